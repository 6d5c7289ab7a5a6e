"""The GPU side of the build and of the dispatch, as far as it goes without a GPU."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paddle.utils.cpp_extension.extension_utils import find_paddle_includes

from tools import cuda_archs, gpu_resources

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@pytest.mark.skipif(not (TOOLKIT / "include/cuda_runtime.h").is_file(), reason=f"no CUDA toolkit in {TOOLKIT}")
@pytest.mark.parametrize("source", ("paddle_ops.cpp", "paddle_stream.cpp"))
def test_operators_with_gpu_kernels_compile_against_this_paddle(source):
    folders = [*find_paddle_includes(), sysconfig.get_path("include"), TOOLKIT / "include", TOOLKIT / "include/cccl"]
    options = ["-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    defines = ["-DRRATTN_WITH_CUDA", "-DPADDLE_WITH_CUSTOM_KERNEL"]
    includes = [f"-isystem{folder}" for folder in folders]
    command = [os.environ.get("CXX", "g++"), *options, *defines, *includes, ROOT / "csrc/bindings" / source]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


TOOLKITS = {  # what some of them can compile for
    "11.8": (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.4": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.6": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.9": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121),
    "13.0": (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121),
}
CHOOSE = "import sys; import cuda_archs; print(*cuda_archs.choose(paddle_is_gpu_build=sys.argv[1] == 'gpu'))"


def write_program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def choose(tmp_path):
    """choose(...): a process that prints the architectures of a build, with a toolkit and with GPUs as they say."""

    def chosen(setting=None, of_paddle=None, *, toolkit="13.0", gpus=None, paddle="gpu"):
        listing = "".join(f"compute_{number}\\n" for number in TOOLKITS[toolkit])
        release = f"Cuda compilation tools, release {toolkit}, V{toolkit}.88"
        answers = f"case $1 in --version) echo '{release}' ;; --list-gpu-arch) printf '{listing}' ;; esac"
        write_program(tmp_path / "cuda/bin/nvcc", answers)
        smi = "exit 9" if gpus is None else f"printf '{''.join(f'{gpu}{chr(92)}n' for gpu in gpus)}'"
        write_program(tmp_path / "bin/nvidia-smi", smi)
        environment = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "PYTHONPATH": str(ROOT / "tools")}
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
        for name, value in (("RRATTN_CUDA_ARCHS", setting), ("PADDLE_CUDA_ARCH_LIST", of_paddle)):
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        command = [sys.executable, "-c", CHOOSE, paddle]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return chosen


@pytest.mark.parametrize("setting", ("75", "90a 100a", "sm_90a", "80+PTX", "80 ptx", "all 80", "101"))
def test_an_architecture_without_kernels_is_refused(setting, choose):
    process = choose(setting)
    assert process.returncode != 0
    assert (
        f"RRATTN_CUDA_ARCHS has {'all' if 'all' in setting else setting.split()[-1]}, but supported" in process.stderr
    )
    assert "are: 80 86 87 88 89 90 90a 100 103 110 120 121 PTX; or all" in process.stderr


@pytest.mark.parametrize(
    "toolkit, archs",
    (
        ("11.8", "80 86 89 90 PTX"),
        ("12.4", "80 86 89 90 PTX"),
        ("12.6", "80 86 89 90a PTX"),
        ("12.9", "80 86 89 90a 100 120 PTX"),
        ("13.0", "80 86 89 90a 100 120 PTX"),
    ),
)
def test_a_build_without_a_gpu_is_for_all_that_nvcc_can(toolkit, archs, choose):
    assert choose(toolkit=toolkit).stdout.split() == archs.split()
    assert choose("all", toolkit=toolkit, gpus=["8.0"], paddle="cpu").stdout.split() == archs.split()
    assert choose(toolkit=toolkit, gpus=["7.0"]).stdout.split() == archs.split()  # this machine's cannot run it


@pytest.mark.parametrize(
    "gpus, toolkit, archs",
    (
        (["8.0"], "13.0", "80"),
        (["9.0", "8.6", "9.0"], "13.0", "86 90a"),
        (["7.5", "12.0"], "13.0", "120"),
        (["10.3", "12.1"], "13.0", "103 121"),
        (["8.9"], "11.8", "89"),
        (["9.0"], "12.4", "90"),
        (["12.0", "8.9"], "12.4", "89 PTX"),
        (["10.0"], "12.4", "PTX"),  # newer than the toolkit
        (["8.8"], "12.9", "87"),
    ),
)
def test_a_build_is_for_the_gpus_of_the_machine(gpus, toolkit, archs, choose):
    assert choose(gpus=gpus, toolkit=toolkit).stdout.split() == archs.split()
    assert choose(gpus=gpus, toolkit=toolkit, paddle="cpu").stdout.split() == []


@pytest.mark.parametrize(
    "of_paddle, archs",
    (
        ("8.0", "80"),
        ("8.0 8.6 9.0", "80 86 90a"),
        ("7.0+PTX;8.0;9.0a;12.0+PTX", "80 90a 120 PTX"),
        ("80,86, 9.0+PTX", "80 86 90a PTX"),
        ("8.0 13.0", "80 PTX"),  # newer than the toolkit
        ("Ampere", "80 86 PTX"),
        ("Volta Ada;Hopper Blackwell", "89 PTX 90a 100 120"),
        ("12.0+PTX 12.0", "120 PTX"),
    ),
)
def test_the_architectures_that_paddle_is_told_are_taken(of_paddle, archs, choose):
    assert choose(of_paddle=of_paddle, gpus=["8.9"]).stdout.split() == archs.split()
    assert choose("90a", of_paddle, gpus=["8.9"]).stdout.split() == ["90a"]  # its own variable wins
    assert choose("", of_paddle, gpus=["8.9"]).stdout.split() == []
    assert choose(of_paddle=of_paddle, paddle="cpu").stdout.split() == []


@pytest.mark.parametrize("of_paddle", ("", " ", ";"))
def test_paddle_told_nothing_is_as_without(of_paddle, choose):
    assert choose(of_paddle=of_paddle, gpus=["8.9"]).stdout.split() == ["89"]


@pytest.mark.parametrize(
    "of_paddle, message",
    (
        (
            "8.0 Amper",
            "PADDLE_CUDA_ARCH_LIST has Amper, but allowed are 8.0, 8.0+PTX and the like, Pascal, Volta+Tegra,",
        ),
        ("6.1 Volta", "PADDLE_CUDA_ARCH_LIST is '6.1 Volta', but rrattn's kernels are for 8.0 and newer"),
    ),
)
def test_what_paddle_is_told_and_rrattn_cannot_build_is_refused(of_paddle, message, choose):
    process = choose(of_paddle=of_paddle)
    assert process.returncode != 0 and message in process.stderr


def test_paddle_itself_never_reads_the_list(tmp_path):
    """It would fail at all that is no number."""
    code = "import cuda_archs, os; cuda_archs.choose(True); print(os.environ.get('PADDLE_CUDA_ARCH_LIST'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "PADDLE_CUDA_ARCH_LIST": "Ampere"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "None", process.stderr


# The choice of a path, of which each line tells capability, kilobytes of shared memory, architectures, wanted path.
CHOICES = """
#include <cstdlib>
#include <iostream>

