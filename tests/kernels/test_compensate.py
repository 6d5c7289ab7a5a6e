"""Compensated attention against the oracle: means stand in for blocks that are wholly visible but not selected."""

from dataclasses import replace

import numpy as np
import pytest
from cases import ATTENTION_CASES, FEW_CASES, Case, make_inputs
from harness import LAYOUTS, assert_as_good_as_naive, assert_identical, assert_same_in_two_threads

from rrattn import reference

BLOCK = reference.BLOCK
# More key blocks than a tile has means: 64 at a head size of 256 on a GPU, else 128.
LONG_CASES = [
    Case(130, 17000, num_heads=4, num_heads_k=2, head_dim=32),
    Case(20, 33000),
    Case(1, 16500, num_heads=1, head_dim=8),
    Case(100, 16500, causal=False, batch=2, head_dim=128),
    Case(130, 17000, num_heads=4, num_heads_k=2, head_dim=80),
    Case(130, 17000, causal=False, head_dim=96),
    Case(130, 8500, head_dim=256),
    Case(130, 17000, flashmask="share_question"),
]


def run(kernels, case, dtype="float32", inputs=None, compensate=True, **options):
    inputs = inputs or make_inputs(case, dtype)
    return kernels.attend(
        *inputs.forward,
        inputs.block_mask,
        inputs.startend,
        sink=inputs.sink,
        dtype=dtype,
        causal=case.causal,
        compensate=compensate,
        **options,
    )


def check(kernels, case, dtype="float32", inputs=None, **options):
    """(out, lse) of the kernel, found as good as the naive implementation's in the same dtype."""
    inputs = inputs or make_inputs(case, dtype)
    results = run(kernels, case, dtype, inputs, **options)
    arguments = *inputs.forward, inputs.block_mask, inputs.startend
    options = {"causal": case.causal, "compensate": True, "sink": inputs.sink, **options}
    oracle = reference.attend(*arguments, **options)
    naive = reference.attend(*arguments, **options, dtype=dtype)
    for actual, exact, same_dtype in zip(results, oracle, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)
    # But for the rounding of the means, lse is always float32's. float32 sums may round a mean the other way.
    mean_dtype = kernels.mean_dtype(dtype)
    exact = oracle[1] if mean_dtype is None else reference.attend(*arguments, **options, mean_dtype=mean_dtype)[1]
    seen = np.isfinite(exact)
    tolerance = (2e-6 if mean_dtype is None else 1e-4) * np.abs(exact[seen]).max(initial=1)
    np.testing.assert_allclose(results[1][seen], exact[seen], rtol=0, atol=tolerance)
    return results


def stood_in_for(case, inputs):
    """bool [B, Hq, Mq, Mk]: the blocks whose means count."""
    return reference.stood_in_for(
        inputs.block_mask, inputs.startend, causal=case.causal, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k
    )


# The oracle's own meaning


def test_blocks_that_the_oracle_lets_means_stand_in_for():
    """Queries 1000 to 1256: of the first block under its diagonal lie blocks 0 to 6, of the other 0 to 7."""
    nothing = np.zeros((1, 1, 2, 10), bool)
    lengths = {"seqlen_q": 256, "seqlen_k": 1256}
    stands_in = reference.stood_in_for(nothing, None, causal=True, **lengths)
    assert stands_in[0, 0].sum(-1).tolist() == [7, 8] and stands_in[0, 0, :, :7].all()
    assert reference.stood_in_for(nothing, None, causal=False, **lengths).all()
    some = nothing.copy()
    some[..., 3] = True
    # Keys 640 to 767 are hidden from row 100 on: cut for the first block, out of sight of the second. Keys 256 to 383
    # are hidden from row 200 on.
    start = np.full(1256, 1000, np.int32)
    start[640:768], start[256:384] = 100, 200
    stands_in = reference.stood_in_for(some, start[None, None, :, None], causal=True, **lengths)
    assert np.flatnonzero(stands_in[0, 0, 0]).tolist() == [0, 1, 2, 4, 6]
    assert np.flatnonzero(stands_in[0, 0, 1]).tolist() == [0, 1, 4, 6, 7]


