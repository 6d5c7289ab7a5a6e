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

STAGES = ("estimate+select", "attend", "backward", "ragged")
# queries, keys, query heads, key heads, bounds of FlashMask or 0
SHAPES = [(129, 1000, 2, 1, 0), (450, 700, 4, 2, 2), (300, 300, 8, 2, 1)]
LONG_ROWS = (1500, 32700, 86, 1)  # enough rows and key blocks for some to be taken first, as row_order.cuh does
REQUESTS = [(129, 300), (0, 70), (1, 200), (200, 200)]  # (queries, keys) of a ragged batch
HEAD_DIMS_V = {64: 64, 96: 96, 128: 128, 256: 256, 192: 128}  # head size of queries and keys: that of values
SETTINGS = [RRAttentionConfig(), RRAttentionConfig(stride=16, key_stride=1, compensate=True)]


def random_bounds(bounds, seqlen_q, seqlen_k):
    """startend_row_indices [1, 1, Lk, bounds] of a causal mask: rows from one on, or between two, see a key not."""
    first = torch.randint(1, seqlen_q + 1, (1, 1, seqlen_k, 1), device="cuda", dtype=torch.int32)
    return first if bounds == 1 else torch.cat([first, (first + 40).clamp(max=seqlen_q)], dim=-1)


def random_inputs(shape, head_dim, dtype, density):
    """(query, key, value, block mask [1, Hq, Mq, Mk]) of queries, keys and heads in numbers."""
    seqlen_q, seqlen_k, heads, heads_k = shape
    sizes = (seqlen_q, heads, head_dim), (seqlen_k, heads_k, head_dim), (seqlen_k, heads_k, HEAD_DIMS_V[head_dim])
    inputs = [torch.randn(1, *size, device="cuda", dtype=dtype) for size in sizes]
    return *inputs, torch.rand(1, heads, -(-seqlen_q // 128), -(-seqlen_k // 128), device="cuda") < density


def run(stages, shape, head_dim, dtype):
    """The calls of one shape; their number."""
    *shape, bounds = shape
    *inputs, mask = random_inputs(shape, head_dim, dtype, density=0.6)
    pipeline = Pipeline(*inputs, random_bounds(bounds, *shape[:2]) if bounds else None)
    words = pack(mask)
    scores, selected = empty(torch.float32, *mask.shape), empty(torch.int32, *words.shape)
    calls = []
    for settings in SETTINGS:
        estimate, select, _ = pipeline.stages(scores, selected, settings)
        calls += [estimate, select] if "estimate+select" in stages else []
        attend = pipeline.attend(words)
        if "attend" in stages:
            calls.append(lambda attend=attend, c=settings.compensate, **options: attend(compensate=c, **options))
    if "attend" in stages and direct.gpu_kernels() == "hopper" and head_dim <= 128:
        calls.append(lambda **options: pipeline.attend(words)(quantization="qk_int8_pv_fp8", **options))
    if "backward" in stages:
        grad_out, grads = torch.randn_like(pipeline.out), tuple(map(torch.empty_like, inputs))
        calls += [backward(pipeline, words, grad_out, grads, deterministic) for deterministic in (False, True)]
    for call in calls:
        pipeline.workspace = empty(torch.uint8, 0)  # so that each has its own, of its size
        pipeline.with_workspace([call])[0]()
    torch.cuda.synchronize()
    return len(calls)


def run_long_rows(head_dim, dtype):
    """The calls of attend where few rows have most of the blocks; their number."""
    *inputs, mask = random_inputs(LONG_ROWS, head_dim, dtype, density=0.005)
    mask[:, ::40, -1] = True
    pipeline = Pipeline(*inputs)
    pipeline.with_workspace([pipeline.attend(pack(mask))])[0]()
    torch.cuda.synchronize()
    return 1


def run_ragged(head_dim, dtype):
    """The calls of a ragged batch, its keys in one piece and in pages; their number."""
    tokens, keys = (sum(lengths) for lengths in zip(*REQUESTS))
    heads, heads_k, head_dim_v = 4, 2, HEAD_DIMS_V[head_dim]
    query = torch.randn(tokens, heads, head_dim, device="cuda", dtype=dtype)
    out = empty(dtype, tokens, heads, head_dim_v)
    begins = torch.tensor([0, *itertools.accumulate(q for q, _ in REQUESTS)], device="cuda", dtype=torch.int32)
    seqlens_k = torch.tensor([k for _, k in REQUESTS], device="cuda", dtype=torch.int32)
    page_sizes = (None, 64, 384)
    for page_size in page_sizes:
        tables, rows = None, (keys, heads_k)
        if page_size is not None:
            used = [-(-k // page_size) for _, k in REQUESTS]
            pages = iter(torch.randperm(sum(used)).tolist())
            tables = torch.full((len(REQUESTS), max(used)), -1, dtype=torch.int32)
            for b, count in enumerate(used):
                tables[b, :count] = torch.tensor([next(pages) for _ in range(count)])
            tables, rows = tables.cuda(), (sum(used), heads_k, page_size)
        cache = [torch.randn(*rows, size, device="cuda", dtype=dtype) for size in (head_dim, head_dim_v)]
        arrays = query, *cache, begins, seqlens_k, tables
        options = {"out": out, "threshold": 0.5, "keep_last": torch.zeros(len(REQUESTS), device="cuda") > 0}
        workspace = empty(torch.uint8, direct.ragged_attention(*arrays, **options, size_only=True))
        direct.ragged_attention(*arrays, **options, workspace=workspace)
    torch.cuda.synchronize()
    return len(page_sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=direct.available_gpu_paths(), default="auto", help="which kernels run")
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be given several times; default: all")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS_V, action="append", help="as --stage")
    arguments = parser.parse_args()
    direct.set_gpu_path(arguments.path)
    torch.manual_seed(0)
    stages = arguments.stage or STAGES
    kinds = [*itertools.product(arguments.head_dim or HEAD_DIMS_V, (torch.bfloat16, torch.float16))]
    count = sum(run(stages, shape, *kind) for shape in SHAPES for kind in kinds)
    count += sum(run_long_rows(*kind) for kind in kinds) if "attend" in stages else 0
    count += sum(run_ragged(*kind) for kind in kinds) if "ragged" in stages else 0
    print(f"{count} calls on {direct.gpu_kernels()}")


if __name__ == "__main__":
    main()
