"""Attention as inference engines call it: requests of several lengths in one batch, keys and values in pages.

An engine hands over one [tokens, heads, head size] tensor of the queries of all requests, without padding, and keeps
keys and values in the pages of a cache, which a table names for each request. A request may be a whole prompt, a chunk
of one behind what is in the cache already, or one token to decode. :func:`ragged_attention` attends for all of them at
once, and gives each the bits that :func:`rrattn.rr_attention` with causal=True would give it alone.

It runs eagerly, without gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from . import arguments
from .config import BLOCK_SIZE, RRAttentionConfig, checked_keep_rules, sampling_of_call
from .functional import (
    attention_inputs,
    checked_sink,
    checked_tensor,
    records_gradient,
    scale_of,
    split_threshold,
    unified,
)
from .operators import call

if TYPE_CHECKING:
    from paddle import Tensor

_DEFAULTS = RRAttentionConfig()
_MASK_WORD_BITS = 32


@unified  # to_static would rewrite it; a program gets the error below
def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    block_tables: Tensor | None = None,
    *,
    heads_first: bool = True,
    pooled_keys: Tensor | None = None,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    threshold: Any = _DEFAULTS.threshold,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool | Tensor = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
    compensate: bool = _DEFAULTS.compensate,
    sink: Tensor | None = None,
    max_seqlen_k: int | None = None,
    max_num_keys: int | None = None,
    return_softmax_lse: bool = False,
    return_block_masks: bool = False,
) -> Any:
    """Causal block-sparse attention of several requests in one call, all three stages.

    The queries of a request are the last of its tokens: with n of them, they are tokens seqlens_k - n and on, and each
    sees the keys up to its own. A request may have no queries; then nothing of it is read. The work of all requests is
    one queue, the largest parts first.

    On a GPU all tensors lie in its memory. Lengths, tables and flags are not read by the host, so nothing waits for the
    GPU and one CUDA graph serves changing lengths; nor are they checked. There query may have more rows than there are
    queries, and rows of out past the last one are not written. A request whose queries are not rows of query has none,
    and one with more keys than there is room for, or fewer than it has queries, sees none.

    Parameters
    ----------
    query : Tensor
        [T, Hq, D] float32, float16 or bfloat16: the queries of all requests, one request after the other.
    key, value : Tensor
        Same dtype. Without block_tables [tokens, Hkv, D] and [tokens, Hkv, Dv], where tokens is the sum of seqlens_k:
        the keys and values of all requests, one after the other. With block_tables the cache, of P pages:
        [P, Hkv, page size, D] and [P, Hkv, page size, Dv]. A page has 64 tokens, or a multiple of 128. The keys and
        values of the queries' own tokens are there already.
    cu_seqlens_q : Tensor
        [B + 1] int32: query rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 are those of request b. The first is 0, the
        last T, and none is below the one before it.
    seqlens_k : Tensor
        [B] int32: the tokens of each request, those in the cache and those of its queries.
    block_tables : Tensor, optional
        [B, pages of a request] int32: token t of request b is in page block_tables[b, t // page size], at place
        t % page size. Entries past the request's tokens are not read. Requests may share pages.
    heads_first : bool
        Whether a page is [Hkv, page size, D], as FastDeploy has it, or else [page size, Hkv, D].
    pooled_keys : Tensor, optional
        [P, Hkv, page size / key_stride, D + 1] float32, contiguous, with block_tables: the estimate's sums of keys, of
        the strides of each page, and behind each sum its variance. A call takes what it has of the tokens before a
        request's queries and writes what the queries' tokens add, in place, so that the keys of the prefix are not read
        again for the estimate. Each call that adds tokens to a page must have it, from the page's first one on, with
        the same key_stride. No stride lies in two pages. Pages with tokens of queries belong to one request. Results
        are the same bits with it and without. On a CPU alone.
    keep_last : bool or Tensor
        Whether the last query block row of a request keeps every visible block; a [B] bool Tensor says it for each
        request. True where a request's chunk is the last of its prompt and where it decodes, False for the chunks
        before: then chunks whose lengths are multiples of 128 select and compute what one prefill of the prompt does. A
        request of at most 128 queries with True is dense, and takes no estimate.
    threshold : float or Tensor
        As in :func:`rrattn.rr_attention`.
    stride, key_stride, head_offset, softmax_scale, spread, keep_sink, keep_local, min_share, compensate, sink
        As there. On a GPU there is no compensation.
    max_seqlen_k, max_num_keys : int, optional
        The most keys of a request and of all requests together. On a GPU memory is taken for as many, so that smaller
        ones take less: without them it is for as many as a row of block_tables or, without that, key has room for, in
        each request at once.
    return_softmax_lse, return_block_masks : bool
        Return these too. To split the masks of a GPU, the host waits for the lengths.

    Returns
    -------
    out : Tensor
        [T, Hq, Dv], the query's dtype.
    lse : Tensor, with return_softmax_lse
        [Hq, T] float32: log-sum-exp of each row, for :func:`merge_attention_states`.
    block_masks : list of Tensor, with return_block_masks
        Of each request [Hq, Mq, ceil(Mk / 32)] int32, as in :func:`rrattn.select_blocks`.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed, before anything is written: gradients that would be recorded, what a GPU
        does not take, and on a CPU lengths that do not fit and a page that is not there.

    Examples
    --------
    >>> query = paddle.randn([300 + 1, 8, 64])  # a prompt of 300 tokens, and a token behind 499 in the cache
    >>> cache_k, cache_v = paddle.randn([9, 2, 128, 64]), paddle.randn([9, 2, 128, 64])
    >>> tables = paddle.to_tensor([[4, 0, 7, -1], [1, 2, 5, 6]], "int32")
    >>> lengths = paddle.to_tensor([0, 300, 301], "int32"), paddle.to_tensor([300, 500], "int32")
    >>> out = rrattn.serving.ragged_attention(query, cache_k, cache_v, *lengths, tables, threshold=0.9)
    """
    query, key, value = attention_inputs(query, key, value)
    for tensor, name in ((cu_seqlens_q, "cu_seqlens_q"), (seqlens_k, "seqlens_k")):
        checked_tensor(tensor, name)
    for optional, name in ((block_tables, "block_tables"), (pooled_keys, "pooled_keys")):
        _refuse_empty(optional, name, query)
    _refuse_programs(query)
    sink = checked_sink(sink, query)
    if records_gradient(query, key, value, sink):
        raise ValueError(
            "query, key, value or sink asks for gradients (stop_gradient is False), but ragged batches have none: call "
            "ragged_attention under paddle.no_grad()"
        )
    scalar, per_head = split_threshold(threshold)
    keeps_last, per_request = (True, keep_last) if isinstance(keep_last, paddle.Tensor) else (keep_last, None)
    _refuse_empty(per_request, "keep_last", query)
    sampling = sampling_of_call(stride, key_stride, head_offset, softmax_scale, spread)
    sampling["softmax_scale"] = scale_of(sampling["softmax_scale"], query)
    with_lse = arguments.flag(return_softmax_lse, "return_softmax_lse")
    with_masks = arguments.flag(return_block_masks, "return_block_masks")
    outputs = call(
        "ragged",
        *(query, key, value, cu_seqlens_q, seqlens_k, block_tables, per_request, per_head, sink, pooled_keys),
        arguments.flag(heads_first, "heads_first"),
        *sampling.values(),
        scalar,
        *checked_keep_rules(keep_sink, keeps_last, keep_local, min_share).values(),
        arguments.flag(compensate, "compensate"),
        arguments.most(max_seqlen_k, "max_seqlen_k"),
        arguments.most(max_num_keys, "max_num_keys"),
    )
    out, lse, words = outputs[:3]
    extras = [lse] if with_lse else []
    if with_masks:
        extras.append(_split_masks(words, cu_seqlens_q, seqlens_k, query.shape[1]))
    return (out, *extras) if extras else out


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention of the same queries over each of them. Differentiable.

    Parameters
    ----------
    out_a, out_b : Tensor
        [..., L, Hq, Dv] float32, float16 or bfloat16, both of one dtype: [B, L, Hq, Dv] of
        :func:`rrattn.rr_attention`, or [T, Hq, Dv] of :func:`ragged_attention`.
    lse_a, lse_b : Tensor
        [..., Hq, L] float32: their log-sum-exps. -inf where a row sees none of the keys. A sink belongs into one of the
        two calls, not into both.

    Returns
    -------
    out : Tensor
        As out_a: what one call over all the keys gives, but for the rounding of float32 and of the parts to their
        dtype. A row that sees nothing in either is zero.
    lse : Tensor
        As lse_a.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    states = ((out_a, "out_a"), (out_b, "out_b"), (lse_a, "lse_a"), (lse_b, "lse_b"))
    for tensor, name in states:
        checked_tensor(tensor, name)
    if out_a.dtype not in (paddle.float32, paddle.float16, paddle.bfloat16):
        raise ValueError(f"out_a has dtype {out_a.dtype}, but must have float32, float16 or bfloat16")
    if len(out_a.shape) < 3:
        raise ValueError(
            f"out_a has shape {list(out_a.shape)}, but must have three dimensions or more: [..., L, Hq, Dv]"
        )
    lse_shape = [*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3]]
    for tensor, name in states:
        shape = lse_shape if name.startswith("lse") else list(out_a.shape)
        dtype = paddle.float32 if name.startswith("lse") else out_a.dtype
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype}, but must have {shape} and {dtype}: "
                f"out_a has {list(out_a.shape)} and {out_a.dtype}"
            )
    # Subtracted from both, so it carries no gradient. Where neither sees anything a base of 0 keeps -inf at -inf.
    base = paddle.maximum(lse_a, lse_b).detach()
    base = paddle.where(base == -np.inf, paddle.zeros_like(base), base)
    # Paddle's exp of -inf is not always 0 on a CPU.
    mass_a, mass_b = (
        paddle.where(lse == -np.inf, paddle.zeros_like(lse), paddle.exp(lse - base)) for lse in (lse_a, lse_b)
    )
    mass = mass_a + mass_b
    nothing = mass == 0
    divisor = paddle.where(nothing, paddle.ones_like(mass), mass)

    last = len(mass.shape) - 1
    heads_last = [*range(last - 1), last, last - 1]

    def share(mass_of_part: Tensor) -> Tensor:
        """[..., L, Hq, 1]"""
        return (mass_of_part / divisor).transpose(heads_last).unsqueeze(-1)

    merged = out_a.astype("float32") * share(mass_a) + out_b.astype("float32") * share(mass_b)
    lse = paddle.where(nothing, paddle.full_like(base, -np.inf), base + paddle.log(divisor))
    return merged.astype(out_a.dtype), lse


def _refuse_empty(tensor: Tensor | None, name: str, query: Tensor) -> None:
    """Refuses what is no tensor, and an empty one, which Paddle would hand to the operator as an absent one."""
    if tensor is not None and 0 in checked_tensor(tensor, name).shape and 0 not in query.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have no size of 0")


def _refuse_programs(query: Tensor) -> None:
    if not paddle.in_dynamic_mode():
        raise ValueError(
            "query is part of a static graph, but ragged batches run eagerly only: the shapes of their results depend "
            "on the values of cu_seqlens_q and seqlens_k"
        )


def _split_masks(words: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, num_heads: int) -> list[Tensor]:
    """Each request's block mask, of all of them in one row."""
    masks, first = [], 0
    for seqlen_q, seqlen_k in zip(np.diff(cu_seqlens_q.numpy()), seqlens_k.numpy()):
        num_words = -(-int(seqlen_k) // (BLOCK_SIZE * _MASK_WORD_BITS))
        shape = [num_heads, -(-int(seqlen_q) // BLOCK_SIZE), num_words]
        end = first + shape[0] * shape[1] * shape[2]
        masks.append(words[first:end].reshape(shape))
        first = end
    return masks