def test_the_oracle_counts_a_mean_as_often_as_its_block_has_keys():
    query = np.ones((1, 1, 1, 8))
    key = np.zeros((1, 200, 1, 8))
    value = np.repeat(np.array([1.0, 5.0]), [128, 72])[None, :, None, None] * np.ones(8)
    nothing = np.zeros((1, 1, 1, 2), bool)
    out, lse = reference.attend(query, key, value, nothing, causal=False, compensate=True)
    np.testing.assert_allclose(out, (128 * 1 + 72 * 5) / 200)
    np.testing.assert_allclose(lse, np.log(200))


# Kernels


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_out_and_lse(kernels, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_more_blocks_than_a_tile_has_means(kernels, main_dtype, case):
    check(kernels, case, main_dtype)


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_simd_level(kernels, simd, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("softmax_scale", (0.01, 1.0, -0.1, 0.0, 1e-35, 1e-38))
def test_softmax_scale(kernels, main_dtype, softmax_scale):
    for case in FEW_CASES[:2]:
        check(kernels, case, main_dtype, softmax_scale=softmax_scale)


@pytest.mark.parametrize("density", (-1.0, 0.1, 0.9))
@pytest.mark.parametrize("causal", (True, False))
def test_densities(kernels, main_dtype, density, causal):
    case = Case(500, 900, causal, num_heads=4, num_heads_k=2, head_dim=32)
    check(kernels, case, main_dtype, make_inputs(case, main_dtype, density=density))


def test_nothing_selected(kernels, dtype):
    """A row consists of means alone, or of nothing at all: rows 0 to 127 have no whole block under the diagonal."""
    case = Case(600, 600, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, dtype, density=-1.0)
    out, lse = check(kernels, case, dtype, inputs)
    assert not out[:, :BLOCK].any() and np.isneginf(lse[:, :, :BLOCK]).all()
    assert np.isfinite(lse[:, :, BLOCK:]).all() and out[:, BLOCK:].any(axis=-1).all()


@pytest.mark.parametrize("case", [*FEW_CASES, LONG_CASES[0]], ids=str)
def test_every_block_selected_is_attention_without_compensation(kernels, case, dtype):
    inputs = make_inputs(case, dtype, density=1.1)
    compensated, plain = (run(kernels, case, dtype, inputs, compensate) for compensate in (True, False))
    assert_identical(compensated, plain)


@pytest.mark.parametrize("case", [Case(300, 700), Case(300, 700, False), LONG_CASES[0]], ids=str)
def test_blocks_of_one_key_and_value_lose_nothing(kernels, dtype, case):
    """Then a mean is what it stands for, and the result that of all blocks but those that no mean may stand in for."""
    inputs = make_inputs(case, dtype)
    first_of_block = np.arange(case.seqlen_k) // BLOCK * BLOCK
    inputs = replace(inputs, key=inputs.key[:, first_of_block], value=inputs.value[:, first_of_block])
    whole = replace(inputs, block_mask=inputs.block_mask | stood_in_for(case, inputs))
    oracle, naive = (
        reference.attend(*whole.forward, whole.block_mask, causal=case.causal, dtype=each)
        for each in ("float64", dtype)
    )
    for actual, exact, same_dtype in zip(run(kernels, case, dtype, inputs), oracle, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)


@pytest.mark.parametrize("bounds, causal", ((1, True), (2, True), (2, False), (4, False)))
def test_flashmask_over_tiles_of_means(kernels, main_dtype, rng, causal, bounds):
    """Of each key block all keys are open, or hidden from all rows, or cut, at random, and whole tiles are hidden."""
    case = Case(150, 50000, causal, num_heads=2)
    inputs = make_inputs(case, main_dtype, density=0.3)
    num_blocks = case.block_shape[-1]
    kind = rng.integers(0, 3, num_blocks)
    kind[128:256] = 1
    start = np.array([10000, -1, 70])[kind]
    end = np.array([10000, 10000, 90])[kind]
    columns = {
        (1, True): (start,),
        (2, True): (start, end),
        (2, False): (start, np.full(num_blocks, -1)),
        (4, False): (start, end, np.full(num_blocks, -5), np.full(num_blocks, -1)),
    }[bounds, causal]
    startend = np.repeat(np.stack(columns, -1), BLOCK, axis=0)[: case.seqlen_k].astype(np.int32)[None, None]
    inputs = replace(inputs, startend=startend)
    stands_in = stood_in_for(case, inputs)
    assert (
        stands_in[..., :128].any() and stands_in[..., 256:384].any() and not stands_in[..., kind > 0].any(axis=2).all()
    )
    check(kernels, case, main_dtype, inputs)


@pytest.mark.parametrize("causal", (True, False))
def test_large_logits(kernels, dtype, causal):
    case = Case(300, 700, causal)
    check(kernels, case, dtype, make_inputs(case, dtype, query_scale=300.0))


@pytest.mark.parametrize("rise", (-120, -9, 9, 30, 120))
@pytest.mark.parametrize("flashmask", (None, "window_with_full_tail"))
def test_scores_of_means_far_above_those_before(kernels, dtype, rise, flashmask):
    """As test_attend has it of selected blocks: a mean's score is far above all scores before it, or below."""
    case = Case(400, 1100, num_heads=4, num_heads_k=2, flashmask=flashmask)
    inputs = make_inputs(case, dtype, query_scale=0.5)
    query, key = inputs.query.copy(), inputs.key.copy()
    query[..., 0] = 16  # the scores' common part: 16 * key / sqrt(64)
    key[..., 0] = (rise / 2 * (np.arange(1100) // BLOCK))[:, None]
    exact = [reference.cast(x, dtype).astype(np.float32) for x in (query, key)]
    check(kernels, case, dtype, replace(inputs, query=exact[0], key=exact[1]))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, case, layout, dtype):
    assert_identical(run(make_kernels(layout), case, dtype), run(kernels, case, dtype))


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", [*FEW_CASES, LONG_CASES[0]], ids=str)
def test_thread_count_and_repetition_change_nothing(kernels, make_kernels, case):
    expected = run(kernels, case)
    for again in (kernels, *(make_kernels(num_threads=n) for n in (1, 2, 3, 7))):
        assert_identical(run(again, case), expected)


def test_two_threads_at_once(kernels, main_dtype):
    assert_same_in_two_threads(*(lambda case=case: run(kernels, case, main_dtype) for case in FEW_CASES[1:]))


def test_sizes_of_zero(kernels, main_dtype):
    for case in (Case(0, 0), Case(0, 200), Case(5, 5, batch=0)):
        out, lse = run(kernels, case, main_dtype)
        assert out.size == lse.size == 0
    out, lse = run(kernels, Case(200, 0, causal=False), main_dtype)
    assert out.size and not out.any() and np.isneginf(lse).all()


# What no row sees, and what is not finite


@pytest.mark.parametrize("poison", (np.nan, np.inf, 3e4))
@pytest.mark.parametrize("which", ("key", "value"))
def test_blocks_that_a_row_does_not_see_leave_no_trace(kernels, main_dtype, which, poison):
    """A tile of means has those of all blocks: of later ones too, and of others that are no part of a row's."""
    case = Case(1100, 1100, num_heads=4, num_heads_k=2)
    inputs = make_inputs(case, main_dtype, density=0.3)
    poisoned = getattr(inputs, which).copy()
    poisoned[:, 5 * BLOCK : 6 * BLOCK, 0] = poison
    inputs.block_mask[:, :, :, 5] = False
    clean = run(kernels, case, main_dtype, inputs)
    after = run(kernels, case, main_dtype, replace(inputs, **{which: poisoned}))
    # Rows of block 5 see it in part, so no mean stands in for it there: they do not attend it at all.
    first = slice(0, 6 * BLOCK)
    before = [(out[:, first].copy(), lse[:, :, first].copy()) for out, lse in (after, clean)]
    assert_identical(*before)
    assert_identical((after[0][:, :, 2:], after[1][:, 2:]), (clean[0][:, :, 2:], clean[1][:, 2:]))
    if np.isnan(poison):
        assert np.isnan(after[0][:, 6 * BLOCK :, :2]).all()


def test_selected_blocks_show_a_nan_as_without_compensation(kernels, main_dtype):
    """Their means stand in for nothing."""
    case = Case(300, 1100, num_heads=2)
    inputs = make_inputs(case, main_dtype, density=0.5)
    value = inputs.value.copy()
    value[:, 200, :, 3] = np.nan  # in block 1
    inputs.block_mask[..., 1] = True
    clean, after = (run(kernels, case, main_dtype, each) for each in (inputs, replace(inputs, value=value)))
    assert np.isnan(after[0][..., 3]).all() and np.isfinite(after[1]).all()
    others = [i for i in range(64) if i != 3]
    assert_identical((after[0][..., others], after[1]), (clean[0][..., others], clean[1]))


# With the other stages


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_prefill_against_the_oracle(kernels, main_dtype, case):
    """The selection is that without compensation."""
    inputs = make_inputs(case, main_dtype)
    options = {
        "causal": case.causal,
        "threshold": 0.4,
        "sink": inputs.sink,
        "dtype": main_dtype,
        "stride": case.stride,
    }
    plain, compensated = (
        kernels.prefill(*inputs.forward, inputs.startend, compensate=compensate, **options)
        for compensate in (False, True)
    )
    assert_identical(compensated[:2], plain[:2])
    check_with = replace(inputs, block_mask=compensated[1])
    assert_identical(compensated[2:], check(kernels, case, main_dtype, check_with))


@pytest.mark.parametrize("chunk", (128, 384))
@pytest.mark.parametrize(
    "case",
    [Case(1000, 1256, num_heads=4, num_heads_k=2), Case(1000, 1000, num_heads=2, flashmask="window_with_full_tail")],
    ids=str,
)
def test_prefill_in_chunks_is_one_prefill(kernels, case, dtype, chunk):
    inputs = make_inputs(case, dtype)
    options = {"causal": True, "threshold": 0.4, "keep_last": False, "compensate": True, "dtype": dtype}
    _, mask, out, lse = kernels.prefill(*inputs.forward, inputs.startend, **options)
    assert stood_in_for(case, replace(inputs, block_mask=mask)).any()
    cached = case.seqlen_k - case.seqlen_q
    for first in range(0, case.seqlen_q, chunk):
        end = min(first + chunk, case.seqlen_q)
        rows, keys = slice(first, end), slice(0, end + cached)
        startend = None if inputs.startend is None else inputs.startend[:, :, keys] - np.int32(first)
        arrays = inputs.query[:, rows], inputs.key[:, keys], inputs.value[:, keys], startend
        part = kernels.prefill(*arrays, **options)
        blocks = slice(first // BLOCK, first // BLOCK + part[1].shape[2])
        assert_identical(part[1], np.ascontiguousarray(mask[:, :, blocks, : part[1].shape[3]]))
        kernels.assert_same(part[2], out[:, rows], dtype)
        kernels.assert_same(part[3], lse[:, :, rows], "float32")


@pytest.mark.parametrize("ranks", (2, 4))
def test_heads_split_over_ranks(kernels, main_dtype, ranks):
    case = Case(400, 900, num_heads=8, num_heads_k=4, head_dim=32)
    inputs = make_inputs(case, main_dtype)
    options = {"causal": True, "threshold": 0.4, "compensate": True, "dtype": main_dtype}
    whole = kernels.prefill(*inputs.forward, **options)
    heads, heads_k = 8 // ranks, 4 // ranks
    for rank in range(ranks):
        own, own_k = slice(rank * heads, (rank + 1) * heads), slice(rank * heads_k, (rank + 1) * heads_k)
        arrays = inputs.query[:, :, own], inputs.key[:, :, own_k], inputs.value[:, :, own_k]
        part = kernels.prefill(*arrays, head_offset=rank * heads, **options)
        for actual, full, axis in zip(part, whole, (1, 1, 2, 1)):
            assert_identical(actual, np.ascontiguousarray(np.take(full, range(*own.indices(8)), axis)))
