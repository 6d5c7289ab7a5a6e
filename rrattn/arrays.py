"""Tensors and arrays that users give to functions on the host: read as NumPy arrays, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union

import numpy as np
import paddle

from . import arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    ArrayLike = Union[paddle.Tensor, NDArray[Any], Sequence[Any]]
    """A tensor, a NumPy array, or nested lists of numbers or flags."""


def array_of(value: object, name: str) -> tuple[NDArray[Any], Any]:
    """(NumPy array, place) of a tensor, a NumPy array or nested lists, of numbers or flags.

    The place is where a result belongs: None, which is Paddle's default, unless a tensor was given. bfloat16 becomes
    float32.

    Raises
    ------
    TypeError
        For anything else, and for a tensor of a static graph, which has no values.
    """
    if isinstance(value, paddle.pir.Value):
        raise TypeError(f"{name} is part of a static graph, where it has no values: call this outside of it")
    if isinstance(value, paddle.Tensor):
        # NumPy would get bfloat16 as integers that hold its bits.
        host = value.cpu()
        return (host.astype("float32") if host.dtype == paddle.bfloat16 else host).numpy(), value.place
    array: NDArray[Any] | None
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = None
    if array is None or array.dtype.kind not in "biuf":
        raise arguments.refused(value, name, "a Tensor, a NumPy array or nested lists of numbers")
    return array, None


def array_of_dtype(value: object, name: str, dtype: str) -> tuple[NDArray[Any], Any]:
    """The same, when it has the dtype of this name.

    Raises
    ------
    ValueError
        When it has another.
    """
    array, place = array_of(value, name)
    if array.dtype != dtype:
        raise ValueError(f"{name} must be of dtype {dtype}, got {getattr(value, 'dtype', array.dtype)}")
    return array, place
