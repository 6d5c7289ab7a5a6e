"""Block masks, their density, and FlashMask row bounds.

Two kinds of mask meet in this package:

- A **block mask** says which key blocks each query block attends: int32 [B, Hq, Mq, ceil(Mk / 32)], bit
  j % 32 of word j / 32 for key block j, with Mq = ceil(Lq / 128) and Mk = ceil(Lk / 128).
- **FlashMask row bounds** (`startend_row_indices`, int32 [B, 1|Hkv|Hq, Lk, 1|2|4]) say, per key, which query
  rows must not see it. They mean what `paddle.nn.functional.flashmask_attention` says they mean.

Only `startend_rows_from_dense` is on the path of the attention itself. The rest is done in NumPy on the host: a tensor
on another device is copied there and the result back.
"""

from __future__ import annotations

import numpy as np
import paddle

from .config import BLOCK_SIZE
from .library import call

WORD_BITS = 32

# Dense masks that the operator reads; others are cast.
_READ_AS_THEY_ARE = (paddle.bool, paddle.float32, paddle.float16, paddle.bfloat16)
_NEITHER_SEEN_NOR_HIDDEN = 1  # of the operator's verdict; see csrc/core/dense_mask.h


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _pack(bits: np.ndarray) -> np.ndarray:
    """bool [..., Mk] -> int32 [..., ceil(Mk / 32)]."""
    missing = -bits.shape[-1] % WORD_BITS
    padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
    octets = np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little"))
    return octets.view("<i4").astype(np.int32, copy=False)


def _popcount(words: np.ndarray) -> int:
    """Number of set bits in an int32 array."""
    return int(_BITS_IN_HALF_WORD[words.view(np.uint16)].sum(dtype=np.int64))


_BITS_IN_HALF_WORD = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2), axis=1).sum(
    axis=1, dtype=np.uint8
)


def visible_block_array(*, causal: bool, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """`visible_blocks` as a NumPy array, bool [Mq, Mk]."""
    if causal and seqlen_q > seqlen_k:
        raise ValueError(f"causal attention needs seqlen_q <= seqlen_k, got seqlen_q={seqlen_q}, seqlen_k={seqlen_k}")
    num_q_blocks, num_k_blocks = _ceil_div(seqlen_q, BLOCK_SIZE), _ceil_div(seqlen_k, BLOCK_SIZE)
    if not causal:
        return np.ones([num_q_blocks, num_k_blocks], dtype=bool)
    last_row = np.minimum((np.arange(num_q_blocks) + 1) * BLOCK_SIZE, seqlen_q) - 1
    last_visible_key = last_row + seqlen_k - seqlen_q
    return np.arange(num_k_blocks)[None, :] * BLOCK_SIZE <= last_visible_key[:, None]


def visible_blocks(*, causal: bool, seqlen_q: int, seqlen_k: int) -> paddle.Tensor:
    """Which key blocks each query block can see at all, without FlashMask.

    Parameters
    ----------
    causal : bool
        Whether query row r sees key j only when j <= r + seqlen_k - seqlen_q.
    seqlen_q, seqlen_k : int
        Tokens in the queries (Lq) and the keys (Lk).

    Returns
    -------
    Tensor
        bool [Mq, Mk].
    """
    return paddle.to_tensor(visible_block_array(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k))


def pack_block_mask(bool_mask: paddle.Tensor) -> paddle.Tensor:
    """Packs one bool per key block into 32 blocks per int32 word.

    Parameters
    ----------
    bool_mask : Tensor
        bool [..., Mk], True for a selected block; usually [B, Hq, Mq, Mk].

    Returns
    -------
    Tensor
        int32 [..., ceil(Mk / 32)]; the unused bits of the last word are 0.
    """
    if bool_mask.dtype != paddle.bool:
        raise ValueError(f"bool_mask must be of dtype bool, got {bool_mask.dtype}")
    if bool_mask.ndim < 1:
        raise ValueError("bool_mask must have at least one dimension, got a tensor of none")
    return paddle.to_tensor(_pack(bool_mask.numpy()), place=bool_mask.place)


def unpack_block_mask(block_mask: paddle.Tensor, num_k_blocks: int) -> paddle.Tensor:
    """The inverse of `pack_block_mask`.

    Parameters
    ----------
    block_mask : Tensor
        int32 [..., ceil(num_k_blocks / 32)].
    num_k_blocks : int
        Mk, the number of key blocks.

    Returns
    -------
    Tensor
        bool [..., Mk].
    """
    return paddle.to_tensor(unpack_block_array(block_mask, num_k_blocks), place=block_mask.place)


def unpack_block_array(block_mask: paddle.Tensor, num_k_blocks: int) -> np.ndarray:
    """`unpack_block_mask` as a NumPy array, bool [..., Mk]."""
    if block_mask.dtype != paddle.int32:
        raise ValueError(f"block_mask must be of dtype int32, got {block_mask.dtype}")
    if num_k_blocks < 0:
        raise ValueError(f"num_k_blocks must not be negative, got {num_k_blocks}")
    words = _ceil_div(num_k_blocks, WORD_BITS)
    if block_mask.ndim < 1 or block_mask.shape[-1] != words:
        raise ValueError(
            f"block_mask must have {words} words in its last dimension for {num_k_blocks} key blocks, "
            f"got shape {list(block_mask.shape)}"
        )
    octets = np.ascontiguousarray(block_mask.numpy().astype("<i4", copy=False)).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=num_k_blocks, bitorder="little").astype(bool)


