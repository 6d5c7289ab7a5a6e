"""The true attention mass of blocks, and how much of it chosen ones hold.

All of it comes from `row_mass`, which computes the softmax of whole rows: of a few, spread over a call, where it is to
be cheap (`rrattn.collect_stats`), and of every row for calibration and evaluation (`exact_block_mass`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from .config import BLOCK_SIZE
from .visibility import keys_seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = (5**0.5 - 1) / 2  # its multiples, less their whole parts, lie evenly between 0 and 1


@paddle.no_grad()
def row_mass(
    query: paddle.Tensor,
    key: paddle.Tensor,
    rows: NDArray[np.integer[Any]],
    startend_row_indices: paddle.Tensor | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    sink: paddle.Tensor | None = None,
) -> NDArray[np.float32]:
    """The true attention mass of some queries in each block of keys: softmax probabilities, summed over its tokens.

    All products of these rows are computed in float32, on the tensors' device, the query heads of one key head at once.

    Parameters
    ----------
    query, key : Tensor
        [B, Lq, Hq, D], the last Lq positions of the keys, and [B, Lk, Hkv, D], Hq % Hkv == 0.
    rows : int array [n]
        Numbers of queries, ascending.
    startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], FlashMask row bounds.
    causal : bool
    softmax_scale : float, optional
        Default: 1 / sqrt(D).
    sink : Tensor, optional
        [Hq], a logit for each query head that joins the softmax of each row.

    Returns
    -------
    float32 [B, Hq, n, Mk]
        Mk = ceil(Lk / 128); a row sums to 1 less what the sink takes, or to 0 where it sees nothing.
    """
    batch_size, seqlen_q, num_heads, head_dim = query.shape
    seqlen_k, num_heads_k = key.shape[1:3]
    mass = np.zeros((batch_size, num_heads, len(rows), -(-seqlen_k // BLOCK_SIZE)), np.float32)
    if mass.size == 0:
        return mass
    shift, group = seqlen_k - seqlen_q, num_heads // num_heads_k
    end = min(seqlen_k, int(rows[-1]) + shift + 1) if causal else seqlen_k  # no row sees a key from there on
    num_blocks = -(-end // BLOCK_SIZE)
    bounds = None if startend_row_indices is None else startend_row_indices.numpy()[:, :, :end]
    index = paddle.to_tensor(rows, dtype="int64", place=query.place)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    def added_to_scores(seen: NDArray[np.bool_]) -> paddle.Tensor:
        return paddle.to_tensor(np.where(seen, np.float32(0), np.float32(-1e30)), place=query.place)

    if bounds is None:  # the same for all heads
        added = added_to_scores(keys_seen(rows, None, end, causal=causal, shift=shift))
    for batch, head in np.ndindex(batch_size, num_heads_k):
        heads = slice(head * group, (head + 1) * group)
        if bounds is not None:  # of each query head, or one for all of these
            shared = num_heads // bounds.shape[1]
            of_heads = sorted({query_head // shared for query_head in range(heads.start, heads.stop)})
            seen = np.stack([keys_seen(rows, bounds[batch, i], end, causal=causal, shift=shift) for i in of_heads])
            added = added_to_scores(seen)
        q = paddle.gather(query[batch, :, heads], index).astype("float32").transpose([1, 0, 2]) * scale
        k = key[batch, :end, head].astype("float32")
        scores = paddle.matmul(q, k, transpose_y=True) + added  # [group, n, end]
        if sink is not None:
            of_sink = sink[heads].astype("float32").reshape([group, 1, 1]).expand([group, len(rows), 1])
            scores = paddle.concat([scores, of_sink], axis=-1)
        chances = paddle.nn.functional.softmax(scores, axis=-1)[:, :, :end]
        if bounds is not None:  # a row may see nothing, where all are equal then
            chances = chances * paddle.to_tensor(seen, dtype="float32", place=query.place)
        behind = paddle.zeros([group, len(rows), num_blocks * BLOCK_SIZE - end])
        by_block = paddle.concat([chances, behind], axis=-1).reshape([group, len(rows), num_blocks, BLOCK_SIZE])
        mass[batch, heads, :, :num_blocks] = by_block.sum(axis=-1).numpy()
    return mass


def sampled_rows(length: int, count: int) -> NDArray[np.int64]:
    """`count` numbers below `length`, ascending: one in each of as many equal parts, at a place of its own there.

    All numbers below `length` where these are no more than `count`.
    """
    if length <= count:
        return np.arange(length)
    index = np.arange(count)
    place: NDArray[np.float64] = (index + (index * _GOLDEN + 0.5) % 1) * length / count
    return place.astype(np.int64)


def exact_block_mass(
    query: paddle.Tensor, key: paddle.Tensor, softmax_scale: float | None = None, sink: paddle.Tensor | None = None
) -> NDArray[np.float32]:
    """The true attention mass of each pair of blocks in a causal call: what `row_mass` gives, summed over the queries.

    It computes all products, a row of blocks at a time.

    Parameters
    ----------
    query, key : Tensor
        [1, Lq, Hq, D], the last Lq positions of the keys, and [1, Lk, Hkv, D], Hq % Hkv == 0.
    softmax_scale : float, optional
        Default: 1 / sqrt(D).
    sink : Tensor, optional
        [Hq], a logit for each query head that joins the softmax of each row.

    Returns
    -------
    float32 [Hq, Mq, Mk]
        Mq = ceil(Lq / 128), Mk = ceil(Lk / 128); a row of blocks sums to its number of queries, less what the sink
        takes.
    """
    query, key = query.astype("float32"), key.astype("float32")
    seqlen_q = query.shape[1]
    blocks = [
        row_mass(
            query,
            key,
            np.arange(begin, min(begin + BLOCK_SIZE, seqlen_q)),
            causal=True,
            softmax_scale=softmax_scale,
            sink=sink,
        )[0].sum(axis=1)
        for begin in range(0, seqlen_q, BLOCK_SIZE)
    ]
    return np.stack(blocks, axis=1)


def density_and_kept(selected: NDArray[np.bool_], mass: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(share of the visible blocks, share of the attention mass) that selected blocks are and hold, float64 [Hq] each.

    selected is bool [Hq, M, M], of a causal prefill; mass is what `exact_block_mass` returns: that on keys. Where a
    sink has taken all of it, nothing of it is lost.
    """
    visible = np.tril(np.ones(selected.shape[1:], bool))
    density = (selected & visible).sum((1, 2)) / visible.sum()
    of_selected, of_all = (x.sum((1, 2), dtype=np.float64) for x in (mass * selected, mass))
    return density, np.divide(of_selected, of_all, out=np.ones_like(of_all), where=of_all > 0)
