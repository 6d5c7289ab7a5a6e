"""What the integrations share: an RRAttention per attention layer, its settings, and the masks that libraries pass.

Each attention layer carries an `RRAttention` of its own, in its `__dict__` and not as a sublayer, so that state and
checkpoints stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import paddle
from paddle.distributed import fleet

from ..config import SETTINGS, RRAttentionConfig
from ..layer import RRAttention
from ..masks import startend_rows_from_dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from paddle import Tensor
    from paddle.nn import Layer

    from ..config import Settings

_CORE = "_rrattn"  # the RRAttention of an attention layer
_REPLACED = "_rrattn_replaced"  # of an enabled layer: names of its attributes, and what its __dict__ held under them
_SETTING = "rrattn_"  # settings of rrattn in a model's config: rrattn_threshold, rrattn_stride, ...
_KNOWN_SETTINGS = [_SETTING + name for name in SETTINGS]


# Settings and layers


def settings_of(model_config: Any, given: Settings | None = None) -> RRAttentionConfig:
    """The settings that a model's config carries as `rrattn_<field of RRAttentionConfig>`; defaults for the others.

    Parameters
    ----------
    model_config
        Its attributes are read.
    given : dict, optional
        Settings that come before those of the model's config.

    Raises
    ------
    ValueError
        For an attribute `rrattn_...` that names no setting, or a value that is not allowed.
    """
    carried = {name: setting for name, setting in vars(model_config).items() if name.startswith(_SETTING)}
    unknown = [name for name in carried if name not in _KNOWN_SETTINGS]
    if unknown:
        raise ValueError(f"the model's config has {', '.join(unknown)}, but rrattn knows {', '.join(_KNOWN_SETTINGS)}")
    return RRAttentionConfig(
        **{**{name[len(_SETTING) :]: setting for name, setting in carried.items()}, **(given or {})}
    )


def refuse_settings(model_config: Any, unsupported: Mapping[str, int], library: str, reason: str = "") -> None:
    """Raises ValueError for a field of a model's config whose value is above the one in `unsupported`, and says why."""
    for name, off in unsupported.items():
        setting = getattr(model_config, name, off)
        if setting > off:  # degrees are -1 where they were never set
            because = f": {reason}" if reason else ""
            raise ValueError(f"rrattn does not support {name}={setting} in {library} models; it must be {off}{because}")


@dataclass(frozen=True)
class Place:
    """Where an attention layer is in its model, and among the ranks that share its heads."""

    num_layers: int
    """Attention layers of the whole model."""
    num_heads: int
    """Query heads of the layer, on all ranks together."""
    ranks: int = 1
    """Ranks that the heads are split over."""
    rank: int = 0
    """Which of them this one is."""
    layer_index: int | None = None
    """Number of the layer in the model, from 0; None where the layer does not know it, and is counted."""


def layer_indices(places: Sequence[Place], config: RRAttentionConfig, model_name: str) -> list[int]:
    """The numbers of a model's attention layers, which are given in order.

    Raises
    ------
    ValueError
        For settings per layer where layers do not know their number and not all of the model's are here to be counted.
    """
    known = [place.layer_index for place in places if place.layer_index is not None]
    if len(known) == len(places):
        return known
    num_layers = places[0].num_layers
    if len(places) != num_layers and (config.dense_layers or not isinstance(config.threshold, float)):
        raise ValueError(
            f"{model_name} has {len(places)} of its {num_layers} attention layers here, so rrattn cannot "
            "tell which settings per layer are theirs: give one threshold and no dense_layers"
        )
    return list(range(len(places)))


def make_core(config: RRAttentionConfig, place: Place, layer_index: int) -> RRAttention:
    """The RRAttention of the attention layer of this number: with its own threshold, and for this rank's heads.

    Raises
    ------
    ValueError
        When the config does not fit the number of layers or heads.
    """
    heads_here = place.num_heads // place.ranks
    first_head = heads_here * place.rank
    threshold = config.layer_threshold(layer_index, place.num_layers)
    if not isinstance(threshold, float):
        if len(threshold) != place.num_heads:
            raise ValueError(
                f"the config gives {len(threshold)} thresholds to layer {layer_index}, "
                f"which has {place.num_heads} query heads"
            )
        threshold = threshold[first_head : first_head + heads_here]
    dense_layers = (
        (0,) if config.layer_is_dense(layer_index, place.num_layers) else ()
    )  # of a model of this layer alone
    config = replace(config, head_offset=config.head_offset + first_head, dense_layers=dense_layers)
    return RRAttention(config, threshold=threshold)


