"""RRAttention in PaddleFormers models.

PaddleFormers looks `config._attn_implementation` up in a table of attention functions at every forward. This file
adds "rrattn" to it, so that

    model.config._attn_implementation = "rrattn"

runs with the settings of the model's config (or the defaults), as they are at each call, and `enable(model, config)`
with chosen ones. `enable` sets the flag for that model alone, also where others share its config.

Some layers follow the flag late or not at all: ERNIE's read it once, when the model is built; Gemma 3's fall back to
"sdpa"; others look nothing up. Then rrattn would not run although the flag says so, or another function would run
without the causal mask, which PaddleFormers leaves out wherever the flag is not "eager". So the table's other functions
refuse a layer whose config says "rrattn", and a model raises an error, after its first call, when none of its layers
came here.
"""

from __future__ import annotations

import functools
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Callable

from .common import (
    Place,
    attend,
    core_of,
    fleet_rank,
    is_enabled,
    make_core,
    refuse_settings,
    report,
    set_cores,
    settings_of,
)
from .model_library import ModelLibrary, OwnFlag
from .own_flag import is_view

if TYPE_CHECKING:
    from types import ModuleType

    from paddle import Tensor
    from paddle.nn import Layer

    from ..config import RRAttentionConfig
    from ..layer import RRAttention

NAME = "rrattn"
FLAG = "_attn_implementation"
SUPPORTED_MODELS = ("llama", "qwen2", "qwen3", "ernie4_5", "ernie4_5_moe")

# Fields of a model's config that rrattn does not support above these values.
_UNSUPPORTED_CONFIG = {"context_parallel_size": 1, "sep_parallel_size": 1}
_LAYER_FLAG = "attn_implementation"  # of layers that read the config's flag once, when they are built
_SETTINGS = "_rrattn_settings"  # of a core that was made by the flag: what the layer's config said then


# The flag


