"""Builds the kernels once, as static libraries that know no framework, and two thin extensions over them:

rrattn._ops     the Paddle operators (skipped where Paddle is not installed)
rrattn._direct  the same stages over DLPack, for kernel work beside other array libraries

The GPU kernels need the nvcc in CUDA_HOME, /usr/local/cuda or PATH, and CUTLASS. They are built into both where Paddle
is a GPU build, and elsewhere into rrattn._direct on request. Environment variables:

RRATTN_CUDA_ARCHS=90a    GPU architectures, separated by spaces; 90a (Hopper) is the only one so far, and the default
                         where Paddle is a GPU build; set but empty: no GPU kernels
MAX_JOBS=N               compilers at once; default: one per core (each takes up to 4 GB)
RRATTN_CUTLASS=FOLDER    CUTLASS's include folder; default: that of the nvidia-cutlass package
"""

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
WITHOUT_GPU = "to build without the GPU kernels, set RRATTN_CUDA_ARCHS to nothing"
SUPPORTED_CUDA_ARCHS = ["90a"]

paddle = importlib.import_module("paddle") if importlib.util.find_spec("paddle") else None
paddle_is_gpu_build = paddle is not None and paddle.is_compiled_with_cuda()
CUDA_ARCHS = os.environ.get("RRATTN_CUDA_ARCHS", "90a" if paddle_is_gpu_build else "").split()
for arch in CUDA_ARCHS:
    if arch not in SUPPORTED_CUDA_ARCHS:
        raise SystemExit(f"RRATTN_CUDA_ARCHS has {arch}, but supported are: {' '.join(SUPPORTED_CUDA_ARCHS)}")

PADDLE_RECORD = ""
if paddle:
    PADDLE_RECORD = f'''"""Written by setup.py."""

PADDLE_VERSION = "{paddle.__version__}"
PADDLE_COMMIT = "{paddle.version.commit}"
CUDA_ARCHS = "{" ".join(CUDA_ARCHS if paddle_is_gpu_build else [])}"
'''

CORE_SOURCES = sorted(
    glob("csrc/core/*.cpp") + glob("csrc/cpu/*.cpp") + (glob("csrc/cuda/*.cpp") if CUDA_ARCHS else [])
)
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu")) if CUDA_ARCHS else []
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
EXPORTS = "csrc/bindings/exports.map"

# What the libraries must be able to do where they are loaded: raise an error that is formatted in C++.
RAISE_AN_ERROR = """
import sys
sys.path.insert(0, {folder!r})
from rrattn import direct
try:
    direct.set_simd("none")
except ValueError:
    print("rrattn._direct raises errors")
if {with_paddle}:
    import paddle, rrattn.library
    rows = paddle.to_tensor([[[[0.0] * 7]]], place=paddle.CPUPlace())
    try:
        rrattn.library.call("estimate", rows, rows, None, True, 8, 0, 1.0)
    except ValueError as error:
        assert "head_dim is 7," in str(error), error
        print("rrattn._ops raises errors")
"""


def find_cuda():
    """The folder of the CUDA toolkit."""
    on_path = shutil.which("nvcc")
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1]):
        if folder and Path(folder, "bin", "nvcc").is_file():
            return Path(folder)
    raise SystemExit(f"nvcc is not in CUDA_HOME, /usr/local/cuda or PATH; {WITHOUT_GPU}")


def find_cutlass():
    folder = os.environ.get("RRATTN_CUTLASS")
    package = importlib.util.find_spec("cutlass_library")
    if folder is None and package is not None:
        folder = os.path.join(os.path.dirname(package.origin), "source", "include")
    if folder is None or not os.path.isdir(os.path.join(folder, "cute")):
        raise SystemExit(f"CUTLASS is not there: install nvidia-cutlass or set RRATTN_CUTLASS; {WITHOUT_GPU}")
    return folder


def cuda_includes():
    return [str(find_cuda() / name) for name in ("include", "include/cccl")]  # cccl: where CUDA 13 keeps Thrust