def dense_block_mask(batch_size: int, num_heads: int, *, causal: bool, seqlen_q: int, seqlen_k: int) -> paddle.Tensor:
    """The block mask that selects every visible block: attention over it is dense attention.

    Returns
    -------
    Tensor
        int32 [batch_size, num_heads, Mq, ceil(Mk / 32)].
    """
    row_words = _pack(visible_block_array(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k))
    return paddle.to_tensor(np.tile(row_words, [batch_size, num_heads, 1, 1]))


def block_density(block_mask: paddle.Tensor, *, causal: bool, seqlen_q: int, seqlen_k: int) -> paddle.Tensor:
    """The share of the visible blocks that a block mask selects, per head.

    Blocks above the causal diagonal count neither as visible nor, should their bits be set, as selected. Blocks
    that only FlashMask hides count as visible, so packing and padding lower the density.

    Parameters
    ----------
    block_mask : Tensor
        int32 [B, Hq, Mq, ceil(Mk / 32)].
    causal : bool
        As in the call that the mask belongs to.
    seqlen_q, seqlen_k : int
        Lq and Lk, in tokens.

    Returns
    -------
    Tensor
        float32 [B, Hq], each in [0, 1]; 0 where no block is visible.
    """
    visible = visible_block_array(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    expected = [visible.shape[0], _ceil_div(visible.shape[1], WORD_BITS)]
    if block_mask.dtype != paddle.int32:
        raise ValueError(f"block_mask must be of dtype int32, got {block_mask.dtype}")
    if block_mask.ndim != 4 or list(block_mask.shape[2:]) != expected:
        raise ValueError(
            f"block_mask must be [B, Hq, {expected[0]}, {expected[1]}] for seqlen_q={seqlen_q}, "
            f"seqlen_k={seqlen_k}, got {list(block_mask.shape)}"
        )
    visible_words = _pack(visible)
    num_visible = max(int(visible.sum()), 1)
    selected = block_mask.numpy()
    counts = [[_popcount(head & visible_words) for head in sequence] for sequence in selected]
    density = np.array(counts, dtype=np.float64).reshape(selected.shape[:2]) / num_visible
    return paddle.to_tensor(density.astype(np.float32))


def causal_startend_rows(batch_size: int, seqlen_q: int, seqlen_k: int | None = None) -> paddle.Tensor:
    """FlashMask bounds that hide nothing below the causal diagonal: plain causal attention.

    Returns
    -------
    Tensor
        int32 [batch_size, 1, Lk, 1], to be used with causal=True.
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    return paddle.full([batch_size, 1, seqlen_k, 1], seqlen_q, dtype="int32")


def document_startend_rows(lengths, seqlen: int | None = None, *, causal: bool = True) -> paddle.Tensor:
    """FlashMask bounds for documents packed one after the other, each of which sees itself only.

    Documents that start at multiples of 128 tokens select and compute exactly what running them apart does.

    Parameters
    ----------
    lengths : sequence of int, or sequence of sequences of int
        Tokens of each document, of one packed row or of every row of the batch.
    seqlen : int, optional
        Tokens per row (L). What the documents leave over is padding, seen by nothing. Default: the longest.
    causal : bool
        Whether the bounds are for causal=True (one bound per key) or causal=False (two).

    Returns
    -------
    Tensor
        int32 [B, 1, L, 1] when causal, otherwise [B, 1, L, 2].
    """
    rows = [list(lengths)] if all(np.ndim(length) == 0 for length in lengths) else [list(row) for row in lengths]
    if any(length < 0 for row in rows for length in row):
        raise ValueError(f"document lengths must not be negative, got {rows}")
    longest = max((sum(row) for row in rows), default=0)
    seqlen = longest if seqlen is None else seqlen
    if longest > seqlen:
        raise ValueError(f"the documents of a row hold {longest} tokens, more than seqlen={seqlen}")
    bounds = np.zeros([len(rows), 1, seqlen, 1 if causal else 2], dtype=np.int32)
    for batch, row in enumerate(rows):
        ends = np.cumsum(row, dtype=np.int64)
        total = int(ends[-1]) if row else 0
        bounds[batch, 0, :total, 0] = np.repeat(ends, row)
        if not causal:
            bounds[batch, 0, :total, 1] = np.repeat(ends - row, row)
    return paddle.to_tensor(bounds)


def padding_startend_rows(keep: paddle.Tensor, seqlen_q: int | None = None, *, causal: bool = True) -> paddle.Tensor:
    """FlashMask bounds that hide padded keys from every query, wherever the padding lies.

    Parameters
    ----------
    keep : Tensor
        [B, Lk], bool or a number: nonzero for a token, zero for padding (a tokenizer's attention mask).
    seqlen_q : int, optional
        Lq. Default: Lk.
    causal : bool
        Whether the bounds are for causal=True (one bound per key) or causal=False (two).

    Returns
    -------
    Tensor
        int32 [B, 1, Lk, 1] when causal, otherwise [B, 1, Lk, 2].
    """
    if keep.ndim != 2:
        raise ValueError(f"keep must be [B, Lk], got shape {list(keep.shape)}")
    seqlen_q = keep.shape[1] if seqlen_q is None else seqlen_q
    start = keep.astype("bool").astype("int32").unsqueeze([1, 3]) * seqlen_q  # [B, 1, Lk, 1]
    return start if causal else paddle.concat([start, paddle.zeros_like(start)], axis=-1)


def startend_rows_from_dense(mask: paddle.Tensor) -> paddle.Tensor:
    """FlashMask bounds of a dense causal mask, after a check that they say exactly the same.

    A dense mask fits when it is causal (query row r is position r + Lk - Lq) and each key, once hidden from a row,
    stays hidden from all later rows: padding, packed documents, a sliding window and their combinations all do.

    The mask is read where it lies; on a GPU the host waits for the answer.

    Parameters
    ----------
    mask : Tensor
        [B, 1|Hq, Lq, Lk]; bool with True for visible, or float and additive, with 0 for visible and -9984 or less for
        hidden (as which bfloat16 knows -1e4).

    Returns
    -------
    Tensor
        int32 [B, 1|Hq, Lk, 1], for causal=True.

    Raises
    ------
    ValueError
        For any other mask (a bias, a bidirectional one, one with holes), rather than a result that is not its.
    """
    read = mask if mask.dtype in _READ_AS_THEY_ARE else mask.astype("float32")
    rows, verdict = call("dense_mask", read)
    faults, bits = verdict.tolist()
    if faults & _NEITHER_SEEN_NOR_HIDDEN:
        raise ValueError(
            f"the additive attention mask holds {_value_of(bits, read.dtype):g}, which is neither 0 (visible) nor -1e4 "
            "or less (hidden): a bias, which rrattn does not support"
        )
    if faults:
        raise ValueError(
            "the attention mask is not causal with padding, packed documents or a sliding window, which is "
            "all that rrattn takes as a dense mask; give other masks as startend_row_indices"
        )
    return rows


def _value_of(bits: int, dtype) -> float:
    """A mask's value, of which the operator gave the bits."""
    if dtype == paddle.float32:
        return float(np.int32(bits).view(np.float32))
    if dtype == paddle.float16:
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << 16).view(np.float32))
