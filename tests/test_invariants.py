"""What holds between calls, whatever the numbers: each invariant of the method through all the stages."""

import numpy as np
import pytest
import reference
from cases import Case, make_inputs
from harness import assert_as_good_as_naive, assert_identical

BLOCK = reference.BLOCK
CASES = [
    Case(1000, 1000, num_heads=4, num_heads_k=2),
    Case(300, 813, num_heads=4, num_heads_k=2, stride=64),
    Case(300, 500, causal=False, num_heads=3, stride=16),
    Case(700, 700, num_heads=2, flashmask="no_row_between"),
    Case(513, 700, num_heads=4, num_heads_k=2, flashmask="window_with_full_tail", flashmask_heads="Hkv"),
    Case(
        450,
        700,
        causal=False,
        num_heads=4,
        num_heads_k=2,
        flashmask="full_sliding_window",
        flashmask_heads="Hq",
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def prefill(kernels, case, inputs, threshold=0.6, **options):
    options = {"causal": case.causal, "stride": case.stride, **options}
    return kernels.prefill(*inputs.forward, inputs.startend, threshold=threshold, **options)


@each_case
def test_tau_of_one_is_dense_attention(kernels, case):
    inputs = make_inputs(case)
    _, mask, out, lse = prefill(kernels, case, inputs, threshold=1.0)
    hidden, _ = reference.block_geometry(inputs.startend, **case.geometry)
    assert np.array_equal(mask, ~hidden)
    everything = np.ones(case.block_shape, bool)
    dense = reference.attend(*inputs.forward, everything, inputs.startend, causal=case.causal)
    naive = reference.attend(*inputs.forward, everything, inputs.startend, causal=case.causal, dtype="float32")
    for actual, exact, same_dtype in zip((out, lse), dense, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)


@each_case
def test_growing_tau_never_removes_a_block(kernels, case):
    inputs = make_inputs(case)
    taus = (0.01, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9999, 1.0)
    masks = [prefill(kernels, case, inputs, threshold=tau)[1] for tau in taus]
    for smaller, larger in zip(masks, masks[1:]):
        assert (larger >= smaller).all()
    assert masks[0].sum() < masks[-1].sum()


@pytest.mark.parametrize("chunk", (128, 384, 512))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(
    "case",
    [
        Case(1000, 1000, num_heads=4, num_heads_k=2),
        Case(1000, 1256, num_heads=9, num_heads_k=3, stride=16, batch=2),
        Case(1000, 1000, num_heads=3, stride=64),
        Case(1000, 1128, stride=2, flashmask="document"),
        Case(1000, 1000, num_heads=4, num_heads_k=2, flashmask="random_intervals", flashmask_heads="Hq"),
    ],
    ids=str,
)
def test_prefill_in_chunks_is_one_prefill(kernels, case, dtype, chunk):
    inputs = make_inputs(case, dtype)
    scores, mask, out, lse = prefill(kernels, case, inputs, dtype=dtype)
    cached = case.seqlen_k - case.seqlen_q
    assert cached % BLOCK == 0
    for first in range(0, case.seqlen_q, chunk):
        rows = slice(first, first + chunk)
        keys = slice(0, min(first + chunk, case.seqlen_q) + cached)
        startend = None if inputs.startend is None else inputs.startend[:, :, keys] - np.int32(first)
        part = kernels.prefill(
            inputs.query[:, rows], inputs.key[:, keys], inputs.value[:, keys], startend,
            causal=True, stride=case.stride, threshold=0.6, dtype=dtype,
        )  # fmt: skip
        blocks = slice(first // BLOCK, first // BLOCK + part[0].shape[2])
        num_k_blocks = part[0].shape[3]
        assert_identical(part[0], np.ascontiguousarray(scores[:, :, blocks, :num_k_blocks]))
        assert_identical(part[1], np.ascontiguousarray(mask[:, :, blocks, :num_k_blocks]))
        assert not mask[:, :, blocks, num_k_blocks:].any()
        assert_identical(part[2], np.ascontiguousarray(out[:, rows]))
        assert_identical(part[3], np.ascontiguousarray(lse[:, :, rows]))


@pytest.mark.parametrize("stride", (4, 8, 64))
@pytest.mark.parametrize("ranks", (2, 4))
def test_heads_split_over_ranks(kernels, ranks, stride):
    """head_offset keeps the phase of each head; without it a rank would sample other tokens."""
    case = Case(400, 600, num_heads=8, num_heads_k=4, head_dim=32, stride=stride)
    inputs = make_inputs(case)
    whole = prefill(kernels, case, inputs)
    heads, heads_k = 8 // ranks, 4 // ranks
    for rank in range(ranks):
        own, own_k = slice(rank * heads, (rank + 1) * heads), slice(rank * heads_k, (rank + 1) * heads_k)
        arrays = inputs.query[:, :, own], inputs.key[:, :, own_k], inputs.value[:, :, own_k]
        options = {"causal": True, "stride": stride, "threshold": 0.6}
        part = kernels.prefill(*arrays, head_offset=rank * heads, **options)
        for actual, full, axis in zip(part, whole, (1, 1, 2, 1)):
            assert_identical(actual, np.ascontiguousarray(np.take(full, range(*own.indices(8)), axis)))
        if rank * heads % stride:
            assert not np.array_equal(part[0], kernels.prefill(*arrays, **options)[0])


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("causal", (True, False))
def test_packed_sequences_run_as_if_apart(kernels, causal, dtype):
    """Documents that start at multiples of 128, across the edge of a tile of strides."""
    lengths = (256, 640, 128, 301)
    case = Case(sum(lengths), sum(lengths), causal, num_heads=4, num_heads_k=2, head_dim=32)
    inputs = make_inputs(case, dtype)
    ends = np.cumsum(lengths)
    bounds = [np.repeat(ends, lengths)] if causal else [np.repeat(ends, lengths), np.repeat(ends - lengths, lengths)]
    startend = np.stack(bounds, -1).astype(np.int32)[None, None]
    options = {"causal": causal, "threshold": 0.6, "dtype": dtype}
    scores, mask, out, lse = kernels.prefill(*inputs.forward, startend, **options)
    for first, end in zip(ends - lengths, ends):
        rows, blocks = slice(first, end), slice(first // BLOCK, -(-end // BLOCK))
        apart = kernels.prefill(*(x[:, rows] for x in inputs.forward), **options)
        assert_identical(scores[:, :, blocks, blocks].copy(), apart[0])
        assert np.array_equal(mask[:, :, blocks, blocks], apart[1])
        assert_identical(out[:, rows].copy(), apart[2])
        assert_identical(lse[:, :, rows].copy(), apart[3])
        mask[:, :, blocks, blocks] = False
    assert not mask.any()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("num_heads_k", (1, 2, 4))
def test_grouped_heads_equal_repeated_keys_and_values(kernels, num_heads_k, dtype):
    case = Case(300, 500, num_heads=8, num_heads_k=num_heads_k, head_dim=32)
    inputs = make_inputs(case, dtype)
    group = 8 // num_heads_k
    repeated = inputs.query, *(np.repeat(x, group, axis=2) for x in (inputs.key, inputs.value))
    options = {"causal": True, "dtype": dtype}
    grouped = kernels.prefill(*inputs.forward, threshold=0.6, **options)
    assert_identical(kernels.prefill(*repeated, threshold=0.6, **options), grouped)
    grads = kernels.backward(*inputs.forward, grouped[1], inputs.grad_out, **options)
    repeated_grads = kernels.backward(*repeated, grouped[1], inputs.grad_out, **options)
    assert_identical(repeated_grads[0], grads[0])
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # the repeated ones are rounded before they are summed
    for grad, parts in zip(grads[1:], repeated_grads[1:]):
        summed = parts.reshape(1, 500, num_heads_k, group, 32).sum(3)
        np.testing.assert_allclose(grad, summed, rtol=tolerance, atol=tolerance * np.abs(summed).max())


def test_batch_entries_are_independent(kernels):
    case = Case(300, 500, num_heads=4, num_heads_k=2, batch=3, flashmask="random_intervals", flashmask_heads="Hkv")
    inputs = make_inputs(case)
    together = prefill(kernels, case, inputs)
    for b in range(3):
        one = slice(b, b + 1)
        alone = kernels.prefill(
            *(x[one] for x in inputs.forward), inputs.startend[one], causal=True, stride=8, threshold=0.6
        )
        assert_identical(alone, [x[one] for x in together])
