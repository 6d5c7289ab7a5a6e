"""Times the GPU stages through rrattn.direct, beside other implementations in the same process.

    python -m tools.bench.gpu --stage estimate+select --json tools/bench/results/gpu.json
    python -m tools.bench.gpu --stage attend --tokens 8192 32768 --density 0.5 0.1

    python -m tools.bench.gpu --stage shapes --shape "MQA 32/1" "8 documents"

Needs torch, a Hopper GPU, and rrattn.direct built with the GPU kernels (RRATTN_CUDA_ARCHS=90a, see setup.py). bfloat16,
batch 1, 32 query heads over 8 key heads, D 128, causal, except where shapes and serving say otherwise; random data
except where rr_attention does.

estimate, select, estimate+select
    Medians of replays of a CUDA graph between events, warm, and cuDNN's dense attention. The floor is the larger of two
    times: the stage's products at 766 TFLOP/s (a large GEMM on an H200), its bytes (keys and sampled queries once,
    scores once each way) at 4.2 TB/s.
attend
    Random blocks before the diagonal and all blocks on it, other ones for each head. Rivals: torch's dense attention
    (cuDNN's and FlashAttention's), and block-sparse FlexAttention and FlashAttention-4, where they run, on the same
    blocks; their results must agree with ours. All take turns, in a new order each round, each after a run by itself;
    medians over the rounds.
    TFLOP/s count 4 * 128 * 128 * D operations for each selected block and half of them for one on the diagonal.
backward
    The gradients of attend in both modes, with all they need besides (the transposed mask, dO * O). Rivals: the
    backward passes of cuDNN's dense attention and of block-sparse FlexAttention and FlashAttention-4, whose lists of
    blocks are made beforehand; their gradients must agree with ours. TFLOP/s count 2.5 times attend's operations.
rr_attention
    Estimate, select and attend in a row, with the settings of gpu_attend.RR_ATTENTION_SETTINGS, on queries and keys
    with structure (gpu_inputs.structured) and on random ones, and cuDNN's dense attention in turns. TFLOP/s count
    the attended blocks as above over the time of all three stages.
quantized
    attend in eight bits, and rr_attention with it at about half of the blocks, of random data: in turns with the same
    in 16 bits, from which its result must not be far, cuDNN's dense attention, and beside attend FlashAttention-4 on
    the same blocks, where it runs. TFLOP/s as of attend.
shapes
    attend and backward of what shapes.SHAPES lists: other head sizes, numbers of heads and batches, documents by
    FlashMask, a low density. Rivals in turns: both dense attentions of torch and their backward passes, which take
    documents as sequences of their own, and FlashAttention-4 on the same blocks, until compiling it has taken
    gpu_shapes.SECONDS_OF_FA4. TFLOP/s as of attend and backward. A short table comes last.
serving
    rrattn.direct.ragged_attention of what serving.CASES lists, all three stages at about half of the blocks: batches of
    requests of several lengths, one request whose keys lie in pages, and one that is prefilled by chunks. In turns with
    it usual calls: one for each request, captured in one CUDA graph, and each by itself, of which the sum is the ideal;
    and one for each length, with its requests as the batch. Everything is replayed from CUDA graphs, and all results
    must be the same bits. Half a minute; a short table and what was to be reached come last.

Densities are shares of the visible blocks. A run with --json replaces the records of the stages, lengths and shapes
that it measures and keeps the file's others.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from rrattn import direct
from rrattn.command_line import check_output_file

from . import gpu_attend, gpu_backward, gpu_quantized, gpu_serving, gpu_shapes, records, serving, shapes
from .gpu_inputs import HEAD_DIM, NUM_HEADS, NUM_HEADS_K, density_of, normal
from .gpu_rivals import DENSE, elapsed_ms

SAMPLING_STAGES = ("estimate", "select", "estimate+select")
STAGES = (*SAMPLING_STAGES, "attend", "backward", "rr_attention", "quantized", "shapes", "serving")
THRESHOLD = 0.9
# seqlen_q, seqlen_k, stride, key stride
SHAPES = [
    (8192, 8192, 8, 8),
    (32768, 32768, 8, 8),
    *((131072, 131072, 8, key_stride) for key_stride in (8, 4, 2, 1)),
    (131072, 131072, 16, 16),
    (16384, 1 << 20, 8, 8),
]
DENSE_UP_TO = 131072  # keys
GEMM_TFLOPS, COPY_GBS = 766, 4200


def median_ms(call, repeats=20, graph=True):
    call()  # loads the kernels
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    call()
    return statistics.median(elapsed_ms(call) for _ in range(repeats))


class Problem:
    """Random inputs, and the stages on them."""

    def __init__(self, seqlen_q, seqlen_k, stride, key_stride):
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k
        self.sampling = {"stride": stride, "key_stride": key_stride}
        self.query, self.key = normal(seqlen_q, NUM_HEADS), normal(seqlen_k, NUM_HEADS_K)
        blocks = seqlen_q // 128, seqlen_k // 128
        self.scores = torch.empty(1, NUM_HEADS, *blocks, device="cuda")
        self.mask = torch.empty(1, NUM_HEADS, blocks[0], -(-blocks[1] // 32), device="cuda", dtype=torch.int32)
        self.workspace_bytes = {
            "estimate": self.call_estimate(size_only=True),
            "select": self.call_select(size_only=True),
        }
        self.workspace_bytes["estimate+select"] = max(self.workspace_bytes.values())
        self.workspace = torch.empty(self.workspace_bytes["estimate+select"], device="cuda", dtype=torch.uint8)

    def call_estimate(self, **options):
        return direct.estimate_block_scores(
            self.query, self.key, block_scores=self.scores, causal=True, **self.sampling, **options
        )

    def call_select(self, **options):
        given = {"block_mask": self.mask, "causal": True, "seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        return direct.select_blocks(self.scores, THRESHOLD, **given, **options)

    def run(self, stage):
        options = {"workspace": self.workspace, "stream": torch.cuda.current_stream().cuda_stream}
        if stage != "select":
            self.call_estimate(**options)
        if stage != "estimate":
            self.call_select(**options)

    def dense_ms(self):
        """cuDNN's dense attention; K stands in for V."""
        return median_ms(DENSE["cudnn dense"](self.query, self.key, self.key), repeats=5, graph=False)

    def work(self, stage):
        """(floating-point operations, bytes) that the stage cannot do without."""
        pairs = (self.seqlen_k - self.seqlen_q / 2) * self.seqlen_q
        stride, key_stride = self.sampling.values()
        flops = 2 * NUM_HEADS * HEAD_DIM * pairs / stride / key_stride
        score_bytes = 4 * NUM_HEADS * pairs / 128**2
        read_bytes = self.key.numel() * 2 + self.query.numel() * 2 / stride
        return {
            "estimate": (flops, read_bytes + score_bytes),
            "select": (0, score_bytes),
            "estimate+select": (flops, read_bytes + 2 * score_bytes),
        }[stage]


