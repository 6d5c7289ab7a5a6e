"""The oracle: block-sparse attention in NumPy float64, written to be read, not to be fast.

Shapes are those of the package: query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv], shift = Lk - Lq.
Block masks here are plain booleans [B, Hq, Mq, Mk]; `pack` and `unpack` translate them to the package's words.

    estimate  -> block_scores [B, Hq, Mq, Mk]
    select    -> block mask   [B, Hq, Mq, Mk]
    attend    -> out [B, Lq, Hq, Dv], lse [B, Hq, Lq]; quantized_attend the same in eight bits
    backward  -> grad_query, grad_key, grad_value, and with a sink grad_sink [Hq]

A `sink` [Hq] is one more key for each row, of this score and without a value.

`estimate`, `attend` and `backward` take `dtype`: "float64" is the oracle; "float32", "float16" and "bfloat16"
are the naive implementation in that type, which rounds every intermediate to it. A kernel may err twice that, see
`errors`. Values travel as float32 arrays that hold only what their dtype can; `encode` and `decode` translate them to
its storage, for which NumPy has no bfloat16: uint16 arrays hold its bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Intervals = list[tuple[Array, Array]]

BLOCK = 128
WORD = 32
INT32_MIN, INT32_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max
FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32, "bool": np.bool_}


# Number formats


def to_bfloat16(values: ArrayLike) -> NDArray[np.uint16]:
    """float32 values as the uint16 bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """uint16 bits of bfloat16 as float32, exactly."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def cast(values: ArrayLike, dtype: str) -> Array:
    """Values rounded to `dtype`, in the NumPy type to compute with: float64 for float64, else float32."""
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(values))
    if dtype == "float16":
        return np.asarray(values, np.float16).astype(np.float32)
    return np.asarray(values, dtype)


def to_e4m3(values: ArrayLike) -> Array:
    """Values rounded to the nearest number of FP8 (e4m3), ties to even: four leading bits, or multiples of 2^-9 below
    2^-6. Their magnitude is at most 448."""
    exponent = np.maximum(np.frexp(values)[1] - 1, -6)
    return np.ldexp(np.rint(np.ldexp(values, 3 - exponent)), exponent - 3)


def encode(values: ArrayLike, dtype: str) -> Array:
    """float32 values as their storage in `dtype`."""
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, STORAGE[dtype])


def decode(storage: Array, dtype: str) -> Array:
    """The inverse of `encode`: bfloat16 and float16 as float32, the rest as it is."""
    if dtype == "bfloat16":
        return from_bfloat16(storage)
    return storage.astype(np.float32) if dtype == "float16" else storage.copy()


def num_blocks(seqlen: int) -> int:
    """Blocks of 128 tokens that hold `seqlen` tokens, the last perhaps in part."""
    return -(-seqlen // BLOCK)


def pack(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """bool [..., Mk] to int32 [..., ceil(Mk / 32)]: bit j % 32 of word j / 32 is block j."""
    words = -(-mask.shape[-1] // WORD)
    bits = np.zeros((*mask.shape[:-1], words * WORD), np.uint64)
    bits[..., : mask.shape[-1]] = mask
    bits = bits.reshape(*mask.shape[:-1], words, WORD) << np.arange(WORD, dtype=np.uint64)
    packed: NDArray[np.int32] = bits.sum(-1, dtype=np.uint64).astype(np.uint32).view(np.int32)
    return packed


def unpack(words: NDArray[np.int32], num_k_blocks: int) -> NDArray[np.bool_]:
    """int32 [..., ceil(Mk / 32)] to bool [..., Mk]."""
    bits = np.asarray(words, np.int32).view(np.uint32)[..., None] >> np.arange(WORD, dtype=np.uint32) & 1
    return bits.reshape(*words.shape[:-1], words.shape[-1] * WORD)[..., :num_k_blocks].astype(bool)


# FlashMask


def masked_intervals(startend: Array | None, causal: bool, num_heads: int) -> Intervals:
    """The half-open intervals of query rows that each key is hidden from.

    startend is None or [B, 1 | Hkv | Hq, Lk, bounds]. Returns a list of (start, end), each [B, Hq, Lk] int64:
    empty without FlashMask, one pair for the lower interval and, where not causal, one for the upper.
    """
    if startend is None:
        return []
    heads = startend.shape[1]
    bound = np.moveaxis(np.repeat(startend.astype(np.int64), num_heads // heads, axis=1), 3, 0)
    first, last = np.full_like(bound[0], INT32_MIN), np.full_like(bound[0], INT32_MAX)
    if causal:
        return {1: [(bound[0], last)], 2: [(bound[0], bound[-1])]}[len(bound)]
    if len(bound) == 2:
        return [(bound[0], last), (first, bound[1])]
    return [(bound[0], bound[1]), (bound[2], bound[3])]


def token_mask(
    startend: Array | None, *, causal: bool, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int
) -> NDArray[np.bool_]:
    """bool [B, Hq, Lq, Lk]: the pairs that may attend to each other, whatever the block mask."""
    row = np.arange(seqlen_q)[:, None]
    visible = np.ones((batch, num_heads, seqlen_q, seqlen_k), bool)
    if causal:
        visible &= np.arange(seqlen_k) <= row + seqlen_k - seqlen_q
    for start, end in masked_intervals(startend, causal, num_heads):
        visible &= ~((row >= start[:, :, None]) & (row < end[:, :, None]))
    return visible


def block_geometry(
    startend: Array | None, *, causal: bool, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(hidden, touched), bool [B, Hq, Mq, Mk]: blocks that no row sees, and others that FlashMask cuts."""
    first_row = np.arange(0, seqlen_q, BLOCK)[:, None]  # [Mq, 1]
    last_row = np.minimum(first_row + BLOCK, seqlen_q) - 1
    first_key = np.arange(0, seqlen_k, BLOCK)  # [Mk]
    hidden = np.zeros((batch, num_heads, len(first_row), len(first_key)), bool)
    touched = np.zeros_like(hidden)
    if causal:
        hidden |= first_key > last_row + seqlen_k - seqlen_q
    for start, end in masked_intervals(startend, causal, num_heads):
        max_start, min_end = (
            extreme(np.maximum, start, BLOCK),
            extreme(np.minimum, end, BLOCK),
        )  # [B, Hq, 1, Mk]
        min_start, max_end = extreme(np.minimum, start, BLOCK), extreme(np.maximum, end, BLOCK)
        hidden |= (first_row >= max_start) & (last_row < min_end)
        touched |= (first_row < max_end) & (last_row >= min_start)
    return hidden, touched & ~hidden