def fleet_rank(ranks: int) -> int:
    """Which of a model's tensor-parallel ranks this process is: 0 where there is one.

    It comes from the group that fleet set up, over which the model's layers split their weights. The rank in a model's
    config says less: it is 0 on every rank unless the program that loads the model sets it.

    Raises
    ------
    ValueError
        When fleet does not have this number of ranks.
    """
    if ranks <= 1:
        return 0
    groups = _fleet_groups()
    found = None if groups is None else groups.get_model_parallel_world_size()
    if found != ranks:
        raise ValueError(f"the model's heads are split over {ranks} ranks, but {_what_fleet_has(found)}")
    rank: int = groups.get_model_parallel_rank()
    return rank


def fleet_sequence_group(ranks: int, setting: str) -> Any:
    """The process group whose ranks have a part of each sequence: fleet's group "sep".

    Parameters
    ----------
    ranks : int
        How many there are by the model's config.
    setting : str
        The config's name for that, for the error.

    Raises
    ------
    ValueError
        When fleet does not have this number of ranks in the group.
    """
    groups = _fleet_groups()
    found = None if groups is None else groups.get_sep_parallel_world_size()
    if found != ranks:
        raise ValueError(f"{setting}={ranks} ranks have a part of each sequence, but {_what_fleet_has(found)}")
    return groups.get_sep_parallel_group()


def _fleet_groups() -> Any:
    """The process groups that fleet set up; None before that, where its own getter fails."""
    return getattr(fleet.fleet, "_hcg", None)


def _what_fleet_has(ranks: int | None) -> str:
    return f"paddle.distributed.fleet {'was not initialized' if ranks is None else f'has {ranks}'}"


def core_of(layer: Layer) -> RRAttention | None:
    """The RRAttention that an attention layer carries, if any."""
    return layer.__dict__.get(_CORE)


def set_core(layer: Layer, core: RRAttention | None) -> None:
    """Gives an attention layer its RRAttention, or takes it away."""
    if core is None:
        layer.__dict__.pop(_CORE, None)
    else:
        layer.__dict__[_CORE] = core


def set_cores(layers: Iterable[Layer], cores: Iterable[RRAttention | None]) -> None:
    """Gives each attention layer its RRAttention, or takes it away where that is None.

    Raises
    ------
    ValueError
        As `refuse_observed`.
    """
    layers = list(layers)
    refuse_observed(layers)
    for layer, core in zip(layers, cores):
        set_core(layer, core)


def refuse_observed(layers: Iterable[Layer]) -> None:
    """Raises ValueError while `rrattn.collect_stats` observes one of the layers: it would miss what a new core does."""
    held = [core for core in map(core_of, layers) if core is not None]
    if any(core._observer is not None for core in held):
        raise ValueError(
            "statistics of this model are being collected: enable, disable or change settings of rrattn "
            "outside of the block of rrattn.collect_stats"
        )


def swap_in(layer: Layer, attributes: Mapping[str, object]) -> None:
    """Makes an attention layer an enabled one, with these attributes until `restore`."""
    held = vars(layer)
    held[_REPLACED] = tuple(attributes), {name: held[name] for name in attributes if name in held}
    held.update(attributes)


def restore(layer: Layer) -> None:
    """Undoes `swap_in`."""
    held = vars(layer)
    names, before = held.pop(_REPLACED)
    for name in names:
        held.pop(name, None)
    held.update(before)


def is_enabled(layer: Layer) -> bool:
    """Whether an attention layer is between `swap_in` and `restore`."""
    return _REPLACED in vars(layer)


def report(model_name: str, library: str, config: RRAttentionConfig, layers: Sequence[int], num_layers: int) -> str:
    """One line that says what runs from now on, in layers of these numbers of a model that has `num_layers`."""
    dense = [layer for layer in layers if config.layer_is_dense(layer, num_layers)]
    parts = [f"threshold {config.threshold}", f"stride {config.stride}"]
    if dense:
        parts.append(f"dense in layers {', '.join(map(str, dense))}")
    if config.min_length:
        parts.append(f"dense below {config.min_length} keys")
    if config.compensate:
        parts.append("compensated")
    if config.quantization is not None:
        parts.append(f"quantization {config.quantization}")
    return f"rrattn runs {len(layers)} attention layers of {model_name} ({library}): {', '.join(parts)}"


# Masks


