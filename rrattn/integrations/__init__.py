"""RRAttention inside model libraries.

`enable(model, config)` switches a model's attention over and `disable(model)` back; `layer_selections` and
`layer_densities` tell afterwards what each layer attended. The library is found from the model's class. There is
one file per library, which is loaded only together with that library: importing rrattn imports none of them.

For libraries that look attention functions up by name, importing this module also registers the name "rrattn", and
lets models notice where that name has no effect: at once when the library is loaded already and otherwise at the moment
it gets loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

from ..config import required_config

# Library -> our module for it.
_INTEGRATIONS = {
    "paddleformers": "rrattn.integrations.paddleformers",
    "paddlenlp": "rrattn.integrations.paddlenlp",
    "paddlefleet": "rrattn.integrations.paddlefleet",
}
# Module of a library -> our module and its function that is called with it: the library's table of attention
# functions, to which "rrattn" is added, and its models, which then notice a flag without effect.
_HOOKS = {
    "paddleformers.nn.attention.interface": ("rrattn.integrations.paddleformers", "register"),
    "paddleformers.transformers.model_utils": ("rrattn.integrations.paddleformers", "watch"),
}


def _hook(library_module: str) -> None:
    module, function = _HOOKS[library_module]
    getattr(importlib.import_module(module), function)(sys.modules[library_module])


class _HookWhenImported(importlib.abc.MetaPathFinder):
    """Lets a library's module load as usual, then hooks rrattn into it.

    So the order of the imports does not matter, and a program that never uses the library never pays for it.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_hook(module):
            load(module)
            _hook(fullname)

        spec.loader.exec_module = load_and_hook
        return spec


def _integration_of(model):
    for base in type(model).__mro__:
        module = _INTEGRATIONS.get(base.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module)
    raise ValueError(
        f"rrattn has no integration for {type(model).__module__}.{type(model).__qualname__}; "
        f"supported are models of {', '.join(_INTEGRATIONS)}"
    )


def enable(model, config=None):
    """Makes every attention layer of a model run RRAttention: prefill sparse, decoding steps dense.

    What was changed is logged once, by the model library's logger. Other models stay as they are, also those built from
    the same config object: the flag that says that rrattn runs (`_attn_implementation` in PaddleFormers, `use_rrattn`
    in PaddleNLP) is set in `model.config` for this model alone, where every other setting is still shared. It is not
    saved with the model, nor copied with the config alone; a copy of the model has it.

    Parameters
    ----------
    model : paddle.nn.Layer
        A LLaMA, Qwen2, Qwen3 or ERNIE 4.5 model of PaddleFormers, a LLaMA or Qwen2 model of PaddleNLP, or a model of
        PaddleFleet whose layer spec names `rrattn.integrations.paddlefleet.RRCoreAttention`. Call it after loading the
        weights.
    config : RRAttentionConfig, optional
        Its threshold may differ per layer and per head. Default: what the model's config says, in attributes named
        `rrattn_threshold`, `rrattn_stride` and so on, one per field of RRAttentionConfig; the defaults where it says
        nothing.

    Returns
    -------
    The model itself.

    Raises
    ------
    TypeError
        For a config that is no RRAttentionConfig.
    ValueError
        For a model of another kind, one in which nothing matches, a config that does not fit its number of layers or
        heads, or while `collect_stats` collects.
    """
    if config is not None:
        required_config(config)
    return _integration_of(model).enable(model, config)


def disable(model):
    """Undoes `enable`: the model, or the part that is given, runs the attention it ran before.

    Raises
    ------
    ValueError
        When rrattn was not enabled on the model, or while `collect_stats` collects.
    """
    return _integration_of(model).disable(model)


def attention_cores(model):
    """The `RRAttention` of each attention layer, in order; None where a layer does not run rrattn."""
    return _integration_of(model).attention_cores(model)


def layer_selections(model):
    """What each attention layer selected in its last prefill.

    Returns
    -------
    list of BlockSelection or None
        One per layer, in order; None where a layer has not run yet, or does not run rrattn now.
    """
    return [None if core is None else core.last_selection for core in attention_cores(model)]


def layer_densities(model):
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
