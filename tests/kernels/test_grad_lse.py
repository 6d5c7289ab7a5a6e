"""The gradient through the log-sum-exp: two parts of the keys, merged by it, are the whole."""

from dataclasses import replace

import numpy as np
import pytest
from cases import Case, make_inputs
from harness import assert_identical

from rrattn import reference

CASES = [
    Case(300, 900, num_heads=4, num_heads_k=2, grad_lse=True),
    Case(300, 700, causal=False, num_heads=4, num_heads_k=4, head_dim_v=24, grad_lse=True),
    Case(400, 700, num_heads=4, num_heads_k=2, flashmask="document", grad_lse=True),
    Case(300, 900, num_heads=4, num_heads_k=2, head_dim=32, sink=True, grad_lse=True),
]
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}


def halves(case):
    """Two block masks: the even key blocks and the odd ones. Either leaves some rows nothing."""
    even = np.broadcast_to(np.arange(case.block_shape[-1]) % 2 == 0, case.block_shape)
    return even, ~even


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_the_keys_merge_into_the_whole(kernels, dtype, case):
    inputs = make_inputs(case, dtype)
    options = {"causal": case.causal, "dtype": dtype}
    sinks = inputs.sink, None  # which joins the softmax once
    parts = [
        kernels.attend(*inputs.forward, mask, inputs.startend, sink=sink, **options)
        for mask, sink in zip(halves(case), sinks)
    ]
    everything = np.ones(case.block_shape, bool)
    out, lse = kernels.attend(*inputs.forward, everything, inputs.startend, sink=inputs.sink, **options)

    merged_lse = np.logaddexp(parts[0][1], parts[1][1])  # [B, Hq, Lq]
    with np.errstate(invalid="ignore"):
        weights = [np.where(np.isneginf(merged_lse), 0, np.exp(part[1] - merged_lse)) for part in parts]
    by_row = [np.moveaxis(weight, 1, 2)[..., None] for weight in weights]  # [B, Lq, Hq, 1]
    merged = sum(weight * part[0] for weight, part in zip(by_row, parts))
    scale = TOLERANCE[dtype]
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, out, rtol=scale, atol=scale)

    # The gradients of sum(out * grad_out) + sum(lse * grad_lse), through the merging.
    of_merged = np.moveaxis((inputs.grad_out * merged).sum(-1), 2, 1)  # [B, Hq, Lq]
    grads = []
    for mask, sink, weight, column, part in zip(halves(case), sinks, weights, by_row, parts):
        of_part = np.moveaxis((inputs.grad_out * part[0]).sum(-1), 2, 1)
        grad_lse = (weight * (of_part - of_merged + inputs.grad_lse)).astype(np.float32)
        grad_out = reference.cast(inputs.grad_out * column, dtype).astype(np.float32)
        grads.append(
            kernels.backward(*inputs.forward, mask, grad_out, inputs.startend, sink=sink, grad_lse=grad_lse, **options)
        )
    whole = kernels.backward(
        *inputs.forward,
        everything,
        inputs.grad_out,
        inputs.startend,
        sink=inputs.sink,
        grad_lse=inputs.grad_lse,
        **options,
    )
    for name, total, one, other in zip(("query", "key", "value"), whole, *grads):
        largest = np.abs(total).max()
        np.testing.assert_allclose(one + other, total, rtol=scale, atol=scale * largest, err_msg=name)
    if case.sink:
        np.testing.assert_allclose(grads[0][3], whole[3], rtol=scale, atol=scale * np.abs(whole[3]).max())


def test_zeros_are_the_same_as_none(kernels, dtype):
    case = replace(CASES[0], sink=True)
    inputs = make_inputs(case, dtype)
    arguments = *inputs.forward, inputs.block_mask, inputs.grad_out, inputs.startend
    options = {"causal": True, "sink": inputs.sink, "dtype": dtype, "deterministic": True}
    zeros = np.zeros_like(inputs.grad_lse)
    assert_identical(kernels.backward(*arguments, grad_lse=zeros, **options), kernels.backward(*arguments, **options))


def test_rows_that_see_nothing_have_no_gradient(kernels, main_dtype):
    """Even where merging made a NaN of their -inf."""
    case = Case(400, 400, num_heads=2, flashmask="no_row_between", grad_lse=True)
    inputs = make_inputs(case, main_dtype)
    pairs = reference.selected_tokens(*inputs.forward[:2], inputs.block_mask, inputs.startend, True)
    unseeing = ~pairs.any(-1)
    assert unseeing.any()
    arguments = *inputs.forward, inputs.block_mask, inputs.grad_out, inputs.startend
    options = {"causal": True, "dtype": main_dtype, "deterministic": True}
    clean = kernels.backward(*arguments, grad_lse=inputs.grad_lse, **options)
    with_nan = np.where(unseeing, np.float32(np.nan), inputs.grad_lse)
    assert_identical(kernels.backward(*arguments, grad_lse=with_nan, **options), clean)
    assert not clean[0].swapaxes(1, 2)[unseeing].any()
