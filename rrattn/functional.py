"""RRAttention and its three stages as functions on Paddle tensors.

Shapes are Paddle's attention layout: query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv], Hq a multiple
of Hkv. Queries are the last Lq positions of the keys. Blocks are of 128 tokens; Mq = ceil(Lq / 128) and
Mk = ceil(Lk / 128).

float32, float16 and bfloat16 are computed in float32. Head sizes D and Dv are multiples of 8 up to 256. Tensors are
read in place when their last dimension is contiguous. Where `paddle.amp.auto_cast` is active, query, key and value are
cast to its dtype first, as for Paddle's own attention.

A program saved by `paddle.jit.save` names the operators and does not hold them: import rrattn before `paddle.jit.load`
and `paddle.inference.create_predictor`. `jit.load` does not check, and without the operators the first call ends the
process.

Keys that a query may not see never change its result, whatever they hold: padding, or slots of a cache that nothing
was written to. A NaN or infinity shows in every query that sees it, as in dense attention, and in queries that share a
block of 128 queries by 128 keys with one that does, but not in other blocks. Sums are in float32: they become infinite
beyond its largest number.

Bad arguments raise ValueError (TypeError for what is no tensor) with the value and what is allowed, before anything
runs; what counts as a number or as True and False is said in :mod:`rrattn.arguments`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import paddle

from . import arguments, config
from .config import (
    CAUSAL,
    RRAttentionConfig,
    checked_keep_rules,
    refuse_compensated_quantization,
    sampling_of_call,
)
from .layout import watch_layout
from .operators import call

try:
    from paddle.jit.marker import unified as unified
except ImportError:  # Paddle 2.6, where rrattn runs only eagerly

    def unified(function: Any) -> Any:  # type: ignore[misc]  # the least of what Paddle's takes
        return function


paddle.jit.ignore_module([arguments, config])  # to_static would rewrite their plain Python, and fails on it

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from paddle import Tensor
    from typing_extensions import Unpack

    from .config import KeepRules, Sampling

    class _Options(Sampling, KeepRules, total=False):
        """What `rr_attention` takes by name, but for what it is to return."""

        causal: bool
        training: bool
        threshold: float | Tensor
        deterministic: bool | None
        compensate: bool
        quantization: str | None
        sink: Tensor | None


_DEFAULTS = RRAttentionConfig()


@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[False] = ...,
    return_block_mask: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[True],
    return_block_mask: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[False] = ...,
    return_block_mask: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: Literal[True],
    return_block_mask: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    return_softmax_lse: bool = ...,
    return_block_mask: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
@unified  # to_static traces through these as they are
def rr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool = CAUSAL,
    training: bool = True,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    threshold: Any = _DEFAULTS.threshold,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
    deterministic: bool | None = _DEFAULTS.deterministic,
    compensate: bool = _DEFAULTS.compensate,
    quantization: str | None = _DEFAULTS.quantization,
    sink: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_block_mask: bool = False,
) -> Any:
    """Attention over the key blocks that hold most of each query block's attention (arXiv 2602.05853).

    Estimates block scores from one query in `stride` and keys summed over `key_stride`, keeps for each query block the
    smallest set of key blocks whose scores reach `threshold` of the row's sum, and attends to these alone.
    Differentiable in query, key, value and sink; the selection itself carries no gradient.

    Parameters
    ----------
    query : Tensor
        [B, Lq, Hq, D] float32, float16 or bfloat16.
    key : Tensor
        [B, Lk, Hkv, D], same dtype.
    value : Tensor
        [B, Lk, Hkv, Dv], same dtype.
    startend_row_indices : Tensor, optional
        [B, 1 | Hkv | Hq, Lk, 1 | 2 | 4] int32: FlashMask, as in `paddle.nn.functional.flashmask_attention`.
    causal : bool
        Query i sees keys up to i + Lk - Lq; needs Lq <= Lk.
    training : bool
        False: the result carries no gradient and nothing is kept for a backward pass.
    stride : int
        Sample stride in tokens: 2, 4, 8, 16, 32 or 64.
    key_stride : int, optional
        Tokens over which keys are summed: 1, 2, 4, 8, 16, 32 or 64. Default: `stride`.
    threshold : float or Tensor
        Share of the estimated mass to keep, in (0, 1]; 1 is dense attention. A float32 tensor of Hq elements gives each
        head its own; one of a single element holds for all.
    head_offset : int
        Number of this rank's first query head, where heads are sharded.
    softmax_scale : float, optional
        Default: 1 / sqrt(D).
    spread : float
        How much the variance within a stride of keys adds to its score, at least 0; see
        :class:`rrattn.RRAttentionConfig`.
    keep_sink : bool
        Always keep a row's first visible key block.
    keep_last : bool
        Keep every visible block of the last query block row. Of a prefill by chunks, give True for the last alone to
        select what one prefill does.
    keep_local : int
        When causal, always keep this many visible key blocks directly before those of the row's own positions, which
        are kept anyway; 0: none. No effect when not causal, where a row has no own positions.
    min_share : float
        A block with less than this share of an average visible block's estimated mass does not count as needed for a
        threshold below 1; from 0 to 1.
    deterministic : bool, optional
        Gradients with the same bits on every run, on a GPU too, where that takes 4 to 22% longer (H200); on a CPU
        they always are. Default: as Paddle's FLAGS_cudnn_deterministic says when this is called.
    compensate : bool
        Let the mean key and the mean value of a block stand in for it where it is not selected but wholly visible:
        every row of the query block sees all of its keys. A mean counts as often as its block has keys. There are no
        gradients of this: a call that would record them is refused, and a traced program raises in its backward pass.
    quantization : str, optional
        "qk_int8_pv_fp8": multiply INT8 queries and keys, and FP8 probabilities and values; see docs/quantization.md. On
        a CPU and on Hopper (there for head sizes up to 128), without gradients (as `compensate`) and without
        `compensate`. Default: none.
    sink : Tensor, optional
        [Hq] float32, float16 or bfloat16: a logit for each query head that joins the softmax of each of its rows, as
        one more key that all see and that has no value. It is not multiplied by softmax_scale. -inf is the same as
        none. The estimate counts it too, as a part of the mass that is in no block.
    return_softmax_lse, return_block_mask : bool
        Return these too.

    Returns
    -------
    out : Tensor
        [B, Lq, Hq, Dv], the query's dtype. A row that sees nothing is zero.
    lse : Tensor, with return_softmax_lse
        [B, Hq, Lq] float32: log-sum-exp of each row over the selected blocks, what stands in for others and the sink.
        Where a row sees nothing it is the sink, -inf without one. Differentiable.
    block_mask : Tensor, with return_block_mask
        [B, Hq, Mq, ceil(Mk / 32)] int32, see :func:`rrattn.unpack_block_mask`.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.

    Examples
    --------
    >>> query = paddle.randn([1, 4096, 8, 64])
    >>> key, value = paddle.randn([1, 4096, 2, 64]), paddle.randn([1, 4096, 2, 64])
    >>> out = rrattn.rr_attention(query, key, value, causal=True, threshold=0.9)
    """
    query, key, value = attention_inputs(query, key, value)
    causal = arguments.flag(causal, "causal")
    rows = checked_rows(startend_row_indices, key, causal)
    sink = checked_sink(sink, query)
    scalar, per_head = split_threshold(threshold)
    attributes = (
        causal,
        *_sampling(query, stride, key_stride, head_offset, softmax_scale, spread),
        scalar,
        *checked_keep_rules(keep_sink, keep_last, keep_local, min_share).values(),
        is_deterministic(deterministic),
        *_numbers(compensate, quantization),
    )
    asked = (
        arguments.flag(return_softmax_lse, "return_softmax_lse"),
        arguments.flag(return_block_mask, "return_block_mask"),
    )
    if arguments.flag(training, "training"):
        refuse_inference_gradients(compensate, quantization, query, key, value, sink)
    with paddle.set_grad_enabled(training and paddle.is_grad_enabled()), watch_layout(query, key, rows, causal=causal):
        out, *extras = _call_with_sink("rr_attention", (query, key, value, rows, per_head), sink, attributes)
    return _results(out, extras, asked)


@unified
def estimate_block_scores(
    query: Tensor,
    key: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool = CAUSAL,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    sink: Tensor | None = None,
) -> Tensor:
    """Estimate how much each query block attends to each key block: the first stage of :func:`rr_attention`.

    The parameters are those of :func:`rr_attention`.

    Returns
    -------
    block_scores : Tensor
        [B, Hq, Mq, Mk] float32, no gradient: softmax probabilities over strides, summed over the pairs of strides of
        each pair of blocks. A row sums to the number of its sampled queries that see anything (at most 128 / stride),
        less what the sink takes.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    query, key = attention_inputs(query, key)
    causal = arguments.flag(causal, "causal")
    rows = checked_rows(startend_row_indices, key, causal)
    sampling = _sampling(query, stride, key_stride, head_offset, softmax_scale, spread)
    sink = checked_sink(sink, query)
    with paddle.no_grad(), watch_layout(query, key, rows, causal=causal):
        block_scores: Tensor = call("estimate", query, key, rows, sink, causal, *sampling)
    return block_scores


