"""The functions of RRAttention's published release, for programs written for it.

The release is Research/RRAttention of github.com/PaddlePaddle/PaddleFleet. Its tensors are [B, H, L, D]. Arguments that
chose among its kernels mean nothing here; a DeprecationWarning names them. PaddleFleet's operator for training came
later, takes [B, L, H, D], and is `rr_attention` here. docs/migration.md has what to write instead.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, cast, overload

import paddle

from . import arguments, functional
from .config import BLOCK_SIZE, CAUSAL, PUBLISHED_ESTIMATE, PUBLISHED_PATCH, PUBLISHED_PREFILL, PUBLISHED_TRAINING
from .functional import checked_tensor, estimate_block_scores, select_blocks
from .integrations import enable
from .masks import block_counts, unpack_block_mask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from paddle import Tensor
    from paddle.nn import Layer
    from typing_extensions import Unpack

    from .config import KeepRules, Sampling

    class _TrainingOptions(TypedDict, total=False):
        """What `rr_attention` here takes by name, but for what it is to return."""

        threshold: float | Tensor
        stride: int
        causal: bool
        dropout: float
        training: bool
        keep_sink: bool
        keep_last: bool
        return_seed_offset: bool


ModelT = TypeVar("ModelT", bound="Layer")

# These configs have one threshold each, where one may have several.
_PREFILL_THRESHOLD = cast(float, PUBLISHED_PREFILL.threshold)
_ESTIMATE_THRESHOLD = cast(float, PUBLISHED_ESTIMATE.threshold)
_TRAINING_THRESHOLD = cast(float, PUBLISHED_TRAINING.threshold)
_PATCH_THRESHOLD = cast(float, PUBLISHED_PATCH.threshold)

_MEANINGLESS = ("use_triton", "chunk_size", "rrattn_version", "layer_idx", "config", "rrattn_config")
# Arguments for which the release itself supports one value only.
_ONE_VALUE = {"block_size": BLOCK_SIZE, "norm": 1, "kdb": 1, "softmax": True, "select_mode": "inverse"}


def rrattn_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    *,
    stride: int = PUBLISHED_PREFILL.stride,
    threshold: float | Tensor = _PREFILL_THRESHOLD,
    keep_sink: bool = PUBLISHED_PREFILL.keep_sink,
    keep_recent: bool = PUBLISHED_PREFILL.keep_last,
    causal: bool = True,
    startend_row_indices: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """:func:`rrattn.rr_attention` in the layout of the published release.

    Parameters
    ----------
    query_states : Tensor
        [B, Hq, Lq, D] float32, float16 or bfloat16.
    key_states, value_states : Tensor
        [B, Hkv, Lk, D], same dtype.
    stride, threshold, keep_sink, causal, startend_row_indices
        As in :func:`rrattn.rr_attention`.
    keep_recent : bool
        Its keep_last: keep every visible block of the last query block row.
    others
        use_triton, chunk_size, rrattn_version, layer_idx, config: no meaning here, named in one DeprecationWarning.
        block_size=128, norm=1, kdb=1: the only values.

    Returns
    -------
    out : Tensor
        [B, Lq, Hq, D], the query's dtype.
    sparse_ratio : Tensor
        float32 []: the share of the visible blocks that were left out.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    _check_others("rrattn_prefill", others)
    query, key = _transposed(query_states, "query_states"), _transposed(key_states, "key_states")
    causal, keep_recent = arguments.flag(causal, "causal"), arguments.flag(keep_recent, "keep_recent")
    sampling: Sampling = {**PUBLISHED_PREFILL.sampling(), "stride": stride}
    rules: KeepRules = {**PUBLISHED_PREFILL.keep_rules(), "keep_sink": keep_sink, "keep_last": keep_recent}
    out, block_mask = functional.rr_attention(
        query,
        key,
        _transposed(value_states, "value_states"),
        startend_row_indices,
        causal=causal,
        threshold=threshold,
        compensate=PUBLISHED_PREFILL.compensate,
        quantization=PUBLISHED_PREFILL.quantization,
        return_block_mask=True,
        **sampling,
        **rules,
    )
    num_selected, num_visible = block_counts(
        block_mask, startend_row_indices, causal=causal, seqlen_q=query.shape[1], seqlen_k=key.shape[1]
    )
    return out, paddle.to_tensor((num_visible - num_selected).sum() / max(num_visible.sum(), 1), dtype="float32")


