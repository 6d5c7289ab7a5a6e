"""Attention in eight bits against the oracle's own eight-bit semantics, and these against exact attention.

Hopper's kernels have it for head sizes up to 128: `test_support.py` sees that all others refuse.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import ATTENTION_CASES, FEW_CASES, Case, make_inputs
from harness import LAYOUTS, assert_all_given_are, assert_as_good_as_naive, assert_identical
from test_hidden_values import every_mask, hidden_keys, with_bad_rows

from rrattn import direct, reference

pytestmark = pytest.mark.one_path
BLOCK = reference.BLOCK
QUANTIZATION = "qk_int8_pv_fp8"
LARGEST_HEAD_SIZE_ON_GPU = 128


@pytest.fixture(autouse=True)
def eight_bits_are_here(platform, request):
    if platform == "cpu":
        return
    if direct.gpu_kernels() != "hopper":
        pytest.skip("Hopper's kernels alone have eight bits")
    case = request.node.callspec.params.get("case")
    if case is not None and max(case.head_dim, case.head_dim_v or 0) > LARGEST_HEAD_SIZE_ON_GPU:
        pytest.skip("refused on a GPU")


def run(kernels, case, dtype="bfloat16", inputs=None, **options):
    inputs = inputs or make_inputs(case, dtype)
    options = {"sink": inputs.sink, "causal": case.causal, "quantization": QUANTIZATION, **options}
    return kernels.attend(*inputs.forward, inputs.block_mask, inputs.startend, dtype=dtype, **options)


def oracle_of(case, inputs, **options):
    arguments = *inputs.forward, inputs.block_mask, inputs.startend
    return reference.quantized_attend(*arguments, causal=case.causal, sink=inputs.sink, **options)


def check(kernels, case, dtype="bfloat16", inputs=None, **options):
    """(out, lse) of the kernel, found within twice what it costs to round the oracle's to bfloat16.

    Where float32 rounds a score or a probability to the other neighbour, lse shows it. Rows in which that counts are
    few, and left out. They are more on a GPU, whose tensor cores cut small probabilities that they add to a large one.
    """
    inputs = inputs or make_inputs(case, dtype)
    results = run(kernels, case, dtype, inputs, **options)
    out, lse = oracle_of(case, inputs, **options)
    seen = np.isfinite(lse)
    assert np.array_equal(np.isneginf(results[1]), ~seen)
    error = np.abs(np.where(seen, results[1], 0) - np.where(seen, lse, 0))  # [B, Hq, Lq]
    assert error.max(initial=0) < 0.07  # two neighbours of e4m3 are this far from each other
    assert reference.rms(error[seen]) <= 1e-3 * max(1, np.abs(lse[seen]).max(initial=0) / 100)
    same = np.swapaxes(error < 1e-3, 1, 2)
    assert (~same).sum() <= max(2, (0.01 if "float32" in kernels.dtypes else 0.05) * same.size)
    assert_as_good_as_naive(results[0][same], out[same], reference.cast(out, "bfloat16")[same])
    return results


# The oracle's own meaning


def test_e4m3_has_the_numbers_of_the_format():
    """All 127 that are not negative, of sign 0, exponent and mantissa; halfway between two the even one is taken."""
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    numbers = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    assert numbers[-1] == 448
    assert np.array_equal(reference.to_e4m3(numbers), numbers)
    assert np.array_equal(reference.to_e4m3(-numbers), -numbers)
    middle = (numbers[1:] + numbers[:-1]) / 2
    assert np.array_equal(reference.to_e4m3(middle), np.where(bits[:-1] % 2, numbers[1:], numbers[:-1]))
    assert np.array_equal(reference.to_e4m3(np.nextafter(middle, 0)), numbers[:-1])


@pytest.mark.parametrize("factor", (1.0, 0.127, -30.0, 1e-30, 0.0))
def test_int8_scales_are_bfloat16(factor):
    """And just large enough: numbers use at least 126 of 127, and are the elements to half a unit."""
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    x *= np.float32(2.0) ** np.arange(-90, 38, 2, dtype=np.float32)[:, None]
    numbers, scale = reference.to_int8(x, np.abs(x).max(-1), np.float32(factor))
    assert np.array_equal(scale, reference.cast(scale, "bfloat16"))
    if factor == 0:
        assert not numbers.any() and not scale.any()
        return
    largest, normal = np.abs(numbers).max(-1), np.abs(scale) >= 2.0**-126
    assert (largest <= 127).all() and (largest[normal] >= 126).all() and normal.sum() > 10
    error = np.abs(x.astype(np.float64) * np.float32(factor) - numbers * scale[:, None])
    assert (error <= 0.5001 * np.abs(scale)[:, None])[normal].all()


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_the_oracle_is_near_exact_attention(case):
    """Of inputs whose scores are about as wide as a model's."""
    inputs = make_inputs(case, query_scale=0.5)
    out, lse = oracle_of(case, inputs)
    exact = reference.attend(*inputs.forward, inputs.block_mask, inputs.startend, causal=case.causal, sink=inputs.sink)
    assert reference.rms(out - exact[0]) < 0.05 * reference.rms(exact[0])
    seen = np.isfinite(exact[1])
    assert np.array_equal(seen, np.isfinite(lse)) and np.abs(lse[seen] - exact[1][seen]).max() < 0.08


