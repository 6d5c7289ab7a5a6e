"""Calls every stage on a GPU with small inputs of many kinds, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --kernel-name kns=rrattn python -m tools.gpu_calls --path portable-99KB
    compute-sanitizer --tool racecheck --kernel-name kns=rrattn python -m tools.gpu_calls --head-dim 64

Needs torch, a GPU and rrattn.direct built for it. Each array has memory of its own, and workspaces have the size that a
call asks for, so that an access beyond the end of one is seen. What the results must be, the tests say.
"""

from __future__ import annotations

import argparse
import itertools
import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from rrattn import direct
from rrattn.config import RRAttentionConfig

from .bench.gpu_attend import Pipeline, empty
from .bench.gpu_backward import backward
from .bench.gpu_inputs import pack

STAGES = ("estimate+select", "attend", "backward")
# queries, keys, query heads, key heads, bounds of FlashMask or 0
SHAPES = [(129, 1000, 2, 1, 0), (450, 700, 4, 2, 2), (300, 300, 8, 2, 1)]
HEAD_DIMS_V = {64: 64, 128: 128, 256: 256, 192: 128}  # head size of queries and keys: that of values
SETTINGS = [RRAttentionConfig(), RRAttentionConfig(stride=16, key_stride=1, compensate=True)]


def random_bounds(bounds, seqlen_q, seqlen_k):
    """startend_row_indices [1, 1, Lk, bounds] of a causal mask: rows from one on, or between two, see a key not."""
    first = torch.randint(1, seqlen_q + 1, (1, 1, seqlen_k, 1), device="cuda", dtype=torch.int32)
    return first if bounds == 1 else torch.cat([first, (first + 40).clamp(max=seqlen_q)], dim=-1)


def run(stages, shape, head_dim, dtype):
    """The calls of one shape; their number."""
    seqlen_q, seqlen_k, heads, heads_k, bounds = shape
    sizes = (seqlen_q, heads, head_dim), (seqlen_k, heads_k, head_dim), (seqlen_k, heads_k, HEAD_DIMS_V[head_dim])
    inputs = [torch.randn(1, *size, device="cuda", dtype=dtype) for size in sizes]
    startend = random_bounds(bounds, seqlen_q, seqlen_k) if bounds else None
    pipeline = Pipeline(*inputs, startend)
    blocks = -(-seqlen_q // 128), -(-seqlen_k // 128)
    words = pack(torch.rand(1, heads, *blocks, device="cuda") < 0.6)
    scores, selected = empty(torch.float32, 1, heads, *blocks), empty(torch.int32, *words.shape)
    calls = []
    for settings in SETTINGS:
        estimate, select, _ = pipeline.stages(scores, selected, settings)
        calls += [estimate, select] if "estimate+select" in stages else []
        attend = pipeline.attend(words)
        if "attend" in stages:
            calls.append(lambda attend=attend, c=settings.compensate, **options: attend(compensate=c, **options))
    if "backward" in stages:
        grad_out, grads = torch.randn_like(pipeline.out), tuple(map(torch.empty_like, inputs))
        calls += [backward(pipeline, words, grad_out, grads, deterministic) for deterministic in (False, True)]
    for call in calls:
        pipeline.workspace = empty(torch.uint8, 0)  # so that each has its own, of its size
        pipeline.with_workspace([call])[0]()
    torch.cuda.synchronize()
    return len(calls)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=direct.available_gpu_paths(), default="auto", help="which kernels run")
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be given several times; default: all")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS_V, action="append", help="as --stage")
    arguments = parser.parse_args()
    direct.set_gpu_path(arguments.path)
    torch.manual_seed(0)
    kinds = itertools.product(SHAPES, arguments.head_dim or HEAD_DIMS_V, (torch.bfloat16, torch.float16))
    count = sum(run(arguments.stage or STAGES, *kind) for kind in kinds)
    print(f"{count} calls on {direct.gpu_kernels()}")


if __name__ == "__main__":
    main()
