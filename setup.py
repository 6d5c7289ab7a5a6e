"""Builds the kernels once, as static libraries that know no framework, and two thin extensions over them:

rrattn._ops     the Paddle operators (skipped where Paddle is not installed)
rrattn._direct  the same stages over DLPack, for kernel work beside other array libraries

The GPU kernels need the nvcc in CUDA_HOME, /usr/local/cuda or PATH, and CUTLASS. They are built into both where Paddle
is a GPU build, and elsewhere into rrattn._direct on request. Environment variables:

RRATTN_CUDA_ARCHS        GPU architectures, separated by spaces: 90a, Hopper's own kernels; 80, 86, 89, 100, 120 and
                         what else nvcc knows, the portable kernels for that compute capability; 90, the portable ones
                         for Hopper; PTX, the portable ones for all other GPUs from 8.0 on, whose driver compiles them;
                         all: 80 86 89 90a 100 120 as far as nvcc can, and PTX; set but empty: no GPU kernels. Default
                         where Paddle is a GPU build: those of PADDLE_CUDA_ARCH_LIST, else of the GPUs that there are,
                         else all; where it is none: no GPU kernels
PADDLE_CUDA_ARCH_LIST    the same as Paddle takes it: "8.0 8.6 9.0+PTX", also with ; or , between, also "Ampere";
                         9.0 is 90a, +PTX after any is PTX, and what is older than 8.0 is left out
MAX_JOBS=N               compilers at once; default: as many as there are cores, and memory for (4 GB each for GPU
                         kernels, 1 GB each for the rest)
RRATTN_CUTLASS=FOLDER    CUTLASS's include folder; default: that of the nvidia-cutlass package
"""

import ctypes
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

BUILD_TOOLS = "pip install 'setuptools>=65' wheel 'pybind11>=2.12'"

if not (3, 9) <= sys.version_info[:2] <= (3, 12):
    raise SystemExit(f"this is Python {sys.version.split()[0]}, but rrattn supports Python 3.9 to 3.12")

try:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile
except ImportError:
    raise SystemExit(f"pybind11 is not installed, which the build needs: {BUILD_TOOLS}") from None

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import cuda_archs  # noqa: E402 - pip does not put this folder on the path

COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
paddle = importlib.import_module("paddle") if importlib.util.find_spec("paddle") else None
paddle_is_gpu_build = paddle is not None and paddle.is_compiled_with_cuda()
CUDA_ARCHS = cuda_archs.choose(paddle_is_gpu_build)


def refuse_another_paddle():
    """Ends a build that pip isolated where the environment that it installs into has another Paddle than the build.

    With -E, Python finds what that environment finds: pip hides its packages by way of PYTHONPATH. A Paddle that is
    itself on PYTHONPATH is what the user asked for, and where another tool isolates the build, there is none to find.
    """
    if str(Path(paddle.__file__).parents[1]) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return
    code = "from importlib.util import find_spec; spec = find_spec('paddle'); print(spec.origin if spec else '')"
    process = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True, check=True)
    found = process.stdout.strip()
    if not found or found == paddle.__file__:
        return
    version = runpy.run_path(str(Path(found).with_name("version") / "__init__.py"))
    if (version["full_version"], version["commit"]) == (paddle.__version__, paddle.version.commit):
        return
    raise SystemExit(
        f"{Path(found).parent} is Paddle {version['full_version']} (commit {version['commit']}), but an isolated build "
        f"makes operators for Paddle {paddle.__version__} (commit {paddle.version.commit}), which it could not load. "
        f"Build for the Paddle that is there: {BUILD_TOOLS}, then pip install --no-build-isolation ."
    )


PADDLE_RECORD = ""
if paddle:
    refuse_another_paddle()
    PADDLE_RECORD = f'''"""Written by setup.py."""

PADDLE_VERSION = "{paddle.__version__}"
PADDLE_COMMIT = "{paddle.version.commit}"
CUDA_ARCHS = "{" ".join(CUDA_ARCHS if paddle_is_gpu_build else [])}"
'''


def find_sources(pattern):
    """Files under csrc, on every machine the same, whatever it builds of them."""
    found = sorted(map(str, Path("csrc").glob(pattern)))
    if not found:
        raise SystemExit(f"{Path('csrc').absolute()} holds no {pattern}: these sources are not complete")
    return found


