"""Times attention over a sequence that several GPUs share, beside one GPU's, over rrattn.direct and NCCL.

    torchrun --nproc-per-node 2 -m tools.bench.gpu_context_parallel --json tools/bench/results/gpu_context_parallel.json
    torchrun --nproc-per-node 2 -m tools.bench.gpu_context_parallel --layout dual_chunk --tokens 131072

Needs torch, as many GPUs as processes, and rrattn.direct built with their kernels (RRATTN_CUDA_ARCHS=90a for Hopper,
see setup.py). bfloat16, batch 1, 32 query heads over 8 key heads, D 128, causal. What is sent while what is computed
stands in gpu_ranks.py.

Blocks are those that are selected, about half of random data (gpu_attend.HALF), few of data with structure
(gpu_inputs.structured, with the defaults), or all. Backward is over the same blocks as forward. Of each are measured

- the whole sequence on each GPU by itself, while the others wait, and cuDNN's dense attention on the first;
- the ranks together, and the same with nothing sent, for which each has all keys and values: each GPU with the share of
  its rank, and then with those of the others, so that how GPUs differ does not count as a difference of shares;
- whether each rank selects the blocks that one GPU does, bit for bit, and how far its results are from that one's;
- the most memory that a rank holds, by torch's allocator, which does not see NCCL's buffers, and the most that it is
  to hold: its own tensors and the gathered keys and values of all heads.

All take turns, in a new order each round, each after runs by itself; medians over the rounds, and of ranks together the
slowest's. First of all a short sequence is tried, and a difference from one GPU ends the run. A short table comes last.
A run with --json replaces the records of the passes that it measures and keeps the file's others.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist

from rrattn import direct
from rrattn.command_line import check_output_file
from rrattn.config import BLOCK_SIZE, MAX_SEQLEN_K_ON_GPU, RRAttentionConfig
from rrattn.sequence_chunks import chunks_of_rank

from . import records
from .context_parallel import is_exact, line, short_table
from .gpu_attend import HALF
from .gpu_inputs import HEAD_DIM, NUM_HEADS, NUM_HEADS_K, density_of, normal, selected_blocks, structured
from .gpu_ranks import NoWire, Wire, attend, every_block, gradients, held, share_of_rank, whole_share
from .gpu_rivals import BACKWARD_DENSE, DENSE, elapsed_ms, make, relative_error

LAYOUTS = ("dual_chunk", "contiguous")
TOKENS = (131072, 262144)
TOKENS_TRIED = 16384
ROUNDS, MS_BEFORE, MOST_BEFORE = 3, 100, 20  # a call runs for so long, or so often, before it is timed
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """Data, the settings that select blocks or None for all of them, and the passes to time."""

    data: str
    settings: dict | None
    passes: tuple[str, ...] = PASSES
    rivals: bool = False


CASES = (
    Case("random", HALF, rivals=True),
    Case("random", None, ("forward",)),
    Case("structured", {}),
)
DATA = tuple(dict.fromkeys(case.data for case in CASES))


# Of the ranks


def of_ranks(number):
    """The numbers that the ranks have here."""
    mine = torch.tensor([number], dtype=torch.float64, device="cuda")
    numbers = mine.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(numbers, mine)
    return numbers.tolist()


@dataclass(frozen=True)
class Timed:
    """A call to be timed: on one rank while the others wait, or on all at once."""

    call: Callable
    only: int | None = None

    def ms(self):
        """Milliseconds of each rank that runs it."""
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        mine = math.nan
        if self.only in (None, dist.get_rank()):
            torch.cuda._sleep(4_000_000)  # for about two milliseconds, so that the time to launch is not counted
            if self.only is None:
                dist.all_reduce(torch.zeros(1, device="cuda"))  # the GPUs go on together
            mine = elapsed_ms(self.call)
        return [ms for ms in of_ranks(mine) if not math.isnan(ms)]


def medians(timed):
    """{name: median over the rounds of each rank}, in turns; all ranks go through the same order."""
    times = {name: [] for name in timed}
    before = {name: min(MOST_BEFORE, math.ceil(MS_BEFORE / max(each.ms()))) for name, each in timed.items()}
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name, each in shuffled.sample(list(timed.items()), len(timed)):
            for _ in range(before[name]):
                each.ms()
            times[name].append(each.ms())
    return {name: [statistics.median(of_rank) for of_rank in zip(*rounds)] for name, rounds in times.items()}


# What is measured


def inputs(tokens, data):
    """(query, key, value, grad_out) of the whole sequence, those of the first rank on all."""
    if data == "structured":
        tensors = structured(tokens)
    else:
        tensors = normal(tokens, NUM_HEADS), normal(tokens, NUM_HEADS_K), normal(tokens, NUM_HEADS_K)
    tensors = *tensors, normal(tokens, NUM_HEADS)
    for tensor in tensors:
        dist.broadcast(tensor, 0)
    return tensors


class Sharer:
    """What attends a sequence, or this rank's part of it: a share, its gradient of the output, and what it attended."""

    def __init__(self, share, wire, grad_out, case):
        self.share, self.wire, self.grad_out = share, wire, grad_out
        self.given_masks = every_block(share) if case.settings is None else None
        self.attended = self.forward()

    def forward(self):
        return attend(self.share, self.wire, self.given_masks)

    def backward(self):
        return gradients(self.share, self.wire, self.attended, self.grad_out)

    def results(self, each):
        """{name: tensor} of a pass."""
        if each == "forward":
            return {"out": self.attended.out}
        return dict(zip(("grad_query", "grad_key", "grad_value"), self.backward()))

    def memory(self, each, whole):
        """Bytes of a pass: the peak, and what this rank's own tensors and all keys and values take."""
        share, attended = self.share, self.attended
        own = [share.query, share.key, share.value]  # there before
        made = [share.query]  # of this size the output, and so on
        if each == "backward":
            own += [attended.out, self.grad_out, *attended.lses, *attended.block_masks]
            made += [share.key, share.value]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(self, each)()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before + num_bytes(own)
        return {
            "peak": int(max(of_ranks(peak))),
            "share": int(max(of_ranks(num_bytes([*own, *made, whole.key, whole.value])))),
        }


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def differing_blocks(one, sharer):
    """How many blocks are selected by a rank or by one GPU alone; given masks are all alike."""
    if sharer.given_masks:
        return 0
    (whole,) = one.attended.block_masks
    different = 0
    for chunk, block_mask in zip(sharer.share.chunks, sharer.attended.block_masks):
        rows = whole[:, :, chunk.start // BLOCK_SIZE : (chunk.start + chunk.length) // BLOCK_SIZE]
        words = block_mask.shape[-1]
        different += selected_blocks(rows[..., :words] ^ block_mask) + selected_blocks(rows[..., words:])
    return different


def errors(one, sharer, each):
    """{name: error of a pass's results from one GPU's}, of the rank where it is largest."""
    expected, found = one.results(each), sharer.results(each)
    of_rank = {name: relative_error(found[name], held(expected[name], sharer.share.chunks)) for name in found}
    return {name: torch.tensor(of_ranks(error)).max().item() for name, error in of_rank.items()}  # NaN where one has it


class Problem:
    """A case at a length: the whole sequence, and this rank's share of it in each layout."""

    def __init__(self, tokens, case, layouts):
        self.tokens, self.case = tokens, case
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        *tensors, grad_out = inputs(tokens, case.data)
        whole = whole_share(*tensors, RRAttentionConfig(**(case.settings or {})))
        self.one = Sharer(whole, NoWire(), grad_out, case)
        self.of_layout = {}
        for layout in layouts:
            share = share_of_rank(whole, layout, self.ranks, self.rank)
            self.of_layout[layout] = Sharer(share, Wire(layout, self.ranks), held(grad_out, share.chunks), case)

    @cached_property
    def with_nothing_sent(self):
        """{layout: the share of each rank, with all keys and values}, on every rank: made when it is to be timed."""
        one, wire = self.one, NoWire()

        def of_rank(layout, rank):
            share = share_of_rank(one.share, layout, self.ranks, rank)
            with_all_keys = replace(share, key=one.share.key, value=one.share.value)
            return Sharer(with_all_keys, wire, held(one.grad_out, share.chunks), self.case)

        return {layout: [of_rank(layout, rank) for rank in range(self.ranks)] for layout in self.of_layout}

    def comparison(self, layout, each):
        """What of a record says whether results are one GPU's."""
        sharer = self.of_layout[layout]
        return {
            "differing_blocks": int(sum(of_ranks(differing_blocks(self.one, sharer)))),
            "errors": errors(self.one, sharer, each),
        }

    def dense(self, each):
        """cuDNN's dense attention on the first rank, or nothing, on all ranks, where it does not run."""
        share = self.one.share
        arrays = [share.query, share.key, share.value, *([self.one.grad_out] if each == "backward" else [])]
        maker = (DENSE if each == "forward" else BACKWARD_DENSE)["cudnn dense"]
        call = make("cudnn dense", maker, *arrays) if dist.get_rank() == 0 else None
        return {"cudnn dense": Timed(call, only=0)} if of_ranks(call is not None)[0] else {}

    def timed(self, each):
        """{name: what is timed} of a pass."""
        one = self.one
        calls = {("one GPU", rank): Timed(getattr(one, each), only=rank) for rank in range(self.ranks)}
        for layout, sharer in self.of_layout.items():
            calls["ranks", layout] = Timed(getattr(sharer, each))
            for turn in range(self.ranks):
                of_rank = self.with_nothing_sent[layout][(self.rank + turn) % self.ranks]
                calls["alone", layout, turn] = Timed(getattr(of_rank, each))
        return {**calls, **(self.dense(each) if self.case.rivals else {})}

    def share_ms(self, ms, layout):
        """Of each rank's share what each GPU takes for it with nothing sent."""
        ranks = range(self.ranks)
        return [[ms["alone", layout, (rank - gpu) % self.ranks][gpu] for gpu in ranks] for rank in ranks]

    def density(self):
        if self.case.settings is None:
            return 1.0
        (block_mask,) = self.one.attended.block_masks
        return density_of(block_mask, self.tokens, self.tokens)


def measure(tokens, case, layouts, wire):
    """Records of a case at a length, all layouts and one GPU in turns; on all ranks."""
    problem = Problem(tokens, case, layouts)
    for each in case.passes:
        ms = medians(problem.timed(each))
        for layout, sharer in problem.of_layout.items():
            yield {
                "stage": "context_parallel",
                "layout": layout,
                "pass": each,
                "data": case.data,
                "blocks": "all" if case.settings is None else "selected",
                "settings": case.settings or {},
                "ranks": problem.ranks,
                "seqlen_q": tokens,
                "seqlen_k": tokens,
                "density": problem.density(),
                "head_groups": len(getattr(sharer.share, f"{each}_groups")),
                "ms": max(ms["ranks", layout]),
                "share_ms": problem.share_ms(ms, layout),
                "one_gpu_ms": [ms["one GPU", rank][0] for rank in range(problem.ranks)],
                **problem.comparison(layout, each),
                "memory": sharer.memory(each, problem.one.share),
                "wire": wire,
                "baselines": {name: ms[name][0] for name in ("cudnn dense",) if name in ms},
            }


def measure_wire(tokens):
    """What it takes by itself to gather keys or values of all heads at once, and to sum up their gradients."""
    ranks = dist.get_world_size()
    whole = normal(tokens, NUM_HEADS_K)
    own = normal(tokens // ranks, NUM_HEADS_K)
    collectives = {
        "gather": partial(dist.all_gather_into_tensor, whole.view(-1), own.view(-1)),
        "sum": partial(dist.reduce_scatter_tensor, own.view(-1), whole.view(-1)),
    }
    ms = medians({name: Timed(call) for name, call in collectives.items()})
    received = num_bytes([whole]) * (ranks - 1) / ranks
    return {
        **{f"{name}_ms": max(ms[name]) for name in collectives},
        **{f"{name}_gbs": received / max(ms[name]) / 1e6 for name in collectives},
    }


def check(cases, layouts):
    """Ends the run where a short sequence is not attended as one GPU does."""
    for case in cases:
        problem = Problem(TOKENS_TRIED, case, layouts)
        for layout in layouts:
            for each in case.passes:
                found = problem.comparison(layout, each)
                if not is_exact(found):
                    raise SystemExit(f"{TOKENS_TRIED} tokens, {case}, {layout}, {each}: not as one GPU does: {found}")


# Command line


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=LAYOUTS, help="only these")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=TOKENS, help="of the whole sequence; default: %(default)s"
    )
    parser.add_argument("--data", choices=DATA, nargs="+", default=DATA, help="only these")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the records to FILE, beside its others")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    arguments = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"start it by torchrun, one process a GPU: torchrun --nproc-per-node 2 -m {__spec__.name}")
    ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks < 2:
        parser.error("one process shares no sequence: at least 2 are needed")
    if torch.cuda.device_count() < here:
        parser.error(f"{here} processes need as many GPUs, and torch sees {torch.cuda.device_count()}")
    step = BLOCK_SIZE * ranks * max(len(chunks_of_rank(layout, ranks, 0)) for layout in arguments.layout)
    for tokens in arguments.tokens:
        if tokens < 1 or tokens % step or tokens > MAX_SEQLEN_K_ON_GPU:
            parser.error(f"--tokens must be multiples of {step} up to {MAX_SEQLEN_K_ON_GPU}, got {tokens}")
    if arguments.json and os.environ["RANK"] == "0":  # which writes it
        check_output_file(parser, "--json", arguments.json)
    return arguments


