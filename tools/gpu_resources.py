"""Writes down what the portable GPU kernels take of each kind of chip, and the table of it in docs/tuning.md.

python -m tools.gpu_resources              compiles the sources that have changed since, and writes record and table
python -m tools.gpu_resources --source S   compiles these again; S may be a pattern, as csrc/cuda/sm80/attend/**/*.cu
python -m tools.gpu_resources --check      compiles nothing; exits with 1 when the record is of other sources, the table
                                           says something else, or a kernel takes more than a chip has

Registers, spills and static shared memory are what ptxas reports. Dynamic shared memory is the size of the kernel's
SharedStorage, which a small program prints that is compiled from the same headers. Nothing needs a GPU. The record,
tools/bench/results/gpu_resources.json, is written after each source, so that a run that was ended goes on where it was.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import cuda_archs
from tools.pages import ROOT, rewrite, with_sections

RECORD = ROOT / "tools/bench/results/gpu_resources.json"
SOURCES = "csrc/cuda/sm80/**/instantiations/*.cu"
PAGE = "docs/tuning.md"


@dataclass(frozen=True)
class Chip:
    """What the GPUs of an architecture have, as CUDA's programming guide tells."""

    capability: str
    table: int
    """Their table of tiles: the kilobytes of shared memory that a thread block can have."""
    shared: int
    """Kilobytes of shared memory of a multiprocessor."""
    warps: int
    """Of a multiprocessor, at most."""


# By the architecture's name in a build: 90 is the portable kernels on Hopper, as the tests run them.
CHIPS = {
    "80": Chip("8.0", 163, 164, 64),
    "86": Chip("8.6", 99, 100, 48),
    "89": Chip("8.9", 99, 100, 48),
    "90": Chip("9.0", 227, 228, 64),
    "100": Chip("10.0", 227, 228, 64),
    "120": Chip("12.0", 99, 100, 48),
}
TABLES = sorted({chip.table for chip in CHIPS.values()})
REGISTERS = 255  # that a thread can have
FILE_REGISTERS = 16384  # of each of a multiprocessor's four parts, which warps take 256 at a time of
TILE_ALIGNMENT = 128  # bytes; kTileAlignment of csrc/cuda/sm80/common/tensor_cores.cuh
RESERVED = 1024  # bytes of shared memory that the driver takes for each thread block
# What main kernels of head sizes up to 128 spill at most, by what they compute and head sizes: how many bytes on which
# compute capabilities, and why that is left so.
KNOWN_SPILLS = {
    ("backward", (128,)): (
        {"9.0": 8, "10.0": 20},
        "in deterministic mode, put aside ahead of a loop of more than 2,000 instructions, of which some read them",
    ),
}


# The sources.


def sources():
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(SOURCES))]


def code_of(path):
    """The file without comments and line breaks, which no machine code depends on, and the files that it includes."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    included = [path.parent / name for name in re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)]
    return " ".join(text.split()), [file.resolve() for file in included]


def digest(source):
    """Tells whether a source, a header of csrc that it includes, or how it is compiled has become another one."""
    code, waiting = {}, [ROOT / source]
    while waiting:
        path = waiting.pop()
        if path not in code:
            code[path], included = code_of(path)
            waiting += included
    parts = (f"{path.relative_to(ROOT)}\n{code[path]}\n" for path in sorted(code))
    text = "".join([*parts, *cuda_archs.flags(list(CHIPS))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What the compilers tell.


def nvcc(*arguments):
    """What it writes, of which ptxas's report is a part."""
    if cuda_archs.find_nvcc() is None:
        raise SystemExit("to compile, the CUDA toolkit must be there")
    cutlass = cuda_archs.find_cutlass()
    command = [cuda_archs.find_nvcc(), "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{cutlass}", *arguments]
    process = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{process.stdout[:4000]}")
    return process.stdout


ENTRY = re.compile(
    r"Compiling entry function '([^']+)' for 'sm_(\d+)'\n"
    r".*Function properties for \1\n"
    r"\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"(?:(?!.*Compiling entry).*\n)*?"  # functions that it calls
    r".*Used (\d+) registers(.*)"
)


