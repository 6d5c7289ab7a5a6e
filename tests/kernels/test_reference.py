"""The oracle against the definitions written with scalars, and its backward against finite differences."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
from cases import CAUSAL_FLASHMASKS, FULL_FLASHMASKS, Case, make_inputs

from rrattn import reference
from rrattn.config import RRAttentionConfig
from rrattn.reference import BLOCK

SMALL = Case(5, 9, num_heads=4, num_heads_k=2, head_dim=8, batch=2)
MASKED = [
    Case(300, 400, causal, 4, 2, 8, batch=2, flashmask=generator.__name__, flashmask_heads=heads)
    for causal, generators in ((True, CAUSAL_FLASHMASKS), (False, FULL_FLASHMASKS))
    for generator in generators
    for heads in ("1", "Hkv", "Hq")
]


def test_bfloat16_rounds_to_nearest_even():
    exact = reference.from_bfloat16(np.arange(2**16, dtype=np.uint16))
    finite = np.isfinite(exact)
    assert np.array_equal(reference.to_bfloat16(exact[finite]), np.arange(2**16)[finite])
    assert np.isnan(reference.from_bfloat16(reference.to_bfloat16(exact[np.isnan(exact)]))).all()
    assert reference.from_bfloat16(0x3F80) == 1 and reference.from_bfloat16(0xC000) == -2
    ulp = 2.0**-7
    for value, rounded in (
        (1 + ulp / 2, 1),  # a tie goes to the even neighbour
        (1 + 1.5 * ulp, 1 + 2 * ulp),
        (1 + 0.51 * ulp, 1 + ulp),
        (1 + 0.49 * ulp, 1),
        (3.4e38, math.inf),
    ):
        assert reference.cast(np.float32(value), "bfloat16") == rounded, value


@pytest.mark.parametrize("num_k_blocks", (1, 31, 32, 33, 70))
def test_pack_sets_bit_j_of_word_j_over_32(rng, num_k_blocks):
    mask = rng.random((2, 3, num_k_blocks)) < 0.5
    words = reference.pack(mask)
    assert words.dtype == np.int32 and words.shape == (2, 3, -(-num_k_blocks // 32))
    for index in np.ndindex(2, 3):
        whole = sum(int(np.uint32(w)) << 32 * i for i, w in enumerate(words[index]))
        assert whole == sum(int(bit) << j for j, bit in enumerate(mask[index]))
    assert np.array_equal(reference.unpack(words, num_k_blocks), mask)


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_block_geometry_agrees_with_the_token_mask(case):
    """A hidden block has no visible token; one neither hidden nor touched loses none to FlashMask."""
    startend = make_inputs(case).startend
    hidden, touched = reference.block_geometry(startend, **case.geometry)
    visible = reference.token_mask(startend, **case.geometry)
    triangle = reference.token_mask(None, **case.geometry)
    for b, h, m, n in np.ndindex(hidden.shape):
        block = (b, h, slice(m * BLOCK, m * BLOCK + BLOCK), slice(n * BLOCK, n * BLOCK + BLOCK))
        if hidden[b, h, m, n]:
            assert not visible[block].any()
        elif not touched[b, h, m, n]:
            assert np.array_equal(visible[block], triangle[block])
    assert not (hidden & touched).any()
    assert touched.any()


@pytest.mark.parametrize("case", [SMALL, *MASKED[::5]], ids=str)
def test_token_mask_is_flashmask_written_out(case):
    startend = make_inputs(case).startend
    visible = reference.token_mask(startend, **case.geometry)
    shift = case.seqlen_k - case.seqlen_q
    for b, h, r, c in np.random.default_rng(0).integers(0, visible.shape, (500, 4)):
        expected = not case.causal or c <= r + shift
        if startend is not None:
            bounds = startend[b, h * startend.shape[1] // case.num_heads, c].tolist()
            if case.causal:
                start, end = bounds if len(bounds) == 2 else (bounds[0], math.inf)
                expected &= not start <= r < end
            elif len(bounds) == 2:
                expected &= not (bounds[0] <= r or r < bounds[1])
            else:
                expected &= not (bounds[0] <= r < bounds[1] or bounds[2] <= r < bounds[3])
        assert visible[b, h, r, c] == expected


@pytest.mark.parametrize("sink", (None, np.array([1.5, -np.inf])))
@pytest.mark.parametrize("key_stride, spread", [(8, 1.0), (8, 0), (4, 0.7), (32, 1.0), (1, 1.0)])
@pytest.mark.parametrize("stride, head_offset", ((8, 0), (32, 27)))
def test_estimate_is_the_formula_written_out(stride, head_offset, key_stride, spread, sink):
    case = Case(140, 265, num_heads=2, num_heads_k=1, head_dim=8)
    query, key, _ = (x.astype(np.float64) for x in make_inputs(case).forward)
    expected = np.zeros(case.block_shape)
    for h in range(2):
        for i in range(0, 140, stride):
            token = i + (h + head_offset) % stride
            if token >= 140:
                continue
            strides = [j for j in range(0, 265, key_stride) if j <= token + 125]
            weight = []
            for j in strides:
                keys = [key[0, c, 0] if c < 265 else np.zeros(8) for c in range(j, j + key_stride)]
                mean = sum(keys) / key_stride
                variance = sum(((k - mean) ** 2).sum() for k in keys) / key_stride / 8  # the mean of the 8 columns'
                q = query[0, token, h]
                weight.append(math.exp(q @ mean / math.sqrt(8) + spread / 2 * (q @ q) / 8 * variance))
            of_sink = 0 if sink is None else math.exp(sink[h]) / key_stride
            for j, w in zip(strides, weight):
                expected[0, h, token // BLOCK, j // BLOCK] += w / (sum(weight) + of_sink)
    options = {"stride": stride, "key_stride": key_stride, "head_offset": head_offset, "spread": spread, "sink": sink}
    scores = reference.estimate(query, key, causal=True, **options)
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-15)


def test_top_tau_is_the_smallest_set_that_reaches_tau(rng):
    for tau in (0.01, 0.5, 0.9, 0.999):
        for _ in range(50):
            scores = rng.random(12).astype(np.float32) ** 4
            visible = rng.random(12) < 0.7
            keep = reference.top_tau(scores, visible, np.float32(tau))
            total = scores[visible].sum(dtype=np.float64)
            assert not (keep & ~visible).any()
            assert scores[keep].sum(dtype=np.float64) >= tau * total - 1e-6
            if keep.any():
                assert scores[keep].sum(dtype=np.float64) - scores[keep].min() < tau * total + 1e-6
                assert scores[keep].min() >= scores[visible & ~keep].max(initial=0)


def test_min_share_leaves_out_what_has_less_than_that_share_of_an_average(rng):
    for min_share in (0.1, 0.5, 1.0):
        for _ in range(50):
            scores = rng.random(12).astype(np.float32) ** 4
            visible = rng.random(12) < 0.7
            every = reference.top_tau(scores, visible, np.float32(0.99))
            keep = reference.top_tau(scores, visible, np.float32(0.99), min_share)
            average = scores[visible].sum(dtype=np.float64) / max(visible.sum(), 1)
            assert np.array_equal(keep, every & (scores >= min_share * average))
            assert np.array_equal(reference.top_tau(scores, visible, np.float32(1), min_share), visible)


def test_the_defaults_are_those_of_the_config():
    config = {**RRAttentionConfig().sampling(), **RRAttentionConfig().keep_rules()}
    for function in (reference.estimate, reference.select):
        for name, parameter in inspect.signature(function).parameters.items():
            assert name not in config or parameter.default == config[name], name


def test_attend_is_softmax_written_out():
    case, scale = SMALL, 0.3
    inputs = make_inputs(case)
    query, key, value = (x.astype(np.float64) for x in inputs.forward)
    out, lse = reference.attend(*inputs.forward, np.ones(case.block_shape, bool), causal=True, softmax_scale=scale)
    for b, h, r in np.ndindex(case.batch, case.num_heads, case.seqlen_q):
        keys = range(r + case.seqlen_k - case.seqlen_q + 1)
        weight = [math.exp(scale * (query[b, r, h] @ key[b, c, h // 2])) for c in keys]
        expected = sum(w * value[b, c, h // 2] for w, c in zip(weight, keys)) / sum(weight)
        np.testing.assert_allclose(out[b, r, h], expected, rtol=1e-12)
        assert lse[b, h, r] == pytest.approx(math.log(sum(weight)), rel=1e-12)


def test_attend_sees_selected_blocks_only(rng):
    """Removing a block equals cutting its keys out."""
    query, key, value = (rng.standard_normal((1, n, 1, 8)) for n in (4, 300, 300))
    mask = np.array([True, False, True]).reshape(1, 1, 1, 3)
    cut = np.r_[0:128, 256:300]
    out, lse = reference.attend(query, key, value, mask, causal=False)
    dense = reference.attend(query, key[:, cut], value[:, cut], np.ones((1, 1, 1, 2), bool), causal=False)
    np.testing.assert_allclose(out, dense[0], rtol=1e-12)
    np.testing.assert_allclose(lse, dense[1], rtol=1e-12)
    nothing = reference.attend(query, key, value, np.zeros_like(mask), causal=False)
    assert not nothing[0].any() and np.isneginf(nothing[1]).all()


SINK = np.array([0.7, -2.0, 4.0, -np.inf])


def test_a_sink_is_one_more_key_whose_value_is_zero(rng):
    """One that every query sees, with this score."""
    query, key, value = (rng.standard_normal((2, n, heads, 8)) for n, heads in ((5, 4), (9, 2), (9, 2)))
    query[..., 0], key[..., 0] = 1, 0
    for h, score in enumerate(SINK[:3]):
        extra = np.zeros((2, 1, 2, 8))
        extra[..., 0] = score
        longer = [np.concatenate(pair, axis=1) for pair in ((extra, key), (np.zeros_like(extra), value))]
        block = np.ones((2, 4, 1, 1), bool)
        options = {"causal": True, "softmax_scale": 1.0}
        out, lse = reference.attend(query, key, value, block, sink=SINK, **options)
        expected = reference.attend(query, *longer, block, **options)
        np.testing.assert_allclose(out[:, :, h], expected[0][:, :, h], rtol=1e-12)
        np.testing.assert_allclose(lse[:, h], expected[1][:, h], rtol=1e-12)


def test_a_sink_of_minus_infinity_is_none():
    inputs, options = make_inputs(SMALL), {"causal": True}
    mask, nothing = np.ones(SMALL.block_shape, bool), np.full(4, -np.inf)
    arguments = *inputs.forward, mask
    for stage, given in (
        (reference.attend, arguments),
        (reference.backward, (*arguments, inputs.grad_out)),
    ):
        for one, other in zip(stage(*given, sink=nothing, **options), stage(*given, **options)):
            np.testing.assert_array_equal(one, other)
    scores = [reference.estimate(*inputs.forward[:2], sink=sink, **options) for sink in (nothing, None)]
    np.testing.assert_array_equal(*scores)


def test_a_row_that_sees_nothing_has_the_sink_alone():
    inputs = make_inputs(SMALL)
    out, lse = reference.attend(*inputs.forward, np.zeros(SMALL.block_shape, bool), causal=True, sink=SINK)
    assert not out.any() and (lse == SINK[:, None]).all()


@pytest.mark.parametrize("key_stride", (1, 8))
def test_the_estimate_leaves_the_sink_its_part(key_stride):
    """With keys one by one, just what the softmax of the sampled queries leaves it."""
    case = Case(140, 265, num_heads=4, num_heads_k=2, head_dim=8)
    query, key, value = make_inputs(case).forward
    options = {"causal": True, "stride": 8, "spread": 0, "key_stride": key_stride, "sink": SINK}
    scores = reference.estimate(query, key, **options)
    _, lse = reference.attend(query, key, value, np.ones(case.block_shape, bool), causal=True, sink=SINK)
    for h in range(4):
        taken = np.zeros(2)
        tokens = np.arange(h, 140, 8)
        np.add.at(taken, tokens // BLOCK, np.exp(SINK[h] - lse[0, h, tokens]))
        missing = np.bincount(tokens // BLOCK) - scores[0, h].sum(-1)
        if key_stride == 1:
            np.testing.assert_allclose(missing, taken, rtol=1e-12, atol=1e-12)
        else:
            assert (missing > 0).all() if np.isfinite(SINK[h]) else (np.abs(missing) < 1e-12).all()


def directional_derivative(loss, arrays, which, direction, step=1e-5):
    moved = [list(arrays), list(arrays)]
    for sign, copy in zip((1, -1), moved):
        copy[which] = copy[which] + sign * step * direction
    return (loss(*moved[0]) - loss(*moved[1])) / (2 * step)


@pytest.mark.parametrize("sink", (None, SINK))
@pytest.mark.parametrize("of_lse", (False, True))
def test_backward_agrees_with_finite_differences_in_every_coordinate(of_lse, sink):
    inputs = make_inputs(replace(SMALL, head_dim_v=16, grad_lse=of_lse))
    arrays = [x.astype(np.float64) for x in inputs.forward] + [x for x in (sink,) if x is not None]
    mask = np.ones(SMALL.block_shape, bool)

    def loss(query, key, value, sink=None):
        out, lse = reference.attend(query, key, value, mask, causal=True, sink=sink)
        return (out * inputs.grad_out).sum() + ((lse * inputs.grad_lse).sum() if of_lse else 0)

    grads = reference.backward(*arrays[:3], mask, inputs.grad_out, causal=True, sink=sink, grad_lse=inputs.grad_lse)
    assert len(grads) == len(arrays)
    for which, grad in enumerate(grads):
        numeric = np.zeros_like(grad)
        for index in np.ndindex(grad.shape):
            if np.isfinite(arrays[which][index]):  # a sink of -inf stays where it is
                direction = np.zeros_like(grad)
                direction[index] = 1
                numeric[index] = directional_derivative(loss, arrays, which, direction)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "case",
    [
        Case(150, 280, head_dim=8, num_heads=2),
        *(MASKED[i] for i in (5, 17, 34)),
        *(replace(MASKED[i], head_dim_v=24, sink=True, grad_lse=True) for i in (9, 20)),
    ],
    ids=str,
)
def test_backward_agrees_with_finite_differences_over_a_block_mask(rng, case):
    inputs = make_inputs(case)
    arrays = [x.astype(np.float64) for x in inputs.forward]
    if case.sink:
        arrays.append(inputs.sink.astype(np.float64))
    options = {"startend": inputs.startend, "causal": case.causal, "softmax_scale": 0.4}

    def loss(query, key, value, sink=None):
        out, lse = reference.attend(query, key, value, inputs.block_mask, sink=sink, **options)
        return (out * inputs.grad_out).sum() + ((lse * inputs.grad_lse).sum() if case.grad_lse else 0)

    grads = reference.backward(
        *arrays[:3],
        inputs.block_mask,
        inputs.grad_out,
        sink=arrays[3] if case.sink else None,
        grad_lse=inputs.grad_lse,
        **options,
    )
    for which, grad in enumerate(grads):
        for _ in range(3):
            direction = rng.standard_normal(grad.shape)
            numeric = directional_derivative(loss, arrays, which, direction)
            assert (grad * direction).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-6)