@unified
def select_blocks(
    block_scores: Tensor,
    threshold: float | Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool = CAUSAL,
    seqlen_q: int,
    seqlen_k: int,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
) -> Tensor:
    """Keep the blocks whose scores reach `threshold` of their row's sum: the second stage of :func:`rr_attention`.

    Blocks are taken from the largest score down, the lower index first among equals, while the mass before one is below
    `threshold` times the row's and its own is at least `min_share` times an average visible block's; masses are added
    in fixed point, so that every device selects the same. Also kept: the blocks that hold the row's own positions (when
    causal), blocks that FlashMask masks in part, and what `keep_sink`, `keep_last` and `keep_local` ask for. A row with
    a score that is NaN, negative or 2^18 and up keeps every visible block, so that a NaN or infinity in a query or key
    shows in the attention; one in a key that no query sees counts as zero in :func:`estimate_block_scores` already.

    Parameters
    ----------
    block_scores : Tensor
        [B, Hq, Mq, Mk] float32.
    seqlen_q, seqlen_k : int
        Lengths in tokens.
    threshold, startend_row_indices, causal, keep_sink, keep_last, keep_local, min_share
        As in :func:`rr_attention`.

    Returns
    -------
    block_mask : Tensor
        [B, Hq, Mq, ceil(Mk / 32)] int32: bit j % 32 of word j / 32 for key block j.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    block_scores = checked_tensor(block_scores, "block_scores")
    causal = arguments.flag(causal, "causal")
    scalar, per_head = split_threshold(threshold)
    with paddle.no_grad():
        block_mask: Tensor = call(
            "select",
            block_scores,
            checked_rows(startend_row_indices, block_scores, causal),
            per_head,
            causal,
            arguments.length(seqlen_q, "seqlen_q"),
            arguments.length(seqlen_k, "seqlen_k"),
            scalar,
            *checked_keep_rules(keep_sink, keep_last, keep_local, min_share).values(),
        )
    return block_mask


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    deterministic: bool | None = ...,
    compensate: bool = ...,
    quantization: str | None = ...,
    sink: Tensor | None = ...,
    return_softmax_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    deterministic: bool | None = ...,
    compensate: bool = ...,
    quantization: str | None = ...,
    sink: Tensor | None = ...,
    return_softmax_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    startend_row_indices: Tensor | None = ...,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    deterministic: bool | None = ...,
    compensate: bool = ...,
    quantization: str | None = ...,
    sink: Tensor | None = ...,
    return_softmax_lse: bool = ...,
) -> Any: ...
@unified
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool = CAUSAL,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    deterministic: bool | None = _DEFAULTS.deterministic,
    compensate: bool = _DEFAULTS.compensate,
    quantization: str | None = _DEFAULTS.quantization,
    sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over given blocks: the third stage of :func:`rr_attention`, differentiable as that is.

    Parameters
    ----------
    block_mask : Tensor
        [B, Hq, Mq, ceil(Mk / 32)] int32, from :func:`select_blocks` or :func:`rrattn.pack_block_mask`. Bits of blocks
        that causal or FlashMask hide do no harm.
    query, key, value, startend_row_indices, causal, softmax_scale, deterministic, compensate, quantization, sink
        As in :func:`rr_attention`.
    return_softmax_lse
        As in :func:`rr_attention`.

    Returns
    -------
    out, lse
        As in :func:`rr_attention`.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    query, key, value = attention_inputs(query, key, value)
    block_mask = checked_tensor(block_mask, "block_mask")
    causal = arguments.flag(causal, "causal")
    rows = checked_rows(startend_row_indices, key, causal)
    scale = scale_of(arguments.softmax_scale(softmax_scale), query)
    attributes = causal, scale, is_deterministic(deterministic), *_numbers(compensate, quantization)
    asked = (arguments.flag(return_softmax_lse, "return_softmax_lse"),)
    sink = checked_sink(sink, query)
    refuse_inference_gradients(compensate, quantization, query, key, value, sink)
    with watch_layout(query, key, rows, causal=causal):
        out, *extras = _call_with_sink("attend", (query, key, value, block_mask, rows), sink, attributes)
    return _results(out, extras, asked)


def checked_tensor(tensor: Any, name: str) -> Tensor:
    """The tensor itself.

    Raises
    ------
    TypeError
        For anything else.
    """
    if not isinstance(tensor, (paddle.Tensor, paddle.pir.Value)):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but must be a paddle.Tensor")
    checked: Tensor = tensor
    return checked


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether Paddle records a gradient of what is computed of these tensors, eagerly; None is an absent one."""
    return paddle.is_grad_enabled() and not all(tensor is None or tensor.stop_gradient for tensor in tensors)


