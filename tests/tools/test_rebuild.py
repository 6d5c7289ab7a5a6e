"""What a build compiles, how much of it at once, and what again when it is configured otherwise.

The compilers only note what they are asked for. What they build cannot be loaded, so another program stands in for the
Python that is to load it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each note is a file of its own, named by its time: compilers run at once.
COMPILER = """#!/bin/sh
case $1 in
--list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 88 89 90 100 110 103 120 121; exit ;;
--version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
esac
echo "$@" >{log}/$(date +%s%N)-$$
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : >"$2"; fi
  shift
done
sleep ${{LINGER:-0}}
echo done >{log}/$(date +%s%N)-$$
"""
BUILD = """
import paddle, runpy, sys
paddle.version.commit = {commit!r}
paddle.is_compiled_with_cuda = lambda: {gpu_build}
sys.executable = {loader!r}
sys.argv = ["setup.py", {command}]
runpy.run_path("setup.py", run_name="__main__")
"""


# As if what was built had raised its errors. Asked with -E which Paddle is installed, it knows none.
LOADER = """#!/bin/sh
if [ "$1" = -E ]; then exit; fi
echo rrattn._direct raises errors
{then}
"""


class Checkout:
    """What the source distribution holds, and what builds of it compile and link."""

    def __init__(self, folder, unpack):
        self.folder, self.log = unpack(folder), folder / "log"
        self.log.mkdir()
        compiler = write_program(folder / "cuda" / "bin" / "nvcc", COMPILER.format(log=shlex.quote(str(self.log))))
        self.loader = write_program(folder / "loader", LOADER.format(then="echo rrattn._ops raises errors"))
        (folder / "cutlass" / "cute").mkdir(parents=True)
        quoted = shlex.quote(str(compiler))
        self.environment = {
            **os.environ,
            **dict.fromkeys(("CC", "CXX"), quoted),
            **dict.fromkeys(("LDSHARED", "LDCXXSHARED"), f"{quoted} -shared"),
            "CUDA_HOME": str(folder / "cuda"),
            "RRATTN_CUTLASS": str(folder / "cutlass"),
        }

    def run(self, command='"build"', *, commit="one", archs="", gpu_build=False, environment=()):
        code = BUILD.format(commit=commit, command=command, loader=str(self.loader), gpu_build=gpu_build)
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**self.environment, "RRATTN_CUDA_ARCHS": archs, **dict(environment)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def build(self, *arguments, **options):
        """The names of the files that this makes, of objects of CUDA sources without their folders."""
        for note in self.log.iterdir():
            note.unlink()
        process = self.run(*arguments, **options)
        assert process.returncode == 0, process.stderr
        commands = [note.split() for note in self.notes()]
        made = [Path(words[words.index("-o") + 1]).name for words in commands if "-o" in words]
        return {name.split(".")[0].rpartition("-")[2] for name in made}

    def notes(self):
        """What the compilers noted, in order."""
        return [note.read_text().strip() for note in sorted(self.log.iterdir())]

    def record(self, place="build/lib*/rrattn"):
        (path,) = self.folder.glob(f"{place}/_build_info.py")
        return path.read_text()


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path, unpack):
    """In a folder whose path has spaces."""
    return Checkout(tmp_path / "a build", unpack)


def test_a_build_for_another_paddle_builds_the_operators_again(checkout):
    assert {"_ops", "_direct", "select"} <= checkout.build()
    assert 'PADDLE_COMMIT = "one"' in checkout.record()
    assert not checkout.build()
    assert {"_ops", "paddle_ops"} <= checkout.build(commit="two")
    assert 'PADDLE_COMMIT = "two"' in checkout.record()
    assert not list(checkout.folder.glob("rrattn/_build_info.py"))  # nothing is built there


def test_a_build_in_place_is_recorded_in_place(checkout):
    in_place = '"build_ext", "--inplace"'
    assert "_ops" in checkout.build(in_place)
    assert 'PADDLE_COMMIT = "one"' in checkout.record("rrattn")
    checkout.build('"--version"', commit="two")
    assert 'PADDLE_COMMIT = "one"' in checkout.record("rrattn")
    assert "_ops" in checkout.build(in_place, commit="two")
    assert 'PADDLE_COMMIT = "two"' in checkout.record("rrattn")


def test_gpu_kernels_come_and_go_with_the_architectures(checkout):
    on_cpu = checkout.build()
    with_gpu = checkout.build(archs="90a")
    sources = expected_flags(flags_of("90a"), [], flags_of("90a"))
    assert {"_direct", "direct", "dispatch"} | {Path(source).stem for source in sources} <= with_gpu
    assert not checkout.build(archs="90a")
    assert {"_direct", "direct"} <= checkout.build()
    assert "_direct" in on_cpu
    moved = checkout.folder.parent / "other"
    (moved / "cute").mkdir(parents=True)
    assert "estimate_bf16_64" in checkout.build(archs="90a", environment={"RRATTN_CUTLASS": str(moved)})


def objects_in_library(checkout):
    (library,) = checkout.folder.glob("build/temp*/librrattn_cuda.a")
    return set(subprocess.run(["ar", "t", library], capture_output=True, text=True, check=True).stdout.split())


def architectures_of(notes):
    """For each CUDA source that a compiler noted, the architectures that it was to be compiled for."""
    commands = [note.split() for note in notes if "-gencode=" in note]
    sources = [next(word for word in words if word.endswith(".cu")) for words in commands]
    flags = [[word for word in words if word.startswith("-gencode=")] for words in commands]
    assert len(set(sources)) == len(sources)
    return dict(zip(sources, flags))


def flags_of(*archs):
    """Hopper's own kernels are compiled with its instructions, all else with Ampere's."""
    return [f"-gencode=arch=compute_{'90a' if arch == '90a' else 80},code=sm_{arch}" for arch in archs]


def expected_flags(of_hopper, of_ampere, of_all):
    """For each CUDA source the flags of its folder; none where it is not built."""
    flags = {}
    for path in ROOT.glob("csrc/cuda/**/*.cu"):
        source = path.relative_to(ROOT)
        flags[source.as_posix()] = {"sm90": of_hopper, "sm80": of_ampere}.get(source.parts[2], of_all)
    assert any(source.startswith("csrc/cuda/sm90/") for source in flags)
    return {source: given for source, given in flags.items() if given}


PTX = "-gencode=arch=compute_80,code=compute_80"


@pytest.mark.parametrize(
    "archs, of_hopper, of_ampere, of_all",
    (
        ("90a", flags_of("90a"), [], flags_of("90a")),
        ("80 120", [], flags_of("80", "120"), flags_of("80", "120")),
        ("86 90a PTX", flags_of("90a"), [*flags_of("86"), PTX], [*flags_of("86", "90a"), PTX]),
        ("PTX", [], [PTX], [PTX]),
        ("90", [], flags_of("90"), flags_of("90")),
        ("90 90a", flags_of("90a"), flags_of("90"), flags_of("90a")),
        ("all", flags_of("90a"), [*flags_of("80", "86", "89", "100", "120"), PTX],
         [*flags_of("80", "86", "89", "90a", "100", "120"), PTX]),
    ),
)  # fmt: skip
def test_sources_are_built_for_the_architectures_of_their_folder(archs, of_hopper, of_ampere, of_all, checkout):
    checkout.build(archs=archs)
    assert architectures_of(checkout.notes()) == expected_flags(of_hopper, of_ampere, of_all)


def test_other_architectures_build_again_what_they_concern(checkout):
    checkout.build(archs="80 90a")
    built = checkout.build(archs="90a")
    assert architectures_of(checkout.notes()) == expected_flags([], [], flags_of("90a"))
    assert {"dispatch", "_direct"} <= built  # which know what is built
    assert not {"kernels", "simd_avx2"} & built


def test_sources_of_one_name_in_two_folders_are_both_in_the_library(checkout):
    shutil.copy(checkout.folder / "csrc/cuda/select/select.cu", checkout.folder / "csrc/cuda/common")
    checkout.build(archs="90a")
    assert {"select-select.o", "common-select.o"} <= objects_in_library(checkout)


def test_what_is_built_no_more_leaves_the_library(checkout):
    checkout.build(archs="80 90a")
    checkout.build(archs="80")
    objects = objects_in_library(checkout)
    assert "select-select.o" in objects and not any(name.startswith("sm90-") for name in objects)


def ci(checkout, *checks):
    return subprocess.run(
        ["bash", ".ci/run", *checks],
        cwd=checkout.folder,
        env={**checkout.environment, "PATH": f"{checkout.folder.parent}/cuda/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


INCLUDED = re.compile(r'^#include "(.*)"$', re.MULTILINE)


def test_ci_compiles_sources_for_the_architectures_of_their_folder(checkout):
    write_program(checkout.folder / ".venv/bin/python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    process = ci(checkout, "CUDA sources")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == "all checks passed"
    expected = expected_flags(flags_of("90a"), flags_of("80"), flags_of("80", "90a", "120"))
    portable = {source for source in expected if source.startswith("csrc/cuda/sm80/")}
    of_bfloat16 = {source for source in portable if "_bf16_" in source}  # each dtype for an architecture of its own
    assert {source.replace("_bf16_", "_fp16_") for source in of_bfloat16} == portable - of_bfloat16
    compiled = architectures_of(checkout.notes())
    found = []
    for source, flags in compiled.items():
        listed = [f"csrc/{include}" for include in INCLUDED.findall((checkout.folder / source).read_text())]
        found += [(each, flags) for each in (listed if source.startswith("build/") else [source])]
    assert dict(found) == {**expected, **dict.fromkeys(of_bfloat16, flags_of("120"))}
    assert len(found) == len(expected) > len(compiled)
    objects = {note.split()[note.split().index("-o") + 1] for note in checkout.notes() if "-gencode=" in note}
    assert len(objects) == len(compiled)


def test_ci_knows_no_other_check(checkout):
    process = ci(checkout, "CUDA source")
    assert process.returncode != 0
    assert "failed: CUDA source, which is none of the checks" in process.stdout


def test_the_record_has_the_architectures_of_the_operators(checkout):
    checkout.build(archs="90a")
    assert 'CUDA_ARCHS = ""' in checkout.record()  # the GPU kernels are in rrattn._direct alone
    assert "paddle_stream" in checkout.build(archs="90a", gpu_build=True)
    assert 'CUDA_ARCHS = "90a"' in checkout.record()
    checkout.build(gpu_build=True)
    assert 'CUDA_ARCHS = ""' in checkout.record()


def test_libraries_that_cannot_raise_an_error_fail_the_build(checkout):
    write_program(checkout.loader, LOADER.format(then="kill -SEGV $$"))
    process = checkout.run()
    assert process.returncode != 0
    assert "the libraries were built, but do not work" in process.stderr
    assert "status -11" in process.stderr and str(checkout.folder.parent / "cuda/bin/nvcc") in process.stderr
    write_program(checkout.loader, LOADER.format(then=""))  # _ops raises none
    assert checkout.run().returncode != 0


@pytest.mark.parametrize("lost", ("core/**/*.cpp", "cuda/**/*.cpp", "cuda/**/*.cu", "**/*.cuh"))
def test_sources_without_a_part_are_refused_on_every_machine(lost, checkout):
    for path in checkout.folder.glob(f"csrc/{lost}"):
        path.unlink()
    process = checkout.run()
    assert process.returncode != 0
    assert f"{checkout.folder / 'csrc'} holds no {lost}: these sources are not complete" in process.stderr


@pytest.mark.parametrize("max_jobs", (1, 4))
def test_max_jobs_limits_the_compilers_of_all_sources(max_jobs, checkout):
    checkout.build(archs="90a", environment={"MAX_JOBS": str(max_jobs), "LINGER": "0.1"})
    running, most = 0, 0
    for note in checkout.notes():
        running += -1 if note == "done" else 1
        most = max(most, running)
    assert running == 0
    assert most == 1 if max_jobs == 1 else 1 < most <= max_jobs


@pytest.mark.parametrize("max_jobs", ("0", "-1", "two", ""))
def test_max_jobs_must_be_a_number_of_compilers(max_jobs, checkout):
    process = checkout.run(environment={"MAX_JOBS": max_jobs})
    assert process.returncode != 0
    assert f"MAX_JOBS is {max_jobs!r}, but must be a whole number from 1 on" in process.stderr


COUNT_COMPILERS = """
import builtins, io, os, runpy, sys

