"""How other methods choose blocks, in plain NumPy, for comparison only: nothing here is fast.

Each takes one sequence, query [Lq, Hq, D] and key [Lk, Hkv, D] float32, queries the last Lq positions of the keys, and
returns block scores or a mask [Hq, Mq, Mk] over blocks of 128 tokens. What is above the causal diagonal counts for
nothing. Only the choice is theirs: attention over the chosen blocks is rrattn's for all, as is how scores become a mask
(the smallest set that holds a share of a row's score, the diagonal and the first block always).
"""

from __future__ import annotations

import numpy as np

from rrattn.config import BLOCK_SIZE as BLOCK

VARIANTS = ("rotated-blocks", "rotated-strides", "row-maximum", "group-mean")  # of `sampled_scores`


def num_blocks(length):
    """Blocks that hold this many tokens, the last perhaps in part."""
    return -(-length // BLOCK)


def heads(query, key):
    """(h, query [Lq, D], key [Lk, D]) of each query head."""
    group = query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):
        yield h, query[:, h], key[:, h // group]


def softmax(scores):
    """Over the last axis; -inf is nothing. Rows of -inf alone become zero."""
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)


def block_sums(rows, size):
    """Sums over groups of `size` along the last axis, the last group perhaps in part."""
    return np.add.reduceat(rows, np.arange(0, rows.shape[-1], size), axis=-1)


