"""Speed and memory of the CPU kernels, beside Paddle's dense attention and against the targets below.

    python -m tools.bench.cpu                 the table: stage | ms | GFLOP/s | cores | ratio
    python -m tools.bench.cpu --memory        peak memory over inputs and outputs as well
    python -m tools.bench.cpu --check --json results.json

L = 16,384 tokens, 8 query heads over 2 key heads, D = 64, causal, sample stride 8, 2 threads. Every row runs once to
warm up and then once in each of several rounds, so that rows share whatever else the machine does; times are medians.

GFLOP/s count the token pairs that causality and the selected blocks leave, 4 D flops a pair forward and 10 D backward,
for Paddle as for rrattn. `cores` is CPU time over wall time: below 2, something else was using the machine, or the row
does not spread over both threads. Paddle's attention computes one head group a call, since on the CPU it holds three
L x L matrices a head: 13 GB in two calls of four heads, where one call of eight would take 26.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

THREADS = 2
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(THREADS)  # read by Paddle's libraries as they load
os.environ["MKL_DYNAMIC"] = "FALSE"  # or MKL uses one thread when the machine is busy

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from rrattn import BLOCK_SIZE, block_density, direct, rr_attention  # noqa: E402
from rrattn.command_line import check_at_least, check_output_file  # noqa: E402

# Row, what it is compared with, the bound on row time / compared time.
SPEED_TARGETS = [
    ("attend, all blocks", "paddle sdpa", 1.0),
    ("attend, 25%", "attend, all blocks", 1 / 3.5),
    ("estimate + select", "attend, all blocks", 0.03),
    ("backward, 25%", "backward, all blocks", 1 / 3.0),
]
MEMORY_TOKENS = 32768
MEMORY_TARGET_MB = 200

TOKENS = 16384
NUM_HEADS, NUM_HEADS_K, HEAD_DIM = 8, 2, 64
STRIDE, THRESHOLD = 8, 0.95
DENSITY = 0.25


@dataclass
class Row:
    """One line of the table. `compared` is the row whose time its own is shown against."""

    name: str
    run: object
    flops: float | None = None
    compared: str | None = None


class Problem:
    """Random inputs, room for every output, and the stages on them through rrattn.direct.

    Outputs start as ones, since zeros would take no memory before they are written.
    """

    def __init__(self, tokens, dtype, density=1.0):
        rng = np.random.default_rng(0)
        self.tokens, self.dtype = tokens, dtype
        self.options = {"causal": True, "num_threads": THREADS, "dtype": dtype}

        def normal(heads):
            x = rng.standard_normal((1, tokens, heads, HEAD_DIM), np.float32)
            return as_bfloat16(x) if dtype == "bfloat16" else x

        self.query, self.key, self.value = normal(NUM_HEADS), normal(NUM_HEADS_K), normal(NUM_HEADS_K)
        self.grad_out = normal(NUM_HEADS)
        self.out, *self.grads = (np.ones_like(x) for x in (self.query, self.query, self.key, self.value))
        self.lse = np.ones((1, NUM_HEADS, tokens), np.float32)
        blocks = tokens // BLOCK_SIZE
        self.block_scores = np.ones((1, NUM_HEADS, blocks, blocks), np.float32)
        self.selected = np.ones((1, NUM_HEADS, blocks, -(-blocks // 32)), np.int32)
        self.given, self.pairs = random_block_mask(rng, tokens, density)
        self.inputs = self.query, self.key, self.value, self.given

    def estimate(self):
        direct.estimate_block_scores(self.query, self.key, self.block_scores, stride=STRIDE, **self.options)

    def select(self):
        lengths = {"seqlen_q": self.tokens, "seqlen_k": self.tokens}
        options = {"threshold": THRESHOLD, "causal": True, "num_threads": THREADS, **lengths}
        direct.select_blocks(self.block_scores, self.selected, **options)

    def estimate_and_select(self):
        self.estimate()
        self.select()

    def attend(self):
        direct.block_sparse_attention(*self.inputs, self.out, self.lse, **self.options)

    def backward(self):
        direct.block_sparse_attention_backward(
            *self.inputs, self.out, self.lse, self.grad_out, *self.grads, **self.options
        )

    @property
    def attend_flops(self):
        return 4 * HEAD_DIM * self.pairs

    @property
    def backward_flops(self):
        return 10 * HEAD_DIM * self.pairs

    @property
    def estimate_flops(self):
        """Every visible pair of strides, one multiplication and one addition per element."""
        strides = self.tokens // STRIDE
        return 2 * HEAD_DIM * NUM_HEADS * strides * (strides + 1) // 2


def as_bfloat16(x):
    """float32 to the bits of bfloat16."""
    return paddle.to_tensor(x).astype("bfloat16").numpy()


def random_block_mask(rng, tokens, density):
    """Every head has its diagonal blocks and random causal ones, `density` of the visible blocks in all.

    Returns the packed mask [1, Hq, M, ceil(M / 32)] and the number of token pairs in its blocks.
    """
    blocks = tokens // BLOCK_SIZE
    below_row, below_column = np.tril_indices(blocks, -1)
    wanted = max(0, round(density * (len(below_row) + blocks)) - blocks)
    mask = np.zeros((1, NUM_HEADS, blocks, -(-blocks // 32) * 32), bool)
    mask[..., np.arange(blocks), np.arange(blocks)] = True
    for head in range(NUM_HEADS):
        chosen = rng.choice(len(below_row), wanted, replace=False)
        mask[0, head, below_row[chosen], below_column[chosen]] = True
    pairs = NUM_HEADS * (wanted * BLOCK_SIZE**2 + blocks * (BLOCK_SIZE * (BLOCK_SIZE + 1) // 2))
    return np.packbits(mask, axis=-1, bitorder="little").view(np.int32), pairs


def paddle_attention(problem):
    """A function that runs Paddle's dense attention on the problem's inputs, one call for each key head."""
    group = NUM_HEADS // NUM_HEADS_K
    calls = []
    for h in range(NUM_HEADS_K):
        heads = (
            problem.query[:, :, h * group : (h + 1) * group],
            problem.key[:, :, [h]],
            problem.value[:, :, [h]],
        )
        calls.append([paddle.to_tensor(np.ascontiguousarray(x)) for x in heads])

    def run():
        with paddle.no_grad():
            for query, key, value in calls:
                paddle.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return run


def make_rows(tokens, with_paddle):
    """Every row of the table. The attention of a problem comes before its backward, which reads its output."""
    rows = []
    for dtype, suffix in (("float32", ""), ("bfloat16", ", bf16")):
        dense, sparse = Problem(tokens, dtype), Problem(tokens, dtype, DENSITY)
        attend, backward = "attend, all blocks", "backward, all blocks"
        if with_paddle and dtype == "float32":
            rows.append(Row("paddle sdpa", paddle_attention(dense), dense.attend_flops))
        compared = "paddle sdpa" if rows and dtype == "float32" else attend if suffix else None
        rows += [
            Row(attend + suffix, dense.attend, dense.attend_flops, compared),
            Row(f"attend, 25%{suffix}", sparse.attend, sparse.attend_flops, attend + suffix),
            Row(f"estimate{suffix}", dense.estimate, dense.estimate_flops, attend + suffix),
            Row(f"select{suffix}", dense.select, None, attend + suffix),
            Row(f"estimate + select{suffix}", dense.estimate_and_select, None, attend + suffix),
            Row(backward + suffix, dense.backward, dense.backward_flops, attend + suffix),
            Row(f"backward, 25%{suffix}", sparse.backward, sparse.backward_flops, backward + suffix),
        ]
    return rows, dense


def measure(rows, rounds):
    """{row name: (median milliseconds, median cores)}, the rows taking turns."""
    samples = {row.name: [] for row in rows}
    for turn in range(rounds + 1):
        for row in rows:
            print(f"\rround {turn} of {rounds}: {row.name:<30}", end="", file=sys.stderr, flush=True)
            time.sleep(0.3)  # the OpenMP threads of the row before spin for up to 0.2 s
            wall, cpu = time.perf_counter(), time.process_time()
            row.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn > 0:  # the first round warms up
                samples[row.name].append((wall * 1e3, cpu / wall))
    print(f"\r{'':<60}\r", end="", file=sys.stderr)
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in samples.items()}


def time_stages(arguments):
    """Prints the table and returns it as {row name: figures}."""
    rows, dense = make_rows(arguments.tokens, not arguments.no_paddle)
    times = measure(rows, arguments.rounds)
    selected = block_density(
        paddle.to_tensor(dense.selected), causal=True, seqlen_q=arguments.tokens, seqlen_k=arguments.tokens
    )
    print(f"select at threshold {THRESHOLD} keeps {float(selected.mean()):.1%} of the visible blocks\n")
    print(f"{'stage':<28}| {'ms':>9} | {'GFLOP/s':>7} | {'cores':>5} | ratio")
    table = {}
    for row in rows:
        ms, cores = times[row.name]
        figures = {"ms": ms, "cores": cores}
        speed = ratio = ""
        if row.flops is not None:
            figures["gflops"] = row.flops / ms / 1e6
            speed = f"{figures['gflops']:.1f}"
        if row.compared is not None:
            figures["ratio"], figures["compared"] = ms / times[row.compared][0], row.compared
            ratio = f"{figures['ratio']:.1%} of {row.compared}"
        print(f"{row.name:<28}| {ms:>9.1f} | {speed:>7} | {cores:>5.2f} | {ratio}")
        table[row.name] = figures
    return table


# Memory. Each stage runs in a process of its own, since what a process has touched once stays in its peak.


def paddle_step(tokens):
    """(run, bytes of what it returns): forward and backward of the Paddle op, as a training step has them."""
    shapes = [(1, tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_HEADS_K, NUM_HEADS_K, NUM_HEADS)]
    query, key, value, grad_out = (paddle.randn(shape) for shape in shapes)
    for x in (query, key, value):
        x.stop_gradient = False

    def run():
        out, lse, mask = rr_attention(
            query, key, value, causal=True, stride=STRIDE, return_softmax_lse=True, return_block_mask=True
        )
        return out, lse, mask, *paddle.grad(out, [query, key, value], grad_out)

    blocks = tokens // BLOCK_SIZE
    elements = (2 * NUM_HEADS + 2 * NUM_HEADS_K) * tokens * HEAD_DIM  # out and three gradients
    elements += NUM_HEADS * tokens + NUM_HEADS * blocks * -(-blocks // 32)  # lse and block mask
    return run, 4 * elements


def prepare_stage(name, tokens):
    """(run, bytes of what it returns) with every input, and every output that the caller provides, in memory."""
    if name == "rr_attention, both ways":
        return paddle_step(tokens)
    problem = Problem(tokens, "float32", DENSITY if name.endswith("25%") else 1.0)
    if name.startswith("backward"):
        problem.attend()
    stages = {
        "estimate": problem.estimate,
        "select": problem.select,
        "attend": problem.attend,
        "backward": problem.backward,
    }
    return stages[name.split(",")[0]], 0


MEMORY_STAGES = (
    "estimate",
    "select",
    "attend, all blocks",
    "attend, 25%",
    "backward, all blocks",
    "backward, 25%",
    "rr_attention, both ways",
)


def resident_bytes(field):
    """A figure of /proc/self/status: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_bytes(name, tokens):
    """What a stage takes at its peak beyond its inputs and outputs, in this process."""
    warm_up, _ = prepare_stage(name, 8 * BLOCK_SIZE)
    warm_up()  # libraries, thread stacks
    run, returned = prepare_stage(name, tokens)
    ctypes.CDLL(None).malloc_trim(0)  # or the stage could reuse what its preparation has freed
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # the peak starts again from here
    before = resident_bytes("VmRSS")
    results = run()  # held, so that what is returned is counted whole, and subtracted whole
    peak = resident_bytes("VmHWM")
    del results
    return peak - before - returned


