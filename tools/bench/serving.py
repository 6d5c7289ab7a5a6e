"""What the stage serving of gpu.py measures, and its tables: no torch, so that tables.py draws them anywhere.

A record is a case, whose requests `ms` has the time of in ragged calls; `baselines` has those of other ways to compute
them, in turns with it.
"""

from __future__ import annotations

# Requests of a batch, {tokens: how many}.
BATCHES = {
    "128K, 8 x 8K, 32 x 1K": {131072: 1, 8192: 8, 1024: 32},
    "2 x 32K": {32768: 2},
}
PAGED_TOKENS, PAGE_SIZES = 32768, (64, 128, 256)
CHUNKED_TOKENS, CHUNK_TOKENS, CHUNK_PAGE_SIZE = 131072, 8192, 128

ONE_PIECE = "32K, one piece"
CHUNKED = "128K by 8K, pages of 128"


def paged_case(page_size):
    return f"32K, pages of {page_size}"


# In the order of the tables.
CASES = (*BATCHES, ONE_PIECE, *map(paged_case, PAGE_SIZES), CHUNKED)
BASELINES = {
    "own calls": "a call for each request",
    "sum of own calls": "their times one by one, summed",
    "padded calls": "a call for each length",
    "one piece": "ragged, keys in one piece",
}

OWN_CALLS = ("own calls", "sum of own calls")
# What is to be reached: of the speed of requests' own calls, whichever way they are faster, and of the time of another.
LEAST_SPEED = {**dict.fromkeys(BATCHES, 0.95), ONE_PIECE: 0.95}
MOST_TIME = {
    paged_case(128): ("one piece", 1.03),
    paged_case(64): ("one piece", 1.05),
    CHUNKED: ("own calls", 1.10),
}


def in_order(records):
    return sorted(records, key=lambda record: CASES.index(record["shape"]))


def line(record):
    """One line of text."""
    others = "  ".join(f"{name} {ms:.3f} ({ms / record['ms']:.3f}x)" for name, ms in record["baselines"].items())
    same = "same bits" if record["same_bits"] else "OTHER BITS"
    return f"{record['shape']:25} ragged {record['ms']:9.3f} ms | {others} | {same}"


def short_table(records):
    """Lines of text: of each case how often its time goes into those of other ways, and what was to be reached."""
    lines = [f"{'':25} {'ragged ms':>10}" + "".join(f"{'x ' + name:>19}" for name in BASELINES)]
    for record in in_order(records):
        ratios = (
            record["baselines"][name] / record["ms"] if name in record["baselines"] else None for name in BASELINES
        )
        cells = "".join(f"{'-' if ratio is None else f'{ratio:.3f}':>19}" for ratio in ratios)
        lines.append(f"{record['shape']:25} {record['ms']:10.3f}{cells}")
    return lines + verdicts(records)


def verdicts(records):
    """Lines of text: each of the goals that was measured, and whether it was reached."""
    lines = []

    def judge(reached, text):
        lines.append(f"{'reached' if reached else 'MISSED '}  {text}")

    for record in in_order(records):
        case, ms, baselines = record["shape"], record["ms"], record["baselines"]
        if case in LEAST_SPEED:
            goal, own = LEAST_SPEED[case], min(baselines[name] for name in OWN_CALLS if name in baselines)
            judge(own / ms >= goal, f"{case}: {own / ms:.3f} of the speed of own calls, to be {goal}")
        if case in MOST_TIME:
            name, limit = MOST_TIME[case]
            judge(
                ms / baselines[name] <= limit,
                f"{case}: {ms / baselines[name]:.3f} of the time of {name}, to be at most {limit:.2f}",
            )
    others = [record["shape"] for record in in_order(records) if not record["same_bits"]]
    judge(not others, f"the same bits as own calls: {', '.join(others) or 'all'}")
    return lines


# Markdown, for docs/serving.md


def measured_table(records):
    if not records:
        return (
            "Nothing was measured yet: `python -m tools.bench.gpu --stage serving --json tools/bench/results/gpu.json`"
            " does it."
        )
    one = records[0]
    sources = dict.fromkeys(f"`{record['command']}` at commit {record['commit']}" for record in records)
    settings = ", ".join(f"`{name}={value}`" for name, value in one["settings"].items())
    lines = [
        f"{one['gpu']}, CUDA {one['cuda']}, {one['dtype']}, {one['num_heads']} query heads over"
        f" {one['num_heads_k']} key heads, head size {one['head_dim']}, random data with {settings}, about half of"
        f" the blocks ({', '.join(sources)}). *n x* is a time over that of the ragged calls.",
        "",
        f"| | {' | '.join(['ragged', *BASELINES.values()])} | bits |",
        "|---" * (len(BASELINES) + 3) + "|",
    ]
    for record in in_order(records):
        ms, baselines = record["ms"], record["baselines"]
        times = [
            f"{baselines[name]:.3f} ms, {baselines[name] / ms:.3f} x" if name in baselines else "" for name in BASELINES
        ]
        cells = [record["shape"], f"{ms:.3f} ms", *times, "the same" if record["same_bits"] else "others"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What was to be reached:", ""]
    lines += [f"- {' '.join(text.split())}" for text in verdicts(records)]
    return "\n".join(lines)
