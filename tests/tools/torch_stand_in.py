"""NumPy as far as the GPU benchmarks take it for torch, so that they are tested without torch and a GPU."""

import importlib
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

import tools.bench

MODULES = ("gpu", "gpu_attend", "gpu_backward", "gpu_inputs", "gpu_rivals", "gpu_serving", "gpu_shapes", "records")


class Tensor(np.ndarray):
    """What the modules do with tensors that NumPy has under another name."""

    def int(self):
        return self.astype(np.int32)

    def contiguous(self):
        return np.ascontiguousarray(self).view(Tensor)

    def clone(self):
        return self.copy()

    def fill_(self, value):
        self.fill(value)

    def numel(self):
        return self.size


def tensor(array):
    return np.asarray(array).view(Tensor)


def make_torch():
    """A stand-in: tensors are NumPy's, and what it knows of the GPU is made up."""
    torch = MagicMock(name="torch")
    torch.int32, torch.uint8, torch.float32 = np.int32, np.uint8, np.float32
    torch.arange = lambda end, **_: tensor(np.arange(end))
    torch.empty = lambda shape, dtype, **_: tensor(np.empty(shape, dtype))
    torch.empty_like = np.empty_like
    torch.version.cuda = "13.0"
    torch.cuda.get_device_name = lambda: "a GPU"
    return torch


def forget_modules():
    """So that they are imported over the torch of the moment."""
    for name in MODULES:
        sys.modules.pop(f"tools.bench.{name}", None)
        vars(tools.bench).pop(name, None)


@contextmanager
def modules_over(torch, monkeypatch):
    """The modules of the benchmark as fields, imported over this torch; forgotten afterwards."""
    for name in ("torch", "torch.nn", "torch.nn.functional", "torch.nn.attention"):
        monkeypatch.setitem(sys.modules, name, torch)
    forget_modules()
    yield SimpleNamespace(**{name: importlib.import_module(f"tools.bench.{name}") for name in MODULES})
    forget_modules()
