"""Fixtures of the kernel tests, of the tests of builds, and of the model tests at the end.

tests/gpu overrides the kernels and the dtypes and keeps the rest.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import harness
import numpy as np
import pytest
from cases import DTYPES

from rrattn import direct


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def make_kernels():
    """make_kernels(layout=, num_threads=): the stages through rrattn.direct on poisoned outputs."""
    return harness.Kernels


@pytest.fixture(scope="session")
def kernels(make_kernels):
    return make_kernels()


@pytest.fixture(params=DTYPES)
def dtype(request):
    """Each dtype that the kernels take."""
    return request.param


@pytest.fixture
def main_dtype():
    """The dtype of tests that need no more than one."""
    return "float32"


@pytest.fixture(params=direct.available_simd())
def simd(request):
    """Each instruction set of this machine in turn."""
    before = direct.simd()
    direct.set_simd(request.param)
    yield request.param
    direct.set_simd(before)


@pytest.fixture(scope="session")
def unpacked_sdist(tmp_path_factory):
    """A folder whose path has spaces, with nothing in it but what the source distribution of this checkout holds.

    It is made beside links to all that lies here, so that what was built here could get into it, but for the list of
    files that an earlier one left, which would.
    """
    folder = tmp_path_factory.mktemp("source distribution")
    root = Path(__file__).resolve().parents[1]
    (folder / "checkout").mkdir()
    for path in root.iterdir():
        if path.suffix != ".egg-info":
            (folder / "checkout" / path.name).symlink_to(path)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "checkout", capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("rrattn-*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder)
    return folder / path.name[: -len(".tar.gz")]


# tiny_models skips what imports it where there is no model library, hence not at the top


@pytest.fixture
def model():
    """A tiny LLaMA, as the library makes it."""
    from tiny_models import make_model

    return make_model()


@pytest.fixture
def tokens():
    """Two rows of random tokens for it."""
    from tiny_models import make_tokens

    return make_tokens()
