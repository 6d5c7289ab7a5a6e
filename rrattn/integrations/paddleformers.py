"""RRAttention in PaddleFormers models.

PaddleFormers looks `config._attn_implementation` up in a table of attention functions at every forward. This file
adds "rrattn" to it, so that

    model.config._attn_implementation = "rrattn"

runs with default settings, and `enable(model, config)` with chosen ones. Each attention layer carries an
`RRAttention` of its own (in its `__dict__`, not as a sublayer, so that state and checkpoints stay what they are).
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import NamedTuple

import paddle

from ..config import RRAttentionConfig
from ..layer import RRAttention
from ..masks import startend_rows_from_dense

NAME = "rrattn"
SUPPORTED_MODELS = ("llama", "qwen2", "qwen3")

_CORE = "_rrattn"  # the RRAttention of an attention layer
_PREVIOUS = "_rrattn_previous"  # what _attn_implementation was before enable


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
    """
    if dropout:
        raise ValueError(f"rrattn does not support attention dropout; set it to 0.0, got {dropout}")
    if sink is not None:
        raise ValueError("rrattn does not support learned attention sinks; use another _attn_implementation")
    given = {name: argument for name, argument in kwargs.items() if argument is not None}
    if given:
        raise ValueError(f"rrattn does not support the attention arguments {given}")

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows = attn_mask_startend_row_indices
    if rows is not None and attention_mask is not None:
        raise ValueError("give either attention_mask or attn_mask_startend_row_indices to rrattn, not both")
    if rows is not None:
        rows = rows.unsqueeze(-1) if rows.ndim == 3 else rows
        causal = {1: True, 4: False}.get(rows.shape[-1], causal)
    elif attention_mask is not None:
        rows, causal = _rows_of_mask(attention_mask, batch_size=query.shape[0]), True

    out = _core_of(module)(
        query.transpose([0, 2, 1, 3]),  # [B, Lq, Hq, D], a view
        key.transpose([0, 2, 1, 3]),
        value.transpose([0, 2, 1, 3]),
        rows,
        causal=causal,
        softmax_scale=scaling,
    )
    return out.reshape([0, 0, out.shape[2] * out.shape[3]]), None


def enable(model, config: RRAttentionConfig | None = None):
    """See `rrattn.enable`."""
    config = RRAttentionConfig() if config is None else config
    model_type = model.config.model_type
    if model_type not in SUPPORTED_MODELS:
        raise ValueError(
            f"rrattn supports the PaddleFormers models {', '.join(SUPPORTED_MODELS)}; "
            f"the model_type of this one is {model_type!r}"
        )
    layers = _attention_layers(model)
    cores = [_make_core(layer, config) for layer in layers]
    previous = getattr(layers[0], _PREVIOUS, model.config._attn_implementation)
    for layer, core in zip(layers, cores):
        layer.__dict__[_CORE] = core
        layer.__dict__[_PREVIOUS] = previous
    model.config._attn_implementation = NAME
    return model


def disable(model):
    """See `rrattn.disable`."""
    layers = _attention_layers(model)
    if not hasattr(layers[0], _PREVIOUS):
        raise ValueError("rrattn is not enabled on this model")
    model.config._attn_implementation = getattr(layers[0], _PREVIOUS)
    for layer in layers:
        del layer.__dict__[_CORE], layer.__dict__[_PREVIOUS]
    return model


def layer_selections(model):
    """See `rrattn.layer_selections`."""
    cores = [layer.__dict__.get(_CORE) for layer in _attention_layers(model)]
    return [None if core is None else core.last_selection for core in cores]


def _attention_layers(model):
    """A model's attention layers in order, known by the layer_idx and scaling that they pass on."""
    layers = [layer for layer in model.sublayers() if hasattr(layer, "layer_idx") and hasattr(layer, "scaling")]
    if not layers:
        raise ValueError(f"found no attention layers in {type(model).__name__}")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def _core_of(module) -> RRAttention:
    core = module.__dict__.get(_CORE)
    if core is None:
        core = module.__dict__[_CORE] = _make_core(module, RRAttentionConfig())
    return core


def _make_core(layer, config: RRAttentionConfig) -> RRAttention:
    """The RRAttention of an attention layer: with its own threshold, and for this rank's heads."""
    model_config = layer.config
    ranks = model_config.tensor_model_parallel_size
    num_heads = model_config.num_attention_heads
    heads_here = num_heads // ranks
    first_head = heads_here * model_config.tensor_parallel_rank if ranks > 1 else 0

    threshold = config.layer_threshold(layer.layer_idx, model_config.num_hidden_layers)
    if not isinstance(threshold, float):
        if len(threshold) != num_heads:
            raise ValueError(
                f"the config gives {len(threshold)} thresholds to layer {layer.layer_idx}, "
                f"which has {num_heads} query heads"
            )
        threshold = threshold[first_head : first_head + heads_here]
    return RRAttention(replace(config, head_offset=config.head_offset + first_head), threshold=threshold)


class _MaskRows(NamedTuple):
    """The row bounds read from a dense mask, and what it takes to know that mask again.

    A mask is known by its memory and version rather than by object, since recompute hands over a new tensor on the
    same memory each time. That is safe while the memory is known to be in use: while the tensor first seen lives.
    """

    identity: tuple
    tensor: weakref.ref
    rows: paddle.Tensor


_last_mask: _MaskRows | None = None


def _rows_of_mask(mask, batch_size):
    """startend_rows_from_dense(mask), worked out once per mask and not per layer; int32 [B, 1|Hq, Lk, 1]."""
    global _last_mask
    if not paddle.in_dynamic_mode():
        raise ValueError(
            "rrattn reads a dense attention mask in dynamic mode only; "
            "in a static graph pass attn_mask_startend_row_indices instead"
        )
    identity = (mask.data_ptr(), mask.inplace_version, mask.dtype, tuple(mask.shape), tuple(mask.strides))
    last = _last_mask
    if last is None or last.identity != identity or last.tensor() is None:
        last = _last_mask = _MaskRows(identity, weakref.ref(mask), startend_rows_from_dense(mask))
    rows = last.rows
    return rows.expand([batch_size, -1, -1, -1]) if rows.shape[0] == 1 < batch_size else rows