CORE_SOURCES = find_sources("core/**/*.cpp") + find_sources("cpu/**/*.cpp")
DISPATCH_SOURCES = find_sources("cuda/**/*.cpp")
CUDA_SOURCES = find_sources("cuda/**/*.cu")
HEADERS = find_sources("**/*.h") + find_sources("**/*.cuh")
EXPORTS = "csrc/bindings/exports.map"
BUILT_CUDA_SOURCES = [source for source in CUDA_SOURCES if cuda_archs.of_source(source, CUDA_ARCHS)]
# The settings of the dispatch are there without GPU kernels too.
DISPATCH_SOURCES = [source for source in DISPATCH_SOURCES if CUDA_ARCHS or source == "csrc/cuda/gpu_path.cpp"]
LIBRARY_SOURCES = CORE_SOURCES + DISPATCH_SOURCES + BUILT_CUDA_SOURCES


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
    import paddle, rrattn
    rows = paddle.to_tensor([[[[0.0] * 7]]], place=paddle.CPUPlace())
    try:
        rrattn.estimate_block_scores(rows, rows)
    except ValueError as error:
        assert "head_dim is 7," in str(error), error
        print("rrattn._ops raises errors")
"""


def find_cuda():
    """The folder of the CUDA toolkit."""
    nvcc = cuda_archs.find_nvcc()
    if nvcc is None:
        raise SystemExit(f"nvcc is not in CUDA_HOME, /usr/local/cuda or PATH; {cuda_archs.WITHOUT_GPU}")
    return nvcc.parents[1]


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


def memory():
    """Bytes that are free here, or fewer where a control group grants fewer."""
    with open("/proc/meminfo") as lines:
        sizes = dict(line.split(":") for line in lines)
    granted = int(sizes["MemAvailable"].split()[0]) * 1024  # counted in kB
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # version 2, version 1
        if os.path.isfile(limit):
            with open(limit) as file:
                text = file.read().strip()
            granted = granted if text == "max" else min(granted, int(text))
    return granted


def compilers_at_once(gigabytes_each):
    jobs = os.environ.get("MAX_JOBS")
    if jobs is None:
        return max(1, min(len(os.sched_getaffinity(0)), memory() // (gigabytes_each * 2**30)))
    if not jobs.isdecimal() or int(jobs) == 0:
        raise SystemExit(f"MAX_JOBS is {jobs!r}, but must be a whole number from 1 on")
    return int(jobs)


class BuildLibraries(build_clib):
    """Adds a library of the CUDA sources, which setuptools cannot compile.

    The dispatch is built again when it is for other architectures.
    """

    def get_library_names(self):
        return [*super().get_library_names(), *(["rrattn_cuda"] if CUDA_ARCHS else [])]

    def run(self):
        configuration = Path(self.build_temp, "cuda_archs")
        write_if_changed(configuration, " ".join(CUDA_ARCHS))
        dict(self.libraries)["rrattn_dispatch"]["obj_deps"][""].append(str(configuration))
        for archive in Path(self.build_clib).glob("librrattn_*.a"):
            archive.unlink()  # else it keeps the objects of an earlier build that this one has no more
        super().run()
        if not CUDA_ARCHS:
            return
        with ThreadPoolExecutor(compilers_at_once(gigabytes_each=4)) as pool:
            jobs = [pool.submit(self.compile_cuda, source) for source in BUILT_CUDA_SOURCES]
            objects = [job.result() for job in jobs]
        self.compiler.create_static_lib(objects, "rrattn_cuda", output_dir=self.build_clib)

    def compile_cuda(self, source):
        """Makes the object again where the source, a header or the command is another one; returns its path."""
        target = Path(self.build_temp, "cuda", cuda_archs.object_name(source))
        command = [
            str(find_cuda() / "bin/nvcc"),
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *cuda_archs.flags(cuda_archs.of_source(source, CUDA_ARCHS)),
            f"-I{cuda_archs.find_cutlass()}",
            "-c",
            source,
            "-o",
            str(target),
        ]
        configuration = target.with_suffix(".command")
        write_if_changed(configuration, shlex.join(command))
        if is_stale(target, [source, *HEADERS, configuration]):
            self.spawn(command)
        return str(target)


class BuildExtensions(build_ext):
    """Builds them again when they are configured otherwise, and then records the operators' Paddle and GPUs.

    Another Paddle may kill the process that loads them. The record lies beside them and is written once they are there,
    so that neither a failed build nor one for another place makes it wrong. At the end a fresh process loads what was
    built and lets it raise errors, which fails where the compiler's C++ runtime is not the process's.
    """

    def run(self):
        versions = [f"pybind11 {pybind11.__version__}", PADDLE_RECORD, f"GPU kernels for {CUDA_ARCHS}"]
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
        # -B: what it compiles of the Python files is not to be packed with them.
        process = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
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
        "depends": [*HEADERS, *LIBRARY_SOURCES, EXPORTS],  # relinks when a library changes
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
dispatch_library = {
    "sources": DISPATCH_SOURCES,
    "obj_deps": {"": list(HEADERS)},
    "macros": [("RRATTN_CUDA_ARCHS", f'"{" ".join(CUDA_ARCHS)}"')],
    "cflags": COMPILE_ARGS + STRICT,
}

ParallelCompile(default=compilers_at_once(gigabytes_each=1)).install()
setup(
    libraries=[("rrattn_core", core_library), ("rrattn_dispatch", dispatch_library)],
    ext_modules=extensions,
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtensions},
)
