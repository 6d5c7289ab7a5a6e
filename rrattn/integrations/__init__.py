"""RRAttention inside model libraries.

`enable(model, threshold=0.9)` switches a model's attention over and `disable(model)` back; `layer_selections` and
`layer_densities` tell afterwards what each layer attended. The library is found from what the model's layers are. There
is one file per library, which is loaded only together with that library: importing rrattn imports none of them.

For libraries that look attention functions up by name, importing this module also registers the name "rrattn", and
lets models notice where that name has no effect: at once when the library is loaded already and otherwise at the moment
it gets loaded.

How to add a library: a module here under the name of its package, which joins _LIBRARIES below. It has a LIBRARY, an
instance of a subclass of `model_library.ModelLibrary`, whose methods say

- `attention_layers`: which layers of a model are its attention,
- `place`: which layer of the model one is, and which of its heads this rank has, so that its RRAttention can be made,
- `replacements`: which attributes a layer gets for as long as it is enabled, so that it calls its RRAttention: this is
  what is swapped in; what was there comes back by itself,
- `own_flag`, `config_of`, `running_core`: the library's flag for attention functions, where it has one,
- `log`: where its messages go.

If it has a table of attention functions to register in, that is one of the _HOOKS; `attention_table.py` has the rest.

What a layer then calls hands query, key, value and masks to `common.attend`, and refuses by name what the library asks
for beyond that. `paddlenlp.py` is an example of a library with a function to replace, `paddleformers.py` of one with a
table of functions, `paddlefleet.py` of one that takes a class of ours.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, TypeVar

from ..config import SETTINGS, RRAttentionConfig, required_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from paddle import Tensor
    from paddle.nn import Layer
    from typing_extensions import Unpack

    from ..config import Settings
    from ..layer import BlockSelection, RRAttention
    from .model_library import ModelLibrary

ModelT = TypeVar("ModelT", bound="Layer")

# Packages of the libraries; our module for one has its name. Where a model has layers of several, the first is meant.
_LIBRARIES = ("paddlefleet", "paddleformers", "paddlenlp")
# Module of a library -> our module and its function that is called with it: the library's table of attention
# functions, to which "rrattn" is added, and its models, which then notice a flag without effect. PaddleFormers' models
# are in PaddleFleet as well.
_HOOKS = {
    f"{package}.{module}": ("rrattn.integrations.paddleformers", function)
    for package in ("paddleformers", "paddlefleet")
    for module, function in (("nn.attention.interface", "register"), ("transformers.model_utils", "watch"))
}


def _hook(library_module: str) -> None:
    module, function = _HOOKS[library_module]
    getattr(importlib.import_module(module), function)(sys.modules[library_module])


class _HookWhenImported(importlib.abc.MetaPathFinder):
    """Lets a library's module load as usual, then hooks rrattn into it.

    So the order of the imports does not matter, and a program that never uses the library never pays for it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_hook(module: ModuleType) -> None:
            load(module)
            _hook(fullname)

        spec.loader.exec_module = load_and_hook  # type: ignore[method-assign]  # of this loader alone
        return spec


def _library_of(model: Layer) -> ModelLibrary:
    """The library whose attention layers a model has: one with a table that they look up, or that of its classes."""
    if any(module in sys.modules for module in _HOOKS):
        with_table: ModelLibrary | None = importlib.import_module(f"{__name__}.paddleformers").library_of(model)
        if with_table is not None:
            return with_table
    bases = {base for layer in model.sublayers(include_self=True) for base in type(layer).__mro__}
    packages = {base.__module__.partition(".")[0] for base in bases}
    for package in _LIBRARIES:
        if package in packages:
            library: ModelLibrary = importlib.import_module(f"{__name__}.{package}").LIBRARY
            return library
    raise ValueError(
        f"rrattn has no integration for {type(model).__module__}.{type(model).__qualname__}; "
        f"supported are models of {', '.join(_LIBRARIES)}"
    )


def enable(model: ModelT, config: RRAttentionConfig | None = None, **settings: Unpack[Settings]) -> ModelT:
    """Makes every attention layer of a model run RRAttention: prefill sparse, decoding steps dense.

    What was changed is logged once, by the model library's logger. Other models stay as they are, also those built from
    the same config object: the flag that says that rrattn runs (`_attn_implementation` in PaddleFormers, `use_rrattn`
    in PaddleNLP) is set in `model.config` for this model alone, where every other setting is still shared. It is not
    saved with the model, nor copied with the config alone; a copy of the model has it. When it raises an error, the
    model is as it was.

    Parameters
    ----------
    model : paddle.nn.Layer
        A model of PaddleFormers whose attention layers look up its table of attention functions, a LLaMA or Qwen2 model
        of PaddleNLP, or a model of PaddleFleet whose layer spec names
        `rrattn.integrations.paddlefleet.RRCoreAttention`. A family that rrattn is not tested with gets a warning that
        names it. Call it after loading the weights.
    config : RRAttentionConfig, optional
        All settings. Its threshold may differ per layer and per head.
    settings
        Fields of RRAttentionConfig by keyword, instead of a config. Those that are not given are as the model's config
        says, in attributes named `rrattn_threshold`, `rrattn_stride` and so on, one per field, over which keywords win;
        or else the defaults. A call does not go on from what an earlier one set.

    Returns
    -------
    The model itself.

    Raises
    ------
    TypeError
        For a config that is no RRAttentionConfig, a config and settings at once, and a keyword that is no setting.
    ValueError
        For a setting that is not allowed, a model of another kind, one in which nothing matches, a config that does not
        fit its number of layers or heads, or while `collect_stats` collects.

    Examples
    --------
    >>> rrattn.enable(model, threshold=0.9)
    >>> rrattn.enable(model, rrattn.RRAttentionConfig.from_json("config.json"))
    """
    if config is not None:
        if settings:
            raise TypeError(
                "rrattn.enable takes either a config or settings by keyword, but was given a config and "
                f"{', '.join(settings)}: write dataclasses.replace(config, ...) to change some settings of a config"
            )
        required_config(config)
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise TypeError(f"rrattn.enable has no setting {', '.join(unknown)}; the settings are {', '.join(SETTINGS)}")
    return _library_of(model).enable(model, config, settings)


def disable(model: ModelT) -> ModelT:
    """Undoes `enable`: the model, or the part that is given, runs the attention it ran before.

    Returns
    -------
    The model itself.

    Raises
    ------
    ValueError
        When rrattn was not enabled on the model, or while `collect_stats` collects.
    """
    return _library_of(model).disable(model)


def attention_cores(model: Layer) -> list[RRAttention | None]:
    """The `RRAttention` of each attention layer, in order; None where a layer does not run rrattn."""
    return _library_of(model).attention_cores(model)


def layer_selections(model: Layer) -> list[BlockSelection | None]:
    """What each attention layer selected in its last prefill.

    Returns
    -------
    list of BlockSelection or None
        One per layer, in order; None where a layer has not run yet, or does not run rrattn now.
    """
    return [None if core is None else core.last_selection for core in attention_cores(model)]


def layer_densities(model: Layer) -> list[Tensor | None]:
    """The share of visible blocks that each attention layer attended in its last prefill.

    Returns
    -------
    list of Tensor or None
        float32 [B, Hq] per layer, in order; None where a layer has not run yet, or only decoding steps, or does not run
        rrattn now.
    """
    return [None if selection is None else selection.density for selection in layer_selections(model)]


for _module in _HOOKS:
    if _module in sys.modules:
        _hook(_module)
sys.meta_path.insert(0, _HookWhenImported())
