"""Compensated attention through Paddle: as the kernels compute it, and without gradients."""

import inspect

import numpy as np
import paddle
import pytest
from cases import DTYPES, Case, make_inputs
from harness import Kernels, assert_identical
from paddle.distributed.fleet.utils import recompute
from paddle_harness import CASE, assert_all_identical, bounds_of, run, to_numpy, to_tensors

import rrattn
from rrattn import functional, published, reference

REFUSED = r"compensate is True.*no gradients.*compensate=False.*paddle\.no_grad\(\)"
REFUSED_BACKWARD = "compensate is True, but attention that is compensated has no gradients: .*compensate=False"


def attend(tensors, block_mask, **options):
    return rrattn.block_sparse_attention(*tensors, block_mask, causal=True, return_softmax_lse=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flashmask", (None, "window_with_full_tail"))
def test_both_functions_give_what_the_kernels_give(dtype, flashmask):
    case = Case(500, 1100, num_heads=4, num_heads_k=2, head_dim=32, batch=2, flashmask=flashmask)
    inputs = make_inputs(case, dtype)
    tensors, bounds = to_tensors(inputs, dtype), bounds_of(inputs)
    out, lse, block_mask = run(tensors, bounds, compensate=True, keep_last=False)
    selected = reference.unpack(block_mask.numpy(), case.block_shape[-1])
    arrays = *inputs.forward, selected, inputs.startend
    expected = Kernels().attend(*arrays, causal=True, dtype=dtype, compensate=True)
    assert_identical((to_numpy(out), to_numpy(lse)), expected)
    again = attend(tensors, block_mask, startend_row_indices=bounds, compensate=True)
    assert_all_identical(again, (out, lse))
    plain = run(tensors, bounds, keep_last=False)
    assert_all_identical(block_mask[None], plain[2][None])
    assert (to_numpy(out) != to_numpy(plain[0])).any()


@pytest.mark.parametrize("which", (0, 1, 2))
def test_a_call_that_would_record_gradients_is_refused(which):
    tensors = to_tensors(make_inputs(CASE))
    block_mask = run(tensors)[2]
    tensors[which].stop_gradient = False
    for attention in (
        lambda **options: run(tensors, **options),
        lambda **options: attend(tensors, block_mask, **options),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            attention(compensate=True)
        assert not attention(compensate=False)[0].stop_gradient
        with paddle.no_grad():
            assert attention(compensate=True)[0].stop_gradient
    assert run(tensors, compensate=True, training=False)[0].stop_gradient


def test_the_layer():
    config = rrattn.RRAttentionConfig(threshold=0.5, compensate=True)
    layer, plain = rrattn.RRAttention(config), rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.5))
    tensors = to_tensors(make_inputs(CASE))
    out = layer(*tensors, causal=True)
    assert_all_identical([out], [run(tensors, threshold=0.5, compensate=True)[0]])
    assert (out != plain(*tensors, causal=True)).any()
    tensors[0].stop_gradient = False
    with pytest.raises(ValueError, match=REFUSED):
        layer(*tensors, causal=True)
    with pytest.raises(ValueError, match=REFUSED):
        recompute(layer, *tensors, causal=True, use_reentrant=False)


@pytest.mark.parametrize("settings", ({"dense_layers": [0]}, {"min_length": 10000}), ids=str)
def test_where_a_layer_attends_every_block_there_is_nothing_to_compensate(settings):
    """So there are gradients."""
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    grads = []
    for compensate in (True, False):
        layer = rrattn.RRAttention(rrattn.RRAttentionConfig(compensate=compensate, **settings))
        grads.append(paddle.grad(layer(*tensors, causal=True).sum(), tensors))
    assert_all_identical(*grads)


def test_the_operators_refuse_the_backward_pass(monkeypatch):
    """As a program may ask for it that no Python has looked at."""
    monkeypatch.setattr(functional, "refuse_inference_gradients", lambda *_: None)
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    out, _, block_mask = run(tensors, compensate=True)
    for attended in (out, attend(tensors, block_mask, compensate=True)[0]):
        with pytest.raises(ValueError, match=REFUSED_BACKWARD):
            attended.sum().backward()


def compensated(query, key, value):
    return run((query, key, value), compensate=True)


def test_a_traced_function_infers_and_refuses_its_backward_pass():
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    with paddle.no_grad():
        expected = compensated(*tensors)
        assert_all_identical(paddle.jit.to_static(compensated, full_graph=True)(*tensors), expected)
    out = paddle.jit.to_static(compensated, full_graph=True)(*tensors)[0]
    assert_all_identical([out], expected[:1])
    with pytest.raises(ValueError, match=REFUSED_BACKWARD):
        out.sum().backward()


def test_saved_programs(tmp_path):
    path = str(tmp_path / "attention")
    heads = CASE.num_heads, CASE.num_heads_k, CASE.num_heads_k
    spec = [
        paddle.static.InputSpec([None, None, h, CASE.head_dim], "float32", name=f"input{i}")
        for i, h in enumerate(heads)
    ]
    layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.5, compensate=True))
    tensors = to_tensors(make_inputs(CASE))
    expected = layer(*tensors)
    assert (expected != rrattn.rr_attention(*tensors, threshold=0.5)).any()
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec, full_graph=True), path)
    assert_all_identical([paddle.jit.load(path)(*tensors)], [expected])
    config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_glog_info()
    assert_all_identical(paddle.inference.create_predictor(config).run(tensors), [expected])


def test_the_published_names_have_none(monkeypatch):
    assert not any(
        config.compensate
        for config in (
            published.PUBLISHED_PREFILL,
            published.PUBLISHED_ESTIMATE,
            published.PUBLISHED_TRAINING,
            published.PUBLISHED_PATCH,
        )
    )
    given = []
    rr_attention = functional.rr_attention

    def noted(*tensors, **options):
        given.append(options["compensate"])
        return rr_attention(*tensors, **options)

    monkeypatch.setattr(functional, "rr_attention", noted)
    states = [x.transpose([0, 2, 1, 3]) for x in to_tensors(make_inputs(CASE))]
    published.rrattn_prefill(*states, causal=True)
    published.rr_attention(*to_tensors(make_inputs(CASE)), causal=True)
    assert given == [False, False]


def test_it_is_off_unless_asked_for():
    for function in (rrattn.rr_attention, rrattn.block_sparse_attention):
        default = inspect.signature(inspect.unwrap(function)).parameters["compensate"].default
        assert default is rrattn.RRAttentionConfig().compensate is functional._DEFAULTS.compensate
    tensors = to_tensors(make_inputs(CASE))
    assert np.isfinite(to_numpy(run(tensors)[1])).all()
