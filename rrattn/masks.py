"""Block masks, their density, and FlashMask row bounds.

Two kinds of mask meet in this package:

- A **block mask** says which key blocks each query block attends: int32 [B, Hq, Mq, ceil(Mk / 32)], bit
  j % 32 of word j / 32 for key block j, with Mq = ceil(Lq / 128) and Mk = ceil(Lk / 128).
- **FlashMask row bounds** (`startend_row_indices`, int32 [B, 1|Hkv|Hq, Lk, 1|2|4]) say, per key, which query
  rows must not see it. They mean what `paddle.nn.functional.flashmask_attention` says they mean.

Only `startend_rows_from_dense` is on the path of the attention itself; the rest is done in NumPy on the host: a tensor
on another device is copied there and the result back. A NumPy array or nested lists of the same dtype will do where a
tensor is asked for, and an iterator of numbers where a sequence is. What is not allowed raises ValueError (TypeError
for what is not an array) with the argument, the value and what is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union

import numpy as np
import paddle

from . import arguments
from .arrays import array_of, array_of_dtype
from .config import BLOCK_SIZE
from .operators import call
from .visibility import BlockVisibility, checked_sizes, visible_block_array

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from paddle import Tensor

    from .arrays import ArrayLike

    Lengths = Union[Tensor, NDArray[np.integer[Any]], Iterable[int]]

WORD_BITS = 32

# Dense masks of these dtypes the operator reads; others are cast.
_READ_AS_THEY_ARE = (paddle.bool, paddle.float32, paddle.float16, paddle.bfloat16)
_NEITHER_SEEN_NOR_HIDDEN = 1  # of the operator's verdict; see csrc/core/dense_mask.h


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _pack(bits: NDArray[np.bool_]) -> NDArray[np.int32]:
    """bool [..., Mk] -> int32 [..., ceil(Mk / 32)]."""
    missing = -bits.shape[-1] % WORD_BITS
    padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
    octets = np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little"))
    return octets.view("<i4").astype(np.int32, copy=False)


def _popcount(words: NDArray[np.int32]) -> int:
    """Number of set bits in an int32 array."""
    return int(_BITS_IN_HALF_WORD[words.view(np.uint16)].sum(dtype=np.int64))


_BITS_IN_HALF_WORD = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2), axis=1).sum(
    axis=1, dtype=np.uint8
)


def visible_blocks(*, causal: bool, seqlen_q: int, seqlen_k: int) -> Tensor:
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
    sizes = checked_sizes(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return paddle.to_tensor(visible_block_array(**sizes))


def pack_block_mask(bool_mask: ArrayLike) -> Tensor:
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
    bits, place = array_of_dtype(bool_mask, "bool_mask", "bool")
    if bits.ndim < 1:
        raise ValueError("bool_mask must have at least one dimension, got a tensor of none")
    return paddle.to_tensor(_pack(bits), place=place)


def unpack_block_mask(block_mask: ArrayLike, num_k_blocks: int) -> Tensor:
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
    bits = unpack_block_array(block_mask, num_k_blocks)
    return paddle.to_tensor(bits, place=block_mask.place if isinstance(block_mask, paddle.Tensor) else None)


def unpack_block_array(block_mask: ArrayLike, num_k_blocks: int) -> NDArray[np.bool_]:
    """`unpack_block_mask` as a NumPy array, bool [..., Mk]."""
    words, _ = array_of_dtype(block_mask, "block_mask", "int32")
    num_k_blocks = arguments.count(num_k_blocks, "num_k_blocks")
    num_words = _ceil_div(num_k_blocks, WORD_BITS)
    if words.ndim < 1 or words.shape[-1] != num_words:
        raise ValueError(
            f"block_mask must have {num_words} words in its last dimension for {num_k_blocks} key blocks, "
            f"got shape {list(words.shape)}"
        )
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=num_k_blocks, bitorder="little").astype(bool)


def dense_block_mask(batch_size: int, num_heads: int, *, causal: bool, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The block mask that selects every visible block: attention over it is dense attention.

    Returns
    -------
    Tensor
        int32 [batch_size, num_heads, Mq, ceil(Mk / 32)].
    """
    batch_size, num_heads = arguments.count(batch_size, "batch_size"), arguments.count(num_heads, "num_heads")
    row_words = _pack(visible_block_array(**checked_sizes(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)))
    return paddle.to_tensor(np.tile(row_words, [batch_size, num_heads, 1, 1]))


