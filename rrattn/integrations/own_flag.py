"""A flag that one model has for itself, though it shares its config with others.

Model libraries read flags from a model's config, and two models may be built from one config object: the policy and
the reference of DPO, say. `give_own_flag` puts a view on the config in its place, in that model alone. The view has
the flag for itself; every other setting is still the shared config's, read and written by all who hold either.

A view belongs to its model: what is saved or copied of it alone is the shared config, as if there were no view.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex

from paddle import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHARED = "_rrattn_shared"  # slot of a view: the config that it is a view on


def give_own_flag(model: nn.Layer, configs: Iterable[object], flag: str, value: object, *, keep: bool) -> None:
    """Gives a model a flag of its own, in these configs wherever its layers hold them.

    Parameters
    ----------
    model : paddle.nn.Layer
    configs
        Those whose flag is meant: a model of pictures and text has others beside that of its text.
    flag : str
        Attribute of the configs.
    value
        Of the flag, for this model.
    keep : bool
        Whether views that the model has are its own, and stay. Otherwise they are another model's, from whose config
        this one was built.
    """
    flagged = {id(shared_of(config)) for config in configs}
    held = [place for place in _attributes(model) if id(shared_of(place[2])) in flagged]
    views = {id(shared_of(config)): config for *_, config in held if keep and is_view(config)}
    for *_, config in held:
        shared = shared_of(config)
        if id(shared) not in views:
            views[id(shared)] = _view(shared, flag, value)  # which fails, if anything does
    for layer, name, config in held:
        vars(layer)[name] = views[id(shared_of(config))]
    for view in views.values():
        setattr(view, flag, value)


def take_own_flag(model: nn.Layer) -> None:
    """Undoes `give_own_flag`: the model holds the shared configs again."""
    for layer, name, held in _attributes(model):
        if is_view(held):
            vars(layer)[name] = shared_of(held)


def is_view(config: object) -> bool:
    """Whether a config was put in place by `give_own_flag`."""
    return isinstance(config, _View)


def shared_of(config: Any) -> Any:
    """The config that a view is on; any other config as it is."""
    return getattr(config, _SHARED) if is_view(config) else config


def _attributes(model: nn.Layer) -> list[tuple[nn.Layer, str, Any]]:
    """(layer, name, value) of every attribute that a layer of the model holds."""
    return [(layer, name, held) for layer in model.sublayers(include_self=True) for name, held in vars(layer).items()]


class _View:
    """What the classes of views have beside those of configs; `_class_of_views` makes them."""

    __slots__ = ()

    def __copy__(self) -> Any:
        return copy.copy(shared_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shared = copy.deepcopy(shared_of(self), memo)
        with_its_model = any(isinstance(copied, nn.Layer) for copied in memo.values())
        return _view(shared, *_own(self)) if with_its_model else shared

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _view, (shared_of(self), *_own(self))


@cache
def _class_of_views(config_class: type, flag: str) -> type:
    """A class of configs that keeps the flag in a slot, which comes before what a config's __dict__ says."""
    members = {"__slots__": (_SHARED, flag), "__module__": config_class.__module__, "__doc__": config_class.__doc__}
    return type(config_class.__name__, (_View, config_class), members)


def _view(shared: Any, flag: str, value: object) -> Any:
    view: Any = object.__new__(_class_of_views(type(shared), flag))  # type: ignore[arg-type]  # classes are hashable
    object.__setattr__(view, "__dict__", vars(shared))  # the same, not a copy
    object.__setattr__(view, _SHARED, shared)
    object.__setattr__(view, flag, value)
    return view


def _own(view: Any) -> tuple[str, object]:
    """(flag, value) of a view."""
    _, flag = type(view).__slots__
    return flag, getattr(view, flag)
