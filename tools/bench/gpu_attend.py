"""The stages attend and rr_attention of gpu.py: shapes, calls, records, and the lines printed for them."""

from __future__ import annotations

import torch

from rrattn import direct
from rrattn.config import RRAttentionConfig

from .gpu_inputs import (
    NUM_HEADS,
    NUM_HEADS_K,
    attend_flops,
    normal,
    pack,
    random_blocks,
    selected_blocks,
    structured,
    visible_blocks,
)
from .gpu_rivals import DENSE, SPARSE, interleaved_ms, make, rivals_ms

# seqlen_q, seqlen_k: densities
ATTEND_SHAPES = {
    (8192, 8192): (1.0, 0.5, 0.25, 0.1),
    (32768, 32768): (1.0, 0.5, 0.25, 0.1),
    (131072, 131072): (1.0, 0.5, 0.25, 0.1),
    (16384, 1 << 20): (0.25, 0.1),
}
RR_ATTENTION_TOKENS = (8192, 32768, 131072)
HALF = {"threshold": 0.5, "min_share": 0}  # of random data about half the blocks
RR_ATTENTION_SETTINGS = {
    "structured": ({}, {"threshold": 0.9}),
    "random": (HALF, {**HALF, "compensate": True}, {**HALF, "key_stride": 1}),
}


def rounds_for(seqlen_k):
    return 5 if seqlen_k <= 32768 else 3


def empty(dtype, *shape):
    return torch.empty(shape, device="cuda", dtype=dtype)