files = {files!r}
os.environ.pop("MAX_JOBS", None)
os.sched_getaffinity = lambda process: range({cores})
sys.argv = ["setup.py", "--version"]
compilers_at_once = runpy.run_path("setup.py")["compilers_at_once"]
open_file, is_file = open, os.path.isfile
os.path.isfile = lambda path: path in files or ("cgroup" not in path and is_file(path))
builtins.open = lambda file, *rest, **options: (
    io.StringIO(files[str(file)]) if str(file) in files else open_file(file, *rest, **options)
)
print("compilers", [compilers_at_once(gigabytes_each) for gigabytes_each in (1, 4)])
"""
GIBIBYTE = 2**30
VERSION_2, VERSION_1 = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@pytest.mark.parametrize(
    "cores, free, limits, expected",
    (
        (4, 64, {}, [4, 4]),
        (64, 64, {}, [64, 16]),
        (64, 64, {VERSION_2: "max\n"}, [64, 16]),
        (64, 64, {VERSION_2: f"{10 * GIBIBYTE}\n"}, [10, 2]),
        (64, 64, {VERSION_1: f"{9 * GIBIBYTE}\n"}, [9, 2]),
        (64, 20, {VERSION_1: f"{2**63 - 4096}\n"}, [20, 5]),
        (8, 1, {VERSION_2: f"{GIBIBYTE // 2}\n"}, [1, 1]),
    ),
)
def test_compilers_are_as_many_as_cores_and_memory_allow(cores, free, limits, expected):
    meminfo = f"MemTotal:       999999999 kB\nMemAvailable:   {free * 2**20} kB\nHugePages_Total:       0\n"
    code = COUNT_COMPILERS.format(cores=cores, files={"/proc/meminfo": meminfo, **limits})
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"compilers {expected}" in process.stdout, process.stdout + process.stderr


@pytest.mark.parametrize("version", ((3, 8, 20), (3, 13, 0)))
def test_another_python_is_refused(version):
    number = ".".join(map(str, version))
    code = (
        "import runpy, setuptools.command.build_ext, sys\n"
        f"sys.version_info, sys.version, sys.argv = {version}, '{number} (main)', ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode != 0
    assert f"this is Python {number}, but rrattn supports Python 3.9 to 3.12" in process.stderr