def refuse_inference_gradients(compensate: bool, quantization: str | None, *tensors: Tensor | None) -> None:
    """Refuses compensation and quantization where gradients would be recorded. What a program is traced for is not
    known: that one raises in its backward pass."""
    if not compensate and quantization is None:
        return
    if paddle.in_dynamic_mode() and records_gradient(*tensors):
        given, kind, without = (
            ("compensate is True", "that is compensated", "compensate=False")
            if compensate
            else (f"quantization is {quantization!r}", "in eight bits", "quantization=None")
        )
        raise ValueError(
            f"{given}, but attention {kind} has no gradients, and query, key, value or sink "
            f"asks for them (stop_gradient is False): give {without} to train, or call it under paddle.no_grad()"
        )


def checked_rows(indices: Tensor | None, like: Tensor, causal: bool) -> Tensor | None:
    """FlashMask as it is. An empty tensor is refused here: Paddle would hand it to the operator as an absent one."""
    if indices is None:
        return None
    shape = list(checked_tensor(indices, "startend_row_indices").shape)
    if 0 in shape and 0 not in like.shape:
        raise ValueError(
            f"startend_row_indices has {shape[-1]} bounds, shape {shape}, "
            f"but must have {'1 or 2' if causal else '2 or 4'} when causal is {causal}, and no size of 0"
        )
    return indices


