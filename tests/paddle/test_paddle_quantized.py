"""Attention in eight bits through Paddle: as the kernels compute it, and without gradients."""

import paddle
import pytest
from cases import DTYPES, Case, make_inputs
from harness import Kernels, assert_identical
from paddle_harness import CASE, assert_all_identical, bounds_of, run, to_numpy, to_tensors

import rrattn
from rrattn import functional, published, reference

QUANTIZATION = "qk_int8_pv_fp8"
REFUSED = r"quantization is 'qk_int8_pv_fp8'.*no gradients.*quantization=None.*paddle\.no_grad\(\)"
REFUSED_BACKWARD = 'quantization is "qk_int8_pv_fp8", but attention in eight bits has no gradients: .*quantization=None'


def attend(tensors, block_mask, **options):
    return rrattn.block_sparse_attention(*tensors, block_mask, causal=True, return_softmax_lse=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flashmask, sink", ((None, False), ("window_with_full_tail", True)))
def test_both_functions_give_what_the_kernels_give(dtype, flashmask, sink):
    case = Case(500, 1100, num_heads=4, num_heads_k=2, head_dim=32, batch=2, flashmask=flashmask, sink=sink)
    inputs = make_inputs(case, dtype)
    tensors, bounds = to_tensors(inputs, dtype), bounds_of(inputs)
    with_sink = {"sink": paddle.to_tensor(inputs.sink)} if sink else {}
    out, lse, block_mask = run(tensors, bounds, quantization=QUANTIZATION, **with_sink)
    selected = reference.unpack(block_mask.numpy(), case.block_shape[-1])
    arrays = *inputs.forward, selected, inputs.startend
    options = {"causal": True, "dtype": dtype, "sink": inputs.sink, "quantization": QUANTIZATION}
    assert_identical((to_numpy(out), to_numpy(lse)), Kernels().attend(*arrays, **options))
    again = attend(tensors, block_mask, startend_row_indices=bounds, quantization=QUANTIZATION, **with_sink)
    assert_all_identical(again, (out, lse))
    plain = run(tensors, bounds, **with_sink)
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
            attention(quantization=QUANTIZATION)
        assert not attention(quantization=None)[0].stop_gradient
        with paddle.no_grad():
            assert attention(quantization=QUANTIZATION)[0].stop_gradient
    assert run(tensors, quantization=QUANTIZATION, training=False)[0].stop_gradient


def test_the_operators_refuse_the_backward_pass(monkeypatch):
    """As a program may ask for it that no Python has looked at."""
    monkeypatch.setattr(functional, "refuse_inference_gradients", lambda *_: None)
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    out, _, block_mask = run(tensors, quantization=QUANTIZATION)
    for attended in (out, attend(tensors, block_mask, quantization=QUANTIZATION)[0]):
        with pytest.raises(ValueError, match=REFUSED_BACKWARD):
            attended.sum().backward()


def test_the_layer():
    """In a prefill of selected or of all blocks, and not in a decoding step."""
    tensors = to_tensors(make_inputs(CASE))
    settings = {"threshold": 0.5, "quantization": QUANTIZATION}
    out = rrattn.RRAttention(rrattn.RRAttentionConfig(**settings))(*tensors, causal=True)
    assert_all_identical([out], [run(tensors, **settings)[0]])
    dense = rrattn.RRAttention(rrattn.RRAttentionConfig(dense_layers=[0], **settings))
    assert_all_identical([dense(*tensors, causal=True)], [run(tensors, **{**settings, "threshold": 1.0})[0]])
    query, key, value = tensors
    plain = rrattn.RRAttention()
    assert_all_identical(*([layer(query[:, -1:], key, value, causal=True)] for layer in (dense, plain)))
    tensors[0].stop_gradient = False
    for layer in (dense, rrattn.RRAttention(rrattn.RRAttentionConfig(**settings))):
        with pytest.raises(ValueError, match=REFUSED):
            layer(*tensors, causal=True)


def quantized(query, key, value):
    return run((query, key, value), quantization=QUANTIZATION)


def test_a_traced_function_infers_and_refuses_its_backward_pass():
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    traced = paddle.jit.to_static(quantized, full_graph=True)
    with paddle.no_grad():
        expected = quantized(*tensors)
        assert_all_identical(traced(*tensors), expected)
    recording = paddle.jit.to_static(quantized, full_graph=True)
    out = recording(*tensors)[0]
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
    layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.5, quantization=QUANTIZATION))
    tensors = to_tensors(make_inputs(CASE))
    expected = layer(*tensors)
    assert (expected != rrattn.rr_attention(*tensors, threshold=0.5)).any()
    traced = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
    paddle.jit.save(traced, path)
    assert_all_identical([paddle.jit.load(path)(*tensors)], [expected])
    config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_glog_info()
    assert_all_identical(paddle.inference.create_predictor(config).run(tensors), [expected])


def test_it_is_off_unless_asked_for():
    names = ("PREFILL", "ESTIMATE", "TRAINING", "PATCH")
    assert all(getattr(published, f"PUBLISHED_{name}").quantization is None for name in names)
    assert rrattn.RRAttentionConfig().quantization is None
