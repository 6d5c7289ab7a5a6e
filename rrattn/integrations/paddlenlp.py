"""RRAttention in PaddleNLP models.

A LLaMA or Qwen2 attention layer projects, rotates and caches, then calls `scaled_dot_product_attention` of its module.
`enable(model, config)` gives each layer a function of its own in that place:

- PaddleNLP 3 keeps the function as `layer.attn_func`, which is replaced.
- PaddleNLP 2.8 reads it from the module at every call. There the layer's `forward` runs with a name space in which that
  name means the layer's own function; the module and other models stay as they are.

Where several ranks have a part of each sequence, by fleet's group "sep", a LLaMA layer follows its config:

- `sep_parallel_degree` (both versions): before rotation the layer exchanges tokens for heads, so that its attention
  sees whole sequences of some of the heads, and after it the other way round, by its `reshard_layer`. An enabled layer
  has an exchange of rrattn in that place: PaddleNLP's gives `paddle.distributed.alltoall` what it sends and where it
  receives in the order of Paddle before 3.0, so that the layer would attend what was in memory.
- `context_parallel_degree` (PaddleNLP 3): a rank has the chunks r and 2 ranks - 1 - r of each sequence, and
  `rrattn.distributed` runs instead of PaddleNLP's ring.

Row indices are those of whole sequences then. Qwen2's layers know neither.

While a model is enabled, its `config.use_rrattn` says at every call whether rrattn runs (True, as `enable` sets it) or
the attention that the model came with (False). The flag is the model's own: others that share its config do not see it,
and it is not saved.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, Callable

from paddle.distributed import fleet

from ..distributed import attend_in_context, exchange
from .common import (
    Place,
    attend,
    core_of,
    fleet_rank,
    fleet_sequence_group,
    refuse_settings,
    rows_of_mask,
    with_bounds,
)
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
_UNSUPPORTED = ("output_attentions", "alibi")
# Fields of a model's config that rrattn does not support above these values.
_UNSUPPORTED_CONFIG = {"alibi": False}
# Fields of a model's config by which ranks have a part of each sequence, and how they share the attention.
_BY_HEADS = "sep_parallel_degree"
_BY_CHUNKS = "context_parallel_degree"


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
        With sep_parallel_degree these have the whole sequences, of this rank's share of the heads; with
        context_parallel_degree, this rank's chunks of the sequences. Row indices have the whole sequences in both.

        Returns
        -------
        Tensor
            [B, Lq, Hq * D], or [B * Lq, Hq * D] with sequence_parallel. With sep_parallel_degree, this rank's part of
            the sequences, of all heads.

        Raises
        ------
        ValueError
            For attention weights, dropout, ALiBi, or a mask that rrattn cannot express. Where ranks have a part of each
            sequence, also for a cache, and a dense mask that hides more than what comes later, unless it has the whole
            sequences and so do the keys.
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

        query, key, value = given["query_states"], *map(self._own_heads, (given["key_states"], given["value_states"]))
        mask, rows = given["attention_mask"], given.get("attn_mask_startend_row_indices")
        split = _split_of(self.layer)
        if split is not None:
            mask = _mask_of_whole_sequences(mask, query, key, split)
        if split == _BY_CHUNKS:
            rows, causal = with_bounds(rows, True)
            out = attend_in_context(
                core, query, key, value, rows, group=_sequence_group(self.layer), layout="dual_chunk", causal=causal
            )
        else:
            out = attend(core, query, key, value, mask, rows, causal=True)
        reshard = given.get("reshard_layer")
        if reshard is not None:  # [B, S, a share of the heads, D] -> [B, S / ranks, Hq, D]
            out = reshard(out, split_axis=1, concat_axis=2)
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
        own //= _degree(layer, _BY_HEADS)
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
        tensor_ranks = _degree(layer, "tensor_parallel_degree")
        ranks, rank = tensor_ranks, fleet_rank(tensor_ranks)
        _refuse_splits(layer)
        group = _sequence_group(layer)
        if group is not None and _split_of(layer) == _BY_HEADS:
            # Heads are split over the tensor-parallel ranks, and each part of them over the ranks of the sequence.
            ranks, rank = tensor_ranks * group.world_size, rank * group.world_size + group.rank
        return Place(config.num_hidden_layers, config.num_attention_heads, ranks, rank)

    def replacements(self, layer: Layer) -> dict[str, object]:
        reshard = {"reshard_layer": _exchanged} if _split_of(layer) == _BY_HEADS else {}
        if hasattr(layer, "attn_func"):
            return {"attn_func": LayerAttention(layer, layer.attn_func), **reshard}
        forward = type(layer).forward
        if _FUNCTION not in forward.__code__.co_names:
            raise ValueError(f"{type(layer).__name__} calls no {_FUNCTION}: rrattn does not know this PaddleNLP")
        attention = LayerAttention(layer, forward.__globals__[_FUNCTION])
        return {"forward": _ForwardWithOwnAttention(layer, attention), **reshard}

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


def _degree(layer: Layer, name: str) -> int:
    """A number of ranks in a layer's config: 1 where it was never set, which is -1 or absent there."""
    return max(getattr(layer.config, name, 1), 1)


