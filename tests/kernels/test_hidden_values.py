"""What lies in keys and values that no query may see, such as slots of a cache that nothing was written to, is nowhere
in the results: not even a NaN or infinity."""

import numpy as np
import pytest
from cases import Case, make_inputs
from harness import assert_identical

from rrattn import reference

BAD = (np.nan, np.inf, -np.inf)
CASES = (
    Case(300, 300, num_heads=4, num_heads_k=2, head_dim=32),
    Case(130, 400, num_heads=2, num_heads_k=2, head_dim=72, stride=16),
    Case(301, 301, causal=False, num_heads=4, num_heads_k=2, head_dim=64),  # rows past the end of every tile
    Case(200, 260, causal=False, num_heads=2, num_heads_k=1, head_dim=128),
    Case(200, 260, num_heads=2, num_heads_k=1, head_dim=192, head_dim_v=96),
)


def padding(case, hidden):
    """FlashMask bounds that hide these keys, bool [Lk], from every query."""
    start = np.where(hidden, 0, case.seqlen_q)
    bounds = [start] if case.causal else [start, np.zeros_like(start)]
    return np.broadcast_to(np.stack(bounds, -1).astype(np.int32), (case.batch, 1, case.seqlen_k, len(bounds)))


def two_intervals(case, hidden):
    """The same by two intervals that meet: no single one hides the key."""
    middle = case.seqlen_q // 2
    start, end = np.where(hidden, middle, case.seqlen_q), np.full(case.seqlen_k, case.seqlen_q)
    upper_start, upper_end = np.zeros(case.seqlen_k), np.where(hidden, middle, 0)
    bounds = np.stack([start, end, upper_start, upper_end], -1).astype(np.int32)
    return np.broadcast_to(bounds, (case.batch, 1, case.seqlen_k, 4))


# Causal bounds have one interval.
every_mask = pytest.mark.parametrize(
    "case, bounds",
    [(case, padding) for case in CASES] + [(case, two_intervals) for case in CASES if not case.causal],
    ids=lambda part: getattr(part, "__name__", str(part)),
)


def hidden_keys(case):
    """Whole blocks, parts of one, and single keys: bool [Lk]. The last query still sees its own key."""
    hidden = np.zeros(case.seqlen_k, bool)
    hidden[:150] = hidden[201] = hidden[-9:-5] = True
    return hidden


def with_bad_rows(array, rows, large):
    """The array with NaN, infinities and large numbers in some elements of these rows."""
    array = array.copy()
    kinds = (*BAD, large)
    for i, row in enumerate(np.flatnonzero(rows)):
        array[:, row, :, i % 3 :: 3] = kinds[i % 4]
    return array


@every_mask
def test_what_no_query_sees_is_in_no_mean(kernels, dtype, case, bounds):
    """With compensation, which takes no mean of blocks with hidden keys, and those of others beside them."""
    hidden = hidden_keys(case)
    startend = bounds(case, hidden)
    inputs = make_inputs(case, dtype)
    mask = np.zeros(case.block_shape, bool)
    mask[..., ::2, -1] = True

    def run(key, value):
        return kernels.attend(
            inputs.query, key, value, mask, startend, causal=case.causal, dtype=dtype, compensate=True
        )

    clean = run(*(np.where(hidden[:, None, None], np.float32(0), x) for x in (inputs.key, inputs.value)))
    assert np.isfinite(clean[0]).all()
    large = 6e4 if dtype == "float16" else 3e38
    assert_identical(run(*(with_bad_rows(x, hidden, large) for x in (inputs.key, inputs.value))), clean)


@every_mask
def test_what_no_query_sees_is_nowhere(kernels, dtype, case, bounds):
    hidden = hidden_keys(case)
    startend = bounds(case, hidden)
    inputs = make_inputs(case, dtype)

    def run(key, value):
        options = {"causal": case.causal, "dtype": dtype}
        scores = kernels.estimate(inputs.query, key, startend, stride=case.stride, **options)
        mask = np.ones(case.block_shape, bool)
        forward = kernels.attend(inputs.query, key, value, mask, startend, **options)
        gradients = kernels.backward(inputs.query, key, value, mask, inputs.grad_out, startend, **options)
        return scores, forward, gradients

    def zeroed(array):
        return np.where(hidden[:, None, None], np.float32(0), array)

    clean = run(zeroed(inputs.key), zeroed(inputs.value))
    _, (out, _), (grad_query, grad_key, grad_value) = clean
    for array in (out, grad_query, grad_key, grad_value):
        assert np.isfinite(array).all()
    assert not grad_key[:, hidden].any() and not grad_value[:, hidden].any()
    key = with_bad_rows(zeroed(inputs.key), hidden, 1000)
    value = with_bad_rows(zeroed(inputs.value), hidden, 6e4 if dtype == "float16" else 3e38)
    scores, forward, gradients = run(key, zeroed(inputs.value))
    assert_close_scores(scores, key, inputs, startend, case)
    kernels.assert_same(forward[0], clean[1][0], dtype)
    kernels.assert_same(forward[1], clean[1][1], "float32")
    assert_same_gradients(gradients, clean[2])
    _, forward, gradients = run(zeroed(inputs.key), value)
    assert_identical(forward, clean[1])
    assert_same_gradients(gradients, clean[2])