class Pipeline:
    """The stages on given inputs: the attention's results lie in its fields.

    `startend`, int32 [B or 1, Hkv or 1, Lk, bounds], is FlashMask's row indices of attention and its gradients.
    """

    def __init__(self, query, key, value, startend=None):
        self.query, self.key, self.value, self.startend = query, key, value, startend
        self.lengths = {"seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        batch, seqlen_q, heads, _ = query.shape
        self.out = empty(query.dtype, batch, seqlen_q, heads, value.shape[3])
        self.lse = empty(torch.float32, batch, heads, seqlen_q)
        self.workspace = empty(torch.uint8, 0)

    def with_workspace(self, stages):
        """(stages as one call, bytes of the workspace that they share)."""
        num_bytes = max(stage(size_only=True) for stage in stages)
        if num_bytes > self.workspace.numel():
            self.workspace = empty(torch.uint8, num_bytes)
        workspace = self.workspace

        def call():
            for stage in stages:
                stage(workspace=workspace, stream=torch.cuda.current_stream().cuda_stream)

        return call, num_bytes

    def attend(self, block_mask):
        arrays = self.query, self.key, self.value, block_mask, self.startend
        outputs = {"out": self.out, "lse": self.lse}
        return lambda **options: direct.block_sparse_attention(*arrays, **outputs, causal=True, **options)

    def stages(self, scores, block_mask, config):
        """All three with an RRAttentionConfig, through these scores and this block mask."""
        attend = self.attend(block_mask)

        def estimate(**options):
            sampling = {"causal": True, **config.sampling()}
            return direct.estimate_block_scores(self.query, self.key, block_scores=scores, **sampling, **options)

        def select(**options):
            given = {"block_mask": block_mask, "causal": True, **self.lengths, **config.keep_rules()}
            return direct.select_blocks(scores, config.threshold, **given, **options)

        kind = {"compensate": config.compensate, "quantization": config.quantization}
        return [estimate, select, lambda **options: attend(**kind, **options)]


def measure_attend(shape, densities):
    """Records of one shape, all densities and rivals in turns."""
    pipeline = Pipeline(normal(shape[0], NUM_HEADS), *(normal(shape[1], NUM_HEADS_K) for _ in range(2)))
    inputs = pipeline.query, pipeline.key, pipeline.value
    calls = {name: make(name, maker, *inputs) for name, maker in DENSE.items()}
    words, workspace_bytes = {}, {}
    for density in densities:
        mask = random_blocks(*shape, density)
        words[density] = pack(mask)
        ours, workspace_bytes[density] = pipeline.with_workspace([pipeline.attend(words[density])])
        ours()
        for name, maker in SPARSE.items():
            calls[name, density] = make(f"{name}, density {density}", maker, *inputs, mask, expected=pipeline.out)
        calls["ours", density] = ours
    ms = interleaved_ms(calls, rounds_for(shape[1]))
    records = []
    for density in densities:
        num_selected = selected_blocks(words[density])
        rivals = rivals_ms(ms, density, DENSE, SPARSE)
        records.append(
            {
                "stage": "attend",
                **pipeline.lengths,
                "stride": None,
                "density": num_selected / NUM_HEADS / visible_blocks(*shape),
                "ms": ms["ours", density],
                "tflops": attend_flops(num_selected, shape[0]) / ms["ours", density] / 1e9,
                "workspace_bytes": workspace_bytes[density],
                "baselines": rivals,
            }
        )
    return records


def measure_rr_attention(tokens, data):
    """Records of one length and kind of data, all settings and cuDNN's dense attention in turns."""
    if data == "random":
        inputs = normal(tokens, NUM_HEADS), normal(tokens, NUM_HEADS_K), normal(tokens, NUM_HEADS_K)
    else:
        inputs = structured(tokens)
    pipeline, all_settings = Pipeline(*inputs), RR_ATTENTION_SETTINGS[data]
    blocks = tokens // 128
    scores = empty(torch.float32, 1, NUM_HEADS, blocks, blocks)
    calls, masks, workspace_bytes = {}, {}, {}
    for number, settings in enumerate(all_settings):
        masks[number] = empty(torch.int32, 1, NUM_HEADS, blocks, -(-blocks // 32))
        stages = pipeline.stages(scores, masks[number], RRAttentionConfig(**settings))
        calls[number], workspace_bytes[number] = pipeline.with_workspace(stages)
        calls[number]()
    calls["cudnn dense"] = make("cudnn dense", DENSE["cudnn dense"], pipeline.query, pipeline.key, pipeline.value)
    ms = interleaved_ms(calls, rounds_for(tokens))
    records = []
    for number, settings in enumerate(all_settings):
        num_selected = selected_blocks(masks[number])
        records.append(
            {
                "stage": "rr_attention",
                **pipeline.lengths,
                "data": data,
                "settings": settings,
                "density": num_selected / NUM_HEADS / visible_blocks(tokens, tokens),
                "ms": ms[number],
                "tflops": attend_flops(num_selected, tokens) / ms[number] / 1e9,
                "workspace_bytes": workspace_bytes[number],
                "baselines": rivals_ms(ms, number, ["cudnn dense"], []),
            }
        )
    return records


def measure_all(tokens=None, densities=None):
    """Records of attend, shape by shape, for these lengths of keys and densities; default: all."""
    for shape, all_densities in ATTEND_SHAPES.items():
        wanted = [density for density in all_densities if not densities or density in densities]
        if wanted and (not tokens or shape[1] in tokens):
            yield from measure_attend(shape, wanted)


def measure_all_rr_attention(tokens=None):
    """Records of rr_attention, for these lengths; default: all."""
    for length in RR_ATTENTION_TOKENS:
        if not tokens or length in tokens:
            for data in RR_ATTENTION_SETTINGS:
                yield from measure_rr_attention(length, data)


def rivals_text(record):
    """The rivals' times, and how often ours goes into them."""
    return "  ".join(f"{name} {ms:.3f} ({ms / record['ms']:.2f}x)" for name, ms in record["baselines"].items())


def line(record):
    """One line of text."""
    settings = f"{record['data']} {record['settings'] or 'defaults'} " if "settings" in record else ""
    return (
        f"{record['stage']:16}{record['seqlen_q']:9}{record['seqlen_k']:9} {settings}density {record['density']:.3f} |"
        f"{record['ms']:9.3f} ms |{record['tflops']:5.0f} TFLOP/s | {rivals_text(record)}"
    )