def read_report(report):
    """{mangled name of a kernel: {architecture: what it takes there}}, of what ptxas -v writes."""
    found = {}
    for name, arch, stores, loads, registers, rest in ENTRY.findall(report):
        static = re.search(r"(\d+) bytes smem", rest)
        found.setdefault(name, {})[arch] = {
            "registers": int(registers),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "static_shared": int(static[1]) if static else 0,
        }
    if report.count("Compiling entry function") != sum(map(len, found.values())):
        raise SystemExit(f"the report of ptxas reads otherwise than expected:\n{report}")
    return found


def template_arguments(name):
    """("f", ["A<B, C>", "E 1"]) of the C++ name void f<A<B, C>, (E)1>(G)."""
    name = re.sub(r"\(([\w:]+)\)(?=\d)", r"\1 ", name.replace("(anonymous namespace)::", ""))
    function, _, rest = name.partition("(")[0].partition("<")
    arguments, depth = [""], 0
    for character in rest[: rest.rfind(">")]:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return function.split()[-1], [argument.strip() for argument in arguments if argument]


def with_dynamic_shared():
    """Names of the kernels that have dynamic shared memory: that of their first argument, Traits."""
    files = [*ROOT.glob("csrc/cuda/sm80/**/*.cuh"), *ROOT.glob("csrc/cuda/common/**/*.cuh")]
    start = re.compile(r"(\w+)\([^(){}]*\)\s*\{\s*extern __shared__")
    return {name for path in files for name in start.findall(path.read_text())}


PROGRAM = """
#include <cstdio>

#include "{header}"

template <typename Traits>
void print() {{
  std::printf("%d %zu\\n", Traits::kThreads, sizeof(typename Traits::SharedStorage));
}}

int main() {{
{calls}
}}
"""


def launch_sizes(source, traits):
    """{Traits: (threads, bytes of SharedStorage) of a thread block}, from the headers of a source."""
    if not traits:
        return {}
    header = (ROOT / source).parents[1] / "stage.cuh"
    arguments = (re.sub(r"([\w:]*TileTable) (\d+)", r"static_cast<\1>(\2)", one) for one in traits)
    calls = "\n".join(f"  print<{argument}>();" for argument in arguments)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "sizes.cu")
        program.write_text(PROGRAM.format(header=header, calls=calls))
        nvcc("-gencode=arch=compute_80,code=sm_80", "-o", program.with_suffix(""), program)
        printed = subprocess.run([program.with_suffix("")], capture_output=True, text=True, check=True).stdout
    return {one: tuple(map(int, line.split())) for one, line in zip(traits, printed.splitlines())}


