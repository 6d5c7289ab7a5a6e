"""The stage backward of gpu.py: shapes, calls, records, and the lines printed for them."""

from __future__ import annotations

import torch

from rrattn import direct

from .gpu_attend import Pipeline, rivals_text, rounds_for
from .gpu_inputs import (
    NUM_HEADS,
    NUM_HEADS_K,
    attend_flops,
    normal,
    pack,
    random_blocks,
    selected_blocks,
    visible_blocks,
)
from .gpu_rivals import BACKWARD_DENSE, BACKWARD_SPARSE, interleaved_ms, make, rivals_ms

TOKENS = (8192, 32768, 131072)
DENSITIES = (1.0, 0.5, 0.25)


def backward(pipeline, block_mask, grad_out, grads, deterministic):
    """A forward pass, and the backward pass of it as a stage that takes `workspace`, `stream` and `size_only`."""
    forward, _ = pipeline.with_workspace([pipeline.attend(block_mask)])
    forward()
    arrays = pipeline.query, pipeline.key, pipeline.value, block_mask, pipeline.out.clone(), pipeline.lse.clone()
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), grads))
    return lambda **options: direct.block_sparse_attention_backward(
        *arrays, grad_out, pipeline.startend, **outputs, causal=True, deterministic=deterministic, **options
    )


def measure_one(tokens, densities):
    """Records of one length, all densities, both modes and all rivals in turns."""
    pipeline = Pipeline(normal(tokens, NUM_HEADS), *(normal(tokens, NUM_HEADS_K) for _ in range(2)))
    inputs = pipeline.query, pipeline.key, pipeline.value
    grad_out, grads = torch.randn_like(pipeline.query), tuple(torch.empty_like(x) for x in inputs)
    calls = {name: make(name, maker, *inputs, grad_out) for name, maker in BACKWARD_DENSE.items()}
    words, workspace_bytes = {}, {}
    for density in densities:
        mask = random_blocks(tokens, tokens, density)
        words[density] = pack(mask)
        for deterministic in (True, False):
            stage = backward(pipeline, words[density], grad_out, grads, deterministic)
            place = density, deterministic
            calls["ours", place], workspace_bytes[place] = pipeline.with_workspace([stage])
        calls["ours", place]()
        for name, maker in BACKWARD_SPARSE.items():
            calls[name, density] = make(
                f"{name}, density {density}", maker, *inputs, mask, grad_out, expected=tuple(x.clone() for x in grads)
            )
    ms = interleaved_ms(calls, rounds_for(tokens))
    records = []
    for density in densities:
        num_selected = selected_blocks(words[density])
        rivals = rivals_ms(ms, density, BACKWARD_DENSE, BACKWARD_SPARSE)
        for deterministic in (False, True):
            ours = ms["ours", (density, deterministic)]
            records.append(
                {
                    "stage": "backward",
                    **pipeline.lengths,
                    "stride": None,
                    "deterministic": deterministic,
                    "density": num_selected / NUM_HEADS / visible_blocks(tokens, tokens),
                    "ms": ours,
                    "tflops": 2.5 * attend_flops(num_selected, tokens) / ours / 1e9,
                    "workspace_bytes": workspace_bytes[density, deterministic],
                    "baselines": rivals,
                }
            )
    return records


def measure(tokens=None, densities=None):
    """Records of these lengths and densities; default: all."""
    for length in TOKENS:
        wanted = [density for density in DENSITIES if not densities or density in densities]
        if wanted and (not tokens or length in tokens):
            yield from measure_one(length, wanted)
            torch.cuda.empty_cache()


def line(record):
    """One line of text."""
    mode = ", deterministic" if record["deterministic"] else ""
    return (
        f"{record['stage']:12}{record['seqlen_q']:9} density {record['density']:5.3f}{mode:15} |"
        f"{record['ms']:9.3f} ms |{record['tflops']:5.0f} TFLOP/s | {rivals_text(record)}"
    )