def extreme(ufunc: np.ufunc, bound: Array, group: int) -> Array:
    """ufunc over each group of `group` keys: [B, Hq, Lk] to [B, Hq, 1, groups]."""
    starts = np.arange(0, bound.shape[-1], group)
    return ufunc.reduceat(bound, starts, axis=-1)[:, :, None] if len(starts) else bound[:, :, None]


# The three stages and the backward


def estimate(
    query: Array,
    key: Array,
    startend: Array | None = None,
    *,
    causal: bool,
    stride: int = 8,
    key_stride: int | None = None,
    head_offset: int = 0,
    softmax_scale: float | None = None,
    spread: float = 1.0,
    sink: Array | None = None,
    dtype: str = "float64",
    mean_dtype: str | None = None,
) -> Array:
    """Stage 1. Block scores [B, Hq, Mq, Mk]: the attention of sampled queries to strides of keys, by block.

    The score of a stride is that of its mean key, plus `spread` / 2 times the variance that its keys' scores would have
    if their spread were alike in all directions: scale^2 |q|^2 times the mean over the head of the keys' variances.
    That is the logarithm of the mean of exp(score) over the stride to second order (spread 1). Keys past the end are
    zeros. A stride has one score for `key_stride` keys, so the sink, one key, counts as a `key_stride`th of it.

    `mean_dtype` is what mean keys are rounded to, if not `dtype`: tensor cores multiply numbers of 16 bits.
    """
    batch, seqlen_q, num_heads, head_dim = query.shape
    seqlen_k, num_heads_k = key.shape[1:3]
    shift, group = seqlen_k - seqlen_q, num_heads // num_heads_k
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    intervals = masked_intervals(startend, causal, num_heads)
    query, key = cast(query, dtype), cast(key, dtype)
    visible = token_mask(
        startend, causal=causal, batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    )
    seen = visible.any(axis=2).reshape(batch, num_heads_k, group, seqlen_k).any(axis=2)  # [B, Hkv, Lk]
    key = np.where(np.isfinite(key) | np.moveaxis(seen, 1, 2)[..., None], key, 0)
    block_scores = cast(np.zeros((batch, num_heads, num_blocks(seqlen_q), num_blocks(seqlen_k))), dtype)
    if seqlen_k == 0:
        return block_scores
    key_stride = stride if key_stride is None else key_stride
    first_key = np.arange(0, seqlen_k, key_stride)  # [Nk], the first key of each stride
    padded = np.pad(key, ((0, 0), (0, -seqlen_k % key_stride), (0, 0), (0, 0)))
    strides = padded.reshape(batch, len(first_key), key_stride, num_heads_k, head_dim)
    mean = cast(strides.mean(axis=2), mean_dtype or dtype).astype(key.dtype)  # [B, Nk, Hkv, D]
    variance = strides.var(axis=2).mean(axis=-1) if spread else None  # [B, Nk, Hkv]
    for b, h in np.ndindex(batch, num_heads):
        token = np.arange((h + head_offset) % stride, seqlen_q, stride)  # [Nq]
        q = query[b, token, h]  # [Nq, D]
        score = q @ mean[b, :, h // group].T * cast(scale, dtype)  # [Nq, Nk]
        if variance is not None:
            score += np.outer((q * q).sum(-1) * cast(spread / 2 * scale**2, dtype), variance[b, :, h // group])
        visible = np.ones(score.shape, bool)
        if causal:
            visible &= first_key <= token[:, None] + shift
        for start, end in intervals:
            max_start = np.maximum.reduceat(start[b, h], first_key)
            min_end = np.minimum.reduceat(end[b, h], first_key)
            visible &= ~((token[:, None] >= max_start) & (token[:, None] < min_end))
        of_sink = None if sink is None else sink[h] - np.log(key_stride)
        probability = masked_softmax(score, visible, of_sink)[0]
        by_key_block = np.add.reduceat(probability, np.arange(0, len(first_key), BLOCK // key_stride), axis=1)
        np.add.at(block_scores[b, h], token // BLOCK, by_key_block)  # [Nq, Mk] into [Mq, Mk]
    return block_scores


def estimate_on_tensor_cores(
    query: Array, key: Array, startend: Array | None = None, *, dtype: str, stride: int = 8, **options: Any
) -> tuple[Array, Array]:
    """(oracle, naive) block scores for a GPU, whose tensor cores multiply mean keys of 16 bits.

    The naive way rounds there too, and computes the rest exactly, with what ex2.approx and float32 sums may add on top:
    2^-20 of a score of at most 128 / stride.
    """
    oracle = estimate(query, key, startend, stride=stride, **options)
    naive = estimate(query, key, startend, stride=stride, mean_dtype=dtype, **options)
    return oracle, naive + 2.0**-20 * BLOCK / stride * np.sign(naive - oracle)


def select(
    block_scores: Array,
    threshold: float | Sequence[float] | Array,
    startend: Array | None = None,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
    keep_sink: bool = True,
    keep_last: bool = True,
    keep_local: int = 1,
    min_share: float = 0.25,
) -> NDArray[np.bool_]:
    """Stage 2. The blocks to keep, bool [B, Hq, Mq, Mk], by one threshold or one for each head."""
    batch, num_heads, num_q_blocks, _ = block_scores.shape
    hidden, touched = block_geometry(
        startend, causal=causal, batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    )
    visible = ~hidden
    tau = np.broadcast_to(np.asarray(threshold, np.float32), num_heads)
    keep = touched.copy()
    for b, h, m in np.ndindex(batch, num_heads, num_q_blocks):
        row_visible = visible[b, h, m]
        keep[b, h, m] |= top_tau(block_scores[b, h, m], row_visible, tau[h], min_share)
        if keep_sink and row_visible.any():
            keep[b, h, m, row_visible.argmax()] = True
        if causal:
            first_row, last_row = m * BLOCK, min(m * BLOCK + BLOCK, seqlen_q) - 1
            shift = seqlen_k - seqlen_q
            first_own, last_own = (first_row + shift) // BLOCK, (last_row + shift) // BLOCK
            keep[b, h, m, max(first_own - keep_local, 0) : last_own + 1] = True
    if keep_last:
        keep[:, :, -1:] = True
    return keep & visible


def top_tau(scores: Array, visible: NDArray[np.bool_], tau: np.float32, min_share: float = 0) -> NDArray[np.bool_]:
    """The fewest visible blocks, largest scores first, that hold tau of the row's mass: bool [Mk].

    Those of them that have less than `min_share` of the mass of an average visible block are left out.
    """
    block = np.flatnonzero(visible)
    score = scores[block]
    if tau == 1 or not np.all((score >= 0) & (score < 2**18)):
        return visible
    mass = np.rint(score.astype(np.float64) * 2**32).astype(np.int64)
    order = np.argsort(-score, kind="stable")  # equal scores: the lower block first
    mass_before = np.cumsum(mass[order]) - mass[order]
    row_sum = np.float64(mass.sum())
    kept = mass_before.astype(np.float64) < np.float64(tau) * row_sum
    kept &= mass[order].astype(np.float64) >= np.float64(np.float32(min_share)) * row_sum / max(len(block), 1)
    keep = np.zeros(visible.shape, bool)
    keep[block[order[kept]]] = True
    return keep


def attend(
    query: Array,
    key: Array,
    value: Array,
    block_mask: NDArray[np.bool_],
    startend: Array | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    compensate: bool = False,
    sink: Array | None = None,
    dtype: str = "float64",
    mean_dtype: str | None = None,
) -> tuple[Array, Array]:
    """Stage 3. Attention over the selected blocks: out [B, Lq, Hq, Dv] and lse [B, Hq, Lq].

    With `compensate`, the mean key and value of each block that `stood_in_for` says are one key and value more, with
    the weight of as many as the block has. `mean_dtype` is the type that means are rounded to, if not `dtype`.
    """
    batch, seqlen_q, num_heads, _ = query.shape
    seqlen_k = key.shape[1]
    group = num_heads // key.shape[2]
    visible = selected_tokens(query, key, block_mask, startend, causal)
    query, key, value = cast(query, dtype), cast(key, dtype), cast(value, dtype)
    logarithm = np.zeros(seqlen_k, query.dtype)  # of how often each key counts
    if compensate and seqlen_k:
        stands_in = stood_in_for(block_mask, startend, causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        rows = np.repeat(stands_in, BLOCK, axis=2)[:, :, :seqlen_q]  # [B, Hq, Lq, Mk]
        first_key = np.arange(0, seqlen_k, BLOCK)
        count = np.diff([*first_key, seqlen_k])  # [Mk]
        means = (np.add.reduceat(x, first_key, axis=1) / count[:, None, None] for x in (key, value))
        key, value = (
            np.concatenate([x, cast(mean, mean_dtype or dtype)], axis=1) for x, mean in zip((key, value), means)
        )
        visible = np.concatenate([visible, rows], axis=3)
        logarithm = np.concatenate([logarithm, cast(np.log(count), dtype)])
    out = np.zeros((batch, seqlen_q, num_heads, value.shape[-1]), query.dtype)
    lse = np.zeros((batch, num_heads, seqlen_q), query.dtype)
    for b, h in np.ndindex(batch, num_heads):
        k, v = key[b, :, h // group], value[b, :, h // group]  # [Lk, D], [Lk, Dv], or of Lk + Mk rows
        score = cast(scaled_scores(query[b, :, h], k, softmax_scale, dtype) + logarithm, dtype)
        probability, lse[b, h] = masked_softmax(score, visible[b, h], None if sink is None else sink[h])
        out[b, :, h] = cast(cast(probability, dtype) @ v, dtype)
    return out, lse


def quantized_attend(
    query: Array,
    key: Array,
    value: Array,
    block_mask: NDArray[np.bool_],
    startend: Array | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    sink: Array | None = None,
) -> tuple[Array, Array]:
    """Stage 3 with the quantization "qk_int8_pv_fp8": what `attend` returns, of products of eight bits.

    Scales are float32, rounded in the order that is written here; all else is exact, in float64. A kernel multiplies
    INT8 into int32 and e4m3 into float32, and may round the rest to float32.

    - A key that no query of its group sees counts as nothing, below. A key that is not finite is zeros, and its value
      NaN; a value that is not finite is NaN.
    - From each key its head's *mean key* is subtracted: the mean of the finite keys of the first block of 128 that has
      a key that counts, of those that do. Scores lack its score, which is constant in a row; lse gets it added, and a
      sink loses it.
    - Queries and keys are *rotated*: multiplied, n neighbouring elements together, by the Hadamard matrix of n over n,
      where n is the largest power of two that D is a multiple of, in float32, from neighbours to those n / 2 apart.
      Their products are then 1 / n of what they were.
    - Queries become INT8 with a scale for each row, keys with one for each block of 128: largest / 127 * factor,
      rounded away from zero to bfloat16, where `largest` is the largest magnitude of the row or block, and `factor` 1
      for keys and softmax_scale * log2(e) * n for queries. x becomes the nearest whole number to x * (factor / scale),
      ties to even. Zeros where `largest` is below 2^-100. Of a query that is not finite the scale is NaN, and so are
      its scores.
    - Scores are exponents of 2: the product of whole numbers, times both scales.
    - Values become e4m3, divided by a power of two for each column of a key head: the smallest, from 2^-100 on, with
      which the largest magnitude of the column is at most 448.
    - The *base* of a row is its largest visible score, or the sink's if larger, rounded up to a whole number.
      Probabilities are 256 * 2^(score - base), rounded to e4m3. A kernel may use the largest score so far, or a base a
      little above or below: as bases are whole, that changes probabilities by powers of two, but for those below 2^-14
      of the base's, where e4m3 has fewer bits.
    - A row's sum is of rounded probabilities, so that their rounding cancels where one key has most of the mass; the
      sink adds its own, not rounded. out is the sum of products with values over it.
    """
    batch, seqlen_q, num_heads, head_dim = query.shape
    seqlen_k, num_heads_k = key.shape[1:3]
    group = num_heads // num_heads_k
    scale = np.float32(head_dim**-0.5 if softmax_scale is None else softmax_scale)
    factor = scale * np.float32(np.log2(np.e)) * np.float32(head_dim & -head_dim)
    visible = selected_tokens(query, key, block_mask, startend, causal)
    seen = token_mask(
        startend, causal=causal, batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    ).any(axis=2)
    out = np.zeros((batch, seqlen_q, num_heads, value.shape[-1]))
    lse = np.zeros((batch, num_heads, seqlen_q))
    for b, h in np.ndindex(batch, num_heads):
        h_k = h // group
        counts = seen[b, h_k * group : (h_k + 1) * group].any(axis=0)  # [Lk]
        k, mean, k_scale = _quantized_keys(key[b, :, h_k].astype(np.float32), counts)
        bad_key = counts & ~np.isfinite(key[b, :, h_k]).all(-1)
        v = _quantized_values(value[b, :, h_k], counts)  # [Lk, Dv], what is not finite NaN
        v[bad_key] = np.nan
        q = query[b, :, h].astype(np.float32)
        bad_query = ~np.isfinite(q).all(-1)
        q[bad_query] = 0
        of_mean = (q.astype(np.float64) @ mean) * scale  # [Lq]
        q = _rotated(q)
        q, q_scale = to_int8(q, np.abs(q).max(-1, initial=0), factor)
        q_scale[bad_query] = np.nan
        score = (q @ k.T) * np.outer(q_scale, k_scale)  # [Lq, Lk]
        score = np.where(visible[b, h], score, -np.inf)
        of_sink = np.full(seqlen_q, -np.inf) if sink is None else (sink[h] - of_mean) / np.log(2)
        base = np.ceil(np.maximum(score.max(-1, initial=-np.inf), of_sink))
        base = np.where(np.isneginf(base), 0, base)
        p = to_e4m3(256 * np.exp2(score - base[:, None]))
        row_sum = p.sum(-1) + 256 * np.exp2(of_sink - base)
        total = p @ np.nan_to_num(v)
        total[visible[b, h].astype(float) @ np.isnan(v) > 0] = np.nan
        out[b, :, h] = total / np.where(row_sum == 0, 1, row_sum)[:, None]
        with np.errstate(divide="ignore"):
            lse[b, h] = (base - 8) * np.log(2) + np.log(row_sum) + of_mean
    return out, lse


def _rotated(x: Array) -> Array:
    """float32 [L, D], times the Hadamard matrix over the number of elements that it takes together."""
    head_dim = x.shape[-1]
    together, step = head_dim & -head_dim, 1
    x = x / np.float32(together)
    while step < together:
        a, b = np.moveaxis(x.reshape(len(x), -1, 2, step), 2, 0)
        x = np.stack([a + b, a - b], axis=2).reshape(len(x), head_dim)
        step *= 2
    return x


def to_int8(x: Array, largest: Array, factor: np.float32) -> tuple[Array, Array]:
    """(whole numbers [L, D] in float64, scale of each row float32 [L]) of `factor` times the float32 rows `x`."""
    scale = largest / np.float32(127) * factor
    scale = ((scale.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    zero = (largest < np.float32(2.0**-100)) | (scale == 0)
    inverse = np.where(zero, np.float32(0), factor / np.where(zero, np.float32(1), scale))
    return np.rint(x * inverse[:, None]).astype(np.float64), scale


def _quantized_keys(key: Array, counts: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """(whole numbers [Lk, D], mean key float32 [D], scale of each key float32 [Lk]) of a head's keys [Lk, D]."""
    mean = np.zeros(key.shape[1], np.float32)
    finite = counts & np.isfinite(key).all(-1)
    if finite.any():
        first = finite.argmax() // BLOCK * BLOCK
        block = slice(first, first + BLOCK)
        mean = key[block][finite[block]].mean(0, dtype=np.float64).astype(np.float32)
    centred = _rotated(np.where(finite[:, None], key - mean, np.float32(0)))
    largest = np.zeros(len(key), np.float32)
    for first in range(0, len(key), BLOCK):
        largest[first : first + BLOCK] = np.abs(centred[first : first + BLOCK]).max()
    numbers, scale = to_int8(centred, largest, np.float32(1))
    return numbers, mean, scale


def _quantized_values(value: Array, counts: NDArray[np.bool_]) -> Array:
    """What e4m3 leaves of a head's values [Lk, Dv]; zeros where they do not count, NaN where they are not finite."""
    kept = np.where(counts[:, None], value, 0).astype(np.float64)
    finite = np.where(np.isfinite(kept), kept, 0)
    fraction, exponent = np.frexp(np.abs(finite).max(0, initial=0))
    power = np.where(fraction > 0, np.maximum(exponent - 9 + (fraction > 0.875), -100), 0)
    return np.where(np.isfinite(kept), np.ldexp(to_e4m3(np.ldexp(finite, -power)), power), np.nan)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """(out [..., L, Hq, Dv], lse [..., Hq, L]) of attention over two sets of keys, from those over each of them."""
    with np.errstate(invalid="ignore"):
        lse = np.logaddexp(lse_a, lse_b, dtype=np.float64)
        shares = [np.where(np.isneginf(part), 0, np.exp(part - lse)) for part in (lse_a, lse_b)]
    weights = [np.swapaxes(share, -1, -2)[..., None] for share in shares]
    return out_a * weights[0] + out_b * weights[1], lse


def stood_in_for(
    block_mask: NDArray[np.bool_], startend: Array | None, *, causal: bool, seqlen_q: int, seqlen_k: int
) -> NDArray[np.bool_]:
    """bool [B, Hq, Mq, Mk]: the blocks that are not selected, but wholly visible to every row of the query block."""
    batch, num_heads, num_q_blocks, num_k_blocks = block_mask.shape
    hidden, touched = block_geometry(
        startend, causal=causal, batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    )
    open_blocks = ~block_mask & ~hidden & ~touched
    if causal:
        last_key = np.arange(1, num_k_blocks + 1) * BLOCK - 1
        open_blocks &= last_key <= np.arange(num_q_blocks)[:, None] * BLOCK + seqlen_k - seqlen_q
    return open_blocks


def backward(
    query: Array,
    key: Array,
    value: Array,
    block_mask: NDArray[np.bool_],
    grad_out: Array,
    startend: Array | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    sink: Array | None = None,
    grad_lse: Array | None = None,
    dtype: str = "float64",
    stored: str | None = None,
    terms: bool = False,
) -> tuple[Array, ...]:
    """The gradients of sum(out * grad_out) + sum(lse * grad_lse) by query, key and value, and by the sink if given.

    The selection is held constant.

    `stored` is the type that the forward pass left its result in, if not `dtype`.

    With `terms`, the sums of their terms' absolute values instead: what rounding errors are relative to where terms
    cancel (of one visible key the probability is 1, so its scores have no gradient: all of dP - delta cancels).
    """
    batch, seqlen_q, num_heads, head_dim = query.shape
    group = num_heads // key.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    visible = selected_tokens(query, key, block_mask, startend, causal)
    query, key, value, grad_out = (cast(x, dtype) for x in (query, key, value, grad_out))
    grad_query, grad_key, grad_value = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    grad_sink = np.zeros(num_heads, query.dtype)
    if grad_lse is None:
        grad_lse = np.zeros((batch, num_heads, seqlen_q))
    for b, h in np.ndindex(batch, num_heads):
        q, k, v, do = query[b, :, h], key[b, :, h // group], value[b, :, h // group], grad_out[b, :, h]
        score = scaled_scores(q, k, softmax_scale, dtype)  # [Lq, Lk]
        of_sink = None if sink is None else sink[h]
        lse = masked_softmax(score, visible[b, h], of_sink)[1][:, None]  # all that the forward keeps of the softmax
        p = cast(np.exp(np.where(visible[b, h], score - lse, -np.inf)), dtype)  # [Lq, Lk]
        if terms:
            q, k, v, do = np.abs(q), np.abs(k), np.abs(v), np.abs(do)
        out = cast(cast(p @ v, stored or dtype), dtype)  # [Lq, Dv]
        of_lse = grad_lse[b, h, :, None].astype(query.dtype)
        delta = (do * out).sum(-1, keepdims=True) + (np.abs(of_lse) if terms else -of_lse)  # [Lq, 1]
        ds = cast(p * (cast(do @ v.T, dtype) + (delta if terms else -delta)), dtype)  # [Lq, Lk]
        grad_query[b, :, h] = ds @ k * cast(scale, dtype)
        grad_key[b, :, h // group] += ds.T @ q * cast(scale, dtype)
        grad_value[b, :, h // group] += p.T @ do
        if of_sink is not None and not np.isneginf(of_sink):
            share = np.exp(of_sink.astype(query.dtype) - lse)  # [Lq, 1], of the sink in each row's softmax
            grad_sink[h] += (share * (delta if terms else -delta)).sum()
    grads = cast(grad_query, dtype), cast(grad_key, dtype), cast(grad_value, dtype)
    return grads if sink is None else (*grads, grad_sink)


def selected_tokens(
    query: Array, key: Array, block_mask: NDArray[np.bool_], startend: Array | None, causal: bool
) -> NDArray[np.bool_]:
    """bool [B, Hq, Lq, Lk]: the pairs that attend to each other, in selected blocks and not masked."""
    batch, seqlen_q, num_heads, _ = query.shape
    seqlen_k = key.shape[1]
    selected = np.repeat(np.repeat(block_mask, BLOCK, axis=2), BLOCK, axis=3)[:, :, :seqlen_q, :seqlen_k]
    return selected & token_mask(
        startend, causal=causal, batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k
    )


def scaled_scores(q: Array, k: Array, softmax_scale: float | None, dtype: str) -> Array:
    """q k^T * softmax_scale: [Lq, D], [Lk, D] to [Lq, Lk]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return cast(cast(q @ k.T, dtype) * cast(scale, dtype), dtype)


def masked_softmax(score: Array, visible: NDArray[np.bool_], sink: Any = None) -> tuple[Array, Array]:
    """(probability, lse) over the last axis, in the type of score, beside one more score that has no place there.

    A row that sees nothing: zeros and that score, or -inf.
    """
    score = np.where(visible, score, -np.inf)
    sink = np.asarray(-np.inf if sink is None else sink, score.dtype)
    row_max = np.maximum(score.max(-1, keepdims=True, initial=-np.inf), sink)
    base = np.where(np.isneginf(row_max), 0, row_max)
    exponential = np.exp(score - base)
    row_sum = exponential.sum(-1, keepdims=True) + np.exp(sink - base)
    with np.errstate(divide="ignore"):
        lse = (np.log(row_sum) + row_max)[..., 0]
    probability = exponential / np.where(row_sum == 0, 1, row_sum)
    return np.where(visible, probability, 0), lse  # hidden is zero even where NaN is visible


# How far from the oracle a kernel may be


def errors(
    actual: Array, oracle: Array, naive: Array, terms: Array | None = None, stored: Array | None = None
) -> list[tuple[str, float, float]]:
    """[(measure, error, allowed)] of the largest and the root mean square error against the oracle.

    Allowed is twice the naive error, or twice that of `stored`, where it is larger: exact gradients, but for the
    forward's result, of which the dtype has a rounding. All gradients of a row carry that one rounding, which the naive
    way may be lucky with.

    A few roundings of float32 are allowed on top, for results that the naive way happens to hit exactly. They are of
    the largest result, or of 1; where larger terms may cancel, `terms` has the sums of their absolute values, and one
    rounding of the largest is allowed too.

    Both are infinite where other values than the oracle's are -inf (the lse of a row that sees nothing) or any is NaN.
    """
    seen = ~np.isneginf(oracle)
    slack = 8 * FLOAT32_EPSILON * np.abs(oracle[seen]).max(initial=1.0)
    if terms is not None:
        slack += FLOAT32_EPSILON * terms.max(initial=0)
    naive_errors = [np.abs(x[seen].astype(np.float64) - oracle[seen]) for x in (naive, stored) if x is not None]
    if np.array_equal(np.isneginf(actual), ~seen) and np.isfinite(actual[seen]).all():
        error = np.abs(actual[seen].astype(np.float64) - oracle[seen])
    else:
        error = np.full(1, np.inf)
    return [
        ("largest", error.max(initial=0), 2 * np.max(naive_errors, initial=0) + slack),
        ("root mean square", rms(error), 2 * max(map(rms, naive_errors)) + slack),
    ]


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
