"""RRAttention in PaddleNLP models.

A LLaMA or Qwen2 attention layer projects, rotates and caches, then calls `scaled_dot_product_attention` of its module.
`enable(model, config)` gives each layer a function of its own in that place:

- PaddleNLP 3 keeps the function as `layer.attn_func`, which is replaced.
- PaddleNLP 2.8 reads it from the module at every call. There the layer's `forward` runs with a name space in which that
  name means the layer's own function; the module and other models stay as they are.

While a model is enabled, its `config.use_rrattn` says at every call whether rrattn runs (True, as `enable` sets it) or
the attention that the model came with (False). The flag is the model's own: others that share its config do not see it,
and it is not saved.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, Callable

from .common import Place, attend, core_of, fleet_rank, refuse_settings
from .model_library import ModelLibrary, OwnFlag

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.nn import Layer

    from ..layer import RRAttention

FLAG = "use_rrattn"
SUPPORTED_LAYERS = {
    "paddlenlp.transformers.llama.modeling": "LlamaAttention",
    "paddlenlp.transformers.qwen2.modeling": "Qwen2Attention",
}

_FUNCTION = "scaled_dot_product_attention"  # by which name the modules know it

# Arguments of scaled_dot_product_attention that rrattn does not support, unless they are None, False or 0.
_UNSUPPORTED = ("output_attentions", "alibi", "reshard_layer")
# Fields of a model's config that rrattn does not support above these values.
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

    def __init__(self, layer: Layer, original: Callable[..., Any]) -> None:
        self.layer = layer
        self.original = original
        self.__signature__ = inspect.signature(original)  # recompute orders arguments by it

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
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
        core = core_of(self.layer)
        assert core is not None, "a layer has this function while it is enabled"
        if not _runs(self.layer):
            core.last_selection = None  # no longer what the layer attended last
            out: Tensor = self.original(*args, **kwargs)
            return out
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
            core,
            given["query_states"],
            self._own_heads(given["key_states"]),
            self._own_heads(given["value_states"]),
            given["attention_mask"],
            given.get("attn_mask_startend_row_indices"),
            causal=True,
        )
        hidden_size = out.shape[2] * out.shape[3]
        return out.reshape([-1, hidden_size] if given["sequence_parallel"] else [0, 0, hidden_size])

    def _own_heads(self, states: Tensor) -> Tensor:
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

    def __init__(self, layer: Layer, attention: LayerAttention) -> None:
        forward = type(layer).forward
        names = {**forward.__globals__, _FUNCTION: attention}
        self._layer, self._attention = layer, attention
        self._forward = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        self.__signature__ = inspect.signature(forward.__get__(layer))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self._layer, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The function itself cannot be copied or pickled.
        return type(self), (self._layer, self._attention)


class PaddleNLP(ModelLibrary):
    """Its layers call a function that each enabled one gets of its own."""

    name = "PaddleNLP"

    def attention_layers(self, model: Layer) -> list[Layer]:
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

    def place(self, layer: Layer) -> Place:
        config = layer.config
        refuse_settings(config, _UNSUPPORTED_CONFIG, self.name)
        ranks = max(config.tensor_parallel_degree, 1)
        return Place(config.num_hidden_layers, config.num_attention_heads, ranks, fleet_rank(ranks))

    def replacements(self, layer: Layer) -> dict[str, object]:
        if hasattr(layer, "attn_func"):
            return {"attn_func": LayerAttention(layer, layer.attn_func)}
        forward = type(layer).forward
        if _FUNCTION not in forward.__code__.co_names:
            raise ValueError(f"{type(layer).__name__} calls no {_FUNCTION}: rrattn does not know this PaddleNLP")
        return {"forward": _ForwardWithOwnAttention(layer, LayerAttention(layer, forward.__globals__[_FUNCTION]))}

    def own_flag(self) -> OwnFlag:
        return OwnFlag(FLAG, True)

    def running_core(self, layer: Layer) -> RRAttention | None:
        return core_of(layer) if _runs(layer) else None

    def log(self, line: str) -> None:
        from paddlenlp.utils.log import logger

        logger.info(line)


LIBRARY = PaddleNLP()


def _runs(layer: Layer) -> bool:
    """Whether the layer, if enabled, runs rrattn: the flag of its config."""
    return bool(getattr(layer.config, FLAG, True))
