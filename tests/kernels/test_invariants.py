"""What holds between calls, whatever the numbers: each invariant of the method through all the stages."""

import numpy as np
import pytest
from cases import Case, make_inputs
from harness import assert_as_good_as_naive, assert_identical

from rrattn import reference

BLOCK = reference.BLOCK
CASES = [
    Case(1000, 1000, num_heads=4, num_heads_k=2),
    Case(300, 813, num_heads=4, num_heads_k=2, stride=64),
    Case(300, 500, causal=False, num_heads=3, stride=16),
    Case(700, 700, num_heads=2, flashmask="no_row_between"),
    Case(513, 700, num_heads=4, num_heads_k=2, flashmask="window_with_full_tail", flashmask_heads="Hkv"),
    Case(513, 700, num_heads=4, num_heads_k=2, head_dim_v=32, sink=True),
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
each_keep_local = pytest.mark.parametrize("keep_local", (0, 1, 2))


def prefill(kernels, case, inputs, dtype, threshold=0.6, **options):
    options = {"causal": case.causal, "stride": case.stride, "sink": inputs.sink, **options}
    return kernels.prefill(*inputs.forward, inputs.startend, threshold=threshold, dtype=dtype, **options)


@each_case
def test_tau_of_one_is_dense_attention(kernels, main_dtype, case):
    inputs = make_inputs(case, main_dtype)
    _, mask, out, lse = prefill(kernels, case, inputs, main_dtype, threshold=1.0)
    hidden, _ = reference.block_geometry(inputs.startend, **case.geometry)
    assert np.array_equal(mask, ~hidden)
    arguments = *inputs.forward, np.ones(case.block_shape, bool), inputs.startend
    dense, naive = (
        reference.attend(*arguments, causal=case.causal, sink=inputs.sink, dtype=d) for d in ("float64", main_dtype)
    )
    for actual, exact, same_dtype in zip((out, lse), dense, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)


@pytest.mark.one_table
@each_keep_local
@each_case
def test_growing_tau_never_removes_a_block(kernels, main_dtype, case, keep_local):
    inputs = make_inputs(case, main_dtype)
    taus = (0.01, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9999, 1.0)
    rules = {"keep_last": False, "keep_local": keep_local}
    masks = [prefill(kernels, case, inputs, main_dtype, threshold=tau, **rules)[1] for tau in taus]
    for smaller, larger in zip(masks, masks[1:]):
        assert (larger >= smaller).all()
    assert masks[0].sum() < masks[-1].sum()


@each_keep_local
@pytest.mark.parametrize("keep_last", (False, True))
@pytest.mark.parametrize("chunk", (128, 384, 512))
@pytest.mark.parametrize(
    "case",
    [
        Case(1000, 1000, num_heads=4, num_heads_k=2),
        Case(1000, 1256, num_heads=9, num_heads_k=3, stride=16, batch=2),
        Case(1000, 1000, num_heads=3, stride=64),
        Case(1000, 1128, stride=2, flashmask="document"),
        Case(1000, 1000, num_heads=4, num_heads_k=2, flashmask="random_intervals", flashmask_heads="Hq"),
        Case(1000, 1128, num_heads=4, num_heads_k=2, sink=True),
    ],
    ids=str,
)
def test_prefill_in_chunks_is_one_prefill(kernels, case, dtype, chunk, keep_last, keep_local):
    """With keep_last in the last chunk alone, where one prefill has its last row."""
    inputs = make_inputs(case, dtype)
    scores, mask, out, lse = prefill(kernels, case, inputs, dtype, keep_last=keep_last, keep_local=keep_local)
    cached = case.seqlen_k - case.seqlen_q
    assert cached % BLOCK == 0
    for first in range(0, case.seqlen_q, chunk):
        end = min(first + chunk, case.seqlen_q)
        rows, keys = slice(first, end), slice(0, end + cached)
        rules = {"keep_last": keep_last and end == case.seqlen_q, "keep_local": keep_local}
        startend = None if inputs.startend is None else inputs.startend[:, :, keys] - np.int32(first)
        part = kernels.prefill(
            inputs.query[:, rows], inputs.key[:, keys], inputs.value[:, keys], startend,
            causal=True, stride=case.stride, threshold=0.6, sink=inputs.sink, dtype=dtype, **rules,
        )  # fmt: skip
        blocks = slice(first // BLOCK, first // BLOCK + part[0].shape[2])
        num_k_blocks = part[0].shape[3]
        kernels.assert_same(part[0], scores[:, :, blocks, :num_k_blocks], "float32")
        assert_identical(part[1], np.ascontiguousarray(mask[:, :, blocks, :num_k_blocks]))
        assert not mask[:, :, blocks, num_k_blocks:].any()
        kernels.assert_same(part[2], out[:, rows], dtype)
        kernels.assert_same(part[3], lse[:, :, rows], "float32")


@pytest.mark.parametrize("stride", (4, 8, 64))
@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("sink", (False, True))
def test_heads_split_over_ranks(kernels, main_dtype, ranks, stride, sink):
    """head_offset keeps the phase of each head; without it a rank would sample other tokens."""
    case = Case(400, 600, num_heads=8, num_heads_k=4, head_dim=32, stride=stride, sink=sink)
    inputs = make_inputs(case, main_dtype)
    whole = prefill(kernels, case, inputs, main_dtype)
    heads, heads_k = 8 // ranks, 4 // ranks
    for rank in range(ranks):
        own, own_k = slice(rank * heads, (rank + 1) * heads), slice(rank * heads_k, (rank + 1) * heads_k)
        arrays = inputs.query[:, :, own], inputs.key[:, :, own_k], inputs.value[:, :, own_k]
        options = {"causal": True, "stride": stride, "threshold": 0.6, "dtype": main_dtype}
        options["sink"] = inputs.sink[own] if sink else None
        part = kernels.prefill(*arrays, head_offset=rank * heads, **options)
        for actual, full, axis in zip(part, whole, (1, 1, 2, 1)):
            assert_identical(actual, np.ascontiguousarray(np.take(full, range(*own.indices(8)), axis)))
        if rank * heads % stride:
            assert not np.array_equal(part[0], kernels.prefill(*arrays, **options)[0])


@each_keep_local
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("sink", (False, True))
def test_packed_sequences_run_as_if_apart(kernels, causal, dtype, keep_local, sink):
    """Documents that start at multiples of 128, across the edge of a tile of strides.

    Without keep_last, which keeps a row of each call: of the last document, when they are packed.
    """
    lengths = (256, 640, 128, 301)
    case = Case(sum(lengths), sum(lengths), causal, num_heads=4, num_heads_k=2, head_dim=32, sink=sink)
    inputs = make_inputs(case, dtype)
    ends = np.cumsum(lengths)
    bounds = [np.repeat(ends, lengths)] if causal else [np.repeat(ends, lengths), np.repeat(ends - lengths, lengths)]
    startend = np.stack(bounds, -1).astype(np.int32)[None, None]
    options = {"causal": causal, "threshold": 0.6, "keep_last": False, "keep_local": keep_local, "dtype": dtype}
    options["sink"] = inputs.sink
    scores, mask, out, lse = kernels.prefill(*inputs.forward, startend, **options)
    for first, end in zip(ends - lengths, ends):
        rows, blocks = slice(first, end), slice(first // BLOCK, -(-end // BLOCK))
        apart = kernels.prefill(*(x[:, rows] for x in inputs.forward), **options)
        kernels.assert_same(apart[0], scores[:, :, blocks, blocks], "float32")
        assert np.array_equal(mask[:, :, blocks, blocks], apart[1])
        kernels.assert_same(apart[2], out[:, rows], dtype)
        kernels.assert_same(apart[3], lse[:, :, rows], "float32")
        mask[:, :, blocks, blocks] = False
    assert not mask.any()


def grouped_and_repeated(num_heads_k, dtype):
    """(inputs, query, key, value): grouped heads, and the same with a key and a value for each query head."""
    inputs = make_inputs(Case(300, 500, num_heads=8, num_heads_k=num_heads_k, head_dim=32, sink=True), dtype)
    return inputs, (inputs.query, *(np.repeat(x, 8 // num_heads_k, axis=2) for x in (inputs.key, inputs.value)))


@pytest.mark.parametrize("num_heads_k", (1, 2, 4))
def test_grouped_heads_equal_repeated_keys_and_values(kernels, num_heads_k, dtype):
    inputs, repeated = grouped_and_repeated(num_heads_k, dtype)
    options = {"causal": True, "sink": inputs.sink, "dtype": dtype, "threshold": 0.6}
    assert_identical(kernels.prefill(*repeated, **options), kernels.prefill(*inputs.forward, **options))


@pytest.mark.parametrize("num_heads_k", (1, 2, 4))
def test_gradients_of_grouped_heads_equal_those_of_repeated_ones(kernels, num_heads_k, dtype):
    inputs, repeated = grouped_and_repeated(num_heads_k, dtype)
    options = {"causal": True, "sink": inputs.sink, "dtype": dtype}
    block_mask = inputs.block_mask
    grads = kernels.backward(*inputs.forward, block_mask, inputs.grad_out, **options)
    repeated_grads = kernels.backward(*repeated, block_mask, inputs.grad_out, **options)
    kernels.assert_same(repeated_grads[0], grads[0], dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # the repeated ones are rounded before they are summed
    for grad, parts in zip(grads[1:3], repeated_grads[1:3]):
        summed = parts.reshape(1, 500, num_heads_k, 8 // num_heads_k, 32).sum(3)
        np.testing.assert_allclose(grad, summed, rtol=tolerance, atol=tolerance * np.abs(summed).max())
    kernels.assert_same(repeated_grads[3], grads[3], dtype)


def test_batch_entries_are_independent(kernels, main_dtype):
    mask = {"flashmask": "random_intervals", "flashmask_heads": "Hkv"}
    case = Case(300, 500, num_heads=4, num_heads_k=2, batch=3, **mask, sink=True)
    inputs = make_inputs(case, main_dtype)
    together = prefill(kernels, case, inputs, main_dtype)
    for b in range(3):
        one = slice(b, b + 1)
        alone = kernels.prefill(
            *(x[one] for x in inputs.forward), inputs.startend[one],
            causal=True, stride=8, threshold=0.6, sink=inputs.sink, dtype=main_dtype,
        )  # fmt: skip
        assert_identical(alone, [x[one] for x in together])
