"""The true attention mass of blocks, and how much of it chosen ones hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from .config import BLOCK_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray


@paddle.no_grad()
def exact_block_mass(
    query: paddle.Tensor, key: paddle.Tensor, softmax_scale: float | None = None
) -> NDArray[np.float32]:
    """The true attention mass of each pair of blocks in a causal prefill: softmax probabilities, summed over tokens.

    It computes all products, on the tensors' device, a row of blocks and the query heads of one key head at a time.

    Parameters
    ----------
    query, key : Tensor
        [1, L, Hq, D] and [1, L, Hkv, D], Hq % Hkv == 0.
    softmax_scale : float, optional
        Default: 1 / sqrt(D).

    Returns
    -------
    float32 [Hq, M, M]
        M = ceil(L / 128); a row of blocks sums to its number of queries.
    """
    _, length, num_heads, head_dim = query.shape
    num_heads_k = key.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    num_blocks = -(-length // BLOCK_SIZE)
    mass = np.zeros((num_heads, num_blocks, num_blocks), np.float32)
    by_group = mass.reshape(num_heads_k, -1, num_blocks, num_blocks)
    for group in range(num_heads_k):
        heads = num_heads // num_heads_k
        q = query[0, :, group * heads : (group + 1) * heads].astype("float32").transpose([1, 0, 2]) * scale
        k = key[0, :, group].astype("float32")
        for row in range(num_blocks):
            begin, end = row * BLOCK_SIZE, min((row + 1) * BLOCK_SIZE, length)
            scores = paddle.matmul(q[:, begin:end], k[:end], transpose_y=True)  # [heads, rows, end]
            hidden = paddle.triu(paddle.full([end - begin, end - begin], -np.inf), diagonal=1)
            scores = paddle.concat([scores[:, :, :begin], scores[:, :, begin:] + hidden], axis=-1)
            of_keys = paddle.nn.functional.softmax(scores, axis=-1).sum(axis=1).numpy()  # [heads, end]
            starts = np.arange(0, end, BLOCK_SIZE)
            by_group[group, :, row, : row + 1] = np.add.reduceat(of_keys, starts, axis=-1)
    return mass


def density_and_kept(selected: NDArray[np.bool_], mass: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(share of the visible blocks, share of the attention mass) that selected blocks are and hold, float64 [Hq] each.

    selected is bool [Hq, M, M], of a causal prefill; mass is what `exact_block_mass` returns.
    """
    visible = np.tril(np.ones(selected.shape[1:], bool))
    density = (selected & visible).sum((1, 2)) / visible.sum()
    kept = (mass * selected).sum((1, 2), dtype=np.float64) / mass.sum((1, 2), dtype=np.float64)
    return density, kept
