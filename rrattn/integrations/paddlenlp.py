"""RRAttention in PaddleNLP models.

A LLaMA or Qwen2 attention layer projects, rotates and caches, then calls `scaled_dot_product_attention` of its module.
`enable(model, config)` gives each layer a function of its own in that place:

- PaddleNLP 3 keeps the function as `layer.attn_func`, which is replaced.
- PaddleNLP 2.8 reads it from the module at every call. There the layer's `forward` runs with a name space in which that
  name means the layer's own function; the module and other models stay as they are.

While a model is enabled, `config.use_rrattn` says at every call whether rrattn runs (True, as `enable` sets it) or the
attention that the model came with (False).
"""

from __future__ import annotations

import copy
import inspect
from types import FunctionType

from ..config import RRAttentionConfig
from ..layer import RRAttention
from .common import (
    attend,
    core_of,
    fleet_rank,
    make_core,
    refuse_settings,
    refuse_settings_of_a_part,
    report,
    set_core,
    settings_of,
)

FLAG = "use_rrattn"
SUPPORTED_LAYERS = {
    "paddlenlp.transformers.llama.modeling": "LlamaAttention",
    "paddlenlp.transformers.qwen2.modeling": "Qwen2Attention",
}

_FUNCTION = "scaled_dot_product_attention"  # by which name the modules know it
_PREVIOUS = "_rrattn_previous"  # (attribute of the layer that was replaced, what its __dict__ held or _ABSENT)
_PREVIOUS_FLAG = "_rrattn_previous_flag"  # what the config's flag was, or _ABSENT
_ABSENT = "absent"

# Arguments of scaled_dot_product_attention that rrattn has no answer to, unless they are None, False or 0.
_UNSUPPORTED = ("output_attentions", "alibi", "reshard_layer")
# Ways of a model's config to run that rrattn has no answer to when they are more than this.
_UNSUPPORTED_CONFIG = {"alibi": False, "context_parallel_degree": 1, "sep_parallel_degree": 1}


class LayerAttention:
    """The attention function of one layer, in the calling convention of the function that it replaces.

    Parameters
    ----------
    layer : paddle.nn.Layer
        The attention layer; its RRAttention is attached to it.
    original : callable
        The `scaled_dot_product_attention` that the layer called before, perhaps with arguments bound.
    """

    def __init__(self, layer, original):
        self.layer = layer
        self.original = original
        self.__signature__ = inspect.signature(original)  # recompute orders arguments by it

    def __call__(self, *args, **kwargs):
        """Attends; the arguments are those of the original.

        query_states is [B, Lq, Hq, D], the last Lq positions of the keys; key_states and value_states are
        [B, Lk, Hkv, D], or [B, Lk, Hq, D] where the layer has repeated the heads. Masks are as in `common.attend`.

        Returns
        -------
        Tensor
            [B, Lq, Hq * D], or [B * Lq, Hq * D] with sequence_parallel.

        Raises
        ------
        ValueError
            For attention weights, dropout, ALiBi, resharding, or a mask that rrattn cannot express.
        """
        if not getattr(self.layer.config, FLAG, True):
            return self.original(*args, **kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name in _UNSUPPORTED:
            if given.get(name) is not None and given[name] is not False:
                raise ValueError(f"rrattn does not support {name} in PaddleNLP models")
        dropout = getattr(given["config"], "attention_dropout", 0.0)
        if dropout and given.get("training", self.layer.training):
            raise ValueError(f"rrattn does not support attention dropout; set attention_dropout to 0.0, got {dropout}")

        out = attend(
            core_of(self.layer),
            given["query_states"],
            self._own_heads(given["key_states"]),
            self._own_heads(given["value_states"]),
            given["attention_mask"],
            given.get("attn_mask_startend_row_indices"),
            causal=True,
        )
        hidden_size = out.shape[2] * out.shape[3]
        return out.reshape([-1, hidden_size] if given["sequence_parallel"] else [0, 0, hidden_size])

    def _own_heads(self, states):
        """Keys or values without the repetition of their heads: [B, Lk, Hkv, D], bit for bit the same attention.

        A layer repeats each of its heads num_key_value_groups times in a row unless flash attention is on, and
        whether it did shows in their number: a repeated head is never one of the layer's own.
        """
        layer = self.layer
        assigned = getattr(layer, "kv_indices", None)  # of tensor-parallel ranks that share heads
        own = layer.num_key_value_heads if assigned is None else len(assigned)
        repeats = layer.num_key_value_groups
        return states[:, :, ::repeats] if repeats > 1 and states.shape[2] == own * repeats else states


class _ForwardWithOwnAttention:
    """A layer's forward in which the name `scaled_dot_product_attention` means `attention`."""

    def __init__(self, layer, attention):
        forward = type(layer).forward
        names = {**forward.__globals__, _FUNCTION: attention}
        self._layer, self._attention = layer, attention
        self._forward = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        self.__signature__ = inspect.signature(forward.__get__(layer))

    def __call__(self, *args, **kwargs):
        return self._forward(self._layer, *args, **kwargs)

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self._layer, memo), copy.deepcopy(self._attention, memo))


