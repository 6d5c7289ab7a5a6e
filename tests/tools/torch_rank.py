"""One rank of tests/tools/test_context_parallel_bench.py: tools.bench.gpu_ranks over gloo, on a CPU.

    python torch_rank.py FOLDER

leaves in FOLDER, for each layout and number of groups of heads, the rank's output, gradients and block masks, and
those that one rank alone has for the same tokens: `expected_NAME`. `NAME_nothing_sent` is of a rank that has all keys
and values, `all_blocks` the output over every block.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rrattn import sequence_chunks
from rrattn.config import BLOCK_SIZE, RRAttentionConfig
from tools.bench import gpu_ranks

HEADS, HEADS_K, HEAD_DIM, TOKENS = 4, 2, 32, 5120  # 40 blocks, more than a word of a mask has
LAYOUTS = ("dual_chunk", "contiguous")
MESSAGE_BYTES = {1: 1 << 30, HEADS_K: 1}  # by the groups of heads that they make


def results(share, wire, grad_out):
    """{name: tensor} of both passes."""
    attended = gpu_ranks.attend(share, wire)
    grads = gpu_ranks.gradients(share, wire, attended, grad_out)
    masks = {f"mask_{number}": mask for number, mask in enumerate(attended.block_masks)}
    return {"out": attended.out, **dict(zip(("grad_query", "grad_key", "grad_value"), grads)), **masks}


def measure(layout, groups, whole, grad_out, of_one):
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sequence_chunks.MESSAGE_BYTES = MESSAGE_BYTES[groups]
    share, wire = gpu_ranks.share_of_rank(whole, layout, ranks, rank), gpu_ranks.Wire(layout, ranks)
    assert len(share.forward_groups) == len(share.backward_groups) == groups
    own_grad_out = gpu_ranks.held(grad_out, share.chunks)
    found = results(share, wire, own_grad_out)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        found[f"expected_{name}"] = gpu_ranks.held(of_one[name], share.chunks)
    for number, chunk in enumerate(share.chunks):
        rows = slice(chunk.start // BLOCK_SIZE, (chunk.start + chunk.length) // BLOCK_SIZE)
        found[f"expected_mask_{number}"] = of_one["mask_0"][:, :, rows]
    with_all_keys = replace(share, key=whole.key, value=whole.value)
    silent = results(with_all_keys, gpu_ranks.NoWire(), own_grad_out)
    found.update({f"{name}_nothing_sent": silent[name] for name in ("out", "grad_query")})
    found["all_blocks"] = gpu_ranks.attend(share, wire, gpu_ranks.every_block(share)).out
    dense = gpu_ranks.attend(whole, gpu_ranks.NoWire(), gpu_ranks.every_block(whole)).out
    found["expected_all_blocks"] = gpu_ranks.held(dense, share.chunks)
    return {name: tensor.numpy() for name, tensor in found.items()}


def main(folder):
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same on all ranks
    query, key, value, grad_out = (
        torch.randn(1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, HEADS_K, HEADS_K, HEADS)
    )
    config = RRAttentionConfig(threshold=0.6, min_share=0)
    whole = gpu_ranks.whole_share(query, key, value, config)
    of_one = results(whole, gpu_ranks.NoWire(), grad_out)
    for layout in LAYOUTS:
        for groups in MESSAGE_BYTES:
            found = measure(layout, groups, whole, grad_out, of_one)
            np.savez(folder / f"{layout}-{groups}-{dist.get_rank()}.npz", **found)
    if dist.get_rank() == 0:
        of_one = {name: tensor.numpy() for name, tensor in of_one.items()}
        np.savez(folder / "one.npz", **of_one, query=query.numpy(), key=key.numpy(), value=value.numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