def measure_memory(tokens):
    """Prints what each stage takes over its inputs and outputs, and returns {stage: MB}."""
    print(f"\n{'memory over inputs and outputs':<32}| MB at {tokens // 2:>6} tokens | MB at {tokens:>6} tokens")
    table = {}
    for name in MEMORY_STAGES:
        sizes = []
        for length in (tokens // 2, tokens):
            command = [sys.executable, "-m", __spec__.name, "--stage", name, "--tokens", str(length)]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode != 0:
                raise RuntimeError(f"{name} at {length} tokens failed:\n{process.stderr}")
            sizes.append(int(process.stdout.split()[-1]) / 1e6)
        print(f"{name:<32}| {sizes[0]:>19.1f} | {sizes[1]:>19.1f}")
        table[name] = sizes[1]
    return table


def check_targets(table, memory):
    """Prints each target that was measured and returns whether all of them were reached."""
    results = []
    for name, compared, bound in SPEED_TARGETS:
        if name in table and compared in table:
            ratio = table[name]["ms"] / table[compared]["ms"]
            text = f"{name} in {ratio:.1%} of the time of {compared}, at most {bound:.1%}"
            results.append((ratio <= bound, text))
    if memory:
        name, size = max(memory.items(), key=lambda item: item[1])
        text = f"{name} takes {size:.1f} MB over inputs and outputs, less than {MEMORY_TARGET_MB}"
        results.append((size < MEMORY_TARGET_MB, text))
    print()
    for reached, text in results:
        print(f"{'reached' if reached else 'MISSED '} {text}")
    return all(reached for reached, _ in results)


def describe_machine():
    with open("/proc/cpuinfo") as cpuinfo:
        names = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "simd": direct.simd(),
        "threads": THREADS,
        "paddle": paddle.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "command": " ".join(["python", "-m", __spec__.name, *sys.argv[1:]]),
    }


