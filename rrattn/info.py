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
HOPPER_KERNELS = "Hopper's own kernels"


@dataclass(frozen=True)
class Gpu:
    """A GPU that Paddle sees, by its number there."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    kernels: str | None
    """Those of the operators in this build that it gets; None where there are none for it."""

    def __str__(self) -> str:
        major, minor = self.capability
        kernels = f"with {self.kernels}" if self.kernels else "NO kernels in this build"
        return f"gpu:{self.index}, {self.name}, compute capability {major}.{minor}, {kernels}"


def gpus() -> list[Gpu]:
    """The GPUs that Paddle sees: none without a CUDA build of it."""
    if not _HAS_PADDLE or not paddle.is_compiled_with_cuda():
        return []
    archs = _build_info.CUDA_ARCHS.split()
    found = []
    for index in range(paddle.device.cuda.device_count()):
        major, minor = paddle.device.cuda.get_device_capability(index)
        name = paddle.device.cuda.get_device_name(index)
        has_kernels = any(_runs_on(arch, major, minor) for arch in archs)
        found.append(Gpu(index, name, (major, minor), _kernels_of(index) if has_kernels else None))
    return found


def built_for() -> str:
    """What the operators are built for."""
    version, commit = _build_info.PADDLE_VERSION, _build_info.PADDLE_COMMIT
    return f"built for Paddle {version}, commit {commit}, {_kernels_for(_build_info.CUDA_ARCHS)}"


def _kernels_of(index: int) -> str:
    """In words, what the dispatch chooses for a GPU that there are kernels for."""
    try:
        name = direct.gpu_kernels(index, "auto")  # operators are always on that path
    except (RuntimeError, ValueError) as error:  # of a driver, or of libraries that were not built together
        return f"kernels that rrattn.direct cannot tell ({error})"
    if name == "hopper":
        return HOPPER_KERNELS
    return f"portable kernels, tiles for {name.rpartition('-')[2].replace('KB', ' KB')} of shared memory"


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability runs what is built for an architecture: as csrc/cuda/gpu_path.cpp."""
    if arch == "90a":
        return (major, minor) == (9, 0)
    if arch == "PTX":  # 8.0's, which runs on all from there on
        return major >= 8
    of_arch = divmod(int(arch), 10)
    return of_arch[0] == major and of_arch[1] <= minor  # machine code runs within its major version


def lines() -> list[str]:
    """One fact a line: a name, a colon and what there is."""
    return [
        f"rrattn: {__version__}, in {Path(__file__).parent}",
        f"Python: {platform.python_version()}, {platform.machine()}, {platform.platform()}",
        f"NumPy: {np.__version__}",
        *_paddle_lines(),
        *(f"{name}: {_version(package)}" for package, name in MODEL_LIBRARIES.items() if _version(package)),
        f"rrattn.direct: {_kernels_for(direct.cuda_archs())}",
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


def _kernels_for(archs: str) -> str:
    names = ", ".join(arch if arch == "PTX" else f"sm_{arch}" for arch in archs.split())
    return f"with GPU kernels for {names}" if names else "without GPU kernels"


def _paddle_lines() -> list[str]:
    if not _HAS_PADDLE:
        return ["Paddle: not installed, so that only rrattn.direct is there"]
    device = f"CUDA {paddle.version.cuda()}" if paddle.is_compiled_with_cuda() else "CPU"
    return [
        f"Paddle: {paddle.__version__}, commit {paddle.version.commit}, {device} build",
        f"operators: {built_for()}",
    ]


def _gpu_lines() -> list[str]:
    if not _HAS_PADDLE:
        return ["GPU: none without Paddle"]
    if not paddle.is_compiled_with_cuda():
        return ["GPU: none, since this Paddle is a CPU build"]
    found = gpus()
    if not found:
        return ["GPU: Paddle sees none"]
    return [f"GPU: {gpu}" for gpu in found]