def enable(model, config: RRAttentionConfig | None = None):
    """See `rrattn.enable`."""
    from paddlenlp.utils.log import logger

    layers = _attention_layers(model)
    model_config = layers[0].config
    config = settings_of(model_config) if config is None else config
    refuse_settings(model_config, _UNSUPPORTED_CONFIG, "PaddleNLP")
    num_layers = model_config.num_hidden_layers
    refuse_settings_of_a_part(model, layers, num_layers, config)
    ranks = max(model_config.tensor_parallel_degree, 1)
    cores = [
        make_core(
            config,
            layer_index=index,
            num_layers=num_layers,
            num_heads=model_config.num_attention_heads,
            ranks=ranks,
            rank=fleet_rank(ranks),
        )
        for index in range(len(layers))
    ]
    for layer, core in zip(layers, cores):
        if core_of(layer) is None:
            _swap(layer)
        set_core(layer, core)
    setattr(model_config, FLAG, True)
    logger.info(report(model, "PaddleNLP", config, len(layers)))
    return model


def disable(model):
    """See `rrattn.disable`."""
    layers = _attention_layers(model)
    if core_of(layers[0]) is None:
        raise ValueError("rrattn is not enabled on this model")
    for layer in layers:
        name, previous = layer.__dict__.pop(_PREVIOUS)
        flag = layer.__dict__.pop(_PREVIOUS_FLAG)
        _restore(layer.__dict__, name, previous)
        set_core(layer, None)
    _restore(layers[0].config.__dict__, FLAG, flag)
    return model


def attention_cores(model) -> list[RRAttention | None]:
    """The RRAttention of each attention layer in order; None where rrattn is not enabled."""
    return [core_of(layer) for layer in _attention_layers(model)]


def _attention_layers(model):
    """A model's attention layers, in order."""
    layers = [
        layer
        for layer in model.sublayers(include_self=True)
        if any(SUPPORTED_LAYERS.get(base.__module__) == base.__name__ for base in type(layer).__mro__)
    ]
    if not layers:
        raise ValueError(
            f"found no attention layers in {type(model).__name__}: rrattn supports the PaddleNLP layers "
            f"{', '.join(SUPPORTED_LAYERS.values())}"
        )
    return layers


def _swap(layer):
    """Puts the layer's own attention function where it calls `scaled_dot_product_attention`."""
    if hasattr(layer, "attn_func"):
        name, own = "attn_func", LayerAttention(layer, layer.attn_func)
    else:
        forward = type(layer).forward
        if _FUNCTION not in forward.__code__.co_names:
            raise ValueError(f"{type(layer).__name__} calls no {_FUNCTION}: rrattn does not know this PaddleNLP")
        name, own = "forward", _ForwardWithOwnAttention(layer, LayerAttention(layer, forward.__globals__[_FUNCTION]))
    layer.__dict__[_PREVIOUS] = name, layer.__dict__.get(name, _ABSENT)
    layer.__dict__[_PREVIOUS_FLAG] = layer.config.__dict__.get(FLAG, _ABSENT)
    layer.__dict__[name] = own


def _restore(attributes, name, previous):
    """Undoes an assignment to attributes[name], which held `previous`."""
    if isinstance(previous, str) and previous == _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = previous
