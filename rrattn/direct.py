"""The stages on plain arrays, without Paddle: for kernel work, tests and benchmarks beside other array libraries.

Every array is anything with ``__dlpack__`` in host memory: NumPy arrays, for one. The caller allocates everything,
outputs included, and they are written in place; ``query``-like arrays may be strided as long as their last dimension
is contiguous. Functions return None, release the GIL, and raise ValueError with the value and what is allowed, before
anything is written.

NumPy has no bfloat16: pass uint16 arrays that hold the bits, and ``dtype="bfloat16"``. ``num_threads`` None means all
OpenMP threads. B, L, H, D stand for batch, length, heads and head size; blocks are of 128 tokens; Mq and Mk are the
numbers of query and key blocks.
"""

from __future__ import annotations

from numbers import Real

from . import _direct

available_simd = _direct.available_simd
set_simd = _direct.set_simd
simd = _direct.simd


def estimate_block_scores(
    query,
    key,
    block_scores,
    startend_row_indices=None,
    *,
    causal,
    stride=8,
    head_offset=0,
    softmax_scale=None,
    dtype=None,
    num_threads=None,
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
    _direct.estimate_block_scores(
        query,
        key,
        block_scores,
        startend_row_indices,
        causal,
        stride,
        head_offset,
        softmax_scale,
        dtype,
        num_threads,
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
    keep_sink=True,
    keep_last=False,
    num_threads=None,
):
    """Keep the blocks whose scores reach ``threshold`` of their row's sum.

    Parameters
    ----------
    block_scores : [B, Hq, Mq, Mk] float32
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32, output: bit j % 32 of word j / 32 for key block j
    threshold : float in (0, 1], or [Hq] or [1] float32
    startend_row_indices, causal, keep_sink, keep_last : as in :func:`rrattn.rr_attention`
    """
    scalar = isinstance(threshold, Real)
    _direct.select_blocks(
        block_scores,
        block_mask,
        startend_row_indices,
        float(threshold) if scalar else 1.0,
        None if scalar else threshold,
        causal,
        seqlen_q,
        seqlen_k,
        keep_sink,
        keep_last,
        num_threads,
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
    softmax_scale=None,
    dtype=None,
    num_threads=None,
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
    _direct.block_sparse_attention(
        query,
        key,
        value,
        block_mask,
        out,
        lse,
        startend_row_indices,
        causal,
        softmax_scale,
        dtype,
        num_threads,
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
    softmax_scale=None,
    dtype=None,
    num_threads=None,
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
    """
    _direct.block_sparse_attention_backward(
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
        causal,
        softmax_scale,
        dtype,
        num_threads,
    )