def compiled(source, archs):
    """The record of a source, which is compiled for these architectures."""
    before = digest(source)  # it may change meanwhile
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernels.fatbin")
        report = nvcc("-Xptxas=-v", *cuda_archs.flags(archs), "-fatbin", source, "-o", output)
    by_mangled_name = read_report(report)
    names = subprocess.run(
        ["c++filt", *by_mangled_name], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parsed = [template_arguments(name) for name in names]
    known = with_dynamic_shared()
    dynamic = [name.split("::")[-1] in known for name, _ in parsed]
    sizes = launch_sizes(source, sorted({arguments[0] for (_, arguments), has in zip(parsed, dynamic) if has}))
    kernels = []
    for (name, arguments), has_dynamic, on in zip(parsed, dynamic, by_mangled_name.values()):
        threads, shared = sizes[arguments[0]] if has_dynamic else (None, 0)
        kernel = {
            "kernel": name.split("::")[-1],
            "arguments": [re.sub(r"\w+::", "", argument) for argument in arguments],
            "threads": threads,
            "dynamic_shared": shared,
        }
        table = re.search(r"\bTileTable (\d+)", str(kernel["arguments"]))
        # Other chips have no use for it, or no room.
        fitting = [arch for arch in archs if table is None or int(table[1]) == CHIPS[arch].table]
        # Nothing is not written down.
        taken = {arch: {what: count for what, count in on[arch].items() if count} for arch in fitting}
        kernels.append({**kernel, "on": taken})
    kernels.sort(key=lambda kernel: (kernel["kernel"], kernel["arguments"]))
    return {"digest": before, "nvcc": toolkit(), "kernels": kernels}


def toolkit():
    listing = subprocess.run([cuda_archs.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", listing)[1]


# The record.


def read_record():
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def write_record(record):
    """A kernel a line, by the sources that there are."""
    parts = []
    for source in sources():
        if source in record:
            kernels = ",\n   ".join(json.dumps(kernel) for kernel in record[source]["kernels"])
            head = f'"digest": "{record[source]["digest"]}", "nvcc": "{record[source]["nvcc"]}"'
            parts.append(f' "{source}": {{\n  {head},\n  "kernels": [\n   {kernels}\n  ]\n }}')
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def stale_sources(record):
    """Those that the record has not, or as they were before."""
    return [source for source in sources() if record.get(source, {}).get("digest") != digest(source)]


@dataclass(frozen=True)
class Kernel:
    """A kernel on an architecture."""

    stage: str
    name: str
    arguments: tuple
    arch: str
    threads: int
    dynamic_shared: int
    registers: int
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0

    @property
    def is_main(self):
        """Whether it is the one that the others of its stage prepare or finish."""
        return self.threads is not None

    @property
    def dtype(self):
        return {"bfloat16_t": "bfloat16", "half_t": "float16"}[re.search(r"\w+_t\b", self.arguments[0])[0]]

    @property
    def head_sizes(self):
        """Of queries and keys, and where it has another one, of values."""
        sizes = [int(size) for size in re.findall(r"(?<=, )\d+", self.arguments[0])]
        return tuple(dict.fromkeys(sizes))

    @property
    def table(self):
        """Of tiles, in kilobytes; None where it is the same for all."""
        found = re.search(r"TileTable (\d+)", self.arguments[0])
        return found and int(found[1])

    @property
    def variant(self):
        """As the docs call it: attention with compensation, and ragged batches, have kernels of their own."""
        if self.name.startswith("ragged_"):
            return f"{self.stage}, ragged"
        compensated = self.name == "attend_kernel" and self.arguments[-1] == "true"
        return f"{self.stage}, compensated" if compensated else self.stage

    @property
    def title(self):
        return f"{self.name}<{', '.join(self.arguments)}> on {CHIPS[self.arch].capability}"

    @property
    def shared(self):
        return self.dynamic_shared + self.static_shared

    @property
    def thread_blocks(self):
        """On a multiprocessor, of a main kernel."""
        chip, warps = CHIPS[self.arch], -(-self.threads // 32)
        warp_registers = -(-self.registers * 32 // 256) * 256
        by_registers = FILE_REGISTERS // warp_registers * 4 // warps
        return min(by_registers, chip.warps // warps, chip.shared * 1024 // (self.shared + RESERVED))


def kernels_of(record):
    """All of them."""
    return [
        Kernel(
            Path(source).parts[3],
            kernel["kernel"],
            tuple(kernel["arguments"]),
            arch,
            kernel["threads"],
            kernel["dynamic_shared"],
            **taken,
        )
        for source, of_source in record.items()
        for kernel in of_source["kernels"]
        for arch, taken in kernel["on"].items()
    ]


def problems(record):
    """What is not as it must be."""
    found = [f"{source} has changed since it was compiled" for source in stale_sources(record)]
    found += [f"{source} is no more" for source in record if source not in sources()]
    for source, of_source in record.items():
        archs = {arch for kernel in of_source["kernels"] for arch in kernel["on"]}
        missing = [chip.capability for arch, chip in CHIPS.items() if arch not in archs]
        if missing:
            found.append(f"{source} was not compiled for {', '.join(missing)}")
    for kernel in kernels_of(record):
        limit = CHIPS[kernel.arch].table * 1024
        if kernel.registers > REGISTERS:
            found.append(f"{kernel.title} takes {kernel.registers} registers, of {REGISTERS}")
        if kernel.shared > limit:
            found.append(f"{kernel.title} takes {kernel.shared} bytes of shared memory, of {limit}")
        if kernel.is_main and kernel.static_shared % TILE_ALIGNMENT:
            found.append(
                f"{kernel.title} takes {kernel.static_shared} bytes of static shared memory, which its tiles follow:"
                f" not a multiple of {TILE_ALIGNMENT}"
            )
        if kernel.is_main and not kernel.thread_blocks:
            found.append(f"{kernel.title} has no room on a multiprocessor")
    for (variant, head_sizes, capability), spilled in spills(record).items():
        known = KNOWN_SPILLS.get((variant, head_sizes), ({}, None))[0].get(capability, 0)
        if max(head_sizes) <= 128 and spilled != known:
            place = f"{place_text(variant, head_sizes)}, on {capability}"
            found.append(f"{place} spills {spilled} bytes, where {known} are known")
    return found


def spills(record):
    """{(what it computes, head sizes, capability): bytes} of the main kernel there that spills most."""
    most = {}
    for kernel in kernels_of(record):
        if kernel.is_main:
            place = kernel.variant, kernel.head_sizes, CHIPS[kernel.arch].capability
            most[place] = max(most.get(place, 0), kernel.spill_stores)
    return most


def place_text(variant, head_sizes):
    return f"{variant}, head size {', '.join(map(str, head_sizes))}"


# The table.


def table(record):
    """By stage and head size, for each kind of chip the most that any of its kernels takes."""
    chips = {size: [chip.capability for chip in CHIPS.values() if chip.table == size] for size in TABLES}
    columns = [f"{size} KB: {', '.join(names)}" for size, names in chips.items()]
    compilers = sorted({of_source["nvcc"] for of_source in record.values()})
    intro = (
        f"Registers of a thread, shared memory of a thread block x thread blocks on a multiprocessor, and bytes that"
        f" spill, as nvcc {' and '.join(compilers)} compiles them, each the worst of all dtypes and variants:"
    )
    lines = [*textwrap.wrap(intro, 118), ""]
    lines += [f"| | head size | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    rows = {}
    for kernel in kernels_of(record):
        if kernel.is_main:
            cells = rows.setdefault((kernel.variant, kernel.head_sizes), {size: [] for size in TABLES})
            cells[CHIPS[kernel.arch].table].append(kernel)
    for (variant, sizes), cells in sorted(rows.items()):
        text = " | ".join(cell(kernels) for kernels in cells.values())
        lines.append(f"| {variant} | {', '.join(map(str, sizes))} | {text} |")
    if KNOWN_SPILLS:
        lines += ["", "Of head sizes up to 128 these spill:", ""]
        for place, (spilled, why) in KNOWN_SPILLS.items():
            counts = ", ".join(f"{count} bytes on {capability}" for capability, count in spilled.items())
            lines += textwrap.wrap(f"- {place_text(*place)}: {counts}: {why}.", 118, subsequent_indent="  ")
    return "\n".join(lines)


def cell(kernels):
    if not kernels:
        return ""
    registers = max(kernel.registers for kernel in kernels)
    shared = max(kernel.shared for kernel in kernels) / 1024
    blocks = min(kernel.thread_blocks for kernel in kernels)
    spilled = {}
    for kernel in kernels:
        capability = CHIPS[kernel.arch].capability
        spilled[capability] = max(spilled.get(capability, 0), kernel.spill_stores)
    text = ", ".join(f"{count} on {capability}" for capability, count in sorted(spilled.items()) if count)
    return f"{registers}, {shared:.1f} KB x {blocks}" + (f"; spills {text}" if text else "")


def compile_all(wanted, record, num_jobs):
    """Compiles these sources, and writes each down as it is done."""
    archs = [arch for arch in CHIPS if arch in cuda_archs.known()]
    writing = threading.Lock()

    def run(source):
        result = compiled(source, archs)
        with writing:
            record[source] = result
            write_record(record)
            print(f"compiled {source} for {', '.join(archs)}", flush=True)

    pool = ThreadPoolExecutor(num_jobs)
    try:
        for job in [pool.submit(run, source) for source in wanted]:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--source", nargs="+", metavar="S", help="compile these, changed or not")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once, of up to 6 GB each; default: 1")
    arguments = parser.parse_args()
    record = read_record()
    if not arguments.check:
        wanted = stale_sources(record)
        if arguments.source:
            matching = {str(path.relative_to(ROOT)) for pattern in arguments.source for path in ROOT.glob(pattern)}
            wanted = [source for source in sources() if source in matching]
            if not wanted:
                parser.error(f"no portable kernels are in {', '.join(arguments.source)}")
        compile_all(wanted, record, arguments.jobs)
        record = {source: record[source] for source in sources() if source in record}
        write_record(record)
    differing = rewrite({PAGE: lambda text: with_sections(text, {"resources": table(record)})}, arguments.check)
    found = problems(record)
    if arguments.check:
        found += [f"{page} has another table" for page in differing]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
