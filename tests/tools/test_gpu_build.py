"""The GPU side of the build, as far as it goes without a GPU."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paddle.utils.cpp_extension.extension_utils import find_paddle_includes

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


@pytest.mark.parametrize("archs", ("80", "90a 100a", "sm_90a"))
def test_an_architecture_without_kernels_is_refused(archs, tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    environment = {**os.environ, "RRATTN_CUDA_ARCHS": archs}
    process = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode != 0
    assert f"RRATTN_CUDA_ARCHS has {archs.split()[-1]}, but supported are: 90a" in process.stderr