def antidiagonal_scores(query, key, scale, stride):
    """XAttention (arXiv 2503.16428): the products on the antidiagonal of each stride x stride square of tokens, summed.

    As there: keys of a stride are laid side by side, queries likewise in reverse order, so that one product of these
    long vectors is the sum over an antidiagonal; divided by the stride, a softmax over squares, sums over blocks.
    """
    seqlen_q, seqlen_k = len(query), len(key)
    shift = seqlen_k - seqlen_q
    if shift % stride:
        raise ValueError(f"{shift} keys stand before the queries, but that must be a multiple of the stride {stride}")
    scores = np.zeros((query.shape[1], num_blocks(seqlen_q), num_blocks(seqlen_k)), np.float32)
    squares = [-(-length // stride) for length in (seqlen_q, seqlen_k)]
    visible = np.arange(squares[1]) <= np.arange(squares[0])[:, None] + shift // stride
    for h, q, k in heads(query, key):
        q, k = (np.pad(x, ((0, -len(x) % stride), (0, 0))) for x in (q, k))
        sides = q.reshape(squares[0], stride, -1)[:, ::-1].reshape(squares[0], -1)
        products = sides @ k.reshape(squares[1], -1).T * np.float32(scale / stride)
        chance = softmax(np.where(visible, products, -np.inf))
        by_key = block_sums(chance, BLOCK // stride)
        scores[h] = np.add.reduceat(by_key, np.arange(0, squares[0], BLOCK // stride), axis=0)
    return scores


def sampled_scores(query, key, scale, stride, variant=None):
    """rrattn's estimate, or a variant of it at the same cost, one query in a stride.

    rotated-blocks     the sampled position (h + turn) mod stride turns with the query block as well as with the head h
    rotated-strides    it turns with the stride, so that a head samples every position
    row-maximum        a block's score is the greatest share that one sampled query gives it, in place of their sum
    group-mean         the mean over the query heads of a key head is added to each one's scores
    """
    seqlen_q, seqlen_k = len(query), len(key)
    shift = seqlen_k - seqlen_q
    scores = np.zeros((query.shape[1], num_blocks(seqlen_q), num_blocks(seqlen_k)), np.float32)
    index = np.arange(-(-seqlen_q // stride))
    turn = {"rotated-blocks": index * stride // BLOCK, "rotated-strides": index}.get(variant, 0)
    add = np.maximum if variant == "row-maximum" else np.add
    first_key = np.arange(0, seqlen_k, stride)
    for h, q, k in heads(query, key):
        token = index * stride + (h + turn) % stride
        token = token[token < seqlen_q]
        products = q[token] @ np.add.reduceat(k, first_key, axis=0).T * np.float32(scale / stride)
        chance = softmax(np.where(first_key <= token[:, None] + shift, products, -np.inf))
        add.at(scores[h], token // BLOCK, block_sums(chance, BLOCK // stride))
    if variant == "group-mean":
        grouped = scores.reshape(key.shape[1], -1, *scores.shape[1:])
        scores = (grouped + grouped.mean(1, keepdims=True)).reshape(scores.shape)
    return scores


def pooled_scores(query, key, scale):
    """FlexPrefill's query-aware estimate (arXiv 2502.20766): softmax of the products of mean queries and mean keys.

    The estimate alone: the switch to a vertical-slash pattern, and one budget for a whole head, are left out, so that
    what is compared is how well block means tell which blocks matter.
    """
    shift = len(key) - len(query)
    scores = np.zeros((query.shape[1], num_blocks(len(query)), num_blocks(len(key))), np.float32)
    last = np.minimum((np.arange(scores.shape[1]) + 1) * BLOCK, len(query)) - 1 + shift
    visible = np.arange(scores.shape[2]) * BLOCK <= last[:, None]

    def means(x):
        sums = np.add.reduceat(x, np.arange(0, len(x), BLOCK), axis=0)
        return sums / np.minimum(BLOCK, len(x) - np.arange(0, len(x), BLOCK))[:, None]

    for h, q, k in heads(query, key):
        scores[h] = softmax(np.where(visible, means(q) @ means(k).T * np.float32(scale), -np.inf))
    return scores


def smallest_set(shares, threshold):
    """The fewest entries of [n] that hold this share of their sum, as a bool mask."""
    order = np.argsort(-shares, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    mask = np.zeros(len(shares), bool)
    mask[order[before < threshold * shares.sum()]] = True
    return mask


def vertical_slash_mask(query, key, scale, threshold, num_last=64):
    """MInference's pattern (arXiv 2407.02490) from the call's last 64 queries: columns and diagonals that they attend.

    Columns are key blocks, diagonals are 128 distances wide. Of each, the fewest are taken that hold `threshold` of the
    attention of the last queries (a share, as in FlexPrefill, where MInference takes fixed numbers), for all rows.
    """
    seqlen_q, seqlen_k = len(query), len(key)
    last = np.arange(max(0, seqlen_q - num_last), seqlen_q) + seqlen_k - seqlen_q  # positions
    mask = np.zeros((query.shape[1], num_blocks(seqlen_q), num_blocks(seqlen_k)), bool)
    row = (np.arange(mask.shape[1]) * BLOCK + seqlen_k - seqlen_q) // BLOCK
    offset = row[:, None] - np.arange(mask.shape[2])  # of each pair of blocks
    distance = last[:, None] - np.arange(seqlen_k)
    for h, q, k in heads(query, key):
        attention = softmax(np.where(distance >= 0, q[-len(last) :] @ k.T * np.float32(scale), -np.inf))
        columns = smallest_set(block_sums(attention.sum(0), BLOCK), threshold)
        of_distance = np.bincount(np.maximum(distance, 0).ravel() // BLOCK, attention.ravel(), mask.shape[2])
        diagonals = np.append(smallest_set(of_distance, threshold), [False, False])
        within = np.clip(offset, 0, mask.shape[2])
        # Tokens that are d apart are in blocks d // 128 or one more apart.
        mask[h] = columns | ((diagonals[within] | (diagonals[within - 1] & (within > 0))) & (offset >= 0))
    return mask


def window_mask(query, key, num_local):
    """The first block and the last `num_local` of each row, as in StreamingLLM (arXiv 2309.17453)."""
    mask = np.zeros((query.shape[1], num_blocks(len(query)), num_blocks(len(key))), bool)
    last = np.minimum((np.arange(mask.shape[1]) + 1) * BLOCK, len(query)) - 1 + len(key) - len(query)
    offset = (last // BLOCK)[:, None] - np.arange(mask.shape[2])
    mask[:] = (offset >= 0) & (offset < num_local)
    mask[:, :, 0] = True
    return mask


def random_mask(query, key, share, seed):
    """Each block with the same chance."""
    size = (query.shape[1], num_blocks(len(query)), num_blocks(len(key)))
    return np.random.default_rng(seed).random(size) < share
