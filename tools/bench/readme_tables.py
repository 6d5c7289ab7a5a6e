"""Writes the README's tables from the figures in tools/bench/results/.

python tools/bench/readme_tables.py            rewrites README.md
python tools/bench/readme_tables.py --check    exits with 1 when README.md does not match the figures
"""

import argparse
import json
import re
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


def milliseconds(row):
    return f"{row['ms']:,.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.1f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = re.sub(
        r"<!-- cpu -->.*<!-- /cpu -->", lambda _: f"<!-- cpu -->\n{cpu_table()}\n<!-- /cpu -->", before, flags=re.S
    )
    if arguments.check:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