def place(record):
    """What a later run replaces."""
    return tuple(record[name] for name in ("ranks", "seqlen_q", "layout", "pass", "data", "blocks"))


def main():
    arguments = parse_arguments()
    local_rank, here = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"]
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank), timeout=timedelta(minutes=3))
    is_first = dist.get_rank() == 0
    torch.manual_seed(0)
    common = {
        "num_heads": NUM_HEADS,
        "num_heads_k": NUM_HEADS_K,
        "head_dim": HEAD_DIM,
        "kernels": direct.gpu_kernels(local_rank),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        **records.fields_of_run(__spec__.name, arguments.commit, ("torchrun", "--nproc-per-node", here)),
    }
    cases = [case for case in CASES if case.data in arguments.data]
    check(cases, arguments.layout)
    if is_first:
        where = f"{dist.get_world_size()} {common['gpu']}, CUDA {common['cuda']}, NCCL {common['nccl']}"
        print(f"{where}, kernels {common['kernels']}: {TOKENS_TRIED} tokens are attended as one GPU does", flush=True)
    measured = []
    for tokens in arguments.tokens:
        wire = measure_wire(tokens)
        for case in cases:
            for record in measure(tokens, case, arguments.layout, wire):
                if not is_first:
                    continue
                measured.append({**record, **common})
                print(line(measured[-1]), flush=True)
                if arguments.json:  # each time, so that a run that is cut short leaves what it measured
                    records.store(arguments.json, measured, place)
            torch.cuda.empty_cache()
    if is_first:
        print(*short_table(measured), sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
