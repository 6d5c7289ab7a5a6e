"""Fixtures of the kernel tests, of the tests of builds, and of the model tests at the end.

A test of `kernels` runs on the CPU and, where they are, on a GPU and through Paddle's operators there: `-k gpu` runs
these alone. What a GPU cannot do is marked cpu_only; of the fixture `dtype` it takes no float32. Where the portable
kernels can be forced on a GPU, a test runs with each of their tables of tiles too, unless it is marked one_path or
one_table, since what it tests are the same kernels there.
"""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_harness
import harness
import numpy as np
import pytest
from cases import DTYPES

from rrattn import direct

PLATFORMS = {"cpu": harness.Kernels, **gpu_harness.PLATFORMS}


def pytest_report_header():
    if gpu_harness.WHY_NOT:
        return f"no kernels run on a GPU: {gpu_harness.WHY_NOT}"
    return f"Paddle's operators run on no GPU: {gpu_harness.WHY_NOT_PADDLE}" if gpu_harness.WHY_NOT_PADDLE else None


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


def runs(item):
    """Whether the platform of a test does what it tests."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    platform = parameters.get("platform", "cpu")
    if platform == "cpu":
        return True
    if item.path.parent.name == "gpu" and not fits_gpu_test(item, platform):
        return False
    if platform in gpu_harness.PATHS and not differs_by_path(item, platform):
        return False
    dtypes = PLATFORMS[platform].dtypes
    return item.get_closest_marker("cpu_only") is None and parameters.get("dtype", dtypes[0]) in dtypes


def fits_gpu_test(item, platform):
    """Whether a test of tests/gpu has something to test there: Paddle's operators run on the usual path alone."""
    if item.path.name.startswith("test_paddle_"):
        return platform == "gpu"
    return platform != "paddle-gpu" or "kernels" in item.fixturenames


def differs_by_path(item, platform):
    """Whether a test sees there what it does not on the usual path, or on the first of those that are forced."""
    if item.get_closest_marker("one_table"):
        return platform == next(iter(gpu_harness.PATHS))
    return item.get_closest_marker("one_path") is None


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", params=PLATFORMS)
def platform(request):
    """Where the kernels run: "cpu", "gpu", "gpu-portable-99KB" and so on, or "paddle-gpu"."""
    with gpu_harness.path_in_use(gpu_harness.PATHS.get(request.param, "auto")):
        yield request.param


@pytest.fixture(scope="session")
def make_kernels(platform):
    """make_kernels(layout=): the stages through rrattn.direct on poisoned outputs; on a CPU also with num_threads=."""
    return harness.Kernels if platform == "cpu" else gpu_harness.GpuKernels


@pytest.fixture(scope="session")
def kernels(platform):
    return PLATFORMS[platform]()


@pytest.fixture(params=DTYPES)
def dtype(request):
    """Each dtype that the kernels take."""
    return request.param


@pytest.fixture
def main_dtype(kernels):
    """The dtype of tests that need no more than one."""
    return kernels.dtypes[0]


@pytest.fixture(params=direct.available_simd())
def simd(request):
    """Each instruction set of this machine in turn."""
    before = direct.simd()
    direct.set_simd(request.param)
    yield request.param
    direct.set_simd(before)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The source distribution of this checkout.

    It is made beside links to all that lies here, so that what was built here could get into it, but for the list of
    files that an earlier one left, which would.
    """
    folder = tmp_path_factory.mktemp("sdist")
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
    return path


@pytest.fixture(scope="session")
def unpack(sdist):
    """unpack(folder): what the source distribution holds, and nothing that another test built of it."""

    def unpacked(folder):
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        return folder / sdist.name[: -len(".tar.gz")]

    return unpacked


@pytest.fixture
def unpacked_sdist(unpack, tmp_path):
    """In a folder whose path has spaces."""
    return unpack(tmp_path / "source distribution")


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


@pytest.fixture
def fleet(monkeypatch):
    """rrattn.integrations.paddlefleet, over the stand-in of PaddleFleet."""
    import paddlefleet_stand_in

    paddlefleet_stand_in.install(monkeypatch)
    yield importlib.import_module("rrattn.integrations.paddlefleet")
    sys.modules.pop("rrattn.integrations.paddlefleet", None)


@pytest.fixture
def by_oracle(monkeypatch):
    """by_oracle(function, ...): what it returns when the oracle computes the attention of models."""
    from model_oracle import oracle_forward

    import rrattn

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            calls = []
            patch.setattr(rrattn.RRAttention, "forward", lambda *a, **k: calls.append(0) or oracle_forward(*a, **k))
            result = function(*arguments, **options)
            assert calls
            return result

    return call
