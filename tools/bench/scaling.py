"""Writes the tables of docs/distributed.md: what context parallelism would take, computed from figures of one GPU.

    python -m tools.bench.scaling                    rewrites the page
    python -m tools.bench.scaling --check            exits with 1 when it does not match the figures
    python -m tools.bench.scaling --infiniband 25    prints the tables for another link

Nothing here was measured on several GPUs. The records in tools/bench/results/gpu.json give the rates of attend and
backward, the time of estimate + select, and the shapes. `Link` gives the speed of the links, and the layouts of
rrattn.distributed say who computes and sends what. Half of the blocks are attended, and the batch is 1.

Kernels and collectives are assumed to take turns, but for those that rrattn.distributed has overlap: values are
gathered while blocks are selected, and while a group of heads is computed the next one's keys and values, and the sums
of the gradients of the one before. What takes longer of the two counts. The slowest rank counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import astuple, dataclass, fields

import numpy as np

from rrattn.distributed import LAYOUTS
from rrattn.sequence_chunks import BACKWARD_GROUPS, FORWARD_GROUPS, chunks_of_rank, head_groups
from tools.pages import ROOT, rewrite, with_sections

BLOCK = 128
DENSITY = 0.5
RANKS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = tuple(1 << power for power in range(17, 23))
PAGE, SECTION = "docs/distributed.md", "simulated"
GPU_KEYS = 1 << 20  # as many as select takes on a GPU
NOT_ON_GPU = " *"


@dataclass(frozen=True)
class Link:
    """What ranks are joined by. Speeds are in GB/s for a GPU and direction."""

    nvlink: float = 450.0
    """Between the GPUs of a host."""
    infiniband: float = 50.0
    """Between hosts: each GPU has an adapter."""
    ranks_per_host: int = 8
    """Ranks of the group that are on one host."""

    def gather_ms(self, whole: float, ranks: int) -> float:
        """All-gather to `whole` bytes, or reduce-scatter of as many.

        They go round in rings: what a host lacks enters it once, through all of its adapters, and goes on by NVLink.
        """
        here = min(ranks, self.ranks_per_host)
        others, other_hosts = 1 - 1 / ranks, 1 - here / ranks
        return max(whole * others / self.nvlink, whole * other_hosts / here / self.infiniband) / 1e6

    def exchange_ms(self, own: float, ranks: int) -> float:
        """All-to-all in which each rank has `own` bytes before and after. It goes by both ways at once."""
        here = min(ranks, self.ranks_per_host)
        return own / ranks * max((here - 1) / self.nvlink, (ranks - here) / self.infiniband) / 1e6


class Measured:
    """What one GPU takes, by the records of tools/bench/results/gpu.json.

    Attributes
    ----------
    heads, heads_k, head_dim : int
        Of queries and of keys, and their size, which is that of values as well.
    itemsize : int
        Bytes of an element.
    """

    def __init__(self, records):
        defaults = [row for row in records if row["stage"] == "estimate+select" and not row["settings"]]
        self.sampling = [row for row in defaults if row["stride"] == row["key_stride"] == 8]
        self.attend = nearest([row for row in records if row["stage"] == "attend"])
        self.backward = nearest([row for row in records if row["stage"] == "backward" and not row["deterministic"]])
        self.rows = [*self.sampling, *self.attend, *self.backward]
        (shape,) = {tuple(row[name] for name in ("num_heads", "num_heads_k", "head_dim", "dtype")) for row in self.rows}
        self.heads, self.heads_k, self.head_dim, dtype = shape
        self.itemsize = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
        terms = np.array([[pairs(row["seqlen_q"], row["seqlen_k"]), row["seqlen_k"], 1] for row in self.sampling])
        ms = np.array([row["ms"] for row in self.sampling])
        # Relative errors count, so that the short calls tell what a call costs and the long ones what a pair does.
        self.ms_of_pair, self.ms_of_key, self.ms_of_call = np.linalg.lstsq(terms / ms[:, None], ms / ms, rcond=None)[0]
        self.estimate_bytes_of_key = max(row["workspace_bytes"] / row["seqlen_k"] for row in self.sampling)

    def sampling_ms(self, queries, keys, ranks=1):
        """Estimate and select of the last `queries` of `keys`, with the heads of one of `ranks` ranks."""
        of_keys = self.ms_of_key * keys * self._share_of_key_heads(ranks)
        return self.ms_of_pair * pairs(queries, keys) / ranks + of_keys + self.ms_of_call

    def attend_ms(self, queries, keys, ranks=1):
        return self._products_ms(self.attend, 4, queries, keys, ranks)

    def backward_ms(self, queries, keys, ranks=1):
        return self._products_ms(self.backward, 2.5 * 4, queries, keys, ranks)

    def _products_ms(self, rows, factor, queries, keys, ranks):
        """Rows of blocks, one by one, at the rate for as many keys as a row sees.

        The block of a row's own positions is attended always, and counts half, as in the records.
        """
        before = np.arange(keys - queries, keys, BLOCK)
        seen = before + BLOCK / 2
        flops = factor * self.head_dim * self.heads / ranks * BLOCK * (DENSITY * before + BLOCK / 2)
        known = [row["seqlen_k"] - row["seqlen_q"] / 2 for row in rows]
        rates = np.interp(np.log(seen), np.log(known), [row["tflops"] for row in rows])
        return float((flops / rates).sum() / 1e9)

    # Bytes

    def query_bytes(self, tokens):
        """Of the query of all heads, or of the output, or of the gradient of either."""
        return tokens * self.heads * self.head_dim * self.itemsize

    def key_bytes(self, tokens):
        """Of the keys of all heads, or of the values, or of the gradient of either."""
        return tokens * self.heads_k * self.head_dim * self.itemsize

    def row_bytes(self, queries, keys, ranks=1):
        """Log-sum-exp and block mask."""
        return self.heads / ranks * (4 * queries + self._mask_bytes_of_head(queries, keys))

    def selecting_bytes(self, queries, keys, ranks=1):
        """Block scores and the estimate's workspace, which is for the keys."""
        scores = 4 * self.heads / ranks * (queries / BLOCK) * (keys / BLOCK)
        return scores + self.estimate_bytes_of_key * keys * self._share_of_key_heads(ranks)

    def differentiating_bytes(self, queries, keys, ranks=1):
        """The workspace of backward: the query's gradient in float32, two numbers a row, the mask by its columns."""
        of_head = queries * (4 * self.head_dim + 8) + self._mask_bytes_of_head(queries, keys)
        return self.heads / ranks * of_head

    def _mask_bytes_of_head(self, queries, keys):
        return 4 * (queries // BLOCK) * -(-keys // (32 * BLOCK))

    def _share_of_key_heads(self, ranks):
        """Of one of `ranks` ranks with as many heads each, at least one of the keys."""
        return max(self.heads_k / ranks, 1) / self.heads_k


def pairs(queries, keys):
    """Queries and keys before them, the last `queries` of `keys` being the queries."""
    return (keys - queries / 2) * queries


def nearest(rows):
    """The record nearest to DENSITY of each shape, in the order of the keys that a query sees on average."""
    shapes = {}
    for row in sorted(rows, key=lambda row: abs(row["density"] - DENSITY), reverse=True):
        shapes[row["seqlen_q"], row["seqlen_k"]] = row
    return sorted(shapes.values(), key=lambda row: row["seqlen_k"] - row["seqlen_q"] / 2)


@dataclass(frozen=True)
class Cost:
    """What a rank takes for the attention of one layer."""

    forward_ms: float
    backward_ms: float
    sent: float
    """Bytes that it sends in both passes; it receives as many."""
    kept: float
    """Bytes that it holds from the forward pass to the backward pass, the output among them."""
    peak: float
    """Bytes that it holds at most."""

    @property
    def ms(self):
        return self.forward_ms + self.backward_ms


def cost(measured, link, layout, tokens, ranks):
    """The most that any of `ranks` ranks takes; None where there are more of them than heads to exchange."""
    if layout == "all_to_all" and measured.heads % ranks:
        return None
    if layout == "all_to_all" or ranks == 1:
        return all_to_all_cost(measured, link, tokens, ranks)
    held = [chunks_of_rank(layout, ranks, rank) for rank in range(ranks)]
    of_ranks = [gathered_cost(measured, link, tokens // (ranks * len(held[0])), chunks, ranks) for chunks in held]
    return Cost(*(max(amounts) for amounts in zip(*map(astuple, of_ranks))))


def gathered_cost(measured, link, length, chunks, ranks):
    """A rank that holds chunks of these numbers, of `length` tokens each, and gathers the keys and values of all."""
    here, whole = length * len(chunks), length * len(chunks) * ranks
    calls = [(length, (number + 1) * length) for number in chunks]  # queries, keys
    query, keys_values = measured.query_bytes(here), 2 * measured.key_bytes(here)
    gathered = 2 * measured.key_bytes(whole)
    gather = link.gather_ms(gathered / 2, ranks)  # of keys, of values, or the sum of either's gradients
    sampling = sum(measured.sampling_ms(*call) for call in calls)
    attend = sum(measured.attend_ms(*call) for call in calls)
    backward = sum(measured.backward_ms(*call) for call in calls)
    kept = 2 * query + keys_values + sum(measured.row_bytes(*call) for call in calls)
    forward_groups, backward_groups = (
        len(head_groups(measured.heads, measured.heads_k, measured.key_bytes(here) // measured.heads_k, most))
        for most in (FORWARD_GROUPS, BACKWARD_GROUPS)
    )
    forward_held = held_forward(measured, calls, gathered, keys_values, forward_groups)
    backward_held = held_backward(measured, calls, gathered, keys_values, backward_groups)
    return Cost(
        forward_ms=(
            gather
            + max(gather, sampling)
            + attend
            # of the groups after the first, whose keys and values are on their way once those before have arrived
            + (forward_groups - 1) * max(2 * gather, sampling + max(gather, attend))
        )
        / forward_groups,
        # The first group's gathers and the last one's sums are waited for.
        backward_ms=4 * gather / backward_groups + max(backward, 4 * gather * (1 - 1 / backward_groups)),
        sent=3 * gathered * (ranks - 1) / ranks,
        kept=kept,
        # Backward with the gradients of the output, the query, the keys and the values.
        peak=kept + max(forward_held, 2 * query + keys_values + backward_held),
    )


def held_forward(measured, calls, gathered, keys_values, groups):
    """Bytes that a rank that gathers holds besides its tensors, the output among them, in `groups` groups of heads."""
    sent = keys_values if groups > 1 else 0  # a copy of the group's, where it is not all
    coming = gathered + sent if groups > 1 else 0  # the next group's
    held = [arriving(measured, calls, gathered, sent)]
    for queries, keys in calls:
        seen = copied_bytes(measured, keys, gathered)
        selecting = measured.selecting_bytes(queries, keys) + seen / 2 + measured.query_bytes(queries)
        attending = seen + 2 * measured.query_bytes(queries)  # with the output
        held.append(gathered + max(sent / 2 + selecting, coming + attending))
    return max(held) / groups


def held_backward(measured, calls, gathered, keys_values, groups):
    """The same in the backward pass, where the gradients are of the rank's tensors too."""
    sent = keys_values if groups > 1 else 0
    coming = gathered + sent if groups > 1 else 0
    sums = gathered + keys_values  # of the gradients of keys and values, of all ranks' and of this one's tokens
    before = sums if groups > 1 else 0  # of the group before, until the first chunk is through
    held, grads = [before + arriving(measured, calls, gathered, sent)], 0
    for queries, keys in calls:
        grads += 2 * measured.key_bytes(keys)
        # The operator gets copies of the query, the output and its gradient, where these are not all of a rank's.
        copies = 3 * measured.query_bytes(queries) if groups > 1 or len(calls) > 1 else 0
        chunk = copies + measured.query_bytes(queries) + measured.differentiating_bytes(queries, keys)
        held.append(gathered + coming + before + grads + copied_bytes(measured, keys, gathered) + chunk)
        before = 0
    held.append(coming + grads + sums)
    return max(held) / groups


def arriving(measured, calls, gathered, sent):
    """Bytes, times the number of groups, while a group's keys are put in order and its values are on their way."""
    in_order = gathered / 2 + measured.key_bytes(calls[0][0])  # chunk by chunk
    return in_order + gathered + sent


def copied_bytes(measured, keys, gathered):
    """The operators get a copy of the keys and of the values that a chunk sees, where these are not all."""
    seen = 2 * measured.key_bytes(keys)
    return seen if seen < gathered else 0


def all_to_all_cost(measured, link, tokens, ranks):
    """A rank that exchanges its part of the tokens for its part of the heads; few key heads are repeated."""
    query = measured.query_bytes(tokens) / ranks
    keys_values = 2 * measured.key_bytes(tokens) / ranks * max(1, ranks / measured.heads_k)
    exchange = link.exchange_ms(query + keys_values, ranks) + link.exchange_ms(query, ranks)
    call = tokens, tokens, ranks
    # With one rank the output is what the kernels wrote.
    kept = (3 if ranks > 1 else 2) * query + keys_values + measured.row_bytes(*call)
    grads = (3 if ranks > 1 else 2) * query + keys_values  # the output's before and after the exchange
    return Cost(
        forward_ms=exchange + measured.sampling_ms(*call) + measured.attend_ms(*call),
        backward_ms=exchange + measured.backward_ms(*call),
        sent=2 * (2 * query + keys_values) * (ranks - 1) / ranks,
        kept=kept,
        peak=kept + max(measured.selecting_bytes(*call), grads + measured.differentiating_bytes(*call)),
    )


def tables(measured, link):
    """Markdown: where the figures come from, times, and bytes."""
    costs = {
        (layout, tokens): [cost(measured, link, layout, tokens, ranks) for ranks in RANKS]
        for tokens in TOKENS
        for layout in LAYOUTS
    }

    def time(one, of_one_rank, ranks):
        share = of_one_rank.ms / ranks / one.ms
        return f"{seconds(one.forward_ms)} + {seconds(one.backward_ms)}, {100 * share:.0f}%"

    def memory(one, *_):
        return f"{gigabytes(one.sent)}, {gigabytes(one.kept)}, {gigabytes(one.peak)}"

    parts = [sources(measured, link)]
    for title, cell in (
        ("Forward and backward pass of one layer, and the efficiency: one GPU's time over ranks times theirs.", time),
        ("GB that a rank sends in both passes, keeps between them, and holds at most.", memory),
    ):
        lines = [
            title,
            "",
            f"| tokens | layout | {' | '.join(map(ranks_text, RANKS))} |",
            "|---" * (len(RANKS) + 2) + "|",
        ]
        for (layout, tokens), of_ranks in costs.items():
            cells = [cell(one, of_ranks[0], ranks) if one else "" for one, ranks in zip(of_ranks, RANKS)]
            too_long = NOT_ON_GPU if tokens > GPU_KEYS else ""
            lines.append(f"| {tokens:,}{too_long} | {layout} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def sources(measured, link):
    """What was measured, where and on what, and the links."""
    one = measured.rows[0]
    off = max(abs(measured.sampling_ms(row["seqlen_q"], row["seqlen_k"]) / row["ms"] - 1) for row in measured.sampling)
    lines = (
        f"**Simulated, not measured on several GPUs**: from figures of one GPU in `tools/bench/results/gpu.json`, for"
        f" batch 1, {one['num_heads']} query heads over {one['num_heads_k']} key heads, head size {one['head_dim']},"
        f" {one['dtype']}, causal, and half of the blocks.",
        "",
        f"- attend ({run_text(measured.attend)}): {rates_text(measured.attend)}",
        f"- backward ({run_text(measured.backward)}): {rates_text(measured.backward)}",
        f"- estimate + select ({run_text(measured.sampling)}), strides of {measured.sampling[0]['stride']}:"
        f" {1e9 * measured.ms_of_pair:.2f} ms for 10^9 pairs of a query and a key before it,"
        f" {1e6 * measured.ms_of_key:.2f} ms for 10^6 keys and {measured.ms_of_call:.3f} ms a call, which is within"
        f" {100 * off:.0f}% of each of {len(measured.sampling)} records",
        f"- links: {link.nvlink:g} GB/s by NVLink for a GPU and direction, between hosts {link.infiniband:g} GB/s by"
        f" InfiniBand for a GPU, {link.ranks_per_host} ranks on a host",
    )
    fill = {"width": 118, "subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return "\n".join([textwrap.fill(lines[0], 118), *(textwrap.fill(line, **fill) for line in lines[1:])])


def run_text(rows):
    """Where records were measured."""
    return ", ".join(dict.fromkeys(f"{row['gpu']} at commit {row['commit']}" for row in rows))


def rates_text(rows):
    """The rates of attend or backward by the keys that a query sees, and the density at which they were measured."""
    rates = [
        f"{row['tflops']:.0f} TFLOP/s with {row['seqlen_k'] - row['seqlen_q'] // 2:,} keys a query at"
        f" {100 * row['density']:.0f}% of the blocks"
        for row in rows
    ]
    return f"{', '.join(rates)}; in between by interpolation, beyond as at the end"


def ranks_text(ranks):
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def seconds(ms):
    """With three digits."""
    return f"{three_digits(ms)} ms" if ms < 1000 else f"{three_digits(ms / 1000)} s"


def gigabytes(num_bytes):
    return three_digits(num_bytes / 1e9)


def three_digits(number):
    """Of a number from 0.01 on; fewer below 1."""
    return f"{number:,.0f}" if number >= 100 or not number else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    for field in fields(Link):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help="print, for this link")
    arguments = vars(parser.parse_args(given))
    check = arguments.pop("check")
    link = {name: speed for name, speed in arguments.items() if speed is not None}
    if link and check:
        parser.error("--check compares the page, which is for the link by default")
    if any(number <= 0 for number in link.values()):
        parser.error(f"numbers of a link must be above 0, got {link}")
    here = link.get("ranks_per_host", 1)
    if any(here % ranks and ranks % here for ranks in RANKS):
        parser.error(f"--ranks-per-host must be a power of 2, as the numbers of ranks are, got {here}")
    measured = Measured(json.loads((ROOT / "tools/bench/results/gpu.json").read_text()))
    section = tables(measured, Link(**link))
    if link:
        print(section)
        return 0
    differing = rewrite({PAGE: lambda text: with_sections(text, {SECTION: section})}, check)
    if check and differing:
        print(f"not as in tools/bench/results: {PAGE}; python -m tools.bench.scaling writes it")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