def test_the_mean_key_changes_no_score(kernels, main_dtype):
    """Keys far from zero all the same way: INT8 numbers of these would be alike."""
    case = Case(300, 700, num_heads=4, num_heads_k=2, sink=True)
    inputs = make_inputs(case, main_dtype, query_scale=0.5)
    key = reference.cast(inputs.key + np.float32(30) * np.sign(inputs.key[:, :1]), main_dtype)
    shifted = replace(inputs, key=key)
    out, lse = check(kernels, case, main_dtype, shifted)
    exact = reference.attend(*shifted.forward, inputs.block_mask, causal=True, sink=inputs.sink)
    assert reference.rms(out - exact[0]) < 0.05 * reference.rms(exact[0])
    assert np.abs(lse - exact[1]).max() < 0.08


@pytest.mark.parametrize("head_dim", (64, 72, 128))
def test_one_element_far_above_the_others_costs_little(kernels, main_dtype, head_dim):
    """Of keys, as models have them: INT8 numbers of the others would have few bits. Ten times the error unturned."""
    case = Case(300, 700, num_heads=4, num_heads_k=2, head_dim=head_dim)
    inputs = make_inputs(case, main_dtype, query_scale=0.5)
    query, key = inputs.query.copy(), inputs.key.copy()
    key[..., 5] *= 32
    query[..., 5] /= 32
    out, _ = check(kernels, case, main_dtype, replace(inputs, query=query, key=key))
    exact, _ = reference.attend(query, key, inputs.value, inputs.block_mask, causal=True)
    assert reference.rms(out - exact) < 0.07 * reference.rms(exact)