def rrattn_estimate(
    query_states: Tensor,
    key_states: Tensor,
    *,
    stride: int = PUBLISHED_ESTIMATE.stride,
    threshold: float | Tensor = _ESTIMATE_THRESHOLD,
    keep_sink: bool = PUBLISHED_ESTIMATE.keep_sink,
    keep_recent: bool = PUBLISHED_ESTIMATE.keep_last,
    causal: bool = True,
    startend_row_indices: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """`estimate_block_scores` and `select_blocks` in the layout of the published release.

    Parameters
    ----------
    query_states, key_states, stride, threshold, keep_sink, keep_recent, causal, startend_row_indices, others
        As in :func:`rrattn_prefill`; softmax=True and select_mode="inverse" are the only values of these.

    Returns
    -------
    block_scores : Tensor
        [B, Hq, Mq, Mk] float32.
    block_mask : Tensor
        [B, Hq, Mq, Mk] bool: the blocks to attend.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    _check_others("rrattn_estimate", others)
    query, key = _transposed(query_states, "query_states"), _transposed(key_states, "key_states")
    causal, keep_recent = arguments.flag(causal, "causal"), arguments.flag(keep_recent, "keep_recent")
    rules: KeepRules = {
        **PUBLISHED_ESTIMATE.keep_rules(),
        "keep_sink": arguments.flag(keep_sink, "keep_sink"),
        "keep_last": keep_recent,
    }
    if not isinstance(threshold, paddle.Tensor):
        threshold = arguments.threshold(threshold)
    sampling: Sampling = {**PUBLISHED_ESTIMATE.sampling(), "stride": stride}
    scores = estimate_block_scores(query, key, startend_row_indices, causal=causal, **sampling)
    block_mask = select_blocks(
        scores,
        threshold,
        startend_row_indices,
        causal=causal,
        seqlen_q=query.shape[1],
        seqlen_k=key.shape[1],
        **rules,
    )
    return scores, unpack_block_mask(block_mask, scores.shape[3])


@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[False] = ...,
    **options: Unpack[_TrainingOptions],
) -> Tensor: ...
@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[True],
    **options: Unpack[_TrainingOptions],
) -> tuple[Tensor, Tensor]: ...
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    threshold: float | Tensor = _TRAINING_THRESHOLD,
    stride: int = PUBLISHED_TRAINING.stride,
    causal: bool = CAUSAL,
    dropout: float = 0.0,
    training: bool = True,
    keep_sink: bool = PUBLISHED_TRAINING.keep_sink,
    keep_last: bool = PUBLISHED_TRAINING.keep_last,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
) -> Any:
    """PaddleFleet's operator for training, by its later arguments; before, it had neither keep_sink nor keep_last.

    Parameters
    ----------
    query, key, value, startend_row_indices
        As in :func:`rrattn.rr_attention`: [B, L, H, D].
    threshold, stride, causal, training, keep_sink, keep_last, return_softmax_lse
        As there.
    dropout : float
        0, the only value here.
    return_seed_offset : bool
        False, the only value here: without dropout there is no seed.

    Returns
    -------
    out, lse
        As in :func:`rrattn.rr_attention`.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    given = arguments.plain(dropout)
    if isinstance(given, bool) or given != 0:
        raise arguments.refused(dropout, "dropout", "0: rrattn has no dropout", ValueError)
    if arguments.flag(return_seed_offset, "return_seed_offset"):
        raise arguments.refused(
            return_seed_offset, "return_seed_offset", "False: there is no seed without dropout", ValueError
        )
    sampling: Sampling = {**PUBLISHED_TRAINING.sampling(), "stride": stride}
    rules: KeepRules = {**PUBLISHED_TRAINING.keep_rules(), "keep_sink": keep_sink, "keep_last": keep_last}
    return functional.rr_attention(
        query,
        key,
        value,
        startend_row_indices,
        causal=causal,
        training=training,
        threshold=threshold,
        compensate=PUBLISHED_TRAINING.compensate,
        quantization=PUBLISHED_TRAINING.quantization,
        return_softmax_lse=return_softmax_lse,
        **sampling,
        **rules,
    )


class Patch(Protocol):
    """A function of the release that enables RRAttention on models of some types."""

    def __call__(
        self,
        model: ModelT,
        method: str = ...,
        threshold: float | Sequence[float] = ...,
        stride: int = ...,
        *,
        keep_sink: bool = ...,
        keep_recent: bool = ...,
        **others: object,
    ) -> ModelT: ...


def _patch(name: str, model_types: tuple[str, ...]) -> Patch:
    """The release's function of this name, for models of these types."""

    def patch(
        model: ModelT,
        method: str = "rrattn",
        threshold: float | Sequence[float] = _PATCH_THRESHOLD,
        stride: int = PUBLISHED_PATCH.stride,
        *,
        keep_sink: bool = PUBLISHED_PATCH.keep_sink,
        keep_recent: bool = PUBLISHED_PATCH.keep_last,
        **others: object,
    ) -> ModelT:
        if method != "rrattn":
            raise ValueError(
                f"method is {method!r}, but must be 'rrattn': a model that {name} leaves alone runs its own attention, "
                "and rrattn.disable(model) undoes it"
            )
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in model_types:
            raise ValueError(
                f"{name} is for models of the types {', '.join(model_types)}; the model_type of this one is "
                f"{model_type!r}"
            )
        _check_others(name, others)
        keep_last = arguments.flag(keep_recent, "keep_recent")
        config = replace(PUBLISHED_PATCH, threshold=threshold, stride=stride, keep_sink=keep_sink, keep_last=keep_last)
        return enable(model, config)

    patch.__name__ = patch.__qualname__ = name
    patch.__doc__ = f"""`rrattn.enable` under its name in the published release.

    Parameters
    ----------
    model : paddle.nn.Layer
        Its config's model_type must be one of {", ".join(model_types)}.
    method : str
        'rrattn', the only one here.
    threshold : float or sequence of float
        For all layers, or one per layer.
    stride, keep_sink : int, bool
        As in `RRAttentionConfig`.
    keep_recent : bool
        Its keep_last.
    others
        As in :func:`rrattn_prefill`, and rrattn_config, which has no meaning here either.

    Returns
    -------
    The model itself.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    return patch


patch_llama_attention = _patch("patch_llama_attention", ("llama",))
patch_qwen_attention = _patch("patch_qwen_attention", ("qwen2", "qwen3"))
patch_ernie_attention = _patch("patch_ernie_attention", ("ernie4_5", "ernie4_5_moe"))


def _transposed(states: Tensor, name: str) -> Tensor:
    """[B, H, L, D] as [B, L, H, D], a view."""
    shape = list(checked_tensor(states, name).shape)
    if len(shape) != 4:
        raise ValueError(
            f"{name} has {len(shape)} dimensions, shape {shape}, but must have 4: [batch, heads, length, head size]"
        )
    return states.transpose([0, 2, 1, 3])


def _check_others(function: str, others: Mapping[str, object]) -> None:
    """One warning for arguments without a meaning, and errors for what nothing here can do."""
    unknown = [name for name in others if name not in _MEANINGLESS and name not in _ONE_VALUE]
    if unknown:
        raise TypeError(f"{function} has no argument {', '.join(unknown)}")
    for name, only in _ONE_VALUE.items():
        given = arguments.plain(others.get(name, only))
        if type(given) is not type(only) or given != only:
            raise arguments.refused(given, name, repr(only), ValueError)
    meaningless = [name for name in others if name in _MEANINGLESS]
    if meaningless:
        warnings.warn(
            f"{', '.join(meaningless)} of {function} mean nothing in this rrattn: leave them out",
            DeprecationWarning,
            stacklevel=3,
        )