def _split_of(layer: Layer) -> str | None:
    """The field of a layer's config by which ranks have a part of each sequence; None where each has all of it."""
    return next((name for name in (_BY_HEADS, _BY_CHUNKS) if _degree(layer, name) > 1), None)


def _sequence_group(layer: Layer) -> Any:
    """The process group of the ranks that have a part of each sequence; None where each has all of it."""
    split = _split_of(layer)
    return None if split is None else fleet_sequence_group(_degree(layer, split), split)


def _exchanged(states: Tensor, split_axis: int = 1, concat_axis: int = 2) -> Tensor:
    """What PaddleNLP's ReshardLayer returns: `split_axis` split over fleet's group "sep", `concat_axis` put together.

    Parameters
    ----------
    states : Tensor
        [B, S / ranks, heads * D], or [B, S, heads / ranks, D].
    """
    group = fleet.get_hybrid_communicate_group().get_sep_parallel_group()
    return exchange(states, group, split=split_axis, join=concat_axis)


def _refuse_splits(layer: Layer) -> None:
    """Raises ValueError where a layer would not do what its config says of the ranks that have a part of a sequence."""
    config, name = layer.config, type(layer).__name__
    heads, chunks = _degree(layer, _BY_HEADS), _degree(layer, _BY_CHUNKS)
    by_heads, by_chunks = f"{_BY_HEADS}={heads}", f"{_BY_CHUNKS}={chunks}"
    if heads > 1 and chunks > 1:
        raise ValueError(f"PaddleNLP has either {by_heads} or {by_chunks}, not both: they mean the same ranks")
    if heads > 1 and getattr(layer, "reshard_layer", None) is None:
        raise ValueError(
            f"rrattn does not support {by_heads} in this {name}, which was built without it or does not know it: "
            "it has no reshard_layer"
        )
    if heads > 1 and layer.kv_indices is not None:
        raise ValueError(
            f"rrattn does not support {by_heads} where tensor-parallel ranks share key heads: {name} would choose "
            f"among all {config.num_key_value_heads} of them, of which a rank then has a part. "
            "tensor_parallel_degree must divide num_key_value_heads"
        )
    if chunks > 1 and _BY_CHUNKS not in type(layer).forward.__code__.co_names:
        raise ValueError(f"rrattn does not support {by_chunks} in {name}, which does not read it in this PaddleNLP")
    if chunks > 1 and config.sequence_parallel:
        raise ValueError(
            f"rrattn does not support {by_chunks} with sequence_parallel=True, where {name} takes the part of a "
            f"sequence that a rank has for a whole one; {_BY_HEADS} works with it"
        )


def _mask_of_whole_sequences(mask: Tensor | None, query: Tensor, key: Tensor, split: str) -> Tensor | None:
    """The dense mask of an attention over ranks that have a part of each sequence; None where it is causal alone.

    A model makes a causal mask for the positions that its own rank has, which says nothing more. What it makes of a
    padding mask would hide the wrong keys.

    Raises
    ------
    ValueError
        For a mask that says more, unless it has as many rows and columns as there are keys in exchange for heads; and
        where there are more keys than queries, which come from a cache.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"with {split}, rrattn supports no cache, from which {key.shape[1] - query.shape[1]} keys come"
        )
    if mask is None or (split == _BY_HEADS and mask.shape[-1] == key.shape[1]):
        return mask
    if bool((rows_of_mask(mask, query.shape[0]) < mask.shape[-2]).any()):
        raise ValueError(
            f"with {split}, rrattn supports no attention_mask {list(mask.shape)} of a part of the sequence that hides "
            "more than what comes later; attn_mask_startend_row_indices of the whole sequence can say it"
        )
    return None
