"""Stand-ins for packages that PaddleFormers' modules import and a CPU has none of, so that their models can be built.

They have the names that are imported and compute nothing: experts that are spread over ranks (deep_ep), PaddleFleet's
models and Triton's kernels take no part in what the tests run.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from unittest import mock


class _AnyName(ModuleType):
    """A module in which every name is a class, to derive others from."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        members = {"encoder_or_decoder": None, "transform_rules": {}}  # of ModelType and GPTModelProvider
        return type(name, (), {"__module__": self.__name__, **members})


class _Triton(ModuleType):
    """Triton, whose decorators leave a function as it is."""

    __path__ = []
    __version__ = "3.1"
    constexpr = object

    @staticmethod
    def jit(function=None, **_):
        return function or (lambda decorated: decorated)


class _PaddleFleetOps(ModuleType):
    @staticmethod
    def is_deep_ep_available():
        return False


_STAND_INS = {
    "paddle.distributed.communication.deep_ep": _AnyName,
    "paddlefleet_ops": _PaddleFleetOps,
    "paddlefleet": _AnyName,
    "triton": _Triton,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self):
        self.made = []

    def find_spec(self, name, path=None, target=None):
        if any(name == known or name.startswith(known + ".") for known in _STAND_INS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        self.made.append(spec.name)
        known = max((known for known in _STAND_INS if spec.name.startswith(known)), key=len)
        return _STAND_INS[known](spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def stand_ins():
    """While modules are imported; afterwards the packages are missing again."""
    finder = _Finder()
    sys.meta_path.append(finder)  # behind what is installed
    try:
        with mock.patch("paddleformers.utils.import_utils.is_paddlefleet_available", return_value=True):
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            del sys.modules[name]