# Kernels


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_out_and_lse(kernels, case):
    check(kernels, case)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_dtype(kernels, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_simd_level(kernels, simd, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("softmax_scale", (0.01, 1.0, -0.1, 0.0, 1e-35))
def test_softmax_scale(kernels, softmax_scale):
    check(kernels, FEW_CASES[0], softmax_scale=softmax_scale)


@pytest.mark.parametrize("query_scale", (300.0, 1e-3))
def test_large_and_small_logits(kernels, query_scale):
    case = Case(300, 300)
    inputs = make_inputs(case, "bfloat16", query_scale=query_scale)
    out, _ = run(kernels, case, "bfloat16", inputs)
    oracle = oracle_of(case, inputs)[0]
    assert reference.rms(out - oracle) < 2.0**-8 * reference.rms(oracle)


@pytest.mark.parametrize("rise", (-120, -5, -1, 30, 120))
def test_scores_far_above_those_before(kernels, rise):
    """Bases rise and fall from block to block: what is summed up so far is rescaled by powers of two."""
    case = Case(400, 1100, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, "bfloat16", query_scale=0.5)
    query, key = inputs.query.copy(), inputs.key.copy()
    query[..., 0] = 16
    key[..., 0] = (rise / 2 * (np.arange(1100) // BLOCK))[:, None]
    check(kernels, case, "bfloat16", replace(inputs, query=query, key=reference.cast(key, "bfloat16")))


@pytest.mark.parametrize("scale", (0.0, 1e-36, 1e-20, 1e20))
def test_zeros_and_extreme_magnitudes(kernels, scale, main_dtype):
    """Scales neither divide by zero nor overflow."""
    case = FEW_CASES[0]
    inputs = make_inputs(case, main_dtype)
    query, key, value = (x.copy() for x in inputs.forward)
    query[:, ::3] *= np.float32(scale)
    value[..., ::2] *= np.float32(scale)
    key[:, :BLOCK] = 0  # a block of zeros, and no mean
    given = replace(inputs, query=reference.cast(query, main_dtype), key=key, value=reference.cast(value, main_dtype))
    out, lse = run(kernels, case, main_dtype, given)
    oracle = oracle_of(case, given)
    seen = np.isfinite(oracle[1])
    for half in (slice(0, None, 2), slice(1, None, 2)):
        largest = np.abs(oracle[0][..., half]).max()
        np.testing.assert_allclose(out[..., half], oracle[0][..., half], rtol=2.0**-6, atol=1e-3 * largest)
    np.testing.assert_allclose(lse[seen], oracle[1][seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, case, layout):
    assert_identical(run(make_kernels(layout), case), run(kernels, case))


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_thread_count_changes_nothing(kernels, make_kernels, case):
    assert_identical(run(make_kernels(num_threads=3), case), run(kernels, case))


@pytest.mark.cpu_only
def test_out_may_be_the_query(kernels):
    case = FEW_CASES[0]
    query, key, value = (kernels.input(x, "float32") for x in make_inputs(case).forward)
    lse = np.empty((case.batch, case.num_heads, case.seqlen_q), np.float32)
    mask = reference.pack(make_inputs(case).block_mask)
    direct.block_sparse_attention(query, key, value, mask, out=query, lse=lse, causal=True, quantization=QUANTIZATION)
    assert_identical((query, lse), run(kernels, case, "float32"))


def test_sizes_of_zero(kernels):
    for case in (Case(0, 0), Case(0, 200), Case(5, 5, batch=0)):
        out, lse = run(kernels, case)
        assert out.size == lse.size == 0
    out, lse = run(kernels, Case(200, 0, causal=False))
    assert out.size and not out.any() and np.isneginf(lse).all()


def test_nothing_selected(kernels):
    case = FEW_CASES[0]
    out, lse = run(kernels, case, inputs=make_inputs(case, "bfloat16", density=-1.0))
    assert not out.any() and np.isneginf(lse).all()


# What no row sees, and what is not finite


@every_mask
def test_what_no_query_sees_is_nowhere(kernels, case, bounds):
    """Nor in the mean key, whose block it may be in, nor in any scale."""
    hidden = hidden_keys(case)
    inputs = replace(make_inputs(case, "bfloat16", density=1.1), startend=bounds(case, hidden))
    key, value = (np.where(hidden[:, None, None], np.float32(0), x) for x in (inputs.key, inputs.value))
    clean = check(kernels, case, "bfloat16", replace(inputs, key=key, value=value))
    assert np.isfinite(clean[0]).all()
    bad = (with_bad_rows(x, hidden, 3e38) for x in (key, value))
    assert_identical(run(kernels, case, "bfloat16", replace(inputs, **dict(zip(("key", "value"), bad)))), clean)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("which", ("key", "value"))
def test_what_is_not_finite_shows_where_it_is_seen(kernels, which, bad):
    """In each row that sees it, and in those of its block of queries, but in no block before; lse stays finite."""
    case = Case(400, 400, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, "bfloat16", density=1.1)
    clean = run(kernels, case, "bfloat16", inputs)
    array = getattr(inputs, which).copy()
    array[0, 200, 0, 3] = bad
    out, lse = run(kernels, case, "bfloat16", replace(inputs, **{which: array}))
    columns = slice(None) if which == "key" else slice(3, 4)
    assert np.isnan(out[0, 200:, :2, columns]).all()
    assert np.isnan(oracle_of(case, replace(inputs, **{which: array}))[0][0, 200:, :2, columns]).all()
    assert_identical(out[:, :128], clean[0][:, :128])
    assert_identical((out[:, :, 2:], lse[:, 2:]), (clean[0][:, :, 2:], clean[1][:, 2:]))
    assert np.isfinite(lse).all()
    if which == "value":
        assert_identical(np.delete(out, 3, -1), np.delete(clean[0], 3, -1))


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_query_that_is_not_finite_stays_in_its_row(kernels, bad):
    case = FEW_CASES[4]
    inputs = make_inputs(case, "bfloat16", density=1.1)
    clean = run(kernels, case, "bfloat16", inputs)
    query = inputs.query.copy()
    query[0, 5, 0, 0] = bad
    out, lse = run(kernels, case, "bfloat16", replace(inputs, query=query))
    assert np.isnan(out[0, 5, 0]).all() and np.isnan(lse[0, 0, 5])
    out[0, 5, 0], lse[0, 0, 5] = clean[0][0, 5, 0], clean[1][0, 0, 5]
    assert_identical((out, lse), clean)


def test_unselected_blocks_are_not_attended(kernels):
    """A NaN there leaves no trace, but a large value does: it is in the range of its column's e4m3 numbers."""
    case = Case(300, 600, num_heads=4, num_heads_k=2, causal=False)
    inputs = make_inputs(case, "bfloat16")
    inputs.block_mask[:, :2, :, 3] = False
    poisoned = [x.copy() for x in inputs.forward[1:]]
    for x in poisoned:
        x[:, 384:512, 0] = np.nan
    same = replace(inputs, key=poisoned[0], value=poisoned[1])
    assert_identical(run(kernels, case, "bfloat16", same), run(kernels, case, "bfloat16", inputs))


# With the other stages


@pytest.mark.parametrize("chunk", (128, 384))
def test_prefill_in_chunks_is_one_prefill(kernels, chunk):
    """Of the same bits, as long as no chunk's values need another power of two: the mean key is of the first block."""
    case = Case(1000, 1256, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, "bfloat16", density=1.1)
    value = inputs.value.copy()
    value[:, 0] = np.abs(value).max(axis=1)
    inputs = replace(inputs, value=value)
    out, lse = run(kernels, case, "bfloat16", inputs)
    for first in range(0, case.seqlen_q, chunk):
        rows, keys = slice(first, min(first + chunk, case.seqlen_q)), slice(0, min(first + chunk, case.seqlen_q) + 256)
        part = Case(rows.stop - rows.start, keys.stop, num_heads=4, num_heads_k=2)
        given = replace(
            inputs,
            query=inputs.query[:, rows],
            key=inputs.key[:, keys],
            value=value[:, keys],
            block_mask=np.ones(part.block_shape, bool),
        )
        results = run(kernels, part, "bfloat16", given)
        assert_identical(results, (np.ascontiguousarray(out[:, rows]), np.ascontiguousarray(lse[:, :, rows])))


def test_all_stages_select_as_without(kernels):
    case = Case(1000, 1256, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, "bfloat16")
    options = {"causal": True, "threshold": 0.4, "dtype": "bfloat16"}
    plain = kernels.rr_attention(*inputs.forward, **options)
    scores, mask, out, lse = kernels.rr_attention(*inputs.forward, quantization=QUANTIZATION, **options)
    assert_all_given_are(plain[:2], (scores, mask))
    assert_identical((out, lse), run(kernels, case, "bfloat16", replace(inputs, block_mask=mask)))
    assert (out != plain[2]).any()


@pytest.mark.parametrize("function", (direct.rr_attention, direct.block_sparse_attention))
def test_what_cannot_be_is_refused(kernels, function):
    case = FEW_CASES[0]
    call = kernels.rr_attention if function is direct.rr_attention else kernels.attend
    inputs = make_inputs(case)
    arguments = inputs.forward if function is direct.rr_attention else (*inputs.forward, inputs.block_mask)
    options = {"threshold": 0.5} if function is direct.rr_attention else {}
    for given, message in (
        ({"quantization": "int4"}, "quantization is 'int4', but must be None or 'qk_int8_pv_fp8'"),
        ({"quantization": True}, "quantization is True, but must be None or"),
        ({"quantization": QUANTIZATION, "compensate": True}, "quantization is .*qk_int8_pv_fp8.*compensate=False"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments, causal=True, **options, **given)
