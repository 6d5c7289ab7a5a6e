"""`rrattn info`: the versions and devices that what rrattn does here may depend on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from . import _HAS_PADDLE, __version__, direct

if _HAS_PADDLE:
    import paddle

    from . import _build_info

MODEL_LIBRARIES = {"paddlefleet": "PaddleFleet", "paddleformers": "PaddleFormers", "paddlenlp": "PaddleNLP"}


@dataclass(frozen=True)
class Gpu:
    """A GPU that Paddle sees, by its number there."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    has_kernels: bool
    """Whether this build of the operators has kernels for it."""

    def __str__(self) -> str:
        major, minor = self.capability
        return f"gpu:{self.index}, {self.name}, compute capability {major}.{minor}"


def gpus() -> list[Gpu]:
    """The GPUs that Paddle sees: none without a CUDA build of it."""
    if not _HAS_PADDLE or not paddle.is_compiled_with_cuda():
        return []
    # sm_90a is for compute capability 9.0 and no other.
    with_kernels = {arch.rstrip("a") for arch in _build_info.CUDA_ARCHS.split()}
    found = []
    for index in range(paddle.device.cuda.device_count()):
        major, minor = paddle.device.cuda.get_device_capability(index)
        name = paddle.device.cuda.get_device_name(index)
        found.append(Gpu(index, name, (major, minor), f"{major}{minor}" in with_kernels))
    return found


def lines() -> list[str]:
    """One fact a line: a name, a colon and what there is."""
    return [
        f"rrattn: {__version__}, in {Path(__file__).parent}",
        f"Python: {platform.python_version()}, {platform.machine()}, {platform.platform()}",
        f"NumPy: {np.__version__}",
        *_paddle_lines(),
        *(f"{name}: {_version(package)}" for package, name in MODEL_LIBRARIES.items() if _version(package)),
        f"SIMD: {direct.simd()} in use, available: {', '.join(direct.available_simd())}",
        f"threads: {direct.default_num_threads()} by default",
        *_gpu_lines(),
    ]


def _version(package: str) -> str | None:
    """As installed, without importing it; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _paddle_lines() -> list[str]:
    if not _HAS_PADDLE:
        return ["Paddle: not installed, so that only rrattn.direct is there"]
    device = f"CUDA {paddle.version.cuda()}" if paddle.is_compiled_with_cuda() else "CPU"
    archs = ", ".join(f"sm_{arch}" for arch in _build_info.CUDA_ARCHS.split())
    return [
        f"Paddle: {paddle.__version__}, commit {paddle.version.commit}, {device} build",
        f"operators: built for Paddle {_build_info.PADDLE_VERSION}, commit {_build_info.PADDLE_COMMIT}, "
        + (f"with GPU kernels for {archs}" if archs else "without GPU kernels"),
    ]


def _gpu_lines() -> list[str]:
    if not _HAS_PADDLE:
        return ["GPU: none without Paddle"]
    if not paddle.is_compiled_with_cuda():
        return ["GPU: none, since this Paddle is a CPU build"]
    found = gpus()
    if not found:
        return ["GPU: Paddle sees none"]
    return [f"GPU: {gpu}, {'with' if gpu.has_kernels else 'NO'} kernels in this build" for gpu in found]
