"""Sinks at their limits; that all stages are right with one is in the cases of cases.py."""

from dataclasses import replace

import numpy as np
import pytest
import test_attend
import test_backward
import test_compensate
import test_estimate
from cases import FEW_CASES, Case, make_inputs
from harness import assert_identical

CASE = Case(300, 500, num_heads=4, num_heads_k=2, sink=True, grad_lse=True)
FLASH_MASKED = Case(
    400, 600, num_heads=4, num_heads_k=2, flashmask="window_with_full_tail", sink=True, grad_lse=True, head_dim_v=40
)
STAGES = (test_attend, test_backward, test_compensate, test_estimate)
each_case = pytest.mark.parametrize("case", (CASE, FLASH_MASKED), ids=str)
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


def with_sinks(case, dtype, *sinks):
    """Inputs of a case with these sinks, one for each head."""
    return replace(make_inputs(case, dtype), sink=np.array(sinks, np.float32))


@each_stage
@each_case
@pytest.mark.parametrize(
    "sinks",
    (
        (50, 50, 50, 50),  # far above all scores
        (-50, -50, -50, -50),
        (1e4, -1e4, 0, 100),
        (-np.inf, 3, -np.inf, 60),
        (1e5, -1e5, 1e-38, 5),
    ),
    ids=str,
)
def test_sinks_far_from_the_scores(kernels, dtype, stage, case, sinks):
    stage.check(kernels, case, dtype, with_sinks(case, dtype, *sinks))


@each_case
def test_a_sink_of_minus_infinity_is_none(kernels, dtype, case):
    """Bit for bit where blocks are selected."""
    inputs = make_inputs(case, dtype)
    nothing = with_sinks(case, dtype, *[-np.inf] * 4)
    without = replace(inputs, sink=None)
    scores = [test_estimate.run(kernels, case, dtype, x) for x in (nothing, without)]
    assert_identical(*scores)
    options = {"causal": True, "threshold": 0.6, "dtype": dtype}
    arguments = *inputs.forward, inputs.startend
    one, other = (kernels.prefill(*arguments, sink=x.sink, **options) for x in (nothing, without))
    assert_identical(one[:2], other[:2])
    for x, y in zip(one[2:], other[2:]):
        kernels.assert_same(x, y, dtype)
    grads, without_sink = (test_backward.run(kernels, case, dtype, x, deterministic=True) for x in (nothing, without))
    assert len(grads) == 4 and len(without_sink) == 3
    assert not grads[3].any()
    for x, y in zip(grads, without_sink):
        kernels.assert_same(x, y, dtype)


def test_nothing_selected(kernels, dtype):
    """Rows have the sink alone: no output, and the log-sum-exp is the sink, so its gradient is all of that of lse."""
    inputs = make_inputs(CASE, dtype, density=-1.0)
    out, lse = test_attend.run(kernels, CASE, dtype, inputs)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(inputs.sink[:, None], lse.shape), rtol=1e-6)
    *grads, grad_sink = test_backward.run(kernels, CASE, dtype, inputs)
    assert not any(grad.any() for grad in grads)
    np.testing.assert_allclose(grad_sink, inputs.grad_lse.sum((0, 2)), rtol=1e-5, atol=1e-5)


def test_the_selection_is_by_the_mass_on_keys(kernels, main_dtype):
    """A sink that takes the same part of all sampled queries of a row changes no choice."""
    case = Case(1024, 1024, causal=False, num_heads=2, head_dim=32)
    inputs = make_inputs(case, main_dtype)
    query = np.repeat(inputs.query[:, ::128], 128, axis=1)
    without, with_sink = (
        kernels.estimate(query, inputs.key, causal=False, dtype=main_dtype, sink=sink)
        for sink in (None, np.array([10.0, 9.0], np.float32))
    )
    assert (with_sink.sum(-1) < 0.99 * without.sum(-1)).all()
    rules = {"causal": False, "seqlen_q": 1024, "seqlen_k": 1024, "threshold": 0.7, "keep_last": False}
    selected = kernels.select(with_sink, **rules)
    assert_identical(selected, kernels.select(without, **rules))
    assert selected.mean() < 0.8


@each_case
def test_its_gradient_has_the_same_bits_on_every_run(kernels, dtype, case):
    """Whatever the other gradients have."""
    first = test_backward.run(kernels, case, dtype, deterministic=False)[3]
    for _ in range(5):
        assert_identical(test_backward.run(kernels, case, dtype, deterministic=False)[3], first)


def test_its_gradient_over_many_rows(kernels, main_dtype):
    """Sums of many terms keep their digits: the terms' errors do not add up to more than their own."""
    case = Case(3000, 3000, num_heads=2, num_heads_k=1, head_dim=8, sink=True, batch=2, grad_lse=True)
    inputs = make_inputs(case, main_dtype, density=0.2)
    test_backward.check(kernels, case, main_dtype, inputs)


def test_a_nan_in_one_head_stays_there(kernels, main_dtype):
    inputs = with_sinks(CASE, main_dtype, 1, np.nan, 2, 3)
    clean = with_sinks(CASE, main_dtype, 1, 2, 2, 3)
    out, lse = test_attend.run(kernels, CASE, main_dtype, inputs)
    expected = test_attend.run(kernels, CASE, main_dtype, clean)
    assert np.isnan(out[:, :, 1]).all() and np.isnan(lse[:, 1]).all()
    others = [0, 2, 3]
    assert_identical((out[:, :, others], lse[:, others]), (expected[0][:, :, others], expected[1][:, others]))


@pytest.mark.parametrize("case", [case for case in FEW_CASES if case.sink], ids=str)
def test_a_slice_of_sinks_is_read_in_place(make_kernels, main_dtype, case):
    """As a rank of several has it."""
    kernels, inputs = make_kernels(), make_inputs(case, main_dtype)
    longer = np.concatenate([[np.nan], inputs.sink, [np.nan]]).astype(np.float32)
    whole = kernels.allocate(longer)

    class Sliced(type(kernels)):
        def input(self, values, dtype, strided=True):
            return whole[1:-1] if values is inputs.sink else super().input(values, dtype, strided)

    assert_identical(test_attend.run(Sliced(), case, main_dtype), test_attend.run(kernels, case, main_dtype))
