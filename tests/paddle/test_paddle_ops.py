"""The operators run eagerly: against the oracle, on every layout, with every option, and from two threads."""

import itertools

import numpy as np
import paddle
import pytest
from cases import DTYPES, FEW_CASES, make_inputs
from harness import assert_as_good_as_naive, assert_identical, assert_same_in_two_threads
from paddle_harness import (
    CASE,
    THRESHOLD,
    assert_all_identical,
    bounds_of,
    gradients,
    run,
    to_numpy,
    to_tensors,
)

import rrattn
from rrattn import functional, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_forward_and_backward_match_the_oracle(case, dtype):
    inputs = make_inputs(case, dtype)
    tensors, bounds = to_tensors(inputs, dtype, requires_grad=True), bounds_of(inputs)
    scores = rrattn.estimate_block_scores(*tensors[:2], bounds, causal=case.causal, stride=case.stride)
    out, lse, mask = run(tensors, bounds, causal=case.causal, stride=case.stride)

    lengths = {"causal": case.causal, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    selected = reference.select(scores.numpy(), THRESHOLD, inputs.startend, **lengths)
    assert_identical(mask.numpy(), reference.pack(selected))

    def oracle_and_naive(stage, *arguments, **options):
        options = {"causal": case.causal, **options}
        return [stage(*arguments, inputs.startend, **options, dtype=d) for d in ("float64", dtype)]

    expected = oracle_and_naive(reference.estimate, *inputs.forward[:2], stride=case.stride)
    assert_as_good_as_naive(scores.numpy(), *expected)
    expected = oracle_and_naive(reference.attend, *inputs.forward, selected)
    for actual, exact, naive in zip((out, lse), *expected):
        assert_as_good_as_naive(to_numpy(actual), exact, naive)
    grads = gradients(out, tensors, inputs.grad_out)
    expected = oracle_and_naive(reference.backward, *inputs.forward, selected, inputs.grad_out)
    for actual, exact, naive in zip(grads, *expected):
        assert_as_good_as_naive(to_numpy(actual), exact, naive)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_rr_attention_is_its_stages(case):
    inputs = make_inputs(case)
    tensors, bounds = to_tensors(inputs, requires_grad=True), bounds_of(inputs)
    options = {"causal": case.causal}
    lengths = {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    for keep in ({"keep_sink": False}, {"keep_last": True}, {"keep_local": 2}):
        sampling = {"stride": 16, "head_offset": 3, "softmax_scale": 0.3}
        out, lse, mask = run(tensors, bounds, **options, **sampling, **keep)
        scores = rrattn.estimate_block_scores(*tensors[:2], bounds, **options, **sampling)
        selected = rrattn.select_blocks(scores, THRESHOLD, bounds, **options, **lengths, **keep)
        attended = rrattn.block_sparse_attention(
            *tensors, selected, bounds, **options, softmax_scale=0.3, return_softmax_lse=True
        )
        assert_all_identical((out, lse, mask), (*attended, selected))
        assert scores.stop_gradient and selected.stop_gradient
        grads = [gradients(x, tensors, inputs.grad_out) for x in (out, attended[0])]
        assert_all_identical(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes(dtype):
    tensors = to_tensors(make_inputs(CASE, dtype), dtype, requires_grad=True)
    batch, num_heads, num_q_blocks, num_k_blocks = CASE.block_shape
    scores = rrattn.estimate_block_scores(*tensors[:2], causal=True)
    assert (scores.dtype, scores.shape) == (paddle.float32, list(CASE.block_shape))
    out, lse, mask = run(tensors)
    assert (out.dtype, out.shape) == (tensors[0].dtype, tensors[0].shape)
    assert (lse.dtype, lse.shape) == (paddle.float32, [batch, num_heads, CASE.seqlen_q])
    assert (mask.dtype, mask.shape) == (paddle.int32, [batch, num_heads, num_q_blocks, 1])
    assert num_k_blocks <= 32
    for tensor, grad in zip(tensors, paddle.grad(out.sum(), tensors)):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)


def test_results_are_those_asked_for():
    tensors = to_tensors(make_inputs(CASE))
    out, lse, mask = run(tensors)
    for with_lse, with_mask in itertools.product((False, True), repeat=2):
        results = rrattn.rr_attention(
            *tensors,
            causal=True,
            threshold=THRESHOLD,
            return_softmax_lse=with_lse,
            return_block_mask=with_mask,
        )
        if not with_lse and not with_mask:
            assert isinstance(results, paddle.Tensor)
            results = (results,)
        assert_all_identical(results, [out] + [lse] * with_lse + [mask] * with_mask)
    alone = rrattn.block_sparse_attention(*tensors, mask, causal=True)
    assert isinstance(alone, paddle.Tensor)
    assert_all_identical((alone,), (out,))


def test_all_but_the_block_mask_carries_a_gradient():
    out, lse, mask = run(to_tensors(make_inputs(CASE), requires_grad=True))
    assert not out.stop_gradient and not lse.stop_gradient
    assert mask.stop_gradient


def test_without_training_nothing_carries_a_gradient():
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    trained, inferred = run(tensors), run(tensors, training=False)
    assert all(x.stop_gradient for x in inferred)
    assert_all_identical(inferred, trained)
    with paddle.no_grad():
        assert run(tensors)[0].stop_gradient
    assert not run(tensors)[0].stop_gradient


def test_one_threshold_for_each_head():
    tensors = to_tensors(make_inputs(CASE))
    thresholds = [0.2, 0.5, 0.8, 1.0]
    each = run(tensors, threshold=paddle.to_tensor(thresholds), keep_last=False)
    masks = []
    for head, threshold in enumerate(thresholds):
        out, lse, mask = run(tensors, threshold=threshold, keep_last=False)
        assert_all_identical(
            (each[0][:, :, head], each[1][:, head], each[2][:, head]),
            (out[:, :, head], lse[:, head], mask[:, head]),
        )
        masks.append(mask.numpy())
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(masks, 2))


def transposed(tensor):
    """The values as they lie in memory as [B, H, L, D]."""
    return tensor.transpose([0, 2, 1, 3]).contiguous().transpose([0, 2, 1, 3])


def sliced(tensor):
    """The values as part of a larger tensor."""
    batch, seqlen, heads, head_dim = tensor.shape
    packed = paddle.full([batch, seqlen + 3, heads + 2, head_dim + 8], float("nan"), tensor.dtype)
    packed[:, 2:-1, 1:-1, :-8] = tensor
    return packed[:, 2:-1, 1:-1, :-8]


def innermost_strided(tensor):
    """The values as they lie in memory as [B, L, D, H]."""
    return tensor.transpose([0, 1, 3, 2]).contiguous().transpose([0, 1, 3, 2])


@pytest.mark.parametrize("layout", (transposed, sliced, innermost_strided))
def test_strided_inputs(layout):
    inputs = make_inputs(CASE)
    expected_inputs = to_tensors(inputs, requires_grad=True)
    expected = run(expected_inputs)
    tensors = [layout(x) for x in to_tensors(inputs)]
    for tensor in tensors:
        assert not tensor.is_contiguous()
        tensor.stop_gradient = False
    actual = run(tensors)
    assert_all_identical(actual, expected)
    grad_out = layout(paddle.to_tensor(inputs.grad_out))
    assert not grad_out.is_contiguous()
    assert_all_identical(
        paddle.grad(actual[0], tensors, grad_out), gradients(expected[0], expected_inputs, inputs.grad_out)
    )


@pytest.mark.parametrize("stage", ("rr_attention", "block_sparse_attention"))
def test_second_order_gradients_are_refused(stage):
    """Without an error the part through attention would be missing: gradients of a penalty on gradients, say."""
    query, key = paddle.randn([1, 200, 2, 8]), paddle.randn([1, 200, 1, 8])
    query.stop_gradient = False

    def attend():
        if stage == "rr_attention":
            return rrattn.rr_attention(query, key, key, causal=True)
        return rrattn.block_sparse_attention(query, key, key, paddle.full([1, 2, 2, 1], -1, "int32"), causal=True)

    (gradient,) = paddle.grad(attend().sum(), [query], create_graph=True)
    np.testing.assert_array_equal(gradient.numpy(), paddle.grad(attend().sum(), [query])[0].numpy())
    with pytest.raises(NotImplementedError, match="no second-order gradients.*create_graph=True"):
        (gradient * gradient).sum().backward()


def test_gradients_accumulate_over_two_uses():
    inputs = make_inputs(CASE)
    query, key, value = to_tensors(inputs, requires_grad=True)
    grad_out = paddle.to_tensor(inputs.grad_out)
    once = paddle.grad(run((query, key, value))[0], [query, key, value], grad_out)
    for _ in range(2):
        run((query, key, value))[0].backward(grad_out)
    assert_all_identical([query.grad, key.grad, value.grad], [2 * grad for grad in once])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_identical_from_run_to_run(dtype):
    inputs = make_inputs(CASE, dtype)

    def once():
        tensors = to_tensors(inputs, dtype, requires_grad=True)
        results = run(tensors)
        return *results, *gradients(results[0], tensors, inputs.grad_out)

    first = once()
    for _ in range(3):
        assert_all_identical(once(), first)


def test_two_threads_at_once():
    """Forward and backward in one thread, inference in the other: neither the results nor the modes mix.

    With backward(), since paddle.grad itself crashes in two threads, whatever the operators.
    """

    def train(case):
        inputs = make_inputs(case)
        tensors = to_tensors(inputs, requires_grad=True)
        results = run(tensors, bounds_of(inputs), causal=case.causal)
        results[0].backward(paddle.to_tensor(inputs.grad_out))
        return [to_numpy(x) for x in (*results, *(tensor.grad for tensor in tensors))]

    def infer(case):
        inputs = make_inputs(case, "bfloat16")
        tensors = to_tensors(inputs, "bfloat16", requires_grad=True)
        results = run(tensors, bounds_of(inputs), causal=case.causal, training=False)
        assert results[0].stop_gradient
        return [to_numpy(x) for x in results]

    assert_same_in_two_threads(
        lambda: train(CASE), lambda: infer(CASE), lambda: train(FEW_CASES[2]), lambda: infer(FEW_CASES[3])
    )


def test_deterministic_goes_to_the_operator(monkeypatch):
    """As it is given, or by Paddle's flag, which only builds for a GPU have."""
    inputs = to_tensors(make_inputs(CASE))
    mask = rrattn.rr_attention(*inputs, causal=True, return_block_mask=True)[1]
    seen = []

    def call(name, *arguments):
        seen.append((name, arguments[-3]))
        return library_call(name, *arguments)

    library_call = functional.call
    monkeypatch.setattr(functional, "call", call)

    def passed(**options):
        seen.clear()
        rrattn.rr_attention(*inputs, causal=True, **options)
        rrattn.block_sparse_attention(*inputs, mask, causal=True, **options)
        assert [name for name, _ in seen] == ["rr_attention", "attend"]
        return [value for _, value in seen]

    assert passed() == [False, False]
    assert passed(deterministic=True) == [True, True]
    flags = {"FLAGS_cudnn_deterministic": True}
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle, "get_flags", lambda name: {name: flags[name]})
    assert passed() == [True, True]
    assert passed(deterministic=False) == [False, False]
    flags["FLAGS_cudnn_deterministic"] = False
    assert passed() == [False, False]


@pytest.mark.parametrize("bad", (1, 0, "yes"))
def test_deterministic_is_a_bool(bad):
    inputs = to_tensors(make_inputs(CASE))
    mask = rrattn.rr_attention(*inputs, causal=True, return_block_mask=True)[1]
    for attention in (
        lambda: rrattn.rr_attention(*inputs, causal=True, deterministic=bad),
        lambda: rrattn.block_sparse_attention(*inputs, mask, causal=True, deterministic=bad),
    ):
        with pytest.raises(TypeError, match=f"deterministic is {bad!r}, but must be True, False or None"):
            attention()