def register(interface_module: ModuleType) -> None:
    """Adds "rrattn" to the table in `paddleformers.nn.attention.interface`, and guards what else is in it."""
    table = interface_module.AttentionInterface
    table.register(NAME, rrattn_attention_forward)
    lookup = table.__getitem__

    def guarded_lookup(self: Any, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = lookup(self, name)
        return function if name == NAME else functools.partial(_other_attention, name, function)

    table.__getitem__ = guarded_lookup


def _other_attention(_name: str, _function: Callable[..., Any], module: Layer, *args: Any, **kwargs: Any) -> Any:
    """Calls another attention function of the table, unless the layer's config says that rrattn runs."""
    if getattr(getattr(module, "config", None), FLAG, None) == NAME:
        raise ValueError(
            f"{FLAG} is {NAME!r}, but {type(module).__name__} runs {_name!r}: it took its own from the config when the "
            f"model was built, or does not follow the flag. rrattn.enable(model) switches over models of the types "
            f"{', '.join(SUPPORTED_MODELS)}; others need another {FLAG}"
        )
    core = core_of(module)
    if core is not None:
        core.last_selection = None  # no longer what the layer attended last
    return _function(module, *args, **kwargs)


_in_a_model = ContextVar("rrattn: in the call of a model", default=False)
_came_here: weakref.WeakSet[Layer] = weakref.WeakSet()  # models that were seen to run rrattn by their config's flag


def watch(model_module: ModuleType) -> None:
    """Makes calls of models in `paddleformers.transformers.model_utils` notice that the flag had no effect."""
    call = model_module.PretrainedModel.__call__

    @functools.wraps(call)
    def watched_call(self: Layer, *args: Any, **kwargs: Any) -> Any:
        flag = getattr(getattr(self, "config", None), FLAG, None)
        if flag != NAME or _in_a_model.get() or self in _came_here:
            return call(self, *args, **kwargs)
        token = _in_a_model.set(True)  # its parts need no attention of their own
        try:
            out = call(self, *args, **kwargs)
        finally:
            _in_a_model.reset(token)
        if all(core_of(layer) is None for layer in self.sublayers()):
            raise ValueError(
                f"{FLAG} is {NAME!r}, but no attention layer of {type(self).__name__} looks it up: rrattn did not run"
            )
        _came_here.add(self)
        return out

    model_module.PretrainedModel.__call__ = watched_call


def rrattn_attention_forward(
    module: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    attn_mask_startend_row_indices: Tensor | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function, in PaddleFormers' calling convention.

    Parameters
    ----------
    module : paddle.nn.Layer
        The attention layer that calls. Where `enable` was not used, its RRAttention is made on the first call, and anew
        when the settings in its config have changed.
    query : Tensor
        [B, Hq, Lq, D], the last Lq positions of the keys; position embedding applied.
    key, value : Tensor
        [B, Hkv, Lk, D], the cache included.
    attention_mask : Tensor, optional
        [B, 1, Lq, Lk], additive or bool. It must be causal; padding, packing and sliding windows
        are read from it.
    attn_mask_startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv, Lk, 1|2|4] or [B, 1|Hkv, Lk]: packed documents. One bound means causal, four mean
        not.
    dropout, sink
        Not supported: anything but 0 and None is an error.
    scaling : float, optional
        Softmax scale. Default: 1 / sqrt(D).
    is_causal : bool, optional
        Default: the layer's is_causal, or True.

    Returns
    -------
    tuple of Tensor and None
        [B, Lq, Hq * D], and no attention weights.

    Raises
    ------
    ValueError
        For dropout, sink, another argument that is set, a mask that rrattn cannot express, settings in the config that
        are not allowed; and where the layer's config does not say that rrattn runs, or another model's says it.
    """
    flag = getattr(getattr(module, "config", None), FLAG, None)
    if flag != NAME == getattr(module, _LAYER_FLAG, None):
        raise ValueError(
            f"{FLAG} is {flag!r}, but {type(module).__name__} runs {NAME!r}: it does not follow the flag. Leave it to "
            "rrattn.enable(model) and rrattn.disable(model), or to the config that the model is built from"
        )
    if dropout:
        raise ValueError(f"rrattn does not support attention dropout; set it to 0.0, got {dropout}")
    if sink is not None:
        raise ValueError("rrattn does not support learned attention sinks; use another _attn_implementation")
    given = {name: argument for name, argument in kwargs.items() if argument is not None}
    if given:
        raise ValueError(f"rrattn does not support the attention arguments {given}")

    out = attend(
        _core_of(module),
        query.transpose([0, 2, 1, 3]),  # [B, Lq, Hq, D], a view
        key.transpose([0, 2, 1, 3]),
        value.transpose([0, 2, 1, 3]),
        attention_mask,
        attn_mask_startend_row_indices,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        softmax_scale=scaling,
    )
    return out.reshape([0, 0, out.shape[2] * out.shape[3]]), None


class PaddleFormers(ModelLibrary):
    """Its models look the attention function up by their config's flag, some layers by a copy that they took of it."""

    name = "PaddleFormers"

    def config_of(self, model: Layer) -> Any:
        if model.config.model_type not in SUPPORTED_MODELS:
            raise ValueError(
                f"rrattn supports the PaddleFormers models {', '.join(SUPPORTED_MODELS)}; "
                f"the model_type of this one is {model.config.model_type!r}"
            )
        return model.config

    def attention_layers(self, model: Layer) -> list[Layer]:
        """They are known by the layer_idx and scaling that they pass on."""
        layers = [layer for layer in model.sublayers() if hasattr(layer, "layer_idx") and hasattr(layer, "scaling")]
        if not layers:
            raise ValueError(f"found no attention layers in {type(model).__name__}")
        return sorted(layers, key=lambda layer: layer.layer_idx)

    def place(self, layer: Layer) -> Place:
        config = layer.config
        refuse_settings(config, _UNSUPPORTED_CONFIG, self.name)
        ranks = config.tensor_model_parallel_size
        return Place(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            ranks=ranks,
            rank=fleet_rank(ranks),
            layer_index=layer.layer_idx,
        )

    def replacements(self, layer: Layer) -> dict[str, object]:
        return {_LAYER_FLAG: NAME} if hasattr(layer, _LAYER_FLAG) else {}

    def own_flag(self) -> OwnFlag:
        from paddleformers.transformers import PretrainedConfig

        return OwnFlag(PretrainedConfig, FLAG, NAME)

    def running_core(self, layer: Layer) -> RRAttention | None:
        return _core_of(layer) if _runs(layer) else None

    def log(self, line: str) -> None:
        from paddleformers.utils.log import logger

        logger.info(line)


LIBRARY = PaddleFormers()


def _runs(layer: Layer) -> bool:
    """Whether the layer's flag, its config's and its own where it has one, says that rrattn runs."""
    return bool(getattr(layer.config, FLAG) == NAME == getattr(layer, _LAYER_FLAG, NAME))


def _core_of(layer: Layer) -> RRAttention:
    """The layer's RRAttention: as `enable` made it, or by what the config says now."""
    core = core_of(layer)
    if core is not None and is_enabled(layer):
        return core
    if not (hasattr(layer, "config") and hasattr(layer, "layer_idx")):
        raise ValueError(
            f"{type(layer).__name__} has no config and layer_idx, by which rrattn knows its settings: rrattn does not "
            f"support this model; use another {FLAG}"
        )
    if is_view(layer.config):
        raise ValueError(
            f"this {layer.config.model_type} model was built from the config of a model that rrattn is enabled on: "
            "enable rrattn on it as well, or build it from a copy of that config"
        )
    settings = settings_of(layer.config)
    if core is None or settings != vars(core).get(_SETTINGS):
        core = make_core(settings, LIBRARY.place(layer), layer.layer_idx)
        vars(core)[_SETTINGS] = settings
        set_cores([layer], [core])
        _report_once(layer.config, settings)
    return core


_last_report: tuple[weakref.ref[Any], RRAttentionConfig] | None = None


def _report_once(config: Any, settings: RRAttentionConfig) -> None:
    """Logs what the flag runs, for the first layer of a model and not for each."""
    global _last_report
    if _last_report is None or _last_report[0]() is not config or _last_report[1] != settings:
        num_layers = config.num_hidden_layers
        LIBRARY.log(report(f"a {config.model_type} model", LIBRARY.name, settings, range(num_layers), num_layers))
        _last_report = weakref.ref(config), settings
