"""The figures of gpu_context_parallel.py as text: no torch, so that tables.py draws them anywhere.

A record is one pass, "forward" or "backward", of one length, layout and kind of data, over blocks that are selected or
all ("blocks"). `one_gpu_ms` has the time of the whole sequence on each of the GPUs by itself, `share_ms` those of each
rank's share on each of the GPUs with nothing sent, None where it was not measured, `ms` that of all together.
"""

from __future__ import annotations

import statistics

# What is to be reached, by pass and by kind of data: in GOAL_LAYOUT on two GPUs, over blocks that are selected.
GOAL_LAYOUT, GOAL_TOKENS = "dual_chunk", 262144
SPEEDUP = {"forward": 1.85, "backward": 1.8}  # at GOAL_TOKENS, of random data
APART = {"random": 0.05, "structured": 0.15}
ROUNDING = 2**-7  # root mean square error over root mean square: bfloat16 rounds by up to 2^-9, a few times over


def speedup(record):
    """How often the ranks' time goes into that of one GPU, of the fastest."""
    return min(record["one_gpu_ms"]) / record["ms"]


def compute_ms(record):
    """The time of each rank's share on its own GPU, with nothing sent."""
    return [of_gpus[rank] for rank, of_gpus in enumerate(record["share_ms"])]


def apart(record):
    """How much longer the largest share takes than the smallest: the mean over the GPUs, which differ themselves."""
    means = [statistics.mean(ms for ms in of_gpus if ms is not None) for of_gpus in record["share_ms"]]
    return max(means) / min(means) - 1


def not_hidden_ms(record):
    """What communication adds to the time of the slowest rank."""
    return record["ms"] - max(compute_ms(record))


def is_exact(record):
    """Whether ranks select what one GPU does, and compute the same but for rounding."""
    return record["differing_blocks"] == 0 and all(error <= ROUNDING for error in record["errors"].values())


def data_text(record):
    """The kind of data, and the settings or that all blocks are attended."""
    return record["data"] if record["blocks"] == "selected" else "all blocks"


def line(record):
    """One line of text."""
    dense = record["baselines"].get("cudnn dense")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in record["errors"].items())
    return (
        f"{record['seqlen_q']:7} {record['layout']:10} {record['pass']:8} {data_text(record):10}"
        f" {100 * record['density']:5.1f}% | one GPU {times_text(record['one_gpu_ms'])} | {record['ranks']} GPUs"
        f" {record['ms']:.2f} ms, with nothing sent {times_text(compute_ms(record))} |"
        f" {record['differing_blocks']} blocks differ, {errors} | cudnn dense"
        f" {f'{dense:.2f} ms' if dense else 'not measured'}"
    )


def times_text(of_ranks):
    return f"{' / '.join(f'{ms:.2f}' for ms in of_ranks)} ms"


def short_table(records):
    """Lines of text: of each pass what counts, what the wire takes, and what was to be reached."""
    lines = [
        f"{'tokens':>7} {'layout':10} {'pass':8} {'data':10} {'blocks':>6} {'one GPU':>9} {'ranks':>8} {'ratio':>6}"
        f" {'apart':>6} {'wire':>8} {'peak':>6} {'share':>6}  equal"
    ]
    for record in records:
        memory = record["memory"]
        lines.append(
            f"{record['seqlen_q']:>7} {record['layout']:10} {record['pass']:8} {data_text(record):10}"
            f" {100 * record['density']:5.1f}% {min(record['one_gpu_ms']):9.2f} {record['ms']:8.2f}"
            f" {speedup(record):5.2f}x {100 * apart(record):5.1f}% {not_hidden_ms(record):+8.2f}"
            f" {memory['peak'] / 1e9:6.2f} {memory['share'] / 1e9:6.2f}  {'yes' if is_exact(record) else 'NO'}"
        )
    lines.append(
        "one GPU, ranks, wire (what communication adds): ms; peak, share (own, and gathered K and V): GB a rank"
    )
    for tokens, wire in wires(records).items():
        lines.append(
            f"{tokens:7} gather of K or of V {wire_text(wire, 'gather')}; sum of dK or of dV {wire_text(wire, 'sum')}"
        )
    return lines + verdicts(records)


def wires(records):
    """{tokens: what the communication alone takes}."""
    return {record["seqlen_q"]: record["wire"] for record in records}


