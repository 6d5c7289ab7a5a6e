"""One rank of tests/tools/test_context_parallel_bench.py: tools.bench.gpu_ranks over gloo, on a CPU.

    python torch_rank.py FOLDER

leaves in FOLDER what a rank's attention and gradients are, and which block masks, beside those of the same tokens of a
group of one, for each layout.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rrattn.config import RRAttentionConfig
from tools.bench import gpu_ranks

HEADS, HEADS_K, HEAD_DIM, TOKENS = 4, 2, 32, 3072
LAYOUTS = ("dual_chunk", "contiguous")


def main(folder):
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)  # the same on all ranks
    query, key, value, grad_out = (
        torch.randn(1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, HEADS_K, HEADS_K, HEADS)
    )
    whole = gpu_ranks.whole_share(query, key, value, RRAttentionConfig(threshold=0.6, min_share=0))
    silence = gpu_ranks.NoWire()
    of_one = gpu_ranks.attend(whole, silence)
    grads_of_one = gpu_ranks.gradients(whole, silence, of_one, grad_out)
    for layout in LAYOUTS:
        share, wire = gpu_ranks.share_of_rank(whole, layout, ranks, rank), gpu_ranks.Wire(layout, ranks)
        attended = gpu_ranks.attend(share, wire)
        grads = gpu_ranks.gradients(share, wire, attended, gpu_ranks.held(grad_out, share.chunks))
        found = {"out": attended.out, **dict(zip(("grad_query", "grad_key", "grad_value"), grads))}
        dense = gpu_ranks.attend(share, wire, gpu_ranks.every_block(share)).out
        expected = dict(zip(found, (of_one.out, *grads_of_one)))
        arrays = {name: tensor.numpy() for name, tensor in found.items()}
        for name, tensor in expected.items():
            arrays[f"expected_{name}"] = gpu_ranks.held(tensor, share.chunks).numpy()
        for number, (chunk, block_mask) in enumerate(zip(share.chunks, attended.block_masks)):
            rows = of_one.block_masks[0][:, :, chunk.start // 128 : (chunk.start + chunk.length) // 128]
            arrays[f"mask_{number}"] = block_mask.numpy()
            arrays[f"expected_mask_{number}"] = rows.numpy()
        np.savez(folder / f"{layout}-{rank}.npz", **arrays, dense=dense.numpy())
    np.savez(folder / f"whole-{rank}.npz", query=query.numpy(), key=key.numpy(), value=value.numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
