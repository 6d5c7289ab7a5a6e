"""Which layers look up a library's table of attention functions, by their code; and for which layer a function does."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paddle.nn import Layer

_packages: dict[type, str] = {}  # class of a table -> package of its library


def add_table(table: type, package: str) -> None:
    """Makes the class of a library's table known."""
    _packages[table] = package


def package_of_table(layer: Layer) -> str | None:
    """The package of the library whose table of attention functions the code of a layer looks up; None for no table."""
    layer_class: Any = type(layer)
    held = filter(None, map(_function_of, vars(layer).values()))
    found = (_package_read_by(layer_class, function) for function in held)
    return _package_of_class(layer_class) or next(filter(None, found), None)


@functools.cache
def _package_of_class(layer_class: Any) -> str | None:
    forward = _function_of(layer_class.forward)
    return _package_read_by(layer_class, forward) if forward else None


def _package_read_by(layer_class: Any, function: FunctionType) -> str | None:
    """That of a table in a function of a layer, or in what it calls of the layer's class and of its own module."""
    seen: set[FunctionType] = set()
    ahead = [function]
    while ahead:
        function = ahead.pop()
        seen.add(function)
        for name in _names(function.__code__):
            named = function.__globals__.get(name)
            if type(named) in _packages:
                return _packages[type(named)]
            for callee in map(_function_of, (named, getattr(layer_class, name, None))):
                if callee and callee not in seen and callee.__module__ == function.__module__:
                    ahead.append(callee)
    return None


def _function_of(value: object) -> FunctionType | None:
    """The function in Python behind a method or a wrapper; None for what is none."""
    if not isinstance(value, (FunctionType, MethodType, CalledForLayer)):
        return None
    function = inspect.unwrap(value)
    function = function.__func__ if isinstance(function, MethodType) else function
    return function if isinstance(function, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    """Global names and attributes in a function's code and in that of its comprehensions and inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


_calling: ContextVar[Layer | None] = ContextVar("rrattn: the layer that a function was called for", default=None)


class CalledForLayer:
    """A function of a layer that calls the table with no layer, or another, which makes the layer known there.

    Parameters
    ----------
    layer : paddle.nn.Layer
    function : callable
        What the layer held.
    """

    def __init__(self, layer: Layer, function: Callable[..., Any]) -> None:
        self.layer = layer
        self.__wrapped__ = function
        self.__signature__ = inspect.signature(function)  # recompute orders arguments by it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _calling.set(self.layer)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _calling.reset(token)


def caller(module: Layer) -> Layer:
    """The layer that calls the table: the one that it is called with, where that is an attention layer."""
    known = hasattr(module, "config") and hasattr(module, "layer_idx")
    return module if known else _calling.get() or module


def functions_to_replace(layer: Layer) -> dict[str, object]:
    """The functions that a layer holds and that look up a table, each as one that makes the layer known there."""
    layer_class: Any = type(layer)
    return {
        name: CalledForLayer(layer, value)
        for name, value in vars(layer).items()
        if (function := _function_of(value)) and _package_read_by(layer_class, function)
    }
