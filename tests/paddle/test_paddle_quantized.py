"""Attention in eight bits through Paddle: as the kernels compute it, and without gradients."""

import paddle
import pytest
from cases import make_inputs
from paddle_harness import CASE, assert_all_identical, attend, run, to_tensors

import rrattn
from rrattn import functional, published

QUANTIZATION = "qk_int8_pv_fp8"
REFUSED = r"quantization is 'qk_int8_pv_fp8'.*no gradients.*quantization=None.*paddle\.no_grad\(\)"
REFUSED_BACKWARD = 'quantization is "qk_int8_pv_fp8", but attention in eight bits has no gradients: .*quantization=None'


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