#include "cuda/gpu_path.h"

using namespace rrattn::cuda;

int main(int, char** arguments) {
  const Gpu gpu = {"Test GPU", {std::atoi(arguments[1]), std::atoi(arguments[2])}, std::atoi(arguments[3]) * 1024};
  try {
    set_gpu_path(arguments[5]);
    const GpuPath path = choose_gpu_path(gpu, arguments[4], wanted_gpu_path());
    std::cout << name_of(path);
  } catch (const std::invalid_argument& error) {
    std::cout << error.what();
  }
}
"""


@pytest.fixture(scope="module")
def choose_path(tmp_path_factory):
    """choose_path(capability, kilobytes, archs, wanted): what the dispatch says."""
    folder = tmp_path_factory.mktemp("gpu_path")
    (folder / "choices.cpp").write_text(CHOICES)
    build = [os.environ.get("CXX", "g++"), "-std=c++17", f"-I{ROOT / 'csrc'}", '-DRRATTN_CUDA_ARCHS="80 90a"']
    sources = [folder / "choices.cpp", ROOT / "csrc/cuda/gpu_path.cpp"]
    subprocess.run([*build, *sources, "-o", folder / "choices"], check=True, timeout=120)

    def chosen(capability, kilobytes, archs, wanted="auto"):
        command = [folder / "choices", *capability.split("."), str(kilobytes), archs, wanted]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    return chosen


@pytest.mark.parametrize(
    "capability, kilobytes, archs, wanted, path",
    (
        ("9.0", 227, "90a", "auto", "hopper"),
        ("9.0", 227, "80 86 89 90a 100 120 PTX", "auto", "hopper"),
        ("9.0", 227, "90", "auto", "portable-227KB"),  # an nvcc too old for Hopper's kernels
        ("9.0", 227, "90 90a", "portable", "portable-227KB"),
        ("9.0", 227, "90 90a", "portable-163KB", "portable-163KB"),
        ("9.0", 227, "90 90a", "portable-99KB", "portable-99KB"),
        ("9.0", 227, "90a PTX", "portable", "portable-227KB"),
        ("8.0", 163, "80 90a", "auto", "portable-163KB"),
        ("8.7", 163, "80 90a", "portable-99KB", "portable-99KB"),
        ("8.6", 99, "80 90a", "auto", "portable-99KB"),  # the machine code of 8.0
        ("8.9", 99, "86", "auto", "portable-99KB"),
        ("10.3", 227, "90a 100", "auto", "portable-227KB"),
        ("12.0", 99, "80 120", "auto", "portable-99KB"),
        ("8.0", 163, "PTX", "auto", "portable-163KB"),
        ("10.0", 227, "80 90a 120 PTX", "auto", "portable-227KB"),
        ("13.0", 227, "80 120 PTX", "auto", "portable-227KB"),  # what comes after
    ),
)
def test_the_path_of_a_gpu(capability, kilobytes, archs, wanted, path, choose_path):
    assert choose_path(capability, kilobytes, archs, wanted) == path


@pytest.mark.parametrize(
    "capability, kilobytes, archs, wanted, messages",
    (
        ("7.5", 64, "80 90a", "auto", ["Test GPU of compute capability 7.5", "supports 8.0 (Ampere) and newer"]),
        ("7.0", 96, "80 90a", "portable", ["capability 7.0", "supports 8.0 (Ampere) and newer"]),
        ("8.0", 163, "90a", "auto", ["Test GPU of compute capability 8.0", "kernels for none such: it is for sm_90a"]),
        ("8.0", 163, "86 90a", "auto", ["capability 8.0", "it is for sm_86, sm_90a"]),  # older than its machine code
        ("7.5", 64, "PTX", "auto", ["capability 7.5", "supports 8.0 (Ampere) and newer"]),
        ("10.0", 227, "80 90a 120", "auto", ["capability 10.0", "it is for sm_80, sm_90a, sm_120"]),
        ("13.0", 227, "80 120", "auto", ["capability 13.0", "it is for sm_80, sm_120"]),
        ("9.0", 227, "80 120", "auto", ["capability 9.0", "it is for sm_80, sm_120"]),
        (
            "9.0",
            227,
            "80 90a",
            "portable",
            ["capability 9.0", "portable kernels for none such: it is for sm_80, sm_90a"],
        ),
        ("8.6", 99, "80", "portable-163KB", ["has 99 KB of shared memory", '"portable-163KB" takes 163 KB']),
        ("11.0", 64, "110", "auto", ["has 64 KB of shared memory", "rrattn takes 99 KB"]),
    ),
)
def test_a_gpu_that_this_build_is_not_for_is_named(capability, kilobytes, archs, wanted, messages, choose_path):
    said = choose_path(capability, kilobytes, archs, wanted)
    assert all(message in said for message in messages), said


def test_a_path_of_no_such_name_is_refused(choose_path):
    said = choose_path("9.0", 227, "90a", "sm80")
    allowed = "auto, portable, portable-99KB, portable-163KB, portable-227KB"
    assert said == f'GPU path is "sm80", but this build has: {allowed}'


@pytest.mark.parametrize("archs", ("90a", "80 86", "PTX", "80 90 90a 120 PTX"))
def test_the_dispatch_compiles_for_any_architectures(archs):
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f'-DRRATTN_CUDA_ARCHS="{archs}"']
    command = [os.environ.get("CXX", "g++"), *flags, ROOT / "csrc/cuda/dispatch.cpp"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


STAGE = re.compile(r"U rrattn::cuda::(sm\d+::\w+)::Stage<\(rrattn::DataType\)(\d), (\d+)(?:, (\d+))?")


def test_the_dispatch_launches_what_is_instantiated(tmp_path):
    """Each source of instances by its name, and nothing else."""
    target = tmp_path / "dispatch.o"
    flags = ["-std=c++17", '-DRRATTN_CUDA_ARCHS="80 90a"', "-c", ROOT / "csrc/cuda/dispatch.cpp", "-o", target]
    subprocess.run([os.environ.get("CXX", "g++"), *flags], check=True, timeout=120)
    symbols = subprocess.run(["nm", "-C", "-u", target], check=True, capture_output=True, text=True, timeout=60).stdout
    launched = set()
    for stage, dtype, head_dim, second in STAGE.findall(symbols):
        name = stage.replace("::", "/"), {"1": "fp16", "2": "bf16"}[dtype], head_dim
        # The second number is a stride of the estimate, else the head size of values: in the name where it is another.
        launched.add("_".join(name if "estimate" in stage or second in ("", head_dim) else (*name, second)))
    sources = [path.relative_to(ROOT / "csrc/cuda") for path in ROOT.glob("csrc/cuda/sm*/*/instantiations/*.cu")]
    assert launched == {f"{path.parents[1]}{path.stem.removeprefix(path.parents[1].name)}" for path in sources}


def test_a_source_of_instances_stands_by_itself():
    """CI compiles those of a stage as one source, in which what one includes is there for the next."""
    for path in ROOT.glob("csrc/cuda/sm*/*/instantiations/*.cu"):
        assert path.read_text().startswith('#include "../stage.cuh"\n'), path


KERNEL = re.compile(r"(?:template <([^>]*)>\s*)?(?:static\s+)?__global__")


def test_no_kernel_is_in_objects_of_two_paths():
    """Before nvcc 13, the launch of an instance is one weak symbol: where objects for other GPUs have it too, the
    linker keeps that of any of them. So what paths share of a header has a type of the path among its parameters."""
    archs, shared = ["80", "90", "90a", "120"], set()
    users = {}  # header: the architectures that its users are for
    for source in (ROOT / "csrc/cuda").rglob("*.cu"):
        of_object = tuple(cuda_archs.of_source(source.relative_to(ROOT), archs))
        waiting, seen = [source], set()
        while waiting:
            path = waiting.pop().resolve()
            if path not in seen:
                seen.add(path)
                users.setdefault(path, set()).add(of_object)
                waiting += gpu_resources.code_of(path)[1]
    for path in users:
        for parameters in KERNEL.findall(gpu_resources.code_of(path)[0]):
            if len(users[path]) > 1:
                shared.add(path.name)
                assert set(re.findall(r"typename (\w+)", parameters)) - {"Element"}, f"{path}: <{parameters}>"
    assert shared == {"pool_keys.cuh"}
