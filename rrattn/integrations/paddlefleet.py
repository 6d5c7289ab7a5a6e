"""RRAttention as the core attention of PaddleFleet's models.

    rrattn.enable(model)                                                # a built model, of PaddleFormers' GPTModel too
    SelfAttentionSublayersSpec(..., core_attention=RRCoreAttention)     # or from the start, by the layer spec

PaddleFleet has a layer DotProductAttention in each attention layer and calls it with queries, keys and values of this
rank's heads, [B, S, heads, D], rotated but without the cache, which the core attention updates itself. `enable` gives
each of these layers of a built model another `forward`, and `disable` takes it away. Layers that are not causal, those
of vision towers, stay as they are. Settings stand in the model's config as `rrattn_threshold` and so on.

A softmax offset of PaddleFleet, learned (`add_full_attention_sink_bias`, or softmax_type "learnable") or zero
(softmax_type "off-by-one"), is rrattn's attention sink. Heads of values may have another size than those of keys, as
in multi-latent attention. The window of a sliding-window layer joins the row indices, as in DotProductAttention.

With context parallelism each rank has a part of every sequence, and row indices are of whole sequences. By
`cp_balance_mode`, or `hybrid_mla_cp_mode` where that is set, ranks share keys and values ("dualchunk_allgather", which
is PaddleFleet's default, and "contiguous_allgather") or heads ("contiguous_a2a"), as `rrattn.distributed` says. In the
last there may be fewer key heads than query heads, other than in PaddleFleet, and sliding-window layers of multi-latent
attention, which PaddleFleet runs in a mode of its own then, "contiguous_swap2p", share heads like the others.

For PaddleFleet's training operator `rr_attention`, `rrattn.rr_attention` is a drop-in: the same arguments. Give it
the threshold, which is 1 there by default.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import paddle
from paddle.distributed import fleet

from ..distributed import attend_in_context
from .common import (
    Place,
    attend,
    core_of,
    make_core,
    refuse_settings,
    set_core,
    settings_of,
    swap_in,
    with_bounds,
)
from .model_library import ModelLibrary

try:
    from paddlefleet.process_groups_config import ProcessGroupCollection
    from paddlefleet.transformer.dot_product_attention import DotProductAttention
    from paddlefleet.transformer.enums import AttnMaskType
except ImportError as error:
    raise ImportError(
        "rrattn.integrations.paddlefleet needs PaddleFleet, of which PyPI has no release: install it from "
        f"github.com/PaddlePaddle/PaddleFleet ({error})"
    ) from error

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.nn import Layer

    from ..layer import RRAttention

logger = logging.getLogger(__name__)

# Fields of a model's config that rrattn does not support above these values.
_UNSUPPORTED_CONFIG = {"apply_query_key_layer_scaling": False, "gpt_model_use_experimental_version": False}
_CORE_NAME = "core_attention"  # of the attribute in which an attention layer has its core attention
# Context parallelism: cp_balance_mode, and what rrattn.distributed calls that layout.
_LAYOUTS = {
    "dualchunk_allgather": "dual_chunk",
    "contiguous_allgather": "contiguous",
    "contiguous_a2a": "all_to_all",
}
_ALL_TO_ALL = _LAYOUTS["contiguous_a2a"]
# Arguments of a call that carry the attention, and those that DotProductAttention takes for the sake of other core
# attentions and never reads. Others are not supported, unless they are None or False.
_READ = (
    "query",
    "key",
    "value",
    "attention_mask",
    "attn_mask_startend_row_indices",
    "attn_mask_type",
    "past_key_values",
    "layer_idx",
    "use_cache",
)
_UNREAD = ("x", "qr", "kv_compressed", "k_pos_emb", "q_absorbed", "v_b_proj_weight")


class RRCoreAttention(DotProductAttention):  # type: ignore[misc]  # PaddleFleet ships no types
    """A core attention of PaddleFleet's layer specs that attends selected blocks.

    Its constructor takes what DotProductAttention's takes, by name, as layer specs give it, and its calls what
    `SelectedBlocks` takes. `rrattn.enable(model, config)` gives other settings than those of the model's config, and
    `rrattn.disable(model)` returns to DotProductAttention's own attention. The layer's place among the ranks comes from
    `pg_collection.tp` and, with context parallelism, fleet's context-parallel group.

    Raises
    ------
    ValueError
        For what `PaddleFleet.place` refuses, and for rrattn's settings in the config when they are not allowed, or
        differ per layer where this PaddleFleet's layers do not know their number, which takes `rrattn.enable`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        **options: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = _default_groups()
        super().__init__(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            pg_collection=pg_collection,
            **options,
        )
        self._place = _place_of(self, pg_collection.tp)
        settings = settings_of(config)
        if self._place.layer_index is None and (settings.dense_layers or not isinstance(settings.threshold, float)):
            raise ValueError(
                "a layer cannot tell which of the settings per layer are its own: "
                "give these to rrattn.enable(model, config), which counts the layers"
            )
        set_core(self, make_core(settings, self._place, self._place.layer_index or 0))  # 0 stands for any layer
        swap_in(self, LIBRARY.replacements(self))