def block_counts(
    block_mask: ArrayLike,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(blocks that a block mask selects, visible blocks), int64 [B, Hq] each; arguments as for `block_density`."""
    words, _ = array_of_dtype(block_mask, "block_mask", "int32")
    sizes = checked_sizes(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    num_q_blocks, num_k_blocks = (_ceil_div(length, BLOCK_SIZE) for length in (sizes["seqlen_q"], sizes["seqlen_k"]))
    expected = [num_q_blocks, _ceil_div(num_k_blocks, WORD_BITS)]
    if words.ndim != 4 or list(words.shape[2:]) != expected:
        raise ValueError(
            f"block_mask must be [B, Hq, {expected[0]}, {expected[1]}] for seqlen_q={seqlen_q}, "
            f"seqlen_k={seqlen_k}, got {list(words.shape)}"
        )
    visibility = BlockVisibility(startend_row_indices, **sizes, batch_size=words.shape[0], num_heads=words.shape[1])
    num_selected, num_visible = np.zeros([2, *words.shape[:2]], dtype=np.int64)
    visible = None
    for batch, head in np.ndindex(*words.shape[:2]):
        before, visible = visible, visibility.of(batch, head)
        if visible is not before:
            visible_words, count = _pack(visible), visible.sum()
        num_selected[batch, head] = _popcount(words[batch, head] & visible_words)
        num_visible[batch, head] = count
    return num_selected, num_visible


def block_density(
    block_mask: ArrayLike,
    startend_row_indices: Tensor | None = None,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
) -> Tensor:
    """The share of the visible blocks that a block mask selects, per head.

    Blocks that are hidden as a whole, above the causal diagonal or by FlashMask, count neither as visible nor, should
    their bits be set, as selected. Without startend_row_indices, those that FlashMask hides count as visible.

    Parameters
    ----------
    block_mask : Tensor
        int32 [B, Hq, Mq, ceil(Mk / 32)].
    startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], FlashMask row bounds: as in the call that the mask belongs to.
    causal : bool
        Likewise.
    seqlen_q, seqlen_k : int
        Lq and Lk, in tokens.

    Returns
    -------
    Tensor
        float32 [B, Hq], each in [0, 1]; 0 where no block is visible.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """
    num_selected, num_visible = block_counts(
        block_mask, startend_row_indices, causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    )
    return paddle.to_tensor((num_selected / np.maximum(num_visible, 1)).astype(np.float32))


def causal_startend_rows(batch_size: int, seqlen_q: int, seqlen_k: int | None = None) -> Tensor:
    """FlashMask bounds that hide nothing below the causal diagonal: plain causal attention.

    Returns
    -------
    Tensor
        int32 [batch_size, 1, Lk, 1], to be used with causal=True.
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    if not any(isinstance(size, paddle.pir.Value) for size in (batch_size, seqlen_q, seqlen_k)):
        batch_size = arguments.count(batch_size, "batch_size")
        sizes = checked_sizes(causal=True, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        seqlen_q, seqlen_k = sizes["seqlen_q"], sizes["seqlen_k"]
    return paddle.full([batch_size, 1, seqlen_k, 1], seqlen_q, dtype="int32")


def document_startend_rows(
    lengths: Lengths | Iterable[Lengths], seqlen: int | None = None, *, causal: bool = True
) -> Tensor:
    """FlashMask bounds for documents packed one after the other, each of which sees itself only.

    Documents that start at multiples of 128 tokens select and compute exactly what running them apart does.

    Parameters
    ----------
    lengths : sequence or iterator of int, or of sequences or iterators of int
        Tokens of each document, of one packed row or of every row of the batch. At least one row or document.
    seqlen : int, optional
        Tokens per row (L). What the documents leave over is padding, seen by nothing. Default: the longest.
    causal : bool
        Whether the bounds are for causal=True (one bound per key) or causal=False (two).

    Returns
    -------
    Tensor
        int32 [B, 1, L, 1] when causal, otherwise [B, 1, L, 2].

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed. Also for no lengths at all, of which every key would be hidden: an iterator
        that was read before has none.
    """
    rows = _document_lengths(lengths)
    longest = max(map(sum, rows))
    if seqlen is None:
        seqlen = arguments.length(longest, "the sum of a row's lengths")
    else:
        seqlen = arguments.length(seqlen, "seqlen")
    if longest > seqlen:
        raise ValueError(f"the documents of a row hold {longest} tokens, more than seqlen={seqlen}")
    causal = arguments.flag(causal, "causal")
    bounds = np.zeros([len(rows), 1, seqlen, 1 if causal else 2], dtype=np.int32)
    for batch, row in enumerate(rows):
        ends = np.cumsum(row, dtype=np.int64)
        total = int(ends[-1]) if row else 0
        bounds[batch, 0, :total, 0] = np.repeat(ends, row)
        if not causal:
            bounds[batch, 0, :total, 1] = np.repeat(ends - row, row)
    return paddle.to_tensor(bounds)


def _document_lengths(lengths: object) -> list[list[int]]:
    """Rows of ints, of what `document_startend_rows` takes: each iterator is read once."""

    def read(value: object) -> object:
        return array_of(value, "lengths")[0] if isinstance(value, paddle.Tensor) else value

    given = arguments.entries(read(lengths))
    if given is None:
        raise arguments.refused(lengths, "lengths", "a sequence of integers, or of sequences of them")
    found = [arguments.entries(read(row)) for row in given]
    rows = [row for row in found if row is not None]
    names = [f"lengths[{i}]" for i in range(len(rows))]
    if not rows:
        rows, names, found = [given], ["lengths"], [given]
    if not given or len(rows) < len(found):
        allowed = "integers or sequences of them, at least one and no mixture"
        raise arguments.refused(given, "lengths", allowed, ValueError)
    return [[arguments.count(read(x), f"{name}[{i}]") for i, x in enumerate(row)] for row, name in zip(rows, names)]


def padding_startend_rows(keep: ArrayLike, seqlen_q: int | None = None, *, causal: bool = True) -> Tensor:
    """FlashMask bounds that hide padded keys from every query, wherever the padding lies.

    Parameters
    ----------
    keep : Tensor
        [B, Lk], bool or whole numbers of at least 0: nonzero for a token, zero for padding (a tokenizer's attention
        mask). Of an additive mask, with 0 for a token, that is `mask == 0`. In a static graph, where values are not
        known, bool or an integer type.
    seqlen_q : int, optional
        Lq. Default: Lk.
    causal : bool
        Whether the bounds are for causal=True (one bound per key) or causal=False (two).

    Returns
    -------
    Tensor
        int32 [B, 1, Lk, 1] when causal, otherwise [B, 1, Lk, 2].

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed. Also for floats that are all 0: they hide nothing in an additive mask, and
        everything in a tokenizer's.
    """
    causal = arguments.flag(causal, "causal")
    if isinstance(keep, paddle.pir.Value):
        return _traced_padding_rows(keep, seqlen_q, causal)
    tokens, place = _tokens(keep)
    seqlen_q = tokens.shape[1] if seqlen_q is None else arguments.length(seqlen_q, "seqlen_q")
    bounds = np.zeros([len(tokens), 1, tokens.shape[1], 1 if causal else 2], dtype=np.int32)
    bounds[:, 0, :, 0] = np.where(tokens, seqlen_q, 0)
    return paddle.to_tensor(bounds, place=place)


def _tokens(keep: ArrayLike) -> tuple[NDArray[np.bool_], Any]:
    """(bool [B, Lk], True for a token; place) of what `padding_startend_rows` takes."""
    array, place = array_of(keep, "keep")
    if array.ndim != 2:
        raise ValueError(f"keep must be [B, Lk], got shape {list(array.shape)}")
    bad = array[~(np.isfinite(array) & (array >= 0) & (array == np.floor(array)))] if array.dtype != bool else array[:0]
    if len(bad):
        raise ValueError(
            f"keep holds {bad[0]:g}, but must hold whole numbers of at least 0, zero for padding: of an additive mask, "
            "where zero is a token, give mask == 0"
        )
    if array.dtype.kind == "f" and array.size and not array.any():
        raise ValueError(
            "keep holds floats that are all zero, which hide every key, but nothing in an additive mask: give a bool "
            "tensor, keep != 0 or, of an additive mask, mask == 0"
        )
    return array != 0, place


def _traced_padding_rows(keep: Any, seqlen_q: Any, causal: bool) -> Tensor:
    """`padding_startend_rows` in a static graph, where sizes may be open and values are not known."""
    if paddle.is_floating_point(keep):
        raise TypeError(
            "keep holds floats of a static graph, which do not tell a tokenizer's mask from an additive one: give a "
            "bool tensor, keep != 0 or, of an additive mask, mask == 0"
        )
    if len(keep.shape) != 2:
        raise ValueError(f"keep must be [B, Lk], got shape {list(keep.shape)}")
    seqlen_q = keep.shape[1] if seqlen_q is None else seqlen_q
    if not isinstance(seqlen_q, paddle.pir.Value):
        seqlen_q = arguments.length(seqlen_q, "seqlen_q")
    start = (keep.astype("bool").astype("int32") * seqlen_q).astype("int32").unsqueeze([1, 3])  # [B, 1, Lk, 1]
    return start if causal else paddle.concat([start, paddle.zeros_like(start)], axis=-1)


def startend_rows_from_dense(mask: ArrayLike) -> Tensor:
    """FlashMask bounds of a dense causal mask, after a check that they say exactly the same.

    A dense mask fits when it is causal (query row r is position r + Lk - Lq) and each key, once hidden from a row,
    stays hidden from all later rows: padding, packed documents, a sliding window and their combinations all do.

    The mask is read where it lies; on a GPU the host waits for the answer.

    Parameters
    ----------
    mask : Tensor
        [B, 1|Hq, Lq, Lk]; bool with True for visible, or float and additive, with 0 for visible and -9984 or less for
        hidden (to which bfloat16 rounds -1e4).

    Returns
    -------
    Tensor
        int32 [B, 1|Hq, Lk, 1], for causal=True.

    Raises
    ------
    ValueError
        For any other mask (a bias, a bidirectional one, one with holes), rather than a wrong result.
    """
    if not isinstance(mask, paddle.Tensor):
        mask = paddle.to_tensor(array_of(mask, "mask")[0])
    read = mask if mask.dtype in _READ_AS_THEY_ARE else mask.astype("float32")
    rows: Tensor
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


def _value_of(bits: int, dtype: paddle.dtype) -> float:
    """A value of a mask, from the bits that the operator gave."""
    if dtype == paddle.float32:
        return float(np.int32(bits).view(np.float32))
    if dtype == paddle.float16:
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << 16).view(np.float32))
