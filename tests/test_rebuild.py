"""What is built again when the build is configured otherwise, with compilers that only note what they are asked for.

What such compilers build cannot be loaded, so another program stands in for the Python that is to load it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = """#!/bin/sh
echo "$@" >>{log}
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : >"$2"; fi
  shift
done
"""
BUILD = """
import paddle, runpy, sys
paddle.version.commit = {commit!r}
paddle.is_compiled_with_cuda = lambda: {gpu_build}
sys.executable = {loader!r}
sys.argv = ["setup.py", {command}]
runpy.run_path("setup.py", run_name="__main__")
"""


# As if what was built had raised its errors.
LOADER = """#!/bin/sh
echo rrattn._direct raises errors
echo rrattn._ops raises errors
"""


class Checkout:
    """A copy of the sources, and what its builds compile and link."""

    def __init__(self, folder):
        self.folder, self.log = folder / "source", folder / "log"
        built = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
        for name in ("csrc", "rrattn"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=built)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, self.folder)
        compiler = write_program(folder / "cuda" / "bin" / "nvcc", COMPILER.format(log=self.log))
        self.loader = write_program(folder / "loader", LOADER)
        (folder / "cutlass" / "cute").mkdir(parents=True)
        self.environment = {
            **os.environ,
            **dict.fromkeys(("CC", "CXX"), str(compiler)),
            **dict.fromkeys(("LDSHARED", "LDCXXSHARED"), f"{compiler} -shared"),
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
        """The names of the files that this makes."""
        self.log.write_text("")
        process = self.run(*arguments, **options)
        assert process.returncode == 0, process.stderr
        commands = [line.split() for line in self.log.read_text().splitlines()]
        return {Path(words[words.index("-o") + 1]).name.split(".")[0] for words in commands if "-o" in words}

    def record(self, place="build/lib*/rrattn"):
        (path,) = self.folder.glob(f"{place}/_build_info.py")
        return path.read_text()


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


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
    assert {"_direct", "direct", "dispatch", "run_bounds"} <= with_gpu
    assert not checkout.build(archs="90a")
    assert {"_direct", "direct"} <= checkout.build()
    assert "_direct" in on_cpu
    moved = checkout.folder.parent / "other"
    (moved / "cute").mkdir(parents=True)
    assert "estimate_bf16_64" in checkout.build(archs="90a", environment={"RRATTN_CUTLASS": str(moved)})


def test_the_record_has_the_architectures_of_the_operators(checkout):
    checkout.build(archs="90a")
    assert 'CUDA_ARCHS = ""' in checkout.record()  # the GPU kernels are in rrattn._direct alone
    assert "paddle_stream" in checkout.build(archs="90a", gpu_build=True)
    assert 'CUDA_ARCHS = "90a"' in checkout.record()
    checkout.build(gpu_build=True)
    assert 'CUDA_ARCHS = ""' in checkout.record()


def test_libraries_that_cannot_raise_an_error_fail_the_build(checkout):
    write_program(checkout.loader, "#!/bin/sh\necho rrattn._direct raises errors\nkill -SEGV $$\n")
    process = checkout.run()
    assert process.returncode != 0
    assert "the libraries were built, but do not work" in process.stderr
    assert "status -11" in process.stderr and str(checkout.folder.parent / "cuda/bin/nvcc") in process.stderr
    write_program(checkout.loader, "#!/bin/sh\necho rrattn._direct raises errors\n")  # and _ops does not
    assert checkout.run().returncode != 0
