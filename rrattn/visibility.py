"""Which keys a query, and which key blocks a query block can see: causality and FlashMask, in NumPy on the host.

Blocks are of 128 tokens, Mq = ceil(Lq / 128) and Mk = ceil(Lk / 128). The operators compute the same for themselves;
this is for counts and pictures of what they selected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import paddle

from . import arguments
from .config import BLOCK_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Sizes(TypedDict):
    """What says, without FlashMask, which blocks are visible."""

    causal: bool
    seqlen_q: int
    seqlen_k: int


def checked_sizes(*, causal: bool, seqlen_q: int, seqlen_k: int) -> Sizes:
    """The arguments, as plain Python.

    Raises
    ------
    ValueError
        For lengths that attention cannot have, with the value and what is allowed.
    """
    sizes: Sizes = {
        "causal": arguments.flag(causal, "causal"),
        "seqlen_q": arguments.length(seqlen_q, "seqlen_q"),
        "seqlen_k": arguments.length(seqlen_k, "seqlen_k"),
    }
    if sizes["causal"] and sizes["seqlen_q"] > sizes["seqlen_k"]:
        raise ValueError(
            f"causal attention needs seqlen_q <= seqlen_k, got seqlen_q={sizes['seqlen_q']}, "
            f"seqlen_k={sizes['seqlen_k']}"
        )
    return sizes


def visible_block_array(*, causal: bool, seqlen_q: int, seqlen_k: int) -> NDArray[np.bool_]:
    """Which key blocks each query block can see at all, without FlashMask: bool [Mq, Mk]."""
    num_q_blocks, num_k_blocks = -(-seqlen_q // BLOCK_SIZE), -(-seqlen_k // BLOCK_SIZE)
    if not causal:
        return np.ones([num_q_blocks, num_k_blocks], dtype=bool)
    last_row = np.minimum((np.arange(num_q_blocks) + 1) * BLOCK_SIZE, seqlen_q) - 1
    last_visible_key = last_row + seqlen_k - seqlen_q
    return np.arange(num_k_blocks)[None, :] * BLOCK_SIZE <= last_visible_key[:, None]


class BlockVisibility:
    """Which key blocks each query block can see, per batch entry and head, with causality and FlashMask.

    A block is hidden when all of it is above the causal diagonal, or when all of its rows lie in the hidden interval
    [start, end) of every one of its keys, of the lower bounds or of the upper. For that it takes the largest start and
    the smallest end over the keys of each block, which is all that is kept of the bounds.

    Parameters
    ----------
    startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], FlashMask row bounds.
    causal : bool
    seqlen_q, seqlen_k : int
    batch_size, num_heads : int
        B and Hq.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.
    """

    def __init__(
        self,
        startend_row_indices: paddle.Tensor | None,
        *,
        causal: bool,
        seqlen_q: int,
        seqlen_k: int,
        batch_size: int,
        num_heads: int,
    ) -> None:
        self._without_bounds = visible_block_array(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        # (largest start, smallest end) of an interval, int32 [B, 1|Hkv|Hq, Mk]; None: no such bound
        self._hidden: list[tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]] = []
        # the batch entry and head of the bounds that were asked for last, and their blocks
        self._last: tuple[tuple[int, int], NDArray[np.bool_]] | None = None
        if startend_row_indices is None:
            return
        _check_row_bounds(startend_row_indices, causal, seqlen_k, batch_size, num_heads)
        bounds = startend_row_indices.numpy()
        first_key = np.arange(0, seqlen_k, BLOCK_SIZE)
        for start, end in _hidden_intervals(bounds, causal):
            largest_start = None if start is None else np.maximum.reduceat(start, first_key, axis=-1)
            smallest_end = None if end is None else np.minimum.reduceat(end, first_key, axis=-1)
            self._hidden.append((largest_start, smallest_end))
        self._heads_per_bounds = num_heads // max(bounds.shape[1], 1)
        self._first_row = np.arange(0, seqlen_q, BLOCK_SIZE)[:, None]  # [Mq, 1]
        self._last_row = np.minimum(self._first_row + BLOCK_SIZE, seqlen_q) - 1

    def of(self, batch: int, head: int) -> NDArray[np.bool_]:
        """bool [Mq, Mk]; the same array for heads that share their bounds one after the other."""
        if not self._hidden:
            return self._without_bounds
        place = batch, head // self._heads_per_bounds
        if self._last is None or self._last[0] != place:
            visible = self._without_bounds.copy()
            for largest_start, smallest_end in self._hidden:
                hidden = np.ones_like(visible)
                if largest_start is not None:
                    hidden &= self._first_row >= largest_start[place]
                if smallest_end is not None:
                    hidden &= self._last_row < smallest_end[place]
                visible &= ~hidden
            self._last = place, visible
        return self._last[1]


def keys_seen(
    rows: NDArray[np.integer[Any]], bounds: NDArray[np.int32] | None, num_keys: int, *, causal: bool, shift: int
) -> NDArray[np.bool_]:
    """Which of the first keys some queries of a sequence and head can see: bool [n, num_keys].

    Parameters
    ----------
    rows : int array [n]
        Numbers of the queries.
    bounds : int32 [num_keys, 1|2|4], optional
        FlashMask row bounds.
    num_keys : int
    causal : bool
    shift : int
        Position of the first query, where it is causal.
    """
    row = rows[:, None]
    seen = np.ones((len(rows), num_keys), bool)
    if causal:
        seen &= np.arange(num_keys) <= row + shift
    for start, end in () if bounds is None else _hidden_intervals(bounds, causal):
        hidden = np.ones_like(seen)
        if start is not None:
            hidden &= row >= start
        if end is not None:
            hidden &= row < end
        seen &= ~hidden
    return seen


def _hidden_intervals(
    bounds: NDArray[np.int32], causal: bool
) -> list[tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]]:
    """(start, end) of the intervals of rows that keys are hidden from, [...] of bounds [..., 1|2|4]; None: no bound."""
    columns = list(np.moveaxis(bounds, -1, 0))
    if causal:
        return [(columns[0], columns[1] if len(columns) == 2 else None)]
    if len(columns) == 2:
        return [(columns[0], None), (None, columns[1])]
    return [(columns[0], columns[1]), (columns[2], columns[3])]


def _check_row_bounds(rows: Any, causal: bool, seqlen_k: int, batch_size: int, num_heads: int) -> None:
    """Raises TypeError or ValueError for anything but FlashMask row bounds of these sizes."""
    if not isinstance(rows, paddle.Tensor):
        raise TypeError(f"startend_row_indices is a {type(rows).__name__}, but must be a paddle.Tensor")
    if rows.dtype != paddle.int32:
        raise ValueError(f"startend_row_indices has dtype {rows.dtype}, but must have int32")
    shape, bounds = list(rows.shape), (1, 2) if causal else (2, 4)
    fits = len(shape) == 4 and [shape[0], shape[2]] == [batch_size, seqlen_k] and shape[3] in bounds
    if not fits or (num_heads % shape[1] if shape[1] else num_heads):
        raise ValueError(
            f"startend_row_indices has shape {shape}, but must be [{batch_size}, a divisor of {num_heads}, {seqlen_k}, "
            f"{bounds[0]} or {bounds[1]}] when causal is {bool(causal)}"
        )
