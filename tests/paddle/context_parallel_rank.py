"""One rank of test_context_parallel.py: a process of its own, which holds a part of each sequence.

    python context_parallel_rank.py FOLDER PORT...

leaves in FOLDER what this rank computed of each case in each layout.
"""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from processes import give_groups_their_own_store

import rrattn
from rrattn import distributed, sequence_chunks
from rrattn.sequence_chunks import chunks_of_rank


def part_of(array, layout, group):
    """This rank's tokens, of axis 1."""
    held = chunks_of_rank(layout, group.nranks, group.rank)
    chunks = np.split(array, len(held) * group.nranks, axis=1)
    return np.concatenate([chunks[i] for i in held], axis=1)


def block_masks_of(attend):
    """(what `attend` returns, the block masks of its calls of attention, one for each group of heads and chunk)."""
    masks = []
    attend_blocks, attend_layer = distributed.block_sparse_attention, rrattn.RRAttention.forward

    def record_blocks(query, key, value, block_mask, *arguments, **options):
        masks.append(block_mask.numpy())
        return attend_blocks(query, key, value, block_mask, *arguments, **options)

    def record_layer(core, *arguments, **options):
        out = attend_layer(core, *arguments, **options)
        masks.append(core.last_selection.block_mask.numpy())
        return out

    distributed.block_sparse_attention, rrattn.RRAttention.forward = record_blocks, record_layer
    try:
        return attend(), masks
    finally:
        distributed.block_sparse_attention, rrattn.RRAttention.forward = attend_blocks, attend_layer


@contextlib.contextmanager
def gathers_counted(count):
    """Appends the size of each tensor that is gathered."""
    gather = dist.stream.all_gather

    def gather_and_count(received, sent, *arguments, **options):
        if isinstance(received, paddle.Tensor):  # gloo's exchanges gather into lists
            count.append(sent.size)
        return gather(received, sent, *arguments, **options)

    dist.stream.all_gather = gather_and_count
    try:
        yield
    finally:
        dist.stream.all_gather = gather


def compute(problem, layout, group):
    """out, gradients and block masks of a problem of test_context_parallel.py."""
    inputs, rows, sink = problem.inputs, problem.rows, problem.sink
    sequence_chunks.MESSAGE_BYTES = problem.message_bytes
    parts = [part_of(x, layout, group) for x in (*inputs.forward, inputs.grad_out)]
    query, key, value, grad_out = (paddle.to_tensor(x).astype(problem.dtype) for x in parts)
    leaves = problem.leaves(query, key, value, sink)

    def attend():
        return distributed.context_parallel_attention(
            query,
            key,
            value,
            rows,
            group=group,
            layout=layout,
            causal=problem.case.causal,
            config=problem.config,
            sink=sink,
        )

    forward, backward = [], []
    with gathers_counted(forward):
        out, masks = block_masks_of(attend)
    with gathers_counted(backward):
        grads = paddle.grad([out], list(leaves.values()), [grad_out])
    results = {f"grad_{name}": grad.astype("float32").numpy() for name, grad in zip(leaves, grads)}
    results.update(gathered_forward=forward, gathered_backward=backward)
    results["out"] = out.astype("float32").numpy()
    num_chunks = 1 if layout == "all_to_all" else len(chunks_of_rank(layout, group.nranks, group.rank))
    of_chunks = [np.concatenate(masks[i::num_chunks], axis=1) for i in range(num_chunks)]
    results.update({f"mask_{i}": mask for i, mask in enumerate(of_chunks)})
    return results


def main(folder, ports):
    give_groups_their_own_store(ports)
    dist.init_parallel_env()
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo")

    from test_context_parallel import PROBLEMS

    for layout in distributed.LAYOUTS:
        for name, problem in PROBLEMS.items():
            np.savez(folder / f"{layout}-{name}-{group.rank}.npz", **compute(problem, layout, group))


if __name__ == "__main__":
    main(Path(sys.argv[1]), map(int, sys.argv[2:]))
    os._exit(0)  # Paddle's stores abort in their destructors when another rank is gone before them
