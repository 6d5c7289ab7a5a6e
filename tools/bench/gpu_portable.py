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
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from rrattn import direct
from rrattn.command_line import check_output_file
from rrattn.config import RRAttentionConfig

from .gpu_attend import HALF, rounds_for
from .gpu_inputs import pack, random_blocks, selected_blocks, visible_blocks
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


class Problem:
    """Random inputs, outputs, and the stages on them as calls without arguments."""

    def __init__(self, head_dim, tokens):
        self.tokens = tokens
        self.num_heads, num_heads_k = HEADS[head_dim]
        self.query, self.key, self.value = (
            torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
            for heads in (self.num_heads, num_heads_k, num_heads_k)
        )
        self.out = torch.empty_like(self.query)
        self.lse = torch.empty(1, self.num_heads, tokens, device="cuda")
        blocks = tokens // 128
        self.scores = torch.empty(1, self.num_heads, blocks, blocks, device="cuda")
        self.mask = torch.empty(1, self.num_heads, blocks, -(-blocks // 32), device="cuda", dtype=torch.int32)

    @staticmethod
    def call(*stages):
        """The stages in a row, with a workspace that they share."""
        num_bytes = max(stage(size_only=True) for stage in stages)
        workspace = torch.empty(num_bytes, device="cuda", dtype=torch.uint8)

        def run():
            for stage in stages:
                stage(workspace=workspace, stream=torch.cuda.current_stream().cuda_stream)

        return run

    def attend(self, words):
        inputs = self.query, self.key, self.value, words
        return lambda **options: direct.block_sparse_attention(
            *inputs, out=self.out, lse=self.lse, causal=True, **options
        )

    def backward(self, words, grad_out):
        self.call(self.attend(words))()
        inputs = self.query, self.key, self.value, words, self.out.clone(), self.lse.clone(), grad_out
        grads = {f"grad_{name}": torch.empty_like(getattr(self, name)) for name in ("query", "key", "value")}
        return lambda **options: direct.block_sparse_attention_backward(
            *inputs, **grads, causal=True, deterministic=False, **options
        )

    def estimate(self, config):
        return lambda **options: direct.estimate_block_scores(
            self.query, self.key, block_scores=self.scores, causal=True, **config.sampling(), **options
        )

    def select(self, config):
        given = {"block_mask": self.mask, "causal": True, "seqlen_q": self.tokens, "seqlen_k": self.tokens}
        return lambda **options: direct.select_blocks(
            self.scores, config.threshold, **given, **config.keep_rules(), **options
        )

    def density(self, words):
        return selected_blocks(words) / (self.num_heads * visible_blocks(self.tokens, self.tokens))


def measure_block_sparse(stage, head_dim, tokens, densities):
    problem = Problem(head_dim, tokens)
    inputs = problem.query, problem.key, problem.value
    words = {density: pack(random_blocks(tokens, tokens, density, problem.num_heads)) for density in densities}
    if stage == "attend":
        calls = {FLASH: make(FLASH, DENSE[FLASH], *inputs)}
        calls.update({density: problem.call(problem.attend(words[density])) for density in densities})
    else:
        grad_out = torch.randn_like(problem.query)
        calls = {FLASH: make(FLASH, backward_of(DENSE[FLASH]), *inputs, grad_out)}
        calls.update({density: problem.call(problem.backward(words[density], grad_out)) for density in densities})
    ms = interleaved_ms(calls, rounds_for(tokens))
    for density in densities:
        selected = problem.density(words[density])
        yield {"stage": stage, "density": selected, "ms": ms[density], "share": ms[FLASH] * selected / ms[density]}, ms


def measure_whole(stages, head_dim, tokens):
    problem = Problem(head_dim, tokens)
    defaults, half = RRAttentionConfig(), RRAttentionConfig(**HALF)
    calls = {
        FLASH: make(FLASH, DENSE[FLASH], problem.query, problem.key, problem.value),
        "estimate+select": problem.call(problem.estimate(defaults), problem.select(defaults)),
        "rr_attention": problem.call(problem.estimate(half), problem.select(half), problem.attend(problem.mask)),
    }
    ms = interleaved_ms(calls, rounds_for(tokens))
    for stage in stages:
        calls[stage]()
        ratio = ms[stage] / ms[FLASH]
        share = ratio if stage == "estimate+select" else 1 / ratio
        yield {"stage": stage, "density": problem.density(problem.mask), "ms": ms[stage], "share": share}, ms


def measure(stages):
    for stage, shapes in BLOCK_SPARSE_SHAPES.items():
        for shape, densities in shapes.items() if stage in stages else ():
            yield from (
                ({**record, **place(*shape)}, ms) for record, ms in measure_block_sparse(stage, *shape, densities)
            )
            torch.cuda.empty_cache()
    whole = [stage for stage in ("estimate+select", "rr_attention") if stage in stages]
    for shape in WHOLE_SHAPES if whole else ():
        yield from (({**record, **place(*shape)}, ms) for record, ms in measure_whole(whole, *shape))
        torch.cuda.empty_cache()


def place(head_dim, tokens):
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


def merge(before, after):
    """Records before, but for the kernels and stages that are among those after, and those."""
    replaced = {(record["kernels"], record["stage"]) for record in after}
    return [record for record in before if (record["kernels"], record["stage"]) not in replaced] + after


def main():
    arguments = parse_arguments()
    direct.set_gpu_path(arguments.path)
    torch.manual_seed(0)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    common = {
        "kernels": direct.gpu_kernels(),
        "dtype": "bfloat16",
        "causal": True,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "commit": arguments.commit or revision.stdout.strip(),
        "command": shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]]),
    }
    before = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else []
    records = []
    for record, ms in measure(arguments.stage):
        records.append({**record, "baselines": {FLASH: ms[FLASH]}, **common})
        print(
            f"{record['stage']:16}{common['kernels']:16} D {record['head_dim']:3}{record['seqlen_q']:8} |"
            f" {100 * record['density']:5.1f}% |{record['ms']:9.3f} ms | FlashAttention-2 {ms[FLASH]:9.3f} ms |"
            f" share {record['share']:.4f}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(merge(before, records), indent=1) + "\n")


if __name__ == "__main__":
    main()
