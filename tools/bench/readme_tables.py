"""Writes the README's tables from the figures in tools/bench/results/.

python tools/bench/readme_tables.py            rewrites README.md
python tools/bench/readme_tables.py --check    exits with 1 when README.md does not match the figures
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def gpu_table():
    records = json.loads((ROOT / "tools/bench/results/h200.json").read_text())
    one = records[0]
    lines = [
        f"{one['gpu']}, CUDA {one['cuda']}, {one['dtype']}, batch 1, {one['num_heads']} query heads over"
        f" {one['num_heads_k']} key heads, head size {one['head_dim']}, causal, random data"
        f" (`{one['command']}` at commit {one['commit']}). The floor is what the products or the bytes alone take.",
        "",
        "| queries | keys | stride | estimate + select | of cuDNN's dense attention | floor |",
        "|---|---|---|---|---|---|",
    ]
    for row in records:
        if row["stage"] == "estimate+select":
            dense = row["baselines"].get("cudnn dense")
            share = f"{100 * row['ms'] / dense:.2f}%" if dense else "not measured"
            lines.append(
                f"| {row['seqlen_q']:,} | {row['seqlen_k']:,} | {row['stride']} | {row['ms']:.3f} ms |"
                f" {share} | {row['floor_ms']:.3f} ms |"
            )
    return "\n".join(lines)


def milliseconds(row):
    return f"{row['ms']:,.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.1f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = before
    for name, table in (("cpu", cpu_table()), ("gpu", gpu_table())):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        first, last = after.index(begin) + len(begin), after.index(end)
        after = after[:first] + table + after[last:]
    if arguments.check:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
