"""The operators of rrattn in Paddle: loads the library that holds them, and calls them."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from typing import Any

import paddle
from paddle import _C_ops
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

from . import _build_info


def _library_path() -> Path:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_ops{suffix}")
        if path.exists():
            return path
    raise ImportError(
        f"rrattn's operator library is not built: {Path(__file__).parent} has no "
        f"_ops{importlib.machinery.EXTENSION_SUFFIXES[0]}. "
        "Install rrattn with `pip install --no-build-isolation .` where Paddle is installed."
    )


def _load() -> None:
    # A library built against another Paddle can end the process when it is loaded, so it is never tried.
    if _build_info.PADDLE_VERSION != paddle.__version__ or _build_info.PADDLE_COMMIT != paddle.version.commit:
        raise ImportError(
            f"rrattn was built for Paddle {_build_info.PADDLE_VERSION} (commit {_build_info.PADDLE_COMMIT}), "
            f"but this is Paddle {paddle.__version__} (commit {paddle.version.commit}). Install rrattn again, with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`, or install the Paddle it was built for."
        )
    load_op_meta_info_and_register_op(str(_library_path()))


_load()
# Paddle 2.6 has it elsewhere, for eager tensors alone.
_run_custom_op = getattr(_C_ops, "_run_custom_op", None) or paddle.base.core.eager._run_custom_op


def call(name: str, *arguments: object) -> Any:
    """Runs the operator rrattn_<name>: its inputs (None for an absent one), then its attributes, in order.

    Gradients flow to all outputs but integers, and to none where Paddle records none.
    """
    if not paddle.framework.in_dynamic_or_pir_mode():
        raise RuntimeError(
            "rrattn runs eagerly, under paddle.jit.to_static and in PIR programs, but this is a static program of the "
            "old kind: set FLAGS_enable_pir_api=1"
        )
    outputs = _run_custom_op(f"rrattn_{name}", *arguments)
    for output in outputs:
        if output.dtype == paddle.int32 or not paddle.is_grad_enabled():
            output.stop_gradient = True
    return outputs if len(outputs) > 1 else outputs[0]
