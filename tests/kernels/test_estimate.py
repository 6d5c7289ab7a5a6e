"""Stage 1 against the oracle: block scores."""

from dataclasses import replace

import numpy as np
import pytest
from cases import ESTIMATE_CASES, FEW_CASES, KEY_STRIDES, STRIDES, Case, make_inputs
from harness import LAYOUTS, assert_as_good_as_naive, assert_identical, assert_same_in_two_threads

from rrattn import reference

pytestmark = pytest.mark.one_table
BLOCK = reference.BLOCK


def run(kernels, case, dtype="float32", inputs=None, **options):
    inputs = inputs or make_inputs(case, dtype)
    options = {"causal": case.causal, "stride": case.stride, **options}
    return kernels.estimate(inputs.query, inputs.key, inputs.startend, sink=inputs.sink, dtype=dtype, **options)


def check(kernels, case, dtype="float32", inputs=None, **options):
    """Scores of the kernel, found as good as those of the naive way."""
    inputs = inputs or make_inputs(case, dtype)
    scores = run(kernels, case, dtype, inputs, **options)
    assert scores.shape == case.block_shape and scores.dtype == np.float32
    options = {"causal": case.causal, "stride": case.stride, "sink": inputs.sink, **options}
    oracle, naive = kernels.estimate_reference(inputs.query, inputs.key, inputs.startend, dtype=dtype, **options)
    assert_as_good_as_naive(scores, oracle, naive)
    return scores


@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_scores(kernels, case, dtype):
    scores = check(kernels, case, dtype)
    hidden, _ = reference.block_geometry(make_inputs(case, dtype).startend, **case.geometry)
    assert (scores[hidden] == 0).all()
    assert (scores >= 0).all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_simd_level(kernels, simd, case, dtype):
    check(kernels, case, dtype, key_stride=16, spread=1)


@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_spread(kernels, main_dtype, case):
    scores = check(kernels, case, main_dtype, spread=1)
    if case in FEW_CASES or case.seqlen_k > 500:
        assert np.abs(scores - run(kernels, case, main_dtype, spread=0)).max() > 1e-3


@pytest.mark.parametrize("spread", (0, 0.7))
@pytest.mark.parametrize("key_stride", KEY_STRIDES)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("case", (*FEW_CASES, Case(600, 1500)), ids=str)
def test_key_stride(kernels, main_dtype, case, stride, key_stride, spread):
    check(kernels, replace(case, stride=stride), main_dtype, key_stride=key_stride, spread=spread)


@pytest.mark.parametrize("stride", STRIDES)
def test_the_default_key_stride_is_the_stride(kernels, main_dtype, stride):
    case = Case(300, 400, stride=stride)
    assert_identical(run(kernels, case, main_dtype), run(kernels, case, main_dtype, key_stride=stride))


@pytest.mark.parametrize("key_stride", KEY_STRIDES)
def test_spread_of_keys_far_from_zero(kernels, main_dtype, key_stride):
    """Keys of a mean far larger than their spread, which a variance from the mean of squares would lose."""
    case = Case(300, 1000)
    inputs = make_inputs(case, main_dtype)
    key = reference.cast(1000 + inputs.key / 4 if main_dtype == "float32" else 16 + inputs.key, main_dtype)
    inputs = replace(inputs, query=inputs.query - inputs.query.mean(-1, keepdims=True), key=key)
    inputs = replace(inputs, query=reference.cast(inputs.query, main_dtype))
    check(kernels, case, main_dtype, inputs, key_stride=key_stride, spread=4)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("head_offset", (1, 7, 133, 2**63 - 1))
def test_head_offset(kernels, main_dtype, stride, head_offset):
    case = Case(129, 300, num_heads=3, stride=stride)
    scores = check(kernels, case, main_dtype, head_offset=head_offset)
    assert_identical(scores, run(kernels, case, main_dtype, head_offset=head_offset % stride))


@pytest.mark.parametrize("softmax_scale", (-0.3, 0.0, 0.01, 1.0, 20.0))
def test_softmax_scale(kernels, main_dtype, softmax_scale):
    check(kernels, FEW_CASES[0], main_dtype, softmax_scale=softmax_scale, spread=0)
    if abs(softmax_scale) < 1:
        check(kernels, FEW_CASES[0], main_dtype, softmax_scale=softmax_scale, spread=1)


@pytest.mark.parametrize("causal", (True, False))
def test_large_logits_stay_finite(kernels, main_dtype, causal):
    """Logits of thousands: one stride takes nearly all of each row, and no exponential overflows."""
    case = Case(300, 300, causal, stride=4)
    scores = check(kernels, case, main_dtype, make_inputs(case, main_dtype, query_scale=2000.0))
    np.testing.assert_allclose(scores.sum(-1)[:, :, :2], BLOCK // 4, rtol=1e-5)


@pytest.mark.parametrize("flashmask", ("no_row_after", "no_row_between"))
def test_a_sampled_token_that_sees_nothing_adds_nothing(kernels, main_dtype, flashmask):
    case = Case(384, 384, num_heads=1, stride=2, flashmask=flashmask)
    inputs = make_inputs(case, main_dtype)
    seeing = reference.token_mask(inputs.startend, **case.geometry)[0, 0, ::2].any(-1)  # head 0 samples even tokens
    expected = seeing.reshape(3, BLOCK // 2).sum(-1)
    assert expected.tolist() == ([64, 64, 0] if flashmask == "no_row_after" else [64, 0, 64])
    np.testing.assert_allclose(run(kernels, case, main_dtype)[0, 0].sum(-1), expected, rtol=1e-5)


def test_nan_stays_in_its_rows(kernels, main_dtype):
    """A NaN in a sampled query makes its block's visible scores NaN, and no other."""
    case = Case(384, 384, num_heads=2, num_heads_k=2, stride=8)
    inputs = make_inputs(case, main_dtype)
    clean = run(kernels, case, main_dtype)
    query = inputs.query.copy()
    query[0, 136, 0, 5] = np.nan  # head 0 samples multiples of 8, head 1 does not
    query[0, 264, 1, 5] = np.nan
    scores = kernels.estimate(query, inputs.key, dtype=main_dtype, causal=True, stride=8)
    assert np.isnan(scores[0, 0, 1, :2]).all()
    scores[0, 0, 1] = clean[0, 0, 1]
    assert_identical(scores, clean)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, case, layout, dtype):
    assert_identical(run(make_kernels(layout), case, dtype), run(kernels, case, dtype))


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_thread_count_and_repetition_change_nothing(kernels, make_kernels, case):
    expected = run(kernels, case)
    for num_threads in (1, 2, 3, 7):
        assert_identical(run(make_kernels(num_threads=num_threads), case), expected)
    assert_identical(run(kernels, case), expected)


def test_two_threads_at_once(kernels):
    assert_same_in_two_threads(
        *(
            lambda case=case, dtype=dtype: run(kernels, case, dtype)
            for case in FEW_CASES[1:]
            for dtype in kernels.dtypes
        )
    )


@pytest.mark.parametrize("case", (Case(0, 0), Case(0, 200), Case(200, 0, causal=False), Case(5, 5, batch=0)), ids=str)
def test_sizes_of_zero_give_empty_scores(kernels, main_dtype, case):
    assert run(kernels, case, main_dtype).size == 0
