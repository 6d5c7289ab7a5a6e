"""What there is on a GPU alone: large sizes, graphs, streams, devices, and the errors of what it does not take.

The tests of every kernel, tests/kernels, run on a GPU by themselves.
"""

import gpu_harness
import pytest

collect_ignore_glob = (
    ["test_*.py"] if gpu_harness.WHY_NOT else ["test_paddle_*.py"] if gpu_harness.WHY_NOT_PADDLE else []
)


@pytest.fixture(scope="session", params=gpu_harness.PLATFORMS, autouse=True)
def platform(request):
    """For all tests, also those that call rrattn.direct themselves."""
    with gpu_harness.path_in_use(gpu_harness.PATHS.get(request.param, "auto")):
        yield request.param


@pytest.fixture(scope="session")
def make_kernels():
    return gpu_harness.GpuKernels


@pytest.fixture(params=gpu_harness.GpuKernels.dtypes)
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def paddle_kernels():
    return gpu_harness.PaddleKernels()
