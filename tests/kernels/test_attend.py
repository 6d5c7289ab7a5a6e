"""Stage 3 against the oracle: attention over the selected blocks, and its log-sum-exp."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from cases import ATTENTION_CASES, FEW_CASES, Case, make_inputs
from harness import LAYOUTS, assert_as_good_as_naive, assert_identical, assert_same_in_two_threads

from rrattn import reference


def run(kernels, case, dtype="float32", inputs=None, **options):
    inputs = inputs or make_inputs(case, dtype)
    return kernels.attend(
        *inputs.forward,
        inputs.block_mask,
        inputs.startend,
        sink=inputs.sink,
        dtype=dtype,
        causal=case.causal,
        **options,
    )


def check(kernels, case, dtype="float32", inputs=None, **options):
    """(out, lse) of the kernel, found as good as the naive implementation's in the same dtype."""
    inputs = inputs or make_inputs(case, dtype)
    results = run(kernels, case, dtype, inputs, **options)
    arguments = *inputs.forward, inputs.block_mask, inputs.startend
    options = {"causal": case.causal, "sink": inputs.sink, **options}
    oracle = reference.attend(*arguments, **options)
    naive = reference.attend(*arguments, dtype=dtype, **options)
    for actual, exact, same_dtype in zip(results, oracle, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)
    seen = np.isfinite(oracle[1])
    largest = np.abs(oracle[1][seen]).max(initial=1)
    np.testing.assert_allclose(results[1][seen], oracle[1][seen], rtol=0, atol=2e-6 * largest)  # always float32
    return results


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_out_and_lse(kernels, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_simd_level(kernels, simd, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("softmax_scale", (0.01, 1.0, -0.1, 0.0, 1e-35))
def test_softmax_scale(kernels, main_dtype, softmax_scale):
    check(kernels, FEW_CASES[0], main_dtype, softmax_scale=softmax_scale)


@pytest.mark.parametrize("density", (0.0, 0.1, 1.0))
def test_densities(kernels, main_dtype, density):
    case = Case(500, 900, num_heads=4, num_heads_k=2, head_dim=32)
    check(kernels, case, main_dtype, make_inputs(case, main_dtype, density=density))


def test_one_block_a_row(kernels, main_dtype, rng):
    """Also where that block is above the diagonal or ends the keys."""
    case = Case(700, 1000, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, main_dtype)
    chosen = rng.integers(0, case.block_shape[-1], case.block_shape[:3])
    block_mask = np.arange(case.block_shape[-1]) == chosen[..., None]
    out, lse = check(kernels, case, main_dtype, replace(inputs, block_mask=block_mask))
    assert np.isneginf(lse).any() and np.isfinite(lse).any()


def test_identical_keys(kernels, dtype):
    """All logits of a row are the same: every visible value counts alike."""
    case = Case(300, 700)
    inputs = make_inputs(case, dtype)
    check(kernels, case, dtype, replace(inputs, key=np.repeat(inputs.key[:, :1], 700, axis=1)))


@pytest.mark.parametrize("causal", (True, False))
def test_large_logits(kernels, dtype, causal):
    """Logits of some thousands: float32 keeps them apart, and no exponential overflows."""
    case = Case(300, 300, causal)
    check(kernels, case, dtype, make_inputs(case, dtype, query_scale=300.0))


def test_scores_beyond_the_range_of_float16(kernels):
    case = Case(130, 130, head_dim=256)
    inputs = make_inputs(case, "float16", query_scale=8000.0)
    out, lse = run(kernels, case, "float16", inputs)
    exact = reference.attend(*inputs.forward, inputs.block_mask, causal=True)
    seen = np.isfinite(exact[1])
    assert np.abs(exact[1][seen] * 16).max() > np.finfo(np.float16).max  # 16: what the scale divides by
    np.testing.assert_allclose(out, exact[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(lse, exact[1], rtol=4e-6)


@pytest.mark.parametrize("rise", (-120, -9, 9, 30, 120))
@pytest.mark.parametrize("flashmask", (None, "document"))
def test_scores_far_above_those_before(kernels, dtype, rise, flashmask):
    """Every block's scores are `rise` above the last one's, in units of the softmax: whichever way a kernel goes
    through the blocks, and whichever base its exponentials have, one day they outgrow it."""
    case = Case(400, 1100, num_heads=4, num_heads_k=2, head_dim=64, flashmask=flashmask)
    inputs = make_inputs(case, dtype, query_scale=0.5)
    query, key = inputs.query.copy(), inputs.key.copy()
    query[..., 0] = 16  # the scores' common part: 16 * key / sqrt(64)
    key[..., 0] = (rise / 2 * (np.arange(1100) // reference.BLOCK))[:, None]
    exact = [reference.cast(x, dtype).astype(np.float32) for x in (query, key)]
    check(kernels, case, dtype, replace(inputs, query=exact[0], key=exact[1]))


def test_nan_stays_in_its_row(kernels, main_dtype):
    case = FEW_CASES[0]
    inputs = make_inputs(case, main_dtype)
    query = inputs.query.copy()
    query[0, 5, 0] = np.nan
    out, lse = run(kernels, case, main_dtype, replace(inputs, query=query))
    clean = run(kernels, case, main_dtype)
    assert np.isfinite(clean[1][0, 0, 5])
    assert np.isnan(out[0, 5, 0]).all() and np.isnan(lse[0, 0, 5])
    out[0, 5, 0], lse[0, 0, 5] = clean[0][0, 5, 0], clean[1][0, 0, 5]
    np.testing.assert_allclose(out, clean[0], rtol=2.0**-6, atol=1e-2)
    np.testing.assert_allclose(lse, clean[1], rtol=2e-6, atol=2e-6)
    assert_identical((out[0, :, 1:], lse[0, 1:]), (clean[0][0, :, 1:], clean[1][0, 1:]))


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if str(c.flashmask).startswith("no_")], ids=str)
def test_rows_that_see_nothing_are_zero(kernels, main_dtype, case):
    """And their log-sum-exp is the sink, where there is one."""
    inputs = make_inputs(case, main_dtype)
    seeing = reference.selected_tokens(*inputs.forward[:2], inputs.block_mask, inputs.startend, case.causal).any(-1)
    assert not seeing.all()
    out, lse = run(kernels, case, main_dtype)
    nothing = np.full(case.num_heads, -np.inf, np.float32) if inputs.sink is None else inputs.sink
    assert np.array_equal(lse == nothing[:, None], ~seeing)
    assert not out.swapaxes(1, 2)[~seeing].any()
    assert np.isfinite(out).all()


def test_nothing_selected(kernels, main_dtype):
    case = FEW_CASES[0]
    out, lse = run(kernels, case, main_dtype, make_inputs(case, main_dtype, density=-1.0))
    assert not out.any() and np.isneginf(lse).all()


def test_unselected_blocks_are_not_read(kernels, main_dtype):
    """NaN in keys and values that no query block selects leaves no trace."""
    case = Case(300, 600, num_heads=4, num_heads_k=2, causal=False)
    inputs = make_inputs(case, main_dtype)
    block_mask = inputs.block_mask.copy()
    block_mask[:, :2, :, 3] = False
    _, key, value = (x.copy() for x in inputs.forward)
    key[:, 384:512, 0], value[:, 384:512, 0] = np.nan, np.nan
    poisoned = kernels.attend(inputs.query, key, value, block_mask, causal=False, dtype=main_dtype)
    clean = kernels.attend(*inputs.forward, block_mask, causal=False, dtype=main_dtype)
    assert_identical(poisoned, clean)


@pytest.mark.parametrize(
    "case",
    (
        Case(400, 700),
        Case(700, 700, flashmask="document", num_heads=4, num_heads_k=2),
        Case(700, 700, causal=False, flashmask="full_sliding_window"),
    ),
    ids=str,
)
def test_bits_of_hidden_blocks_are_harmless(kernels, main_dtype, case):
    """Nor do bits beyond the last block."""
    inputs = make_inputs(case, main_dtype)
    hidden, _ = reference.block_geometry(inputs.startend, **case.geometry)
    assert hidden.any()

    def attend(mask):
        return kernels.attend(*inputs.forward, mask, inputs.startend, causal=case.causal, dtype=main_dtype)

    clean = attend(inputs.block_mask & ~hidden)
    assert_identical(attend(inputs.block_mask | hidden), clean)
    beyond = np.int32(-1 << case.block_shape[-1])
    assert_identical(attend(reference.pack(inputs.block_mask | hidden) | beyond), clean)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, case, layout, dtype):
    assert_identical(run(make_kernels(layout), case, dtype), run(kernels, case, dtype))


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_thread_count_and_repetition_change_nothing(kernels, make_kernels, case):
    expected = run(kernels, case)
    for again in (kernels, *(make_kernels(num_threads=n) for n in (1, 2, 3, 7))):
        assert_identical(run(again, case), expected)


def test_two_threads_at_once(kernels):
    assert_same_in_two_threads(
        *(
            lambda case=case, dtype=dtype: run(kernels, case, dtype)
            for case in FEW_CASES[1:]
            for dtype in kernels.dtypes
        )
    )


@pytest.mark.cpu_only
def test_other_python_threads_run_meanwhile(make_kernels):
    """A call holds the interpreter lock for less than its whole length."""
    case = Case(2048, 2048, causal=False, num_heads=4)
    inputs = make_inputs(case, density=1.0)
    one_thread = make_kernels(num_threads=1)
    call = threading.Thread(target=run, args=(one_thread, case, "float32", inputs))
    call.start()
    turns = 0
    while call.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


def test_sizes_of_zero(kernels, main_dtype):
    for case in (Case(0, 0), Case(0, 200), Case(5, 5, batch=0)):
        out, lse = run(kernels, case, main_dtype)
        assert out.shape == make_inputs(case).query.shape and out.size == lse.size == 0
    out, lse = run(kernels, Case(200, 0, causal=False), main_dtype)
    assert out.size and not out.any() and np.isneginf(lse).all()