def wire_text(wire, collective):
    return f"{wire[f'{collective}_ms']:.2f} ms, {wire[f'{collective}_gbs']:.0f} GB/s"


def verdicts(records):
    """Lines of text: each of the goals that was measured, and whether it was reached."""
    lines = []

    def judge(reached, text):
        lines.append(f"{'reached' if reached else 'MISSED '}  {text}")

    for record in records:
        if record["ranks"] != 2 or record["layout"] != GOAL_LAYOUT or record["blocks"] != "selected":
            continue
        name = f"{record['pass']} at {record['seqlen_q']}, {record['data']}:"
        if record["seqlen_q"] == GOAL_TOKENS and record["data"] == "random":
            goal = SPEEDUP[record["pass"]]
            judge(speedup(record) >= goal, f"{name} {speedup(record):.3f}x one GPU, to be {goal}x")
        limit = APART[record["data"]]
        judge(apart(record) <= limit, f"{name} ranks {100 * apart(record):.1f}% apart, to be within {100 * limit:.0f}%")
        peak, share = (record["memory"][part] for part in ("peak", "share"))
        judge(peak <= share, f"{name} a rank holds {peak / 1e9:.3f} GB, to be up to {share / 1e9:.3f}")
    inexact = [record for record in records if not is_exact(record)]
    judge(not inexact, f"equality with one GPU: {len(records) - len(inexact)} of {len(records)} passes")
    return lines


# Markdown, for docs/distributed.md


def measured_tables(records):
    """What passes take, and what the wire takes and a rank holds."""
    one = records[0]
    sources = dict.fromkeys(
        f"`{record['command']}` at commit {record['commit']}"
        + (f" on {record['gpu']}" if record["gpu"] != one["gpu"] else "")
        for record in records
    )
    lines = [
        f"{one['ranks']} {one['gpu']} of one host, NCCL {one['nccl']}, CUDA {one['cuda']}, {one['dtype']}, batch 1,"
        f" {one['num_heads']} query heads over {one['num_heads_k']} key heads, head size {one['head_dim']}, causal"
        f" ({', '.join(sources)}). *Groups* are those of key heads that ranks work in. *One GPU* has the whole"
        " sequence, and so has cuDNN's dense attention. *Not hidden* is what the time of the ranks has over that of the"
        " slowest when nothing is sent, *apart* how much longer the largest share computes than the smallest, by the"
        " means over the GPUs that computed it.",
        "",
        "| tokens | layout | pass | data | blocks | groups | one GPU | ranks | ratio | apart | not hidden | cuDNN |",
        "|---" * 12 + "|",
    ]
    for record in records:
        dense = record["baselines"].get("cudnn dense")
        lines.append(
            f"| {record['seqlen_q']:,} | {record['layout']} | {record['pass']} | {record['data']} |"
            f" {100 * record['density']:.1f}% | {record['head_groups']} |"
            f" {min(record['one_gpu_ms']):.1f} ms | {record['ms']:.1f} ms |"
            f" {speedup(record):.2f} x | {100 * apart(record):.1f}% | {not_hidden_ms(record):.2f} ms |"
            f" {f'{dense:.1f} ms' if dense else 'not measured'} |"
        )
    lines += [
        "",
        "By itself the communication takes:",
        "",
        "| tokens | gather of keys, and of values | sum of either's gradients |",
        "|---|---|---|",
    ]
    for tokens, wire in wires(records).items():
        lines.append(f"| {tokens:,} | {wire_text(wire, 'gather')} | {wire_text(wire, 'sum')} |")
    lines += [
        "",
        "GB that a rank holds at most, with its own tensors, and what its own tensors and the gathered keys and values"
        " of all heads would make; it gathers those of a group of heads at a time, one group ahead:",
        "",
        "| tokens | layout | forward | of these own and gathered | backward | of these own and gathered |",
        "|---" * 6 + "|",
    ]
    for (tokens, layout), memory in memories(records).items():
        cells = [f"{memory[each][part] / 1e9:.2f}" for each in SPEEDUP for part in ("peak", "share")]
        lines.append(f"| {tokens:,} | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memories(records):
    """{(tokens, layout): {pass: what a rank holds}}, on random data over selected blocks."""
    found = {}
    for record in records:
        if record["data"] == "random" and record["blocks"] == "selected":
            found.setdefault((record["seqlen_q"], record["layout"]), {})[record["pass"]] = record["memory"]
    return found
