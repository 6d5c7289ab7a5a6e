"""The backward against the oracle. The oracle's own is checked by finite differences in test_reference.py."""

import numpy as np
import pytest
from cases import ATTENTION_CASES, FEW_CASES, Case, make_inputs
from harness import LAYOUTS, assert_as_good_as_naive, assert_identical, assert_same_in_two_threads

from rrattn import reference


def run(kernels, case, dtype="float32", inputs=None, **options):
    inputs = inputs or make_inputs(case, dtype)
    return kernels.backward(
        *inputs.forward,
        inputs.block_mask,
        inputs.grad_out,
        inputs.startend,
        sink=inputs.sink,
        grad_lse=inputs.grad_lse,
        dtype=dtype,
        causal=case.causal,
        **options,
    )


def check(kernels, case, dtype="float32", inputs=None, **options):
    """Gradients of the kernel, found as good as the naive implementation's in the same dtype."""
    inputs = inputs or make_inputs(case, dtype)
    grads = run(kernels, case, dtype, inputs, **options)
    arguments = *inputs.forward, inputs.block_mask, inputs.grad_out, inputs.startend
    options = {"causal": case.causal, "sink": inputs.sink, "grad_lse": inputs.grad_lse, **options}
    oracle = reference.backward(*arguments, **options)
    naive = reference.backward(*arguments, dtype=dtype, **options)
    for actual, exact, same_dtype in zip(grads[:3], oracle, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)
    if inputs.sink is not None:  # of few numbers, in which the rounding of the output is most of the error
        stored, terms = (
            reference.backward(*arguments, **options, **how)[3] for how in ({"stored": dtype}, {"terms": True})
        )
        assert_as_good_as_naive(grads[3], oracle[3], naive[3], terms, stored)
    return grads


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_gradients(kernels, case, dtype):
    """Also: exactly zero where no selected block reaches, and finite where a row sees nothing."""
    grad_query, grad_key, grad_value = check(kernels, case, dtype)[:3]
    inputs = make_inputs(case, dtype)
    pairs = reference.selected_tokens(*inputs.forward[:2], inputs.block_mask, inputs.startend, case.causal)
    assert not grad_query.swapaxes(1, 2)[~pairs.any(-1)].any()
    reached = pairs.any(-2)  # [B, Hq, Lk]
    reached = reached.reshape(case.batch, case.num_heads_k, -1, case.seqlen_k).any(2)
    for grad in (grad_key, grad_value):
        assert not grad.swapaxes(1, 2)[~reached].any()


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_simd_level(kernels, simd, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("softmax_scale", (0.01, 1.0, -0.1, 0.0, 1e-35))
def test_softmax_scale(kernels, main_dtype, softmax_scale):
    check(kernels, FEW_CASES[0], main_dtype, softmax_scale=softmax_scale)


@pytest.mark.parametrize("density", (0.1, 1.0))
def test_densities(kernels, main_dtype, density):
    case = Case(500, 900, num_heads=4, num_heads_k=2, head_dim=32)
    check(kernels, case, main_dtype, make_inputs(case, main_dtype, density=density))


def test_large_logits(kernels, dtype):
    case = Case(300, 300)
    check(kernels, case, dtype, make_inputs(case, dtype, query_scale=100.0))


def test_nothing_selected(kernels, main_dtype):
    case = FEW_CASES[0]
    for grad in run(kernels, case, main_dtype, make_inputs(case, main_dtype, density=-1.0)):
        assert grad.size and not grad.any()


def test_unselected_blocks_are_not_read(kernels, main_dtype):
    """NaN in keys and values that no query block selects leaves no trace."""
    case = Case(300, 600, num_heads=4, num_heads_k=2, causal=False)
    inputs = make_inputs(case, main_dtype)
    options = {"dtype": main_dtype, "causal": False}
    block_mask = inputs.block_mask.copy()
    block_mask[:, :2, :, 3] = False
    _, key, value = (x.copy() for x in inputs.forward)
    key[:, 384:512, 0], value[:, 384:512, 0] = np.nan, np.nan
    poisoned = kernels.backward(inputs.query, key, value, block_mask, inputs.grad_out, **options)
    clean = kernels.backward(*inputs.forward, block_mask, inputs.grad_out, **options)
    for one, other in zip(poisoned, clean):
        kernels.assert_same(one, other, main_dtype)
    assert not clean[1][:, 384:512, 0].any() and not clean[2][:, 384:512, 0].any()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, case, layout, dtype):
    strided, contiguous = (run(one, case, dtype, deterministic=True) for one in (make_kernels(layout), kernels))
    assert_identical(strided, contiguous)


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_thread_count_and_repetition_change_nothing(kernels, make_kernels, case):
    expected = run(kernels, case)
    for again in (kernels, *(make_kernels(num_threads=n) for n in (1, 2, 3, 7))):
        assert_identical(run(again, case), expected)


def test_two_threads_at_once(kernels):
    assert_same_in_two_threads(
        *(
            lambda case=case, dtype=dtype: run(kernels, case, dtype, deterministic=True)
            for case in FEW_CASES[1:]
            for dtype in kernels.dtypes
        )
    )


def test_sizes_of_zero(kernels, main_dtype):
    for case in (Case(0, 0), Case(0, 200), Case(200, 0, causal=False), Case(5, 5, batch=0)):
        for grad in run(kernels, case, main_dtype):
            assert not grad.any()  # what is not empty is zero
