"""The GPU architectures of a build: which it is for, which sources each concerns, and what nvcc is told of them.

They are named as nvcc does, 90a and the like; PTX stands for all others, whose drivers compile the kernels themselves.
setup.py says what the environment variables mean.

Hopper's own kernels, 90a, are compiled with Hopper's instructions. All else has Ampere's alone, and the machine code of
every GPU is made of the same PTX: the tested one, of which ptxas spills less than of instructions for 10.0 or 12.0.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

WITHOUT_GPU = "to build without the GPU kernels, set RRATTN_CUDA_ARCHS to nothing"
EVERY_GPU = ["80", "86", "89", "90a", "100", "120"]  # those in between run the machine code of the one before
FIRST_NVCC_FOR_HOPPER = (12, 5)  # older ones lack cudaGetDriverEntryPointByVersion
PTX = "PTX"
PORTABLE = "compute_80"  # the instructions of all but Hopper's own kernels
# Paddle's names, and what it takes them for.
PADDLE_NAMES = {
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "10.1",
    "Blackwell": "10.0;12.0+PTX",
}


def find_nvcc():
    """The compiler of the CUDA toolkit, or None."""
    on_path = shutil.which("nvcc")
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1]):
        if folder and Path(folder, "bin", "nvcc").is_file():
            return Path(folder, "bin", "nvcc")
    return None


def find_cutlass():
    """The folder of CUTLASS's headers."""
    folder = os.environ.get("RRATTN_CUTLASS")
    package = importlib.util.find_spec("cutlass_library")
    if folder is None and package is not None:
        folder = os.path.join(os.path.dirname(package.origin), "source", "include")
    if folder is None or not os.path.isdir(os.path.join(folder, "cute")):
        raise SystemExit(f"CUTLASS is not there: install nvidia-cutlass or set RRATTN_CUTLASS; {WITHOUT_GPU}")
    return folder


@functools.cache
def known():
    """What nvcc can build kernels for, the oldest first; without nvcc, and so without a build, EVERY_GPU."""
    nvcc = find_nvcc()
    if nvcc is None:
        return EVERY_GPU

    def answer(option):
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout

    numbers = sorted(map(int, re.findall(r"compute_(\d+)\b", answer("--list-gpu-arch"))))
    archs = [str(number) for number in numbers if number >= 80]
    release = re.search(r"release (\d+)\.(\d+)", answer("--version"))
    if "90" in archs and tuple(map(int, release.groups())) >= FIRST_NVCC_FOR_HOPPER:
        archs.insert(archs.index("90") + 1, "90a")
    return archs


def of_every_gpu():
    """EVERY_GPU as far as nvcc can. Where it is too old for Hopper's kernels, Hopper gets the portable ones."""
    archs = [arch for arch in EVERY_GPU if arch in known()]
    if "90a" not in archs and "90" in known():
        archs.append("90")
    return [*archs, PTX]


def of_capability(major, minor):
    """The best that nvcc can do for GPUs of a compute capability; None where there are no kernels for it."""
    if major < 8:
        return None
    if (major, minor) == (9, 0) and "90a" in known():
        return "90a"
    # Machine code runs within its major version, from its own minor version on.
    numbers = [arch for arch in known() if arch != "90a"]
    fitting = [arch for arch in numbers if int(arch) // 10 == major and int(arch) % 10 <= minor]
    return fitting[-1] if fitting else PTX


def of_gpus_here():
    """For the GPUs of this machine that there are kernels for."""
    query = shutil.which("nvidia-smi")
    if query is None:
        return []
    command = [query, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listing = subprocess.run(command, capture_output=True, text=True).stdout
    found = {(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", listing, re.MULTILINE)}
    return [arch for arch in (of_capability(*capability) for capability in sorted(found)) if arch]


def of_paddle_setting(setting):
    """For those of PADDLE_CUDA_ARCH_LIST that there are kernels for."""
    archs = []
    for item in re.split(r"[;,\s]+", setting.strip(";, ")):
        for capability in PADDLE_NAMES.get(item, item).split(";"):
            parts = re.fullmatch(r"(\d+)\.?(\d)a?(\+PTX)?", capability)
            if parts is None:
                names = ", ".join(PADDLE_NAMES)
                raise SystemExit(
                    f"PADDLE_CUDA_ARCH_LIST has {item}, but allowed are 8.0, 8.0+PTX and the like, {names}"
                )
            arch = of_capability(int(parts[1]), int(parts[2]))
            if arch is not None:
                archs += [arch, PTX] if parts[3] else [arch]
    if not archs:
        raise SystemExit(
            f"PADDLE_CUDA_ARCH_LIST is {setting!r}, but rrattn's kernels are for 8.0 and newer; {WITHOUT_GPU}"
        )
    return archs


def of_own_setting(setting):
    """As RRATTN_CUDA_ARCHS has them."""
    if setting.split() == ["all"]:
        return of_every_gpu()
    allowed = [*known(), PTX]
    for arch in setting.split():
        if arch not in allowed:
            raise SystemExit(
                f"RRATTN_CUDA_ARCHS has {arch}, but supported by rrattn and {find_nvcc() or 'nvcc'} are: "
                f"{' '.join(allowed)}; or all"
            )
    return setting.split()


def choose(paddle_is_gpu_build):
    """The architectures of this build; none: without GPU kernels."""
    own = os.environ.get("RRATTN_CUDA_ARCHS")
    # Taken away, since what Paddle 3.3 builds an extension with reads it too, and fails where it has more than numbers.
    of_paddle = os.environ.pop("PADDLE_CUDA_ARCH_LIST", "").strip(";, ")
    if own is not None:
        archs = of_own_setting(own)
    elif not paddle_is_gpu_build:
        archs = []
    elif of_paddle:
        archs = of_paddle_setting(of_paddle)
    else:
        archs = of_gpus_here() or of_every_gpu()
    return list(dict.fromkeys(archs))


def of_source(source, archs):
    """Those of a build's that a CUDA source is for, by its folder in csrc/cuda."""
    folder = Path(source).relative_to("csrc/cuda").parts[0]
    if folder == "sm90":
        return [arch for arch in archs if arch == "90a"]
    if folder == "sm80":
        return [arch for arch in archs if arch != "90a"]
    return [arch for arch in archs if arch != "90" or "90a" not in archs]  # what is for all, once for Hopper


def flags(archs):
    """What tells them to nvcc."""
    # nvcc goes through the source once for all that have the same instructions.
    given = []
    for arch in archs:
        instructions = "compute_90a" if arch == "90a" else PORTABLE
        given.append(f"-gencode=arch={instructions},code={PORTABLE if arch == PTX else f'sm_{arch}'}")
    return given


def object_name(source):
    """The file name of a CUDA source's object. Base names of sources would collide in an archive."""
    return "-".join(Path(source).relative_to("csrc/cuda").with_suffix(".o").parts)
