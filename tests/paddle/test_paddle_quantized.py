"""Attention in eight bits through Paddle: as the kernels compute it, and without gradients."""

import pytest
from cases import make_inputs
from paddle_harness import CASE, assert_all_identical, run, to_tensors

import rrattn
from rrattn import published

QUANTIZATION = "qk_int8_pv_fp8"
REFUSED = r"quantization is 'qk_int8_pv_fp8'.*no gradients.*quantization=None.*paddle\.no_grad\(\)"


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


def test_it_is_off_unless_asked_for():
    names = ("PREFILL", "ESTIMATE", "TRAINING", "PATCH")
    assert all(getattr(published, f"PUBLISHED_{name}").quantization is None for name in names)
    assert rrattn.RRAttentionConfig().quantization is None
