"""The kernel tests on a GPU: torch tensors through rrattn.direct, in place of NumPy arrays.

They need torch, a Hopper GPU, and rrattn.direct built with the GPU kernels (see setup.py), and are left out elsewhere.
"""

import harness
import numpy as np
import pytest

try:
    import torch

    WHY_NOT = None if torch.cuda.is_available() else "torch sees no GPU"
except ImportError:
    WHY_NOT = "torch is not installed"

collect_ignore_glob = ["test_*.py"] if WHY_NOT else []

WORKSPACE_BYTES = 1 << 28


def pytest_report_header():
    return f"tests/gpu is left out: {WHY_NOT}" if WHY_NOT else None


class GpuKernels(harness.Kernels):
    """Kernels on torch tensors, with a workspace full of NaN; the GPU has no thread count."""

    def __init__(self, layout="contiguous"):
        super().__init__(layout)
        workspace = torch.full([WORKSPACE_BYTES // 4], float("nan"), device="cuda")
        self.options = {"workspace": workspace, "stream": torch.cuda.current_stream().cuda_stream}

    def allocate(self, storage):
        if storage.dtype == np.uint16:  # the bits of bfloat16
            return torch.from_numpy(storage.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(storage).cuda()

    def download(self, array):
        if array.dtype == torch.bfloat16:
            return array.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
        return array.cpu().numpy()

    def typed(self, dtype):
        return self.options


@pytest.fixture(scope="session")
def make_kernels():
    return GpuKernels
