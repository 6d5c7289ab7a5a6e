"""Writes of results/ the README's figure and the tables of docs/: performance, quantization, distributed, serving.

python -m tools.bench.tables            rewrites them
python -m tools.bench.tables --check    exits with 1 when one does not match the figures
"""

import json
import sys
import textwrap

from tools.bench import context_parallel, serving, shapes
from tools.pages import ROOT, with_sections, write_or_check


def cpu_table():
    results = json.loads((ROOT / "tools/bench/results/cpu.json").read_text())
    machine, rows = results["machine"], results["rows"]
    lines = [
        f"{results['tokens']:,} tokens, 8 query heads over 2 key heads, head size 64, causal, stride 8,"
        f" {machine['threads']} threads of an {machine['cpu']} ({machine['simd']}), Paddle {machine['paddle']};"
        f" medians of one run (`{machine['command']}` at commit {machine['commit']}).",
        "",
        "| | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        if not name.endswith(", bf16"):
            half = rows.get(f"{name}, bf16")
            lines.append(f"| {name} | {milliseconds(row)} | {milliseconds(half) if half else ''} |")
    peak = max(results["memory_mb"].values())
    lines += [
        "",
        "*paddle sdpa* is `paddle.nn.functional.scaled_dot_product_attention`, *25%* a random quarter of the visible"
        f" blocks. At {results['memory_tokens']:,} tokens no stage takes more than {peak:.0f} MB besides its inputs and"
        " outputs, forward and backward.",
    ]
    return "\n".join(lines)


def gpu_tables(records):
    """A table for each group of stages that has records, and each GPU that they are of."""
    tables = (
        (sampling_table, "estimate+select"),
        (attend_table, "attend"),
        (backward_table, "backward"),
        (rr_attention_table, "rr_attention"),
        (shapes_table, "shapes"),
    )
    texts = []
    for table, stage in tables:
        rows = [row for row in records if row["stage"] == stage]
        for gpu in dict.fromkeys(row["gpu"] for row in rows):
            texts.append(table([row for row in rows if row["gpu"] == gpu]))
    return "\n\n".join(texts)


def gpu_setting(rows, data):
    """What all rows have in common, and where they come from."""
    one = rows[0]
    sources = dict.fromkeys(f"`{row['command']}` at commit {row['commit']}" for row in rows)
    head_size = f" head size {one['head_dim']}," if all(row["head_dim"] == one["head_dim"] for row in rows) else ""
    return (
        f"{one['gpu']}, CUDA {one['cuda']}, {one['dtype']}, batch 1, {one['num_heads']} query heads over"
        f" {one['num_heads_k']} key heads,{head_size} causal, {data}"
        f" ({', '.join(sources)})."
    )


def sampling_table(rows):
    lines = [
        f"{gpu_setting(rows, 'random data')} With {settings_text(rows[0])} for what is not in the table. The floor is"
        " what the products or the bytes alone take.",
        "",
        "| queries | keys | stride | key stride | estimate + select | of cuDNN's dense attention | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense = row["baselines"].get("cudnn dense")
        share = f"{100 * row['ms'] / dense:.2f}%" if dense else "not measured"
        lines.append(
            f"| {row['seqlen_q']:,} | {row['seqlen_k']:,} | {row['stride']} | {row['key_stride']} |"
            f" {row['ms']:.3f} ms | {share} | {row['floor_ms']:.3f} ms |"
        )
    return "\n".join(lines)


RIVALS = {
    "16 bits": "16 bits",
    "cudnn dense": "cuDNN, dense",
    "flash dense": "FlashAttention, dense",
    "flex": "FlexAttention",
    "fa4": "FlashAttention-4",
}


def rivals_table(intro, columns, rows):
    """A table of (record, cells of `columns`), with the rivals' times after them."""
    rivals = [name for name in RIVALS if any(name in row["baselines"] for row, _ in rows)]
    lines = [
        intro,
        "",
        f"| {' | '.join([*columns, *(RIVALS[name] for name in rivals)])} |",
        "|---" * (len(columns) + len(rivals)) + "|",
    ]
    for row, cells in rows:
        lines.append(f"| {' | '.join([*cells, *(times(row, name) for name in rivals)])} |")
    return "\n".join(lines)


def work_cells(row):
    """Share of the blocks, time and rate."""
    return f"{100 * row['density']:.0f}%", f"{row['ms']:.3f} ms", f"{row['tflops']:.0f}"


def attend_table(rows):
    intro = (
        f"{gpu_setting(rows, 'random blocks, those on the diagonal always')} The others took turns with it: torch's"
        " dense attention, all blocks, and block-sparse ones, the same blocks. *n x* is their time over attend's."
    )
    columns = "queries", "keys", "blocks", "attend", "TFLOP/s"
    return rivals_table(
        intro, columns, [(row, (f"{row['seqlen_q']:,}", f"{row['seqlen_k']:,}", *work_cells(row))) for row in rows]
    )


def backward_table(rows):
    intro = (
        f"{gpu_setting(rows, 'random blocks, those on the diagonal always')} Gradients of attend, in turns with the"
        " others' backward passes."
    )
    columns = "tokens", "blocks", "backward", "TFLOP/s", "deterministic"
    pairs = zip(rows[::2], rows[1::2], strict=True)  # the latter deterministic
    return rivals_table(
        intro,
        columns,
        [(row, (f"{row['seqlen_q']:,}", *work_cells(row), f"{same['ms']:.3f} ms")) for row, same in pairs],
    )


def rr_attention_table(rows):
    lines = [
        f"{gpu_setting(rows, 'queries and keys that are random or have sink, local, vertical and needle patterns')}"
        " Estimate, select and attend together, in turns with cuDNN's dense attention.",
        "",
        "| tokens | data | settings | blocks | rr_attention | cuDNN, dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seqlen_q']:,} | {row['data']} | {settings_text(row)} | {100 * row['density']:.1f}% |"
            f" {row['ms']:.3f} ms | {times(row, 'cudnn dense')} |"
        )
    return "\n".join(lines)


def shapes_table(rows):
    one = rows[0]
    sources = dict.fromkeys(f"`{row['command']}` at commit {row['commit']}" for row in rows)
    lines = [
        f"{one['gpu']}, CUDA {one['cuda']}, {one['dtype']}, causal, random blocks, those on the diagonal always; batch"
        " 1, 16,384 tokens, 32 query heads over 8 key heads, head size 128 where the name of a row says nothing else;"
        f" the documents share 32,768 tokens by FlashMask ({', '.join(sources)}). *n x* is the time of dense attention,"
        " of all blocks, over ours, and that of FlashAttention-4 on the same blocks. Dense attention is cuDNN's, which"
        " takes documents as sequences of their own; of gradients of head sizes above 128 the fastest that torch has.",
        "",
        "| | blocks | attend | TFLOP/s | dense | FlashAttention-4 | backward | TFLOP/s | dense | FlashAttention-4 |",
        "|---" * 10 + "|",
    ]
    for name, found in shapes.passes_of(rows).items():
        cells = [name, f"{100 * next(iter(found.values()))['density']:.0f}%"]
        for each in shapes.PASSES:
            cells += shape_cells(found[each]) if each in found else ["not measured"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shape_cells(row):
    """Time and rate, and how often the time goes into those of dense attention and of FlashAttention-4."""
    factors = (f"{factor} x" if factor != "-" else "not measured" for factor in shapes.ratios(row))
    return [f"{row['ms']:.3f} ms", f"{row['tflops']:.0f}", *factors]


PORTABLE_STAGES = "attend", "backward", "estimate+select", "rr_attention"


def portable_table(records):
    """The portable kernels beside FlashAttention-2: a row a stage, shape and table of tiles."""
    sources = dict.fromkeys(f"`{row['command']}` at commit {row['commit']}" for row in records)
    one = records[0]
    lines = [
        f"{one['gpu']}, CUDA {one['cuda']}, {one['dtype']}, batch 1, causal, random data ({', '.join(sources)}).",
        "",
        "| | head size | heads | tokens | tiles | blocks | time | FlashAttention-2, dense | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(records, key=lambda row: PORTABLE_STAGES.index(row["stage"])):
        if row["stage"] == "estimate+select":
            share = f"{100 * row['share']:.2f}% of its time"
        else:
            share = f"{row['share']:.2f} x{'' if row['stage'] == 'rr_attention' else ' a block'}"
        blocks = "" if row["stage"] == "estimate+select" else f"{100 * row['density']:.0f}%"
        lines.append(
            f"| {row['stage'].replace('+', ' + ')} | {row['head_dim']} | {row['num_heads']}/{row['num_heads_k']} |"
            f" {row['seqlen_q']:,} | {row['kernels'].split('-')[-1].replace('KB', ' KB')} | {blocks} |"
            f" {row['ms']:.3f} ms | {row['baselines']['flash dense']:.3f} ms | {share} |"
        )
    return "\n".join(lines)


def settings_text(row):
    """The settings of a whole call, but for the defaults."""
    return ", ".join(f"`{name}={value}`" for name, value in row["settings"].items()) or "the defaults"


QUANTIZED = ',quantization="qk_int8_pv_fp8"'
TASK_COLUMNS = ("lookup", "needle", "multi-needle", "hops", "copy", "inside", "text")


def quantization_tables(results):
    """The loss of SmolLM2 and the probe's tasks, with products of eight bits beside all bits.

    `results` has rows of `tools.evaluate run`, those with the same method and length side by side.
    """
    source = f"`{results['command']}` on the default text, {results['cpu']}, at commit {results['commit']}"
    return "\n\n".join([f"By {source}.", smollm2_table(results["smollm2"]), probe_table(results["probe"])])


def quantized_speed_table(rows):
    """Attention in eight bits beside its own of 16 bits and what else took turns with it."""
    intro = (
        f"{gpu_setting(rows, 'random data')} All that turns inputs into eight bits is included. In turns with the same"
        " in 16 bits, cuDNN's dense attention of all blocks and FlashAttention-4 on the same blocks; *n x* is their"
        " time over that of eight bits."
    )
    columns = "call", "tokens", "head size", "blocks", "eight bits", "TFLOP/s"
    return rivals_table(
        intro,
        columns,
        [(row, (row["shape"], f"{row['seqlen_q']:,}", str(row["head_dim"]), *work_cells(row))) for row in rows],
    )


def smollm2_table(rows):
    by_method = {(row["length"], row["method"]): row for row in rows}
    lines = [
        "SmolLM2-135M, the loss and the KL of one document, from dense attention with all bits:",
        "",
        "| tokens | threshold | blocks | loss, all bits | eight bits | over all bits | KL, all bits | eight bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (length, method), row in by_method.items():
        if not method.endswith(QUANTIZED):
            continue
        method = method[: -len(QUANTIZED)]
        threshold = method.partition("=")[2]
        exact, dense = (by_method[length, name] for name in ("dense" if threshold == "1" else method, "dense"))
        change, of_exact = (f"{100 * (row['nats'] / other['nats'] - 1):+.2f}%" for other in (dense, exact))
        lines.append(
            f"| {length:,} | {threshold} | {100 * row['density']:.0f}% |"
            f" {100 * (exact['nats'] / dense['nats'] - 1):+.2f}% | {change} | {of_exact} |"
            f" {exact['divergence']:.4f} | {row['divergence']:.4f} |"
        )
    return "\n".join(lines)


def probe_table(rows):
    """Scores of each task; the mean is over tasks, of shares of dense attention's, of the text's inverse loss."""
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["task"]] = row
    (length,) = {row["length"] for row in rows}
    lines = [
        f"The probe, seven tasks of {length:,} bytes; the text's figure is its loss in nats a byte:",
        "",
        f"| | {' | '.join(TASK_COLUMNS)} | mean of dense |",
        "|---" * (len(TASK_COLUMNS) + 2) + "|",
    ]
    for method, tasks in by_method.items():
        cells = [
            f"{tasks[task]['nats']:.4f}" if task == "text" else f"{100 * tasks[task]['score']:.1f}%"
            for task in TASK_COLUMNS
        ]
        name = f"{method[: -len(QUANTIZED)]}, eight bits" if method.endswith(QUANTIZED) else method
        mean = mean_of_dense(tasks, by_method["dense"])
        lines.append(f"| {name.replace('rrattn:', '')} | {' | '.join(cells)} | {100 * mean:.2f}% |")
    return "\n".join(lines)


def mean_of_dense(tasks, dense):
    shares = [
        dense[task]["nats"] / tasks[task]["nats"] if task == "text" else tasks[task]["score"] / dense[task]["score"]
        for task in TASK_COLUMNS
    ]
    return sum(shares) / len(shares)


def times(row, rival):
    """A rival's time, and how often ours goes into it."""
    ms = row["baselines"].get(rival)
    return f"{ms:.3f} ms, {ms / row['ms']:.2f} x" if ms else "not measured"


def milliseconds(row):
    return f"{row['ms']:,.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.1f} ms"


def headline(records):
    """The largest factor over cuDNN's dense attention among whole calls."""
    rows = [row for row in records if row["stage"] == "rr_attention"]
    row = max(rows, key=lambda row: row["baselines"]["cudnn dense"] / row["ms"])
    dense = row["baselines"]["cudnn dense"]
    text = (
        f"- **{dense / row['ms']:.0f} times as fast as cuDNN's dense attention** over {row['seqlen_q']:,} tokens:"
        f" {row['ms']:.1f} ms in place of {dense:.0f} ms, with {settings_text(row)} on"
        f" {row['data']} data, which takes {100 * row['density']:.1f}% of the blocks ({row['gpu']}, {row['dtype']},"
        f" {row['num_heads']} query heads over {row['num_heads_k']} key heads, head size {row['head_dim']}, causal)."
        " [Performance](docs/performance.md) has other lengths, densities and rivals, gradients, and CPUs."
    )
    return textwrap.fill(text, 118, subsequent_indent="  ", break_on_hyphens=False)


def main():
    names = "gpu", "gpu_portable", "gpu_context_parallel"
    records, portable, shared = (json.loads((ROOT / f"tools/bench/results/{name}.json").read_text()) for name in names)
    sections = {"cpu": cpu_table(), "gpu": gpu_tables(records), "portable": portable_table(portable)}
    quantized = json.loads((ROOT / "tools/bench/results/quantization.json").read_text())
    served = [record for record in records if record["stage"] == "serving"]
    eight_bits = [record for record in records if record["stage"] == "quantized"]
    of_quantization = {"quality": quantization_tables(quantized), "speed": quantized_speed_table(eight_bits)}
    pages = {
        "docs/quantization.md": lambda text: with_sections(text, of_quantization),
        "docs/distributed.md": lambda text: with_sections(text, {"measured": context_parallel.measured_tables(shared)}),
        "docs/serving.md": lambda text: with_sections(text, {"measured": serving.measured_table(served)}),
        "docs/performance.md": lambda text: with_sections(text, sections),
        "README.md": lambda text: with_sections(text, {"headline": headline(records)}),
    }
    return write_or_check("python -m tools.bench.tables", __doc__.splitlines()[0], "tools/bench/results", pages)


if __name__ == "__main__":
    sys.exit(main())
