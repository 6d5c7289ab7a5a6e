"""Times the GPU stages through rrattn.direct, beside cuDNN's dense attention in the same process.

    python tools/bench/gpu.py --stage estimate+select --json tools/bench/results/h200.json

Needs torch, a Hopper GPU, and rrattn.direct built with the GPU kernels (RRATTN_CUDA_ARCHS=90a, see setup.py). Random
bfloat16 data, batch 1, 32 query heads over 8 key heads, D 128, causal. Times are medians of replays of a CUDA graph
between events, warm. The floor is the larger of two times: the stage's products at 766 TFLOP/s (a large GEMM on an
H200), its bytes (keys and sampled queries once, scores once each way) at 4.2 TB/s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rrattn import direct

STAGES = ("estimate", "select", "estimate+select")
NUM_HEADS, NUM_HEADS_K, HEAD_DIM = 32, 8, 128
THRESHOLD = 0.9
# seqlen_q, seqlen_k, stride
SHAPES = [(8192, 8192, 8), (32768, 32768, 8), (131072, 131072, 8), (131072, 131072, 16), (16384, 1 << 20, 8)]
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
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Problem:
    """Random inputs, and the stages on them."""

    def __init__(self, seqlen_q, seqlen_k, stride):
        def normal(length, heads):
            return torch.randn(1, length, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

        self.seqlen_q, self.seqlen_k, self.stride = seqlen_q, seqlen_k, stride
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
            self.query, self.key, self.scores, causal=True, stride=self.stride, **options
        )

    def call_select(self, **options):
        lengths = {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        return direct.select_blocks(self.scores, self.mask, threshold=THRESHOLD, causal=True, **lengths, **options)

    def run(self, stage):
        options = {"workspace": self.workspace, "stream": torch.cuda.current_stream().cuda_stream}
        if stage != "select":
            self.call_estimate(**options)
        if stage != "estimate":
            self.call_select(**options)

    def dense_ms(self):
        """cuDNN's dense attention; K stands in for V."""
        query, key = self.query.transpose(1, 2), self.key.transpose(1, 2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return median_ms(
                lambda: F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True),
                repeats=5,
                graph=False,
            )

    def work(self, stage):
        """(floating-point operations, bytes) that the stage cannot do without."""
        pairs = (self.seqlen_k - self.seqlen_q / 2) * self.seqlen_q
        flops = 2 * NUM_HEADS * HEAD_DIM * pairs / self.stride**2
        score_bytes = 4 * NUM_HEADS * pairs / 128**2
        read_bytes = self.key.numel() * 2 + self.query.numel() * 2 / self.stride
        return {
            "estimate": (flops, read_bytes + score_bytes),
            "select": (0, score_bytes),
            "estimate+select": (flops, read_bytes + 2 * score_bytes),
        }[stage]


def density(mask, seqlen_q, seqlen_k):
    """Selected over visible blocks."""
    bits = (mask[..., None] >> torch.arange(32, device="cuda", dtype=torch.int32)) & 1
    blocks_q, blocks_k = seqlen_q // 128, seqlen_k // 128
    visible = sum(blocks_k - blocks_q + m + 1 for m in range(blocks_q))
    return bits.sum().item() / (visible * NUM_HEADS)


def measure(stage, shape, machine):
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
        "num_heads": NUM_HEADS,
        "num_heads_k": NUM_HEADS_K,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "stride": shape[2],
        "causal": True,
        "density": density(problem.mask, *shape[:2]),
        "ms": ms,
        "tflops": flops / ms / 1e9,
        "gbs": num_bytes / ms / 1e6,
        "floor_ms": floor_ms,
        "workspace_bytes": problem.workspace_bytes[stage],
        "baselines": {} if dense_ms is None else {"cudnn dense": dense_ms},
        **machine,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be given several times; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the records to FILE")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    arguments = parser.parse_args()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "commit": arguments.commit or revision.stdout.strip(),
        "command": shlex.join(["python", *sys.argv]),
    }
    records = []
    print(f"{machine['gpu']}, CUDA {machine['cuda']}, {NUM_HEADS} heads over {NUM_HEADS_K}, D {HEAD_DIM}, bf16, causal")
    print(
        f"{'stage':16}{'queries':>9}{'keys':>9}{'S':>4}{'us':>10} |{'TFLOP/s':>8} |{'GB/s':>7} |"
        f"{'% of dense':>11}{'floor us':>10}"
    )
    for shape in SHAPES:
        for stage in arguments.stage or STAGES:
            record = measure(stage, shape, machine)
            records.append(record)
            share = [f"{100 * record['ms'] / dense:.2f}" for dense in record["baselines"].values()]
            print(
                f"{stage:16}{shape[0]:9}{shape[1]:9}{shape[2]:4}{1e3 * record['ms']:10.1f} |{record['tflops']:8.1f} |"
                f"{record['gbs']:7.0f} |{''.join(share):>11}{1e3 * record['floor_ms']:10.1f}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(records, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
