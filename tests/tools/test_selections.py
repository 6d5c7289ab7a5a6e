"""How tools.evaluate chooses blocks: the baselines against plain definitions, and what holds for every method."""

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import reference
from rrattn.attention_mass import exact_block_mass
from tools.evaluation import baselines
from tools.evaluation.methods import Method

BASELINES = [
    "xattention:0.7",
    "rotated-blocks:0.6",
    "rotated-strides:0.6",
    "row-maximum:0.6",
    "group-mean:0.6",
    "pooling:0.7",
    "vertical-slash:0.2",
    "window:2",
    "random:0.3",
    "exact:0.7",
]


def inputs(rng, seqlen_q, seqlen_k, heads=4, kv_heads=2):
    """One sequence of queries and keys that attend unevenly."""
    return (
        2 * rng.standard_normal((seqlen_q, heads, 16), np.float32),
        2 * rng.standard_normal((seqlen_k, kv_heads, 16), np.float32),
    )


SHAPES = [(1, 1), (127, 127), (129, 129), (400, 400), (72, 584), (128, 640)]


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_antidiagonal_scores_sum_antidiagonals(rng, seqlen_q, seqlen_k):
    query, key = inputs(rng, seqlen_q, seqlen_k)
    shift, stride = seqlen_k - seqlen_q, 8
    scores = baselines.antidiagonal_scores(query, key, 0.25, stride)
    expected = np.zeros_like(scores)
    for h in range(4):
        product = np.zeros((-(-seqlen_q // 8) * 8, -(-seqlen_k // 8) * 8))
        product[:seqlen_q, :seqlen_k] = query[:, h] @ key[:, h // 2].T * 0.25
        squares = np.zeros((product.shape[0] // 8, product.shape[1] // 8))
        for i, j in np.ndindex(squares.shape):
            squares[i, j] = np.trace(product[i * 8 : i * 8 + 8, j * 8 : j * 8 + 8][::-1]) / stride
        visible = np.arange(squares.shape[1]) <= np.arange(len(squares))[:, None] + shift // 8
        probability = reference.masked_softmax(squares, visible)[0]
        for i, j in np.ndindex(probability.shape):
            expected[h, i // 16, j // 16] += probability[i, j]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_antidiagonals_need_whole_strides(rng):
    with pytest.raises(
        ValueError, match="3 keys stand before the queries, but that must be a multiple of the stride 8"
    ):
        baselines.antidiagonal_scores(*inputs(rng, 10, 13), 0.25, 8)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_sampled_scores(rng, seqlen_q, seqlen_k):
    """Not rotated they are rrattn's estimate; rotated by blocks or strides, that of other heads there."""
    query, key = inputs(rng, seqlen_q, seqlen_k)
    group = np.repeat(np.arange(2), 2)
    own = reference.estimate(query[None], key[None], causal=True, stride=8, spread=0)[0]
    np.testing.assert_allclose(baselines.sampled_scores(query, key, 0.25, 8), own, atol=1e-3)
    by_block = baselines.sampled_scores(query, key, 0.25, 8, "rotated-blocks")
    for m in range(own.shape[1]):
        turned = reference.estimate(query[None], key[None], causal=True, stride=8, head_offset=m, spread=0)[0]
        np.testing.assert_allclose(by_block[:, m], turned[:, m], atol=1e-3)
    by_stride = baselines.sampled_scores(query, key, 0.25, 8, "rotated-strides")
    shift = seqlen_k - seqlen_q
    for h in range(4):
        k, expected = key[:, group[h]].astype(np.float64), np.zeros_like(own[h])
        for i in range(-(-seqlen_q // 8)):
            token = i * 8 + (h + i) % 8
            if token < seqlen_q:
                starts = np.arange(0, token + shift + 1, 8)
                score = (
                    np.add.reduceat(k, np.arange(0, seqlen_k, 8), axis=0)[: len(starts)] @ query[token, h] * 0.25 / 8
                )
                chance = np.exp(score - score.max())
                np.add.at(expected[token // 128], starts // 128, chance / chance.sum())
        np.testing.assert_allclose(by_stride[h], expected, atol=1e-3)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_pooled_scores_are_of_block_means(rng, seqlen_q, seqlen_k):
    query, key = inputs(rng, seqlen_q, seqlen_k)
    scores = baselines.pooled_scores(query, key, 0.25)
    for h, m in np.ndindex(scores.shape[:2]):
        last = (min(m * 128 + 128, seqlen_q) - 1 + seqlen_k - seqlen_q) // 128
        products = [
            query[m * 128 : m * 128 + 128, h].mean(0) @ key[j * 128 : j * 128 + 128, h // 2].mean(0) * 0.25
            for j in range(last + 1)
        ]
        expected = np.exp(products) / np.exp(products).sum()
        np.testing.assert_allclose(scores[h, m, : last + 1], expected, rtol=1e-4)
        assert not scores[h, m, last + 1 :].any()


def test_vertical_slash_finds_a_column_and_a_diagonal():
    """Key 200 and, for each query, the one 300 before it hold half of its attention each.

    To the last 64 queries that is columns 1 and 5, where these keys are, and distances of 2 and mostly 6 blocks.
    """
    seqlen = 1024
    code = np.random.default_rng(0).standard_normal((seqlen, 64)).astype(np.float32)
    code *= (60 / np.square(code).sum(1, keepdims=True)) ** 0.5
    key = np.zeros((seqlen, 1, 66), np.float32)
    key[:, 0, :64], key[200, 0, 64] = code, 1
    query = np.zeros((seqlen, 1, 66), np.float32)
    query[300:, 0, :64], query[:, 0, 64] = code[:-300], 60
    mask = baselines.vertical_slash_mask(query, key, 1.0, 0.9)[0]
    for m in range(8):
        expected = {1, 5} | {j for j in range(8) if m - j in (2, 3, 6, 7)}
        assert set(np.flatnonzero(mask[m])) == expected


def test_window_and_random_masks(rng):
    query, key = inputs(rng, 1000, 1000)
    assert [list(np.flatnonzero(row)) for row in baselines.window_mask(query, key, 2)[0, [0, 1, 5]]] == [
        [0], [0, 1], [0, 4, 5]]  # fmt: skip
    long = np.zeros((8000, 4, 16), np.float32)
    assert baselines.random_mask(long, long, 0.3, 0).mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("text", ["dense", "rrattn:0.6:16", *BASELINES])
def test_masks_keep_the_diagonal_and_the_sink_and_nothing_hidden(rng, text):
    query, key = (paddle.to_tensor(x[None]) for x in inputs(rng, 500, 756))
    packed = Method(text).block_mask(query, key, None, 0, 1)
    mask = rrattn.unpack_block_mask(packed, 6).numpy()[0]
    assert mask[:, :, 0].all() and all(mask[:, m, m + 2].all() for m in range(4))
    assert not any(mask[:, m, m + 3 :].any() for m in range(4))
    assert (mask.sum() == 4 * (3 + 4 + 5 + 6)) == (text == "dense")


@pytest.mark.parametrize("text", ["rrattn:0.5", "xattention:0.5", "random:0.1"])
def test_last_keeps_the_last_row_and_changes_no_other(rng, text):
    query, key = (paddle.to_tensor(x[None]) for x in inputs(rng, 1000, 1000))
    name, _, settings = text.partition(":")
    plain, last = (
        rrattn.unpack_block_mask(Method(text).block_mask(query, key, None, 0, 1), 8).numpy()[0]
        for text in (text, f"{name}+last:{settings}")
    )
    assert last[:, -1].all() and not plain[:, -1].all()
    assert np.array_equal(last[:, :-1], plain[:, :-1])


@pytest.mark.parametrize("text", ["rrattn:0.5", "xattention:0.5", "random:0.1"])
def test_near_keeps_the_block_before_the_diagonal(rng, text):
    query, key = (paddle.to_tensor(x[None]) for x in inputs(rng, 1000, 1256))
    name, _, settings = text.partition(":")
    plain, near = (
        rrattn.unpack_block_mask(Method(text).block_mask(query, key, None, 0, 1), 10).numpy()[0]
        for text in (text, f"{name}+near:{settings}")
    )
    before = np.arange(10) == np.arange(8)[:, None] + 1
    assert near[:, before].all() and not plain[:, before].all()
    assert np.array_equal(near[:, ~before], plain[:, ~before])


def test_a_growing_knob_attends_more_and_exact_keeps_most(rng):
    query, key = inputs(rng, 2048, 2048)
    query, key = (paddle.to_tensor(x[None]) for x in (query, key))
    mass = exact_block_mass(query, key)
    curves = {}
    for name in ("exact", "rrattn", "xattention", "pooling", "vertical-slash"):
        masks = [
            rrattn.unpack_block_mask(Method(f"{name}:{tau}").block_mask(query, key, None, 0, 1), 16).numpy()[0]
            for tau in (0.2, 0.4, 0.6, 0.8, 0.9, 1)
        ]
        assert all((low <= high).all() for low, high in zip(masks, masks[1:])), name
        curves[name] = np.asarray([[mask.sum(), (mask * mass).sum()] for mask in masks]).T
        best = np.interp(curves[name][0], *curves["exact"])
        assert (curves[name][1] <= best * 1.01).all(), name


@pytest.mark.parametrize("text, message", [
    ("denser", "method 'denser' is not one of dense, pooling, vertical-slash"),
    ("rrattn", "must be written as rrattn:NUMBER\\[:STRIDE\\], rrattn:SETTING=VALUE,... or rrattn:FILE.json"),
    ("rrattn:1.5", "method 'rrattn:1.5': 1.5 must be in \\(0, 1\\]"),
    ("rrattn:0.9:7", "stride must be one of 2, 4, 8"),
    ("pooling:0.9:8", "must be written as pooling:NUMBER"),
    ("window:2.5", "window must be a whole number of blocks"),
    ("random:x", "must be written as random:NUMBER"),
    ("dense+last", "dense keeps every block anyway"),
    ("rrattn+first:0.9", "after a \\+ may stand last and near"),
    ("dense:1", "must be written as dense"),
])  # fmt: skip
def test_bad_methods_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Method(text)