def checked_sink(sink: Tensor | None, query: Tensor) -> Tensor | None:
    """The sink in float32, which the kernels read; a model's parameters may be of 16 bits. See also checked_rows."""
    if sink is None:
        return None
    shape = list(checked_tensor(sink, "sink").shape)
    if 0 in shape and 0 not in query.shape:
        raise ValueError(f"sink has shape {shape}, but must have one element for each query head")
    return sink.astype("float32") if sink.dtype in (paddle.float16, paddle.bfloat16) else sink


def attention_inputs(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in the dtype of auto_cast where that is active."""
    checked = [checked_tensor(tensor, name) for tensor, name in zip(tensors, ("query", "key", "value"))]
    dtype = _autocast_dtype()
    return checked if dtype is None else [tensor.astype(dtype) for tensor in checked]


def _autocast_dtype() -> Any:
    """The dtype that auto_cast computes attention in; None where it is not active."""
    if hasattr(paddle.amp, "is_autocast_enabled"):
        return paddle.amp.get_autocast_dtype() if paddle.amp.is_autocast_enabled() else None
    tracer = paddle.base.framework._dygraph_tracer()  # Paddle 2.6 tells in no other way
    return None if tracer._amp_level == paddle.base.core.AmpLevel.O0 else tracer._amp_dtype


def split_threshold(threshold: Any) -> tuple[float, Tensor | None]:
    """(float, None), or (unused float, float32 tensor of one element per head)."""
    if isinstance(threshold, (paddle.Tensor, paddle.pir.Value)):
        if 0 in threshold.shape:  # the operator would see an absent one, see checked_rows
            raise ValueError(
                f"threshold has shape {list(threshold.shape)}, but must have one element for each head, or one"
            )
        return 1.0, threshold
    return arguments.threshold(threshold, allowed="a number in (0, 1] or a float32 Tensor of one per head"), None


def is_deterministic(deterministic: object) -> bool:
    """As asked for, or as Paddle's flag says, which builds for the CPU do not have."""
    asked = arguments.optional_flag(deterministic, "deterministic")
    if asked is None:
        flag = "FLAGS_cudnn_deterministic"
        return paddle.is_compiled_with_cuda() and bool(paddle.get_flags(flag)[flag])
    return asked


def _numbers(compensate: object, quantization: object) -> tuple[bool, str]:
    """The last two attributes of an operator that attends; "" is no quantization."""
    compensated, quantized = arguments.flag(compensate, "compensate"), arguments.quantization(quantization)
    refuse_compensated_quantization(compensated, quantized)
    return compensated, quantized or ""


def _sampling(query: Tensor, stride: object, key_stride: object, *others: object) -> tuple[object, ...]:
    """The values of `sampling_of_call`, with the scale that the query gives where none is given."""
    sampling = sampling_of_call(stride, key_stride, *others)
    sampling["softmax_scale"] = scale_of(sampling["softmax_scale"], query)
    return tuple(sampling.values())


def scale_of(softmax_scale: float | None, query: Tensor) -> float:
    """The scale itself, or 1 / sqrt(D)."""
    if softmax_scale is not None:
        return softmax_scale
    head_dim = query.shape[-1] if query.shape else 0
    return 1 / math.sqrt(head_dim) if head_dim > 0 else 1.0  # the operator refuses the others


def _call_with_sink(name: str, inputs: Sequence[object], sink: object, attributes: Sequence[object]) -> Any:
    """Calls an operator, or with a sink its variant that has one, as its last input."""
    if sink is None:
        return call(name, *inputs, *attributes)
    return call(f"{name}_with_sink", *inputs, sink, *attributes)


def _results(out: Tensor, extras: Sequence[Tensor], asked: Sequence[bool]) -> Any:
    """out alone, or with the extras that were asked for."""
    extras = [extra for extra, wanted in zip(extras, asked) if wanted]
    return (out, *extras) if extras else out