def attend(
    core: RRAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    startend_rows: Tensor | None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Runs a layer's RRAttention under the masks that a model library passes.

    Parameters
    ----------
    core : RRAttention
    query : Tensor
        [B, Lq, Hq, D], the last Lq positions of the keys; position embedding applied.
    key, value : Tensor
        [B, Lk, Hkv, D] and [B, Lk, Hkv, Dv], the cache included.
    attention_mask : Tensor, optional
        [B | 1, 1 | Hq, Lq, Lk], additive or bool. It must be causal; padding, packing and sliding windows are read
        from it. In front it may have columns of keys that have left a cache, as long as no query sees them.
    startend_rows : Tensor, optional
        int32 [B, Lk], [B, 1|Hkv|Hq, Lk] or [B, 1|Hkv|Hq, Lk, 1|2|4]: packed documents. One bound means causal, four
        mean not.
    causal : bool
        Where neither mask says it.
    softmax_scale : float, optional
        Default: 1 / sqrt(D).
    sink : Tensor, optional
        [Hq], a logit for each query head that joins the softmax of each row.

    Returns
    -------
    Tensor
        [B, Lq, Hq, Dv].

    Raises
    ------
    ValueError
        For both masks at once, and for a dense mask of another shape, or that FlashMask bounds cannot express.
    """
    if startend_rows is not None and attention_mask is not None:
        raise ValueError("give either attention_mask or attn_mask_startend_row_indices to rrattn, not both")
    rows, causal = with_bounds(startend_rows, causal)
    if attention_mask is not None:
        rows, causal = _rows_of_keys(attention_mask, query, key), True
    out: Tensor = core(query, key, value, rows, causal=causal, softmax_scale=softmax_scale, sink=sink)
    return out


def with_bounds(startend_rows: Tensor | None, causal: bool) -> tuple[Tensor | None, bool]:
    """Row indices as libraries pass them, with all four dimensions, and whether they mean causal attention.

    Parameters
    ----------
    startend_rows : Tensor, optional
        int32 [B, Lk], [B, 1|Hkv|Hq, Lk] or [B, 1|Hkv|Hq, Lk, 1|2|4].
    causal : bool
        Where their number of bounds does not say it.

    Returns
    -------
    tuple of Tensor or None, and bool
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], and causal.
    """
    if startend_rows is None:
        return None, causal
    rows = startend_rows
    if rows.ndim == 2:
        rows = rows.unsqueeze(1)
    rows = rows.unsqueeze(-1) if rows.ndim == 3 else rows
    return rows, {1: True, 4: False}.get(rows.shape[-1], causal)


def _rows_of_keys(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The row bounds that a dense mask gives to the keys, int32 [B, 1|Hq, Lk, 1].

    A library makes a mask for all positions so far, also for a layer with a sliding window, whose cache holds the last
    keys alone. Such a mask has columns in front of those of the keys.
    """
    batch_size, seqlen_q, num_heads, _ = query.shape
    seqlen_k = key.shape[1]
    shape = list(mask.shape)
    allowed = (1, batch_size), (1, num_heads), (seqlen_q,)
    fits = len(shape) == 4 and all(size in sizes for size, sizes in zip(shape, allowed)) and shape[3] >= seqlen_k
    if paddle.in_dynamic_mode() and not fits:
        raise ValueError(
            f"attention_mask has shape {shape}, but must be [1 or {batch_size}, 1 or {num_heads}, {seqlen_q}, "
            f"{seqlen_k}] for {seqlen_q} queries of {num_heads} heads over {seqlen_k} keys"
        )
    rows = rows_of_mask(mask, batch_size)
    surplus = shape[3] - seqlen_k
    if surplus == 0:
        return rows
    if bool((rows[:, :, :surplus] > 0).any()):
        raise ValueError(
            f"attention_mask has shape {shape}, of which the last {seqlen_k} columns are for the {seqlen_k} keys, but "
            f"lets queries see keys of its first {surplus} columns, which must be hidden"
        )
    return rows[:, :, surplus:]


def rows_of_mask(mask: Tensor, batch_size: int) -> Tensor:
    """startend_rows_from_dense(mask), int32 [B, 1|Hq, Lk, 1].

    Each layer reads the mask again: only its values tell whether it is still the mask of the layer before. That takes
    little time beside the attention.
    """
    if not paddle.in_dynamic_mode():
        raise ValueError(
            "rrattn reads a dense attention mask in dynamic mode only; "
            "in a static graph pass attn_mask_startend_row_indices instead"
        )
    rows = startend_rows_from_dense(mask)
    return rows.expand([batch_size, -1, -1, -1]) if rows.shape[0] == 1 < batch_size else rows
