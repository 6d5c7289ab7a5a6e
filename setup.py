"""Builds the kernels once, as a static library that knows no framework, and two thin extensions over it:

rrattn._ops     the Paddle operators (skipped where Paddle is not installed)
rrattn._direct  the same stages over DLPack, for kernel work beside other array libraries
"""

import importlib.util
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
STRICT = ["-Wall", "-Wextra", "-Werror"]
CORE_SOURCES = sorted(glob("csrc/core/*.cpp") + glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def direct_extension():
    return Extension(
        "rrattn._direct",
        ["csrc/bindings/direct.cpp"],
        include_dirs=[pybind11.get_include()],
        depends=HEADERS + CORE_SOURCES,  # relinks when the core library changes
        extra_compile_args=COMPILE_ARGS + STRICT,
        extra_link_args=["-fopenmp"],
    )


def paddle_extension():
    """The operator library, and a record of the Paddle it is for: another one may kill the process that loads it."""
    import paddle
    from paddle.utils.cpp_extension import CppExtension

    info = f'PADDLE_VERSION = "{paddle.__version__}"\nPADDLE_COMMIT = "{paddle.version.commit}"\n'
    Path("rrattn/_build_info.py").write_text('"""Written by setup.py."""\n\n' + info)
    extension = CppExtension(
        sources=["csrc/bindings/paddle_ops.cpp"],
        depends=HEADERS + CORE_SOURCES,  # relinks when the core library changes
        extra_compile_args=list(COMPILE_ARGS),  # Paddle appends to it
        extra_link_args=["-fopenmp"],
    )
    extension.name = "rrattn._ops"
    return extension


extensions = [direct_extension()]
if importlib.util.find_spec("paddle") is not None:
    extensions.append(paddle_extension())

core_library = {"sources": CORE_SOURCES, "obj_deps": {"": HEADERS}, "cflags": COMPILE_ARGS + STRICT}

ParallelCompile().install()
setup(libraries=[("rrattn_core", core_library)], ext_modules=extensions)
