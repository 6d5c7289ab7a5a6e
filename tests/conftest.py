"""Fixtures of the kernel tests. tests/gpu overrides `make_kernels` with its own arrays and keeps the rest."""

import harness
import numpy as np
import pytest

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


@pytest.fixture(params=direct.available_simd())
def simd(request):
    """Each instruction set of this machine in turn."""
    before = direct.simd()
    direct.set_simd(request.param)
    yield request.param
    direct.set_simd(before)