def measure(stage, shape):
    problem = Problem(*shape)
    problem.run("estimate+select")
    ms = median_ms(lambda: problem.run(stage))
    flops, num_bytes = problem.work(stage)
    floor_ms = max(flops / GEMM_TFLOPS / 1e9, num_bytes / COPY_GBS / 1e6)
    dense_ms = problem.dense_ms() if shape[1] <= DENSE_UP_TO else None
    return {
        "stage": stage,
        "seqlen_q": shape[0],
        "seqlen_k": shape[1],
        **problem.sampling,
        "settings": {},
        "density": density_of(problem.mask, *shape[:2]),
        "ms": ms,
        "tflops": flops / ms / 1e9,
        "gbs": num_bytes / ms / 1e6,
        "floor_ms": floor_ms,
        "workspace_bytes": problem.workspace_bytes[stage],
        "baselines": {} if dense_ms is None else {"cudnn dense": dense_ms},
    }


def line(record):
    """One line of text."""
    share = [f"{100 * record['ms'] / dense:.2f}% of dense" for dense in record["baselines"].values()]
    return (
        f"{record['stage']:16}{record['seqlen_q']:9}{record['seqlen_k']:9} S {record['stride']:2} /"
        f" {record['key_stride']:2} |"
        f"{1e3 * record['ms']:9.1f} us |{record['tflops']:6.1f} TFLOP/s |{record['gbs']:6.0f} GB/s | floor"
        f" {1e3 * record['floor_ms']:.1f} us | {''.join(share)}"
    )


