"""Numbers, flags and sequences that users give: one check for each kind, wherever it is given.

Each function takes a value and, where it serves several arguments, the name of the argument, and returns the value as
plain Python. NumPy's scalars and its arrays of no dimension count as the numbers or flags that they hold. True and
False are not numbers, and numbers are not flags. Tensors are neither: to read one waits for its device, and in a static
graph there is nothing to read.

What is not allowed raises ValueError with the argument, the value and what is allowed.
"""

from __future__ import annotations

import ctypes
import math
import operator
import reprlib
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any, TypeVar, overload

import numpy as np

STRIDES = (2, 4, 8, 16, 32, 64)
"""Sample strides that can be used: divisors of the block size that leave at least two samples in a block."""

KEY_STRIDES = (1, *STRIDES)
"""The same for keys alone."""

MAX_LENGTH = 2**30
"""The largest number of tokens that the kernels take."""

QUANTIZATIONS = ("qk_int8_pv_fp8",)
"""What attention can be computed in, other than 16 or 32 bits."""

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1


ErrorT = TypeVar("ErrorT", bound=Exception)


class ArgumentKindError(TypeError, ValueError):
    """An argument of a kind that is never allowed.

    It is a TypeError and a ValueError as well, so that whoever reads settings from a file can catch one error for all
    bad ones.
    """


@overload
def refused(value: object, name: str, allowed: str) -> ArgumentKindError: ...
@overload
def refused(value: object, name: str, allowed: str, kind: type[ErrorT]) -> ErrorT: ...
def refused(value: object, name: str, allowed: str, kind: type[Exception] = ArgumentKindError) -> Exception:
    """The error for a value that is not allowed."""
    return kind(f"{name} is {shown(value)}, but must be {allowed}")


def shown(value: object) -> str:
    """A value as error messages show it: cut to a readable length, an array by its type alone."""
    value = plain(value)
    return f"a {type(value).__name__}" if _is_array(value) else reprlib.repr(value)


def integer(value: object, name: str, low: int | None = None, high: int | None = None) -> int:
    """Anything that Python takes as an index, from `low` to `high`."""
    allowed = "an integer"
    if low is not None:
        allowed += f" of at least {low}" if high is None else f" from {low} to {high}"
    found = _index(value)
    if found is None:
        raise refused(value, name, allowed)
    if (low is not None and found < low) or (high is not None and found > high):
        raise refused(value, name, allowed, ValueError)
    return found


def count(value: object, name: str) -> int:
    """An integer of at least 0."""
    return integer(value, name, low=0)


def int64_count(value: object, name: str) -> int:
    """The same for the kernels, which take int64: a larger integer becomes the largest of these."""
    return min(count(value, name), MAX_INT64)


def counts(value: object, name: str) -> tuple[int, ...]:
    """Any number of integers of at least 0."""
    given = entries(value)
    found = [index for index in map(_index, given or ()) if index is not None and index >= 0]
    if given is None or len(found) < len(given):
        raise refused(value if given is None else given, name, "a sequence of integers of at least 0")
    return tuple(found)


def length(value: object, name: str) -> int:
    """A number of tokens."""
    return integer(value, name, 0, MAX_LENGTH)


def most(value: object, name: str) -> int:
    """The most that there is of something, or None, which the kernels take as 0: as many as there is room for."""
    return 0 if value is None else integer(value, name, 1, MAX_INT64)


def head_offset(value: object) -> int:
    """The number of a head, below 2^63 since the kernels take int64."""
    offset = count(value, "head_offset")
    if offset > MAX_INT64:
        raise refused(value, "head_offset", "an integer of at least 0 and below 2^63", ValueError)
    return offset


def sample_stride(value: object) -> int:
    """One of STRIDES."""
    return _divisor(value, "stride", STRIDES)


def key_stride(value: object) -> int | None:
    """One of KEY_STRIDES; None stays None."""
    return None if value is None else _divisor(value, "key_stride", KEY_STRIDES)


