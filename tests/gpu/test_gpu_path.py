"""Which kernels the GPU gets."""

import gpu_harness
import pytest
import torch

from rrattn import direct

pytestmark = pytest.mark.one_path


@pytest.mark.parametrize("path", direct.available_gpu_paths())
def test_the_kernels_of_the_gpu_are_told(path):
    hopper = torch.cuda.get_device_capability() == (9, 0) and "90a" in direct.cuda_archs().split()
    if path != "auto" and f"gpu-{path}" not in gpu_harness.PATHS and (path != "portable" or not gpu_harness.PATHS):
        with pytest.raises(ValueError, match=torch.cuda.get_device_name()):
            direct.gpu_kernels(0, path)
        return
    largest = max(gpu_harness.PATHS.values(), key=lambda name: int(name[9:-2]), default=None)
    told = {"auto": "hopper" if hopper else largest, "portable": largest}.get(path, path)
    assert direct.gpu_kernels(0, path) == told
    with gpu_harness.path_in_use(path):
        assert direct.gpu_kernels() == told