def assert_close_scores(scores, key, inputs, startend, case):
    """As the oracle's, which takes what is not finite there for zero, and any number for what it is."""
    expected = reference.estimate(inputs.query, key, startend, causal=case.causal, stride=case.stride)
    assert np.array_equal(np.isnan(scores), np.isnan(expected))
    np.testing.assert_allclose(scores, expected, rtol=2e-2, atol=2e-2)


def assert_same_gradients(actual, expected):
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tensor", ("key", "value"))
@pytest.mark.parametrize("bad", BAD)
def test_what_some_query_sees_is_in_its_result_and_in_no_other_block(kernels, main_dtype, tensor, bad):
    """Packed documents, the first of which holds a bad key: its later rows show it; the second's blocks do not."""
    case = Case(500, 500, num_heads=2, num_heads_k=1, head_dim=32)
    document = 200
    start = np.where(np.arange(500) < document, document, 500).astype(np.int32)[None, None, :, None]
    inputs = make_inputs(case, main_dtype)
    options = {"causal": True, "dtype": main_dtype}
    arrays = {"key": inputs.key.copy(), "value": inputs.value.copy()}
    arrays[tensor][:, 150, :, 3] = bad
    mask = np.ones(case.block_shape, bool)
    arguments = inputs.query, arrays["key"], arrays["value"], mask
    out, _ = kernels.attend(*arguments, start, **options)
    gradients = kernels.backward(*arguments, inputs.grad_out, start, **options)
    clean_out, _ = kernels.attend(*inputs.forward, mask, start, **options)
    clean = kernels.backward(*inputs.forward, mask, inputs.grad_out, start, **options)
    if np.isnan(bad):
        assert np.isnan(out[:, 150:document]).any(axis=(1, 3)).all()
        assert np.isnan(gradients[0][:, 150:document]).any(axis=(1, 3)).all()
    own = 256  # the first query block that sees the second document alone
    assert_identical(out[:, own:], clean_out[:, own:])
    assert_identical(gradients[0][:, own:], clean[0][:, own:])


@pytest.mark.parametrize("tensor", ("key", "value"))
def test_a_bad_key_behind_the_diagonal_of_a_whole_block(kernels, main_dtype, tensor):
    """Queries that begin inside of a block of keys: none of the first 128 sees the bad key in their last key block."""
    case = Case(200, 260, num_heads=2, num_heads_k=1, head_dim=32)
    inputs, options = make_inputs(case, main_dtype), {"causal": True, "dtype": main_dtype}
    arrays = {"key": inputs.key.copy(), "value": inputs.value.copy()}
    arrays[tensor][:, 250, :, 3] = np.nan
    mask = np.ones(case.block_shape, bool)
    out, _ = kernels.attend(inputs.query, arrays["key"], arrays["value"], mask, **options)
    grad_query, *_ = kernels.backward(inputs.query, arrays["key"], arrays["value"], mask, inputs.grad_out, **options)
    assert np.isfinite(out[:, :128]).all() and np.isfinite(grad_query[:, :128]).all()
    assert np.isnan(out[:, 190:]).any(axis=(1, 3)).all() and np.isnan(grad_query[:, 190:]).any(axis=(1, 3)).all()


def test_a_result_is_as_large_as_float32_lets_it_be(kernels, main_dtype):
    """Values near the end of float32: sums may overflow to infinity, as in dense attention, but to no other number."""
    case = Case(64, 64, num_heads=1, num_heads_k=1, head_dim=8, causal=False)
    value = np.full((1, 64, 1, 8), 3e38, np.float32)
    query = key = np.zeros((1, 64, 1, 8), np.float32)
    out, _ = kernels.attend(query, key, value, np.ones(case.block_shape, bool), causal=False, dtype=main_dtype)
    assert (np.isinf(out) | (np.abs(out / 3e38 - 1) < 1e-2)).all()
