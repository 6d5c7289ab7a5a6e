"""One rank of tests/tools/test_scaling.py: what context parallelism holds, in bytes.

    python memory_rank.py FOLDER PORT...

leaves in FOLDER, for each layout and number of groups of heads: `kept` between the passes, `left` when the output is
dropped without a backward pass, and the `peaks` of both passes, all without the rank's own query, key, value and
gradient of the output.
"""

import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from processes import give_groups_their_own_store

import rrattn
from rrattn import sequence_chunks
from rrattn.distributed import LAYOUTS, context_parallel_attention

HEADS, HEADS_K, HEAD_DIM, TOKENS = 8, 4, 64, 8192
MESSAGE_BYTES = {1: 1 << 30, HEADS_K: 1}  # by the groups of heads that they make


def held():
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def peak_of(call):
    """(what it returns, the most that was held during it)."""
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    result = call()
    return result, paddle.base.core.host_memory_stat_peak_value("Allocated", 0)


def measure(layout, group):
    shapes = [[1, TOKENS // group.nranks, heads, HEAD_DIM] for heads in (HEADS, HEADS_K, HEADS_K, HEADS)]
    query, key, value, grad_out = map(paddle.randn, shapes)
    sink = paddle.zeros([HEADS])
    leaves = query, key, value, sink
    for leaf in leaves:
        leaf.stop_gradient = False
    config = rrattn.RRAttentionConfig(threshold=0.5)

    def attend():
        return context_parallel_attention(query, key, value, group=group, layout=layout, config=config, sink=sink)

    before = held()
    out = attend()
    del out
    left = held() - before
    out, forward = peak_of(attend)
    kept = held() - before
    _, backward = peak_of(lambda: paddle.grad([out], leaves, [grad_out]))
    return {"left": left, "kept": kept, "peaks": np.array([forward, backward]) - before}


def main(folder, ports):
    give_groups_their_own_store(ports)
    dist.init_parallel_env()
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo")
    for groups, sequence_chunks.MESSAGE_BYTES in MESSAGE_BYTES.items():
        for layout in LAYOUTS:
            np.savez(folder / f"{layout}-{groups}-{group.rank}.npz", **measure(layout, group))


if __name__ == "__main__":
    main(Path(sys.argv[1]), map(int, sys.argv[2:]))
    os._exit(0)  # Paddle's stores abort in their destructors when another rank is gone before them