def place(record):
    """What a later run replaces."""
    return record["stage"], record["seqlen_q"], record["seqlen_k"], record.get("shape")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be given several times; default: all")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these lengths of keys")
    parser.add_argument("--density", type=float, nargs="+", help="only these densities of attend and backward")
    parser.add_argument("--shape", nargs="+", choices=shapes.SHAPES, metavar="NAME", help="only these of shapes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the records to FILE, beside its others")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    arguments = parser.parse_args()
    arguments.stage = arguments.stage or STAGES
    lengths, densities = what_is_measured(arguments.stage)
    for name, known in (("tokens", lengths), ("density", densities)):
        unknown = [value for value in getattr(arguments, name) or () if value not in known]
        if unknown:
            allowed, stages = ", ".join(map(str, sorted(known))) or "none", ", ".join(arguments.stage)
            parser.error(f"--{name} must be of those that {stages} is measured at ({allowed}), got {unknown}")
    if arguments.shape and "shapes" not in arguments.stage:
        parser.error("--shape is of the stage shapes, which is not among those to be measured")
    if arguments.json:
        check_output_file(parser, "--json", arguments.json)
        try:
            records.stored(arguments.json)
        except ValueError as error:
            parser.error(f"--json {arguments.json} holds no records to add to: {error}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    return arguments


def what_is_measured(stages):
    """({lengths of keys}, {densities}) that there are of these stages."""
    lengths, densities = set(), set()
    if set(stages) & set(SAMPLING_STAGES):
        lengths |= {shape[1] for shape in SHAPES}
    if "attend" in stages:
        lengths |= {seqlen_k for _, seqlen_k in gpu_attend.ATTEND_SHAPES}
        densities |= {density for of_shape in gpu_attend.ATTEND_SHAPES.values() for density in of_shape}
    if "backward" in stages:
        lengths |= set(gpu_backward.TOKENS)
        densities |= set(gpu_backward.DENSITIES)
    if "rr_attention" in stages:
        lengths |= set(gpu_attend.RR_ATTENTION_TOKENS)
    return lengths, densities


def main():
    arguments = parse_arguments()
    torch.manual_seed(0)
    common = {
        "num_heads": NUM_HEADS,
        "num_heads_k": NUM_HEADS_K,
        "head_dim": HEAD_DIM,
        **records.fields_of_run(__spec__.name, arguments.commit),
    }
    print(f"{common['gpu']}, CUDA {common['cuda']}, {NUM_HEADS} heads over {NUM_HEADS_K}, D {HEAD_DIM}, bf16, causal")
    stages = arguments.stage
    reported = []

    def report(record, text):
        print(text, flush=True)
        reported.append({**common, **record})
        if arguments.json:  # each time, so that a run that is cut short leaves what it measured
            records.store(arguments.json, reported, place)

    for shape in SHAPES:
        for stage in SAMPLING_STAGES:
            if stage in stages and (not arguments.tokens or shape[1] in arguments.tokens):
                record = measure(stage, shape)
                report(record, line(record))
    if "attend" in stages:
        for record in gpu_attend.measure_all(arguments.tokens, arguments.density):
            report(record, gpu_attend.line(record))
    if "backward" in stages:
        for record in gpu_backward.measure(arguments.tokens, arguments.density):
            report(record, gpu_backward.line(record))
    if "rr_attention" in stages:
        for record in gpu_attend.measure_all_rr_attention(arguments.tokens):
            report(record, gpu_attend.line(record))
    if "quantized" in stages:
        for record in gpu_quantized.measure():
            report(record, gpu_quantized.line(record))
    if "shapes" in stages:
        measured = []
        for record in gpu_shapes.measure(arguments.shape):
            report(record, shapes.line(record))
            measured.append(record)
        print(*shapes.short_table(measured), sep="\n")
    if "serving" in stages:
        measured = []
        for record in gpu_serving.measure():
            report(record, serving.line(record))
            measured.append(record)
        print(*serving.short_table(measured), sep="\n")


if __name__ == "__main__":
    main()