def _divisor(value: object, name: str, divisors: tuple[int, ...]) -> int:
    stride = _index(value)
    if stride not in divisors:
        allowed = f"an integer and a divisor of 128 from {divisors[0]} to 64: {', '.join(map(str, divisors))}"
        raise refused(value, name, allowed, ArgumentKindError if stride is None else ValueError)
    return stride


def flag(value: object, name: str, allowed: str = "True or False") -> bool:
    """True or False."""
    if value is True or value is False:
        return value
    value = plain(value)
    if not isinstance(value, bool):
        raise refused(value, name, allowed)
    return value


def optional_flag(value: object, name: str) -> bool | None:
    """True, False or None."""
    return None if value is None else flag(value, name, "True, False or None")


def softmax_scale(value: object) -> float | None:
    """A number that is finite in float32, in which the kernels compute; None stays None."""
    if value is None:
        return None
    scale = _number(value, "softmax_scale", "a finite number")
    if not math.isfinite(_float32(scale)):
        raise ValueError(f"softmax_scale is {_in_float32(value, scale)}, but must be finite")
    return scale


def quantization(value: object) -> str | None:
    """One of QUANTIZATIONS; None stays None."""
    if value is None:
        return None
    allowed = f"None or {' or '.join(map(repr, QUANTIZATIONS))}"
    if not isinstance(value, str):
        raise refused(value, "quantization", allowed)
    if value not in QUANTIZATIONS:
        raise refused(value, "quantization", allowed, ValueError)
    return value


def spread(value: object) -> float:
    """A number of at least 0 that is finite in float32."""
    weight = _number(value, "spread", "a finite number of at least 0")
    if not (weight >= 0 and math.isfinite(_float32(weight))):
        raise ValueError(f"spread is {_in_float32(value, weight)}, but must be finite and at least 0")
    return weight


def min_share(value: object) -> float:
    """A number in [0, 1]."""
    share = _number(value, "min_share", "a number in [0, 1]")
    if not 0 <= share <= 1:
        raise ValueError(f"min_share is {shown(value)}, but must be in [0, 1]")
    return share


def threshold(value: object, name: str = "threshold", allowed: str = "a number in (0, 1]") -> float:
    """A number in (0, 1], in float32 too."""
    share = _number(value, name, allowed)
    if not 0 < share <= 1 or _float32(share) == 0:
        raise ValueError(f"{name} is {_in_float32(value, share)}, but must be in (0, 1]")
    return share


def thresholds(value: object, depth: int, name: str = "threshold") -> float | tuple[Any, ...]:
    """A threshold, or tuples of them up to the given depth."""
    given = entries(value) if depth > 0 else None
    if given is None:
        return threshold(value, name)
    if not given:
        raise refused(given, name, "a number in (0, 1] or a sequence of at least one", ValueError)
    return tuple(thresholds(entry, depth - 1, f"{name}[{i}]") for i, entry in enumerate(given))


def entries(value: object) -> list[Any] | None:
    """The entries of a sequence, an iterator or a NumPy array, in order; None for anything else.

    An iterator can be read only once, so callers go on with this list. Text, sets and mappings are not sequences.
    """
    value = plain(value)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)) or _is_array(value):
        return None
    return list(value)


def plain(value: object) -> Any:
    """NumPy's scalars and arrays as Python's numbers and lists, anything else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and not isinstance(value, (np.generic, type))


def _index(value: Any) -> int | None:
    """An integer as int; None for anything else."""
    if type(value) is int:
        return value
    value = plain(value)
    if isinstance(value, bool) or _is_array(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _number(value: Any, name: str, allowed: str) -> float:
    """A real number as float, infinite beyond its range; anything else is refused."""
    if type(value) is float:
        return value
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise refused(value, name, allowed)
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _float32(number: float) -> float:
    return ctypes.c_float(number).value


def _in_float32(value: object, number: float) -> str:
    """The value for an error message, with its value in float32 where that is what is wrong."""
    rounded = _float32(number)
    lost = (rounded == 0 or math.isinf(rounded)) and rounded != plain(value)
    return f"{shown(value)}, which is {rounded:g} in float32" if lost else shown(value)
