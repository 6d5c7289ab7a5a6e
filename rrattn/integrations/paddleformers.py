"""RRAttention in PaddleFormers models.

PaddleFormers looks `config._attn_implementation` up in a table of attention functions at every forward. This file
adds "rrattn" to it, so that

    model.config._attn_implementation = "rrattn"

runs with the settings of the model's config (or the defaults), and `enable(model, config)` with chosen ones.
(ERNIE reads the flag when the model is built: set it in the config before, or use `enable`.)
"""

from __future__ import annotations

from ..config import RRAttentionConfig
from ..layer import RRAttention
from .common import attend, core_of, fleet_rank, make_core, refuse_settings, report, set_core, settings_of

NAME = "rrattn"
SUPPORTED_MODELS = ("llama", "qwen2", "qwen3", "ernie4_5", "ernie4_5_moe")

# Ways of a model's config to run that rrattn has no answer to when they are more than this.
_UNSUPPORTED_CONFIG = {"context_parallel_size": 1, "sep_parallel_size": 1}
_PREVIOUS = "_rrattn_previous"  # what the flags of the config and of the layer were before enable
_LAYER_FLAG = "attn_implementation"  # of ERNIE layers, which read the config's flag once, when they are built


def register(interface_module) -> None:
    """Adds "rrattn" to the table in `paddleformers.nn.attention.interface`."""
    interface_module.AttentionInterface.register(NAME, rrattn_attention_forward)


def rrattn_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask=None,
    attn_mask_startend_row_indices=None,
    dropout=0.0,
    sink=None,
    scaling=None,
    is_causal=None,
    **kwargs,
):
    """The attention function, in PaddleFormers' calling convention.

    Parameters
    ----------
    module : paddle.nn.Layer
        The attention layer that calls; its RRAttention is made on the first call if `enable` was not used.
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
        For dropout, sink, another argument that is set, or a mask that rrattn cannot express.
    """
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


def enable(model, config: RRAttentionConfig | None = None):
    """See `rrattn.enable`."""
    from paddleformers.utils.log import logger

    config = settings_of(model.config) if config is None else config
    model_type = model.config.model_type
    if model_type not in SUPPORTED_MODELS:
        raise ValueError(
            f"rrattn supports the PaddleFormers models {', '.join(SUPPORTED_MODELS)}; "
            f"the model_type of this one is {model_type!r}"
        )
    layers = _attention_layers(model)
    cores = [_make_core(layer, config) for layer in layers]
    for layer, core in zip(layers, cores):
        set_core(layer, core)
        flags = model.config._attn_implementation, getattr(layer, _LAYER_FLAG, None)
        layer.__dict__.setdefault(_PREVIOUS, flags)
        if hasattr(layer, _LAYER_FLAG):
            setattr(layer, _LAYER_FLAG, NAME)
    model.config._attn_implementation = NAME
    logger.info(report(model, "PaddleFormers", config, len(layers)))
    return model


def disable(model):
    """See `rrattn.disable`."""
    layers = _attention_layers(model)
    if not hasattr(layers[0], _PREVIOUS):
        raise ValueError("rrattn is not enabled on this model")
    for layer in layers:
        set_core(layer, None)
        model.config._attn_implementation, flag = layer.__dict__.pop(_PREVIOUS)
        if hasattr(layer, _LAYER_FLAG):
            setattr(layer, _LAYER_FLAG, flag)
    return model


def attention_cores(model) -> list[RRAttention | None]:
    """The RRAttention of each attention layer in order; None where neither `enable` nor the flag asked for it."""
    return [
        _core_of(layer) if getattr(layer, _LAYER_FLAG, model.config._attn_implementation) == NAME else core_of(layer)
        for layer in _attention_layers(model)
    ]


def _attention_layers(model):
    """A model's attention layers in order, known by the layer_idx and scaling that they pass on."""
    layers = [layer for layer in model.sublayers() if hasattr(layer, "layer_idx") and hasattr(layer, "scaling")]
    if not layers:
        raise ValueError(f"found no attention layers in {type(model).__name__}")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def _core_of(module) -> RRAttention:
    core = core_of(module)
    if core is None:
        core = _make_core(module, settings_of(module.config))
        set_core(module, core)
    return core


def _make_core(layer, config: RRAttentionConfig) -> RRAttention:
    refuse_settings(layer.config, _UNSUPPORTED_CONFIG, "PaddleFormers")
    return make_core(
        config,
        layer_index=layer.layer_idx,
        num_layers=layer.config.num_hidden_layers,
        num_heads=layer.config.num_attention_heads,
        ranks=layer.config.tensor_model_parallel_size,
        rank=fleet_rank(layer.config.tensor_model_parallel_size),
    )
