"""The stages on plain arrays, without Paddle: for kernel work, tests and benchmarks beside other array libraries.

An array is anything with ``__dlpack__``: NumPy arrays in host memory; torch, CuPy or Paddle tensors, on a GPU too
where this build has the stage for it. The caller allocates everything. Outputs are written in place; arrays of
[B, L, H, D] may be strided as long as their last dimension is contiguous. Inputs may be read-only. An output may share
memory with no other array, except that ``out`` may be ``query``. Functions release the GIL. They raise ValueError
(TypeError for what is not an array, and for options that they do not have) with the value and what is allowed, before
anything is written.

NumPy has no bfloat16: pass uint16 arrays that hold the bits, and ``dtype="bfloat16"``. B, L, H, D stand for batch,
length, heads and head size; blocks are of 128 tokens; Mq and Mk are the numbers of query and key blocks.

All functions take these options and return the bytes of workspace that they need:

num_threads : int, optional
    The most threads to use on the CPU. Default: `default_num_threads()`, as many as OpenMP would take
    (OMP_NUM_THREADS), but no more than the process has processors or its container's CPU quota pays for. Results do
    not depend on it.
workspace : array, optional on the CPU
    Scratch memory on the device of the other arrays, of any type.
stream : int
    The cudaStream_t to run on, as an integer.
size_only : bool
    Only return the bytes; nothing runs.
"""

from __future__ import annotations

import inspect

from . import _direct, arguments
from .config import RRAttentionConfig

_DEFAULTS = RRAttentionConfig()
_THRESHOLD = "a number in (0, 1] or a float32 array of one per head"

available_simd = _direct.available_simd
default_num_threads = _direct.default_num_threads
simd = _direct.simd


def set_simd(name):
    """Makes the CPU stages use the instruction set of this name, one of :func:`available_simd`."""
    if not isinstance(name, str):
        raise TypeError(f"simd is {name!r}, but must be a name, one of {', '.join(available_simd())}")
    _direct.set_simd(name)


def estimate_block_scores(
    query,
    key,
    block_scores,
    startend_row_indices=None,
    *,
    causal,
    stride=_DEFAULTS.stride,
    head_offset=_DEFAULTS.head_offset,
    softmax_scale=_DEFAULTS.softmax_scale,
    dtype=None,
    **options,
):
    """Estimate how much each query block attends to each key block.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key : [B, Lk, Hkv, D], same dtype
    block_scores : [B, Hq, Mq, Mk] float32, output
    startend_row_indices : [B, 1 | Hkv | Hq, Lk, 1 | 2 | 4] int32, FlashMask
    causal, stride, head_offset, softmax_scale : as in :func:`rrattn.rr_attention`
    """
    return _direct.estimate_block_scores(
        query,
        key,
        block_scores,
        startend_row_indices,
        arguments.flag(causal, "causal"),
        arguments.sample_stride(stride),
        arguments.head_offset(head_offset),
        arguments.softmax_scale(softmax_scale),
        _name(dtype),
        _options(estimate_block_scores, options),
    )


def select_blocks(
    block_scores,
    block_mask,
    startend_row_indices=None,
    *,
    threshold,
    causal,
    seqlen_q,
    seqlen_k,
    keep_sink=_DEFAULTS.keep_sink,
    keep_last=_DEFAULTS.keep_last,
    keep_local=_DEFAULTS.keep_local,
    **options,
):
    """Keep the blocks whose scores reach ``threshold`` of their row's sum.

    Parameters
    ----------
    block_scores : [B, Hq, Mq, Mk] float32
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32, output: bit j % 32 of word j / 32 for key block j
    threshold : float in (0, 1], or [Hq] or [1] float32
    startend_row_indices, causal, keep_sink, keep_last, keep_local : as in :func:`rrattn.rr_attention`
    """
    per_head = hasattr(threshold, "__dlpack__") and getattr(threshold, "shape", None) != ()
    scalar = 1.0 if per_head else arguments.threshold(threshold, allowed=_THRESHOLD)
    return _direct.select_blocks(
        block_scores,
        block_mask,
        startend_row_indices,
        scalar,
        threshold if per_head else None,
        arguments.flag(causal, "causal"),
        arguments.length(seqlen_q, "seqlen_q"),
        arguments.length(seqlen_k, "seqlen_k"),
        arguments.flag(keep_sink, "keep_sink"),
        arguments.flag(keep_last, "keep_last"),
        arguments.int64_count(keep_local, "keep_local"),
        _options(select_blocks, options),
    )


