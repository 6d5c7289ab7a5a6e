"""Times the kernels for any GPU from Ampere on beside torch's FlashAttention-2, which has the same instructions.

    python -m tools.bench.gpu_portable --json tools/bench/results/gpu_portable.json
    python -m tools.bench.gpu_portable --path portable-99KB --stage attend

Needs torch, a GPU and rrattn.direct built for it; on Hopper a build with RRATTN_CUDA_ARCHS="90 90a", where --path has
it run these kernels. bfloat16, batch 1, causal, random data: random blocks before the diagonal and all blocks on it.
All calls of a shape take turns, as in tools.bench.gpu.

attend, backward
    The share is FlashAttention-2's dense time x the share of the blocks over ours: at 1 a block takes as long as there.
estimate+select
    With the defaults. The share is our time over FlashAttention-2's dense forward.
rr_attention
    Estimate, select and attend at about half of the blocks. The share is FlashAttention-2's dense time over ours.

A run with --json replaces the records of the kernels and stages that it measures and keeps the file's others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rrattn import direct
from rrattn.command_line import check_output_file
from rrattn.config import RRAttentionConfig

from . import records
from .gpu_attend import HALF, Pipeline, empty, rounds_for
from .gpu_backward import backward
from .gpu_inputs import density_of, normal, pack, random_blocks
from .gpu_rivals import DENSE, backward_of, interleaved_ms, make

FLASH = "flash dense"
HEADS = {64: (32, 8), 128: (32, 8), 256: (16, 4)}  # head size: query heads, key heads
DENSITIES = (1.0, 0.5, 0.25)
# (head size, tokens): densities
BLOCK_SPARSE_SHAPES = {
    "attend": {
        **{(head_dim, tokens): DENSITIES for head_dim in (128, 64) for tokens in (32768, 131072)},
        (256, 16384): (0.5,),
    },
    "backward": {
        **{(head_dim, tokens): DENSITIES for head_dim in (128, 64) for tokens in (16384, 32768)},
        (256, 16384): (0.5,),
    },
}
WHOLE_SHAPES = [(head_dim, tokens) for head_dim in (128, 64) for tokens in (32768, 131072)]
STAGES = (*BLOCK_SPARSE_SHAPES, "estimate+select", "rr_attention")


def random_pipeline(head_dim, tokens):
    """The stages on random inputs."""
    num_heads, num_heads_k = HEADS[head_dim]
    return Pipeline(*(normal(tokens, heads, head_dim) for heads in (num_heads, num_heads_k, num_heads_k)))


def measure_block_sparse(stage, head_dim, tokens, densities):
    pipeline = random_pipeline(head_dim, tokens)
    inputs = pipeline.query, pipeline.key, pipeline.value
    words = {density: pack(random_blocks(tokens, tokens, density, pipeline.query.shape[2])) for density in densities}
    if stage == "attend":
        calls = {FLASH: make(FLASH, DENSE[FLASH], *inputs)}
        stages = {density: pipeline.attend(words[density]) for density in densities}
    else:
        grad_out, grads = torch.randn_like(pipeline.query), tuple(torch.empty_like(x) for x in inputs)
        calls = {FLASH: make(FLASH, backward_of(DENSE[FLASH]), *inputs, grad_out)}
        stages = {
            density: backward(pipeline, words[density], grad_out, grads, deterministic=False) for density in densities
        }
    calls.update({density: pipeline.with_workspace([stages[density]])[0] for density in densities})
    ms = interleaved_ms(calls, rounds_for(tokens))
    for density in densities:
        selected = density_of(words[density], tokens, tokens)
        yield {"stage": stage, "density": selected, "ms": ms[density], "share": ms[FLASH] * selected / ms[density]}, ms


def measure_whole(stages, head_dim, tokens):
    pipeline = random_pipeline(head_dim, tokens)
    heads, blocks = pipeline.query.shape[2], tokens // 128
    scores = empty(torch.float32, 1, heads, blocks, blocks)
    mask = empty(torch.int32, 1, heads, blocks, -(-blocks // 32))
    estimate_and_select = pipeline.stages(scores, mask, RRAttentionConfig())[:2]
    calls = {
        FLASH: make(FLASH, DENSE[FLASH], pipeline.query, pipeline.key, pipeline.value),
        "estimate+select": pipeline.with_workspace(estimate_and_select)[0],
        "rr_attention": pipeline.with_workspace(pipeline.stages(scores, mask, RRAttentionConfig(**HALF)))[0],
    }
    ms = interleaved_ms(calls, rounds_for(tokens))
    for stage in stages:
        calls[stage]()
        ratio = ms[stage] / ms[FLASH]
        share = ratio if stage == "estimate+select" else 1 / ratio
        yield {"stage": stage, "density": density_of(mask, tokens, tokens), "ms": ms[stage], "share": share}, ms


def measure(stages):
    for stage, shapes in BLOCK_SPARSE_SHAPES.items():
        for shape, densities in shapes.items() if stage in stages else ():
            yield from (
                ({**record, **fields_of(*shape)}, ms) for record, ms in measure_block_sparse(stage, *shape, densities)
            )
            torch.cuda.empty_cache()
    whole = [stage for stage in ("estimate+select", "rr_attention") if stage in stages]
    for shape in WHOLE_SHAPES if whole else ():
        yield from (({**record, **fields_of(*shape)}, ms) for record, ms in measure_whole(whole, *shape))
        torch.cuda.empty_cache()


def fields_of(head_dim, tokens):
    num_heads, num_heads_k = HEADS[head_dim]
    return {"head_dim": head_dim, "seqlen_q": tokens, "num_heads": num_heads, "num_heads_k": num_heads_k}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=direct.available_gpu_paths(), default="portable", help="which kernels run")
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be given several times; default: all")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the records to FILE, beside its others")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    arguments = parser.parse_args()
    arguments.stage = arguments.stage or STAGES
    if arguments.json:
        check_output_file(parser, "--json", arguments.json)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    return arguments


def place(record):
    """What a later run replaces."""
    return record["kernels"], record["stage"]


def main():
    arguments = parse_arguments()
    direct.set_gpu_path(arguments.path)
    torch.manual_seed(0)
    common = {"kernels": direct.gpu_kernels(), **records.fields_of_run(__spec__.name, arguments.commit)}
    measured = []
    for record, ms in measure(arguments.stage):
        measured.append({**record, "baselines": {FLASH: ms[FLASH]}, **common})
        print(
            f"{record['stage']:16}{common['kernels']:16} D {record['head_dim']:3}{record['seqlen_q']:8} |"
            f" {100 * record['density']:5.1f}% |{record['ms']:9.3f} ms | FlashAttention-2 {ms[FLASH]:9.3f} ms |"
            f" share {record['share']:.4f}",
            flush=True,
        )
        if arguments.json:
            records.store(arguments.json, measured, place)


if __name__ == "__main__":
    main()