def block_multiple(text):
    tokens = int(text)
    if tokens <= 0 or tokens % (2 * BLOCK_SIZE):
        raise argparse.ArgumentTypeError(f"{tokens} is not a positive multiple of {2 * BLOCK_SIZE}")
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=block_multiple, default=TOKENS, help="length of the timed stages")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row (default: 5)")
    parser.add_argument("--no-paddle", action="store_true", help="leave Paddle's attention out: 13 GB, a minute a run")
    parser.add_argument("--memory", action="store_true", help=f"measure peak memory at {MEMORY_TOKENS} tokens as well")
    parser.add_argument("--check", action="store_true", help="--memory, and exit with 1 when a target is missed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE as well")
    parser.add_argument("--stage", choices=MEMORY_STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check and arguments.no_paddle:
        parser.error("--check compares with Paddle's attention, so it cannot go with --no-paddle")
    check_at_least(parser, arguments, rounds=1)
    if arguments.json:
        check_output_file(parser, "--json", arguments.json)
    if arguments.stage:
        print(peak_bytes(arguments.stage, arguments.tokens))
        return 0
    machine = describe_machine()
    print(f"{machine['cpu']} ({machine['simd']}), {THREADS} threads, paddle {machine['paddle']}")
    print(f"{arguments.tokens} tokens, {NUM_HEADS} heads over {NUM_HEADS_K}, D = {HEAD_DIM}, causal, stride {STRIDE}")
    table = time_stages(arguments)
    memory = measure_memory(MEMORY_TOKENS) if arguments.memory or arguments.check else {}
    reached = check_targets(table, memory)
    if arguments.json:
        with arguments.json.open("w") as file:
            json.dump(
                {
                    "machine": machine,
                    "tokens": arguments.tokens,
                    "rows": table,
                    "memory_tokens": MEMORY_TOKENS,
                    "memory_mb": memory,
                },
                file,
                indent=2,
            )
    return 1 if arguments.check and not reached else 0


if __name__ == "__main__":
    sys.exit(main())