def block_sparse_attention(
    query,
    key,
    value,
    block_mask,
    out,
    lse,
    startend_row_indices=None,
    *,
    causal,
    softmax_scale=_DEFAULTS.softmax_scale,
    dtype=None,
    **options,
):
    """Flash attention over the selected blocks.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key, value : [B, Lk, Hkv, D], same dtype
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32
    out : [B, Lq, Hq, D], output, same dtype
    lse : [B, Hq, Lq] float32, output: log-sum-exp of each row, -inf where nothing is visible
    startend_row_indices, causal, softmax_scale : as in :func:`rrattn.rr_attention`
    """
    return _direct.block_sparse_attention(
        query,
        key,
        value,
        block_mask,
        out,
        lse,
        startend_row_indices,
        arguments.flag(causal, "causal"),
        arguments.softmax_scale(softmax_scale),
        _name(dtype),
        _options(block_sparse_attention, options),
    )


def block_sparse_attention_backward(
    query,
    key,
    value,
    block_mask,
    out,
    lse,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
    startend_row_indices=None,
    *,
    causal,
    softmax_scale=_DEFAULTS.softmax_scale,
    dtype=None,
    deterministic=False,
    **options,
):
    """Gradients of :func:`block_sparse_attention`, given what it was given and what it returned.

    Parameters
    ----------
    query, out, grad_out : [B, Lq, Hq, D] float32, float16 or bfloat16
    key, value : [B, Lk, Hkv, D], same dtype
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32
    lse : [B, Hq, Lq] float32
    grad_query : [B, Lq, Hq, D], output, same dtype
    grad_key, grad_value : [B, Lk, Hkv, D], outputs, same dtype
    startend_row_indices, causal, softmax_scale : as in :func:`rrattn.rr_attention`
    deterministic : whether a GPU too is to give the same bits on every run, as a CPU always does
    """
    return _direct.block_sparse_attention_backward(
        query,
        key,
        value,
        block_mask,
        out,
        lse,
        grad_out,
        grad_query,
        grad_key,
        grad_value,
        startend_row_indices,
        arguments.flag(causal, "causal"),
        arguments.softmax_scale(softmax_scale),
        _name(dtype),
        arguments.flag(deterministic, "deterministic"),
        _options(block_sparse_attention_backward, options),
    )


def startend_rows_from_dense(mask, start_rows, verdict, *, dtype=None, **options):
    """FlashMask bounds of a dense causal mask, and a verdict that says whether they are exact.

    Parameters
    ----------
    mask : [B, 1 | Hq, Lq, Lk] bool (True: visible), or float32, float16 or bfloat16 (0: visible; -9984 or less: hidden)
    start_rows : [B, 1 | Hq, Lk, 1] int32, output: one bound for causal=True
    verdict : [2] int32, output: first 0 where the bounds say what the mask does, or 1 for a value that is neither
        visible nor hidden, plus 2 for a mask that is not causal or shows a key again after hiding it; then the bits of
        such a value
    """
    return _direct.startend_rows_from_dense(
        mask, start_rows, verdict, _name(dtype), _options(startend_rows_from_dense, options)
    )


def _options(function, given):
    """The options that all functions take, for the one that was called."""
    known = {"num_threads": None, "workspace": None, "stream": 0, "size_only": False}
    unknown = [name for name in given if name not in known]
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        raise TypeError(
            f"rrattn.direct.{function.__name__} has no argument {', '.join(unknown)}; "
            f"by name it takes {', '.join([*own, *known])}"
        )
    options = {**known, **given}
    num_threads = options["num_threads"]
    if num_threads is not None:
        num_threads = min(arguments.integer(num_threads, "num_threads", low=1), arguments.MAX_INT32)
    return _direct.Options(
        num_threads,
        options["workspace"],
        arguments.integer(options["stream"], "stream", 0, arguments.MAX_INT64),
        arguments.flag(options["size_only"], "size_only"),
    )


def _name(dtype):
    """The name of a dtype, which the library checks; None stays None."""
    if dtype is not None and not isinstance(dtype, str):
        raise TypeError(f"dtype is {dtype!r}, but must be a name: 'float32', 'float16' or 'bfloat16'")
    return dtype