def cuda_libraries():
    folders = [f"-L{find_cuda() / name}" for name in ("lib64", "lib")]
    return [*folders, "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


def cxx_runtime():
    """Files of the C++ runtime in this process, which holds Paddle where it is installed.

    Linked by their paths, ahead of what the compiler adds, they keep one that would link its runtime statically from
    giving each extension a copy of its own: exceptions and streams cannot pass from one copy to another.
    """
    for name in ("libstdc++.so.6", "libgcc_s.so.1"):
        try:
            ctypes.CDLL(name)
        except OSError:
            pass  # then another runtime is the process's
    with open("/proc/self/maps") as maps:
        mapped = sorted({line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line})
    return [path for path in mapped if os.path.basename(path).startswith(("libstdc++.so", "libgcc_s.so"))]


def is_stale(target, sources):
    return not os.path.exists(target) or os.path.getmtime(target) < max(map(os.path.getmtime, sources))


def write_if_changed(path, text):
    """So that what depends on the file is only made again when the text is another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


class BuildLibraries(build_clib):
    """Adds a library of the CUDA sources, which setuptools cannot compile."""

    def get_library_names(self):
        return [*super().get_library_names(), *(["rrattn_cuda"] if CUDA_SOURCES else [])]

    def run(self):
        super().run()
        if not CUDA_SOURCES:
            return
        command = [
            str(find_cuda() / "bin/nvcc"),
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS] + [f"-I{find_cutlass()}"]
        folder = Path(self.build_temp, "cuda")
        configuration = folder / "command"
        write_if_changed(configuration, shlex.join(command))
        objects = [str(folder / Path(source).with_suffix(".o").name) for source in CUDA_SOURCES]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count()))) as pool:
            jobs = [
                pool.submit(self.spawn, [*command, "-c", source, "-o", target])
                for source, target in zip(CUDA_SOURCES, objects)
                if is_stale(target, [source, *HEADERS, configuration])
            ]
            for job in jobs:
                job.result()
        self.compiler.create_static_lib(objects, "rrattn_cuda", output_dir=self.build_clib)


class BuildExtensions(build_ext):
    """Builds them again when they are configured otherwise, and then records the operators' Paddle and GPUs.

    Another Paddle may kill the process that loads them. The record lies beside them and is written once they are there,
    so that neither a failed build nor one for another place makes it wrong. At the end a fresh process loads what was
    built and lets it raise errors, which fails where the compiler's C++ runtime is not the process's.
    """

    def run(self):
        versions = [f"pybind11 {pybind11.__version__}", PADDLE_RECORD]
        configuration = Path(self.build_temp, "configuration")
        write_if_changed(configuration, "\n".join([*versions, *(repr(vars(one)) for one in self.extensions)]))
        for extension in self.extensions:
            extension.depends.append(str(configuration))
        super().run()
        if paddle:
            write_if_changed(Path(self.folder(), "rrattn/_build_info.py"), PADDLE_RECORD)
        self.check_errors()

    def folder(self):
        return os.path.abspath("" if self.inplace else self.build_lib)

    def check_errors(self):
        if not self.inplace:
            self.run_command("build_py")
        code = RAISE_AN_ERROR.format(folder=self.folder(), with_paddle=bool(paddle))
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if process.returncode or process.stdout.count("raises errors") != len(self.extensions):
            raise SystemExit(
                f"the libraries were built, but do not work: a process that lets them raise an error ended with status "
                f"{process.returncode}. Compiler: {shlex.join(self.compiler.compiler_so)}\n"
                f"{process.stdout}{process.stderr}"
            )


def options(*, with_cuda):
    """What both extensions pass to setuptools.Extension."""
    return {
        "define_macros": [("RRATTN_WITH_CUDA", None)] if with_cuda else [],
        "depends": [*HEADERS, *CORE_SOURCES, *CUDA_SOURCES, EXPORTS],  # relinks when a library changes
        "extra_link_args": [
            "-fopenmp",
            "-pthread",
            f"-Wl,--version-script={EXPORTS}",
            *cxx_runtime(),
            *(cuda_libraries() if with_cuda else []),
        ],
    }


def direct_extension():
    return Extension(
        "rrattn._direct",
        ["csrc/bindings/direct.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=COMPILE_ARGS + STRICT,
        **options(with_cuda=bool(CUDA_ARCHS)),
    )


def paddle_extension():
    from paddle.utils.cpp_extension import CppExtension

    with_cuda = bool(CUDA_ARCHS) and paddle_is_gpu_build
    extension = CppExtension(
        sources=["csrc/bindings/paddle_ops.cpp", *(["csrc/bindings/paddle_stream.cpp"] if with_cuda else [])],
        include_dirs=cuda_includes() if with_cuda else [],
        extra_compile_args=list(COMPILE_ARGS),  # Paddle appends to it
        **options(with_cuda=with_cuda),
    )
    extension.name = "rrattn._ops"
    return extension


extensions = [direct_extension(), *([paddle_extension()] if paddle else [])]
core_library = {"sources": CORE_SOURCES, "obj_deps": {"": HEADERS}, "cflags": COMPILE_ARGS + STRICT}

ParallelCompile().install()
setup(
    libraries=[("rrattn_core", core_library)],
    ext_modules=extensions,
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtensions},
)