class SelectedBlocks:
    """What an enabled core attention calls as its `forward`, with DotProductAttention's arguments.

    Parameters of a call
    --------------------
    query : Tensor
        [B, Lq, H, D], with context parallelism [B, Lq / ranks, H, D]; H is this rank's share of the heads. There Lq /
        ranks is a multiple of 256 with "dualchunk_allgather" and of 128 with "contiguous_allgather".
    key, value : Tensor
        [B, Lq, Hkv, D] and [B, Lq, Hkv, Dv] likewise: without what the cache holds.
    attention_mask : Tensor, optional
        [B | 1, 1 | H, Lq, Lk]: bool with True for hidden, float with 1 for visible and 0 for hidden, or additive.
        Unused where there are row indices, as in DotProductAttention.
    attn_mask_startend_row_indices : Tensor, optional
        int32 [B, 1 | Hkv, Lk, 1 | 2 | 4], of the whole sequence.
    attn_mask_type : AttnMaskType, optional
        With row indices of two bounds and no cache, causal or not; causal otherwise. Where context-parallel ranks share
        keys and values, two bounds are not causal, as in PaddleFleet, which takes them with `experimental_dataflow`.
    past_key_values, layer_idx, use_cache
        With both, `past_key_values.update(key, value, layer_idx)` returns the keys and values to attend.
    x, qr, kv_compressed, k_pos_emb, q_absorbed, v_b_proj_weight
        Given by multi-latent attention layers; DotProductAttention does not read them either.
    Others are not supported unless None or False: attention_bias, packed_seq_params, use_rr_flash_attention (which is
    PaddleFleet's refined recompute) and what later versions add.

    Returns
    -------
    Tensor
        [B, Lq, H * Dv].

    Raises
    ------
    ValueError
        For what is not supported, dropout in training among it, and for masks that rrattn cannot express.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        # Also what recompute binds its keyword arguments by.
        self.__signature__ = inspect.signature(DotProductAttention.forward.__get__(layer))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.layer,)  # a signature is not for copying

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        _refuse_arguments(given)
        dropout = layer.attention_dropout.p
        if layer.training and dropout:
            raise ValueError(f"rrattn does not support attention dropout; set attention_dropout to 0.0, got {dropout}")
        query, key, value, mask = (given[name] for name in _READ[:4])
        rows, causal = given.get("attn_mask_startend_row_indices"), True
        cache = given.get("past_key_values") if given.get("use_cache") else None
        if query.shape[1] == 1 or rows is not None:
            mask = None  # a decoding step still gets the prefill's
        if _is_context_parallel(layer):
            if given.get("use_cache") or mask is not None:
                raise ValueError("with context parallelism, rrattn supports neither a cache nor attention_mask")
            out = _attend_in_context(layer, query, key, value, rows, given.get("attn_mask_type"))
            return out.reshape([0, 0, out.shape[2] * out.shape[3]])
        window = _window(layer)
        if window and rows is None and query.shape[1] > 1:
            raise ValueError(
                f"a prefill with sliding_window {window} takes attn_mask_startend_row_indices, also without rrattn"
            )
        if cache is not None:
            key, value = cache.update(key, value, given["layer_idx"])
        elif rows is not None:
            causal = given.get("attn_mask_type") == AttnMaskType.causal
        if window and rows is not None:
            rows = _within_window(rows, window)
        out = attend(
            _core(layer),
            query,
            key,
            value,
            _additive_or_visible(mask),
            rows,
            causal=causal,
            softmax_scale=layer.softmax_scale,
            sink=_sink(layer),
        )
        return out.reshape([0, 0, out.shape[2] * out.shape[3]])


class PaddleFleet(ModelLibrary):
    """Its attention layers hold a DotProductAttention, whose forward is replaced while rrattn is enabled."""

    name = "PaddleFleet"

    def attention_layers(self, model: Layer) -> list[Layer]:
        """The causal core attentions, in order.

        Raises
        ------
        ValueError
            Where there is none, or where one is not DotProductAttention.
        """
        named = [("", model), *model.named_sublayers()]
        layers = [layer for path, layer in named if _is_causal_core(path, layer)]
        for layer in layers:
            if type(layer).forward is not DotProductAttention.forward:
                raise ValueError(
                    f"rrattn does not support {type(layer).__name__} as core attention, which this "
                    f"{type(model).__name__} has; it must be DotProductAttention or {RRCoreAttention.__name__}"
                )
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no causal DotProductAttention and no RRCoreAttention of "
                f"{__name__}, which are the layers that rrattn supports in PaddleFleet"
            )
        return sorted(layers, key=lambda layer: _layer_index(layer) or 0)  # stages of a pipeline may interleave

    def place(self, layer: Layer) -> Place:
        """Where a core attention is.

        Raises
        ------
        ValueError
            For what rrattn does not support: query-key layer scaling, the experimental version of GPTModel, a
            sliding window for some heads alone, another cp_balance_mode than those above, and, with
            "contiguous_a2a", heads that the context-parallel ranks do not divide.
        """
        if isinstance(layer, RRCoreAttention):
            place: Place = layer._place
            return place
        return _place_of(layer, _default_groups().tp)

    def replacements(self, layer: Layer) -> dict[str, object]:
        return {"forward": SelectedBlocks(layer)}

    def log(self, line: str) -> None:
        logger.info(line)


LIBRARY = PaddleFleet()


def _is_causal_core(path: str, layer: Layer) -> bool:
    """Whether a layer at this path of a model is the core attention of a decoder, of whatever class."""
    core = isinstance(layer, DotProductAttention) or path.rpartition(".")[2] == _CORE_NAME
    return core and getattr(layer, "attn_mask_type", AttnMaskType.causal) == AttnMaskType.causal


def _default_groups() -> Any:
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])


def _place_of(layer: Layer, tp_group: Any) -> Place:
    """`PaddleFleet.place` of a layer whose heads are split over the ranks of a tensor-parallel group."""
    config = layer.config
    refuse_settings(config, _UNSUPPORTED_CONFIG, PaddleFleet.name)
    window = getattr(config, "sliding_window", None)
    if window and not hasattr(layer, "is_swa"):
        raise ValueError(f"rrattn does not support sliding_window={window} with this version of PaddleFleet")
    ratio = getattr(layer, "head_wise_swa_ratio", 0)
    if _window(layer) and 0 < ratio < 1:
        raise ValueError(f"rrattn does not support head_wise_swa_ratio={ratio} in PaddleFleet models; only 0 and 1")
    num_heads = getattr(layer, "num_attention_heads", config.num_attention_heads)
    heads_here = layer.num_attention_heads_per_partition
    tp_ranks, tp_rank = _ranks_and_rank(tp_group)
    if heads_here * tp_ranks != num_heads:
        raise ValueError(
            f"a layer has {heads_here} of its {num_heads} heads here, which are not "
            f"those of one of {tp_ranks} tensor-parallel ranks"
        )
    # Heads are split over the tensor-parallel ranks and each part of them, by the all-to-all, over the others.
    cp_ranks, cp_rank = 1, 0
    if _is_context_parallel(layer) and _layout(layer) == _ALL_TO_ALL:
        cp_ranks, cp_rank = _ranks_and_rank(_context_parallel_group())
        if heads_here % cp_ranks:
            raise ValueError(
                f"cp_balance_mode 'contiguous_a2a' cannot split {heads_here} heads over {cp_ranks} context-parallel "
                f"ranks: their number must be a multiple of {cp_ranks}"
            )
    return Place(
        num_layers=_num_layers(config),
        num_heads=num_heads,
        ranks=tp_ranks * cp_ranks,
        rank=tp_rank * cp_ranks + cp_rank,
        layer_index=_layer_index(layer),
    )


def _layer_index(layer: Layer) -> int | None:
    """The number of a core attention in its model, from 0; None in versions of PaddleFleet whose layers are counted
    from 1, the first two with the same number, and do not tell those of multi-token prediction."""
    config = layer.config
    if not hasattr(layer, "is_mtp_layer"):
        return None
    number: int = layer.layer_number
    if layer.is_mtp_layer:
        return int(config.num_hidden_layers) + number
    return number - (getattr(config, "num_empty_layers_add_in_head", 0) or 0)


def _num_layers(config: Any) -> int:
    """Attention layers of the whole model, those of multi-token prediction included, by either of their names."""
    predicting = getattr(config, "num_nextn_predict_layers", None) or getattr(config, "mtp_num_layers", None) or 0
    return int(config.num_hidden_layers) + int(predicting)


def _window(layer: Layer) -> int:
    """How many keys a query of a sliding-window layer sees, its own included; 0 where all."""
    given = layer.config.sliding_window if getattr(layer, "is_swa", False) else None
    if not given:
        return 0
    return max(0, given if isinstance(given, int) else given[0])  # -1 means all


def _within_window(rows: Tensor, window: int) -> Tensor:
    """Row indices [B, 1 | Hkv, Lk, 1 | 2] of which the first also ends `window` rows below each key."""
    if rows.shape[-1] > 2:
        raise ValueError(f"sliding_window takes row indices of one or two bounds, got {rows.shape[-1]}")
    ends = paddle.arange(window, window + rows.shape[2], dtype="int32")
    return paddle.concat([paddle.minimum(rows[..., :1], ends.unsqueeze(-1)), rows[..., 1:]], axis=-1)


def _refuse_arguments(given: dict[str, Any]) -> None:
    """Raises ValueError for an argument of a call that rrattn does not support, with its value."""
    for name, argument in given.items():
        if name not in _READ + _UNREAD and argument is not None and argument is not False:
            told = f"a tensor {list(argument.shape)}" if isinstance(argument, paddle.Tensor) else repr(argument)
            raise ValueError(f"rrattn does not support {name}={told} in PaddleFleet layers; it must be None or False")


# Context parallelism


def _is_context_parallel(layer: Layer) -> bool:
    return bool(getattr(layer, "context_parallel_size", 1) > 1)


def _context_parallel_group() -> Any:
    groups: Any = fleet.get_hybrid_communicate_group()
    return groups.get_context_parallel_group()


def _layout(layer: Layer) -> str:
    """How a layer's context-parallel ranks share a sequence, as `rrattn.distributed` calls it.

    Raises
    ------
    ValueError
        For a cp_balance_mode that rrattn does not support.
    """
    mode = getattr(layer, "hybrid_mla_cp_mode", None) or layer.config.cp_balance_mode
    if mode not in _LAYOUTS:
        reason = (
            " (keys of a window alone are exchanged, which PaddleFleet chooses itself where a layer has one)"
            if mode == "contiguous_swap2p"
            else ""
        )
        raise ValueError(
            f"rrattn does not support cp_balance_mode {mode!r}{reason} in PaddleFleet models; it must be one of "
            f"{', '.join(map(repr, _LAYOUTS))}"
        )
    return _LAYOUTS[mode]


def _attend_in_context(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, mask_type: AttnMaskType | None
) -> Tensor:
    """Attention [B, Lq / ranks, H, Dv] of a layer whose sequences are split over context-parallel ranks."""
    group, layout, window = _context_parallel_group(), _layout(layer), _window(layer)
    in_window_mode = window > 0 and getattr(layer.config, "multi_latent_attention", False)  # "contiguous_swap2p"
    if rows is not None and (layout != _ALL_TO_ALL or in_window_mode):
        # Here PaddleFleet gives rows of one bound the diagonal as a second one.
        known = (1, 2) if getattr(layer.config, "experimental_dataflow", False) else (1,)
        if rows.ndim != 4 or rows.shape[-1] not in known:
            raise ValueError(
                f"attn_mask_startend_row_indices have shape {list(rows.shape)}; with context parallelism in this mode "
                "PaddleFleet takes 4 dimensions, the last with one bound, or with two where experimental_dataflow is on"
            )
        mask_type = AttnMaskType.no_mask
    rows, causal = with_bounds(rows, rows is None or mask_type == AttnMaskType.causal)
    if window:
        if rows is None:
            seqlen = key.shape[1] * group.world_size
            rows = paddle.full([key.shape[0], 1, seqlen, 1], seqlen, dtype="int32")
        rows = _within_window(rows, window)
    return attend_in_context(
        _core(layer),
        query,
        key,
        value,
        rows,
        group=group,
        layout=layout,
        causal=causal,
        softmax_scale=layer.softmax_scale,
        sink=_sink(layer),
    )


# What both ways of attending read of a layer


def _core(layer: Layer) -> RRAttention:
    core = core_of(layer)
    assert core is not None, "a layer has this forward while it is enabled"
    return core


def _sink(layer: Layer) -> Tensor | None:
    """The softmax offsets of this rank's heads, float32 [H]."""
    return None if layer.softmax_offset is None else layer.softmax_offset.astype("float32")


def _ranks_and_rank(group: Any) -> tuple[int, int]:
    """(number of ranks, which of them this one is) of a process group; (1, 0) where there is none."""
    return (1, 0) if group is None or group.world_size <= 1 else (group.world_size, group.rank)


def _additive_or_visible(mask: Tensor | None) -> Tensor | None:
    """A dense mask of PaddleFleet as `common.attend` takes it: bool with True for visible, or additive."""
    if mask is None:
        return None
    if mask.dtype == paddle.bool:
        return ~mask
    ones = mask == 1
    return ones if bool((ones | (mask == 0)).all()) and bool(ones.any()) else mask
