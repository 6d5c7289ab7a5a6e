"""The stage quantized of gpu.py: attention in eight bits beside its own of 16 bits, cuDNN's and FlashAttention-4."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from rrattn.config import RRAttentionConfig

from .gpu_attend import HALF, Pipeline, empty
from .gpu_inputs import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_HEADS_K,
    attend_flops,
    normal,
    pack,
    random_blocks,
    selected_blocks,
    visible_blocks,
)
from .gpu_rivals import DENSE, SPARSE, interleaved_ms, make, rivals_ms

QUANTIZATION = "qk_int8_pv_fp8"
# tokens, head size: densities of attend
ATTEND_SHAPES = {(32768, HEAD_DIM): (1.0, 0.5, 0.25), (131072, HEAD_DIM): (1.0, 0.5, 0.25), (32768, 64): (0.5,)}
RR_ATTENTION_TOKENS = (32768, 131072)
ROUNDS = 3


def inputs_of(tokens, head_dim):
    return normal(tokens, NUM_HEADS, head_dim), *(normal(tokens, NUM_HEADS_K, head_dim) for _ in range(2))


def measured(shape, tokens, head_dim, selected, ms, name):
    """A record; `name` distinguishes the calls in `ms`, which has (bits or rival, name), and cuDNN's."""
    return {
        "stage": "quantized",
        "shape": shape,
        "seqlen_q": tokens,
        "seqlen_k": tokens,
        "head_dim": head_dim,
        "density": selected / NUM_HEADS / visible_blocks(tokens, tokens),
        "ms": ms["eight bits", name],
        "tflops": attend_flops(selected, tokens, head_dim=head_dim) / ms["eight bits", name] / 1e9,
        "baselines": rivals_ms(ms, name, ["cudnn dense"], ["16 bits", "fa4"]),
    }


def measure_attend(tokens, head_dim, densities):
    inputs = inputs_of(tokens, head_dim)
    calls, selected = {"cudnn dense": make("cudnn dense", DENSE["cudnn dense"], *inputs)}, {}
    pipelines = {"16 bits": Pipeline(*inputs), "eight bits": Pipeline(*inputs)}
    for density in densities:
        mask = random_blocks(tokens, tokens, density)
        words = pack(mask)
        selected[density] = selected_blocks(words)
        for bits, pipeline in pipelines.items():
            attend = partial(pipeline.attend(words), quantization=QUANTIZATION if bits == "eight bits" else None)
            calls[bits, density], _ = pipeline.with_workspace([attend])
            calls[bits, density]()
        exact, quantized = (pipeline.out.float() for pipeline in pipelines.values())
        error = (quantized - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        if not error < 0.06:
            raise AssertionError(f"eight bits are {error:.3f} of the result from 16 bits at density {density}")
        label, expected = f"fa4, head size {head_dim}, density {density}", pipelines["16 bits"].out
        calls["fa4", density] = make(label, SPARSE["fa4"], *inputs, mask, expected=expected)
    ms = interleaved_ms(calls, ROUNDS)
    for density in densities:
        yield measured("attend", tokens, head_dim, selected[density], ms, density)


def measure_rr_attention(tokens):
    pipeline, blocks = Pipeline(*inputs_of(tokens, HEAD_DIM)), tokens // 128
    scores = empty(torch.float32, 1, NUM_HEADS, blocks, blocks)
    words = empty(torch.int32, 1, NUM_HEADS, blocks, -(-blocks // 32))
    config = RRAttentionConfig(**HALF)
    calls = {"cudnn dense": make("cudnn dense", DENSE["cudnn dense"], pipeline.query, pipeline.key, pipeline.value)}
    for bits, settings in (("16 bits", config), ("eight bits", replace(config, quantization=QUANTIZATION))):
        calls[bits, None], _ = pipeline.with_workspace(pipeline.stages(scores, words, settings))
        calls[bits, None]()
    ms = interleaved_ms(calls, ROUNDS)
    yield measured("rr_attention", tokens, HEAD_DIM, selected_blocks(words), ms, None)


def measure():
    """Records, one call after the other."""
    for shape, densities in ATTEND_SHAPES.items():
        yield from measure_attend(*shape, densities)
    for tokens in RR_ATTENTION_TOKENS:
        yield from measure_rr_attention(tokens)


def line(record):
    """One line of text."""
    rivals = "  ".join(f"{name} {ms:.3f} ({ms / record['ms']:.2f}x)" for name, ms in record["baselines"].items())
    return (
        f"{record['shape']:13} D {record['head_dim']:3}{record['seqlen_k']:9} density {record['density']:.3f} |"
        f"{record['ms']:9.3f} ms |{record['tflops']:5.0f} TFLOP/s | {rivals}"
    )
