"""RRAttention as the core attention of PaddleFleet's layer specs.

    SelfAttentionSublayersSpec(..., core_attention=RRCoreAttention)   # instead of DotProductAttention

PaddleFleet builds the class once per attention layer and calls it with queries, keys and values of this rank's heads,
[B, S, heads, D], rotated but without the cache, which the core attention updates itself. Settings stand in the model's
config as `rrattn_threshold` and so on; `rrattn.enable(model, config)` gives others, and `rrattn.disable(model)` returns
to PaddleFleet's own attention.

For PaddleFleet's training operator `rr_attention`, `rrattn.rr_attention` is a drop-in: the same arguments. Give it
the threshold, which is 1 there by default.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import paddle
from paddle.distributed import fleet

from .common import Place, attend, core_of, make_core, refuse_settings, set_core, settings_of, swap_in
from .model_library import ModelLibrary

try:
    from paddlefleet.context_parallel_utils import UlyssesAlltoAll
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

logger = logging.getLogger(__name__)

# Fields of a model's config that rrattn does not support above these values.
_UNSUPPORTED_CONFIG = {"apply_query_key_layer_scaling": False, "gpt_model_use_experimental_version": False}
# Arguments of a call that rrattn does not support, unless they are None or False.
_UNSUPPORTED = ("attention_bias", "packed_seq_params", "use_rr_flash_attention")
_ALL_TO_ALL = "contiguous_a2a"


class RRCoreAttention(DotProductAttention):  # type: ignore[misc]  # PaddleFleet ships no types
    """A core attention of PaddleFleet's layer specs that attends selected blocks.

    Its constructor takes what DotProductAttention's takes, by name, as layer specs give it. The layer's place among the
    ranks comes from `pg_collection.tp` and, with context parallelism, fleet's context-parallel group.

    Raises
    ------
    ValueError
        For what rrattn does not support: an attention sink (softmax_type other than "vanilla"), a sliding window, heads
        of values with another size than those of keys (multi-latent attention), query-key layer scaling, context
        parallelism other than cp_balance_mode "contiguous_a2a"; and for rrattn's settings in the config, when they are
        not allowed or differ per layer, which takes `rrattn.enable`.
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
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        super().__init__(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            pg_collection=pg_collection,
            **options,
        )
        refuse_settings(config, _UNSUPPORTED_CONFIG, "PaddleFleet")
        if self.softmax_offset is not None:
            raise ValueError(f"rrattn does not support attention sinks (softmax_type {config.softmax_type!r})")
        if self.is_swa:
            raise ValueError(f"rrattn does not support sliding-window layers (sliding_window {config.sliding_window})")
        if self.k_channels != self.v_channels:
            raise ValueError(
                f"rrattn does not support values of another head size than keys ({self.v_channels}, {self.k_channels})"
            )
        self._cp_group: Any = None
        if self.context_parallel_size > 1:
            mode = self.hybrid_mla_cp_mode or config.cp_balance_mode
            if mode != _ALL_TO_ALL:
                raise ValueError(
                    f"cp_balance_mode is {mode!r}, in which a rank holds some of the queries and all keys; rrattn "
                    f"supports {_ALL_TO_ALL!r}, in which it holds some of the heads and whole sequences"
                )
            groups: Any = fleet.get_hybrid_communicate_group()
            self._cp_group = groups.get_context_parallel_group()
        settings = settings_of(config)
        if settings.dense_layers or not isinstance(settings.threshold, float):
            raise ValueError(
                "a layer cannot tell which of the settings per layer are its own: "
                "give these to rrattn.enable(model, config), which counts the layers"
            )
        # Heads are split over the tensor-parallel ranks and each part of them, by the all-to-all, over the others.
        tp_ranks, tp_rank = _ranks_and_rank(pg_collection.tp)
        cp_ranks, cp_rank = _ranks_and_rank(self._cp_group)
        self._place = Place(
            num_layers=config.num_hidden_layers,
            num_heads=self.num_attention_heads,
            ranks=tp_ranks * cp_ranks,
            rank=tp_rank * cp_ranks + cp_rank,
        )
        set_core(self, make_core(settings, self._place, 0))  # these settings are every layer's
        swap_in(self, {})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_startend_row_indices: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: object = None,
        packed_seq_params: object = None,
        use_rr_flash_attention: object = False,
        past_key_values: Any = None,
        layer_idx: int | None = None,
        use_cache: bool = False,
        **others: object,
    ) -> Tensor:
        """Attends the selected blocks; after `rrattn.disable`, DotProductAttention's own attention.

        Parameters
        ----------
        query : Tensor
            [B, Lq, H, D], with context parallelism [B, Lq / ranks, H, D]; H is this rank's share of the heads.
        key, value : Tensor
            [B, Lq, Hkv, D] likewise: without what the cache holds.
        attention_mask : Tensor, optional
            [B | 1, 1 | H, Lq, Lk]: bool with True for hidden, float with 1 for visible and 0 for hidden, or additive.
            Unused where there are row indices, as in DotProductAttention.
        attn_mask_startend_row_indices : Tensor, optional
            int32 [B, 1 | Hkv, Lk, 1 | 2 | 4], of the whole sequence.
        attn_mask_type : AttnMaskType, optional
            With row indices of two bounds and no cache, causal or not; causal otherwise.
        past_key_values, layer_idx, use_cache
            With both, `past_key_values.update(key, value, layer_idx)` returns the keys and values to attend.
        attention_bias, packed_seq_params, use_rr_flash_attention, others
            Not supported unless None or False. (use_rr_flash_attention is PaddleFleet's refined recompute.)

        Returns
        -------
        Tensor
            [B, Lq, H * D].

        Raises
        ------
        ValueError
            For what is not supported, dropout in training among it, and for masks that rrattn cannot express.
        """
        own: dict[str, object] = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        own |= {"use_rr_flash_attention": use_rr_flash_attention, **others}
        core = core_of(self)
        if core is None:
            cache = {"past_key_values": past_key_values, "layer_idx": layer_idx, "use_cache": use_cache}
            masks = (attention_mask, attn_mask_startend_row_indices, attn_mask_type)
            dense: Tensor = super().forward(query, key, value, *masks, **own, **cache)
            return dense
        for name, given in own.items():
            if given is not None and given is not False:
                raise ValueError(f"rrattn does not support {name} in PaddleFleet layers")
        dropout = self.attention_dropout.p
        if self.training and dropout:
            raise ValueError(f"rrattn does not support attention dropout; set attention_dropout to 0.0, got {dropout}")
        rows, causal = attn_mask_startend_row_indices, True
        if query.shape[1] == 1 or rows is not None:
            attention_mask = None  # a decoding step still gets the prefill's
        if self._cp_group is not None and (use_cache or attention_mask is not None):
            raise ValueError("with context parallelism, rrattn supports neither a cache nor attention_mask")
        if use_cache and past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        elif rows is not None:
            causal = attn_mask_type == AttnMaskType.causal

        if self._cp_group is not None:
            query, key, value = (self._exchange(tensor, scatter=2, gather=1) for tensor in (query, key, value))
            if rows is not None and rows.ndim == 4 and rows.shape[1] > 1:
                rows = paddle.split(rows, self.context_parallel_size, axis=1)[self._cp_group.rank]
        mask = _additive_or_visible(attention_mask)
        out = attend(core, query, key, value, mask, rows, causal=causal, softmax_scale=self.softmax_scale)
        if self._cp_group is not None:
            out = self._exchange(out, scatter=1, gather=2)
        return out.reshape([0, 0, out.shape[2] * out.shape[3]])

    def _exchange(self, tensor: Tensor, *, scatter: int, gather: int) -> Tensor:
        """All-to-all over the context-parallel ranks: dimension `scatter` is split over them, `gather` put together."""
        exchanged: Tensor = UlyssesAlltoAll.apply(
            tensor, scatter_idx=scatter, gather_idx=gather, batch_dim_idx=0, group=self._cp_group
        )
        return exchanged


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


class PaddleFleet(ModelLibrary):
    """Its layers are rrattn's own from the start, and call DotProductAttention's attention where rrattn is disabled."""

    name = "PaddleFleet"

    def attention_layers(self, model: Layer) -> list[Layer]:
        layers: list[Layer] = [
            layer for layer in model.sublayers(include_self=True) if isinstance(layer, RRCoreAttention)
        ]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no layer of rrattn.integrations.paddlefleet.RRCoreAttention: "
                "name it as core_attention in the layer spec that the model is built from"
            )
        return layers

    def place(self, layer: Layer) -> Place:
        place: Place = layer._place
        return place

    def log(self, line: str) -> None:
        logger.info(line)


LIBRARY = PaddleFleet()
