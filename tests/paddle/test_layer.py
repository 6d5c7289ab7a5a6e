"""The nn.Layer: the functional op with a config, dense decoding, and the view on its last selection."""

import dataclasses

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import layer as layer_module
from rrattn import masks

CONFIG = rrattn.RRAttentionConfig(
    threshold=0.4, stride=16, key_stride=4, keep_last=True, keep_local=1, min_share=0.5, head_offset=3, spread=0.5
)


def make_inputs(seqlen_q=700, seqlen_k=700, heads=4, kv_heads=2, head_dim=32, batch=2, seed=0):
    """Random inputs of six blocks; a low threshold leaves some of them out."""
    paddle.seed(seed)
    key = paddle.randn([batch, seqlen_k, kv_heads, head_dim])
    value = paddle.randn([batch, seqlen_k, kv_heads, head_dim])
    query = 2 * paddle.randn([batch, seqlen_q, heads, head_dim])
    return query, key, value


def dense_attention(query, key, value, causal=True, scale=None):
    """Plain softmax attention in NumPy float64; [B, Lq, Hq, D]."""
    q, k, v = (tensor.numpy().astype(np.float64).transpose(0, 2, 1, 3) for tensor in (query, key, value))
    k, v = (np.repeat(array, q.shape[1] // array.shape[1], axis=1) for array in (k, v))
    logits = q @ k.transpose(0, 1, 3, 2) * (scale or q.shape[-1] ** -0.5)
    if causal:
        hidden = np.arange(k.shape[2]) > np.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        logits = np.where(hidden, -np.inf, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("causal", [True, False])
def test_layer_is_the_function_with_its_config(causal):
    query, key, value = make_inputs()
    layer = rrattn.RRAttention(CONFIG)
    settings = dataclasses.asdict(CONFIG)
    del settings["dense_layers"], settings["min_length"]  # the layer's alone
    expected, block_mask = rrattn.rr_attention(query, key, value, causal=causal, return_block_mask=True, **settings)
    assert (layer(query, key, value, causal=causal) == expected).all()
    assert (layer.last_selection.block_mask == block_mask).all()
    density = rrattn.block_density(block_mask, causal=causal, seqlen_q=700, seqlen_k=700)
    assert (layer.last_density == density).all()
    assert float(density.min()) < 1


@pytest.mark.parametrize("deterministic", (True, False, None))
@pytest.mark.parametrize(
    "settings, function", (({}, "rr_attention"), ({"dense_layers": [0]}, "block_sparse_attention")), ids=str
)
def test_the_layer_passes_deterministic_on(settings, function, deterministic, monkeypatch):
    given, attend = [], getattr(layer_module, function)

    def noted(*tensors, **options):
        given.append(options)
        return attend(*tensors, **options)

    monkeypatch.setattr(layer_module, function, noted)
    rrattn.RRAttention(rrattn.RRAttentionConfig(deterministic=deterministic, **settings))(*make_inputs())
    assert [options["deterministic"] for options in given] == [deterministic]


def test_threshold_argument_replaces_the_config():
    query, key, value = make_inputs()
    config = rrattn.RRAttentionConfig(threshold=[0.2, 0.9])
    with pytest.raises(ValueError, match="2"):
        rrattn.RRAttention(config)
    layers = [rrattn.RRAttention(config, threshold=threshold) for threshold in (0.2, 1.0)]
    outputs = [layer(query, key, value, causal=True) for layer in layers]
    np.testing.assert_allclose(outputs[1].numpy(), dense_attention(query, key, value), atol=2e-5)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="1.5"):
        rrattn.RRAttention(threshold=1.5)


def test_one_threshold_per_head():
    query, key, value = make_inputs()
    layer = rrattn.RRAttention(threshold=(1.0, 0.1, 1.0, 0.1))
    out = layer(query, key, value, causal=True)
    dense = dense_attention(query, key, value)
    np.testing.assert_allclose(out.numpy()[:, :, ::2], dense[:, :, ::2], atol=2e-5)
    assert (layer.last_density.numpy()[:, ::2] == 1).all()
    assert (layer.last_density.numpy()[:, 1::2] < 1).all()
    again = layer(query, key, value, causal=True)  # the tensor of thresholds is reused
    assert (again == out).all()


@pytest.mark.parametrize("seqlen_k", [2, 128, 129, 5000])
def test_decoding_attends_every_block(seqlen_k):
    query, key, value = make_inputs(seqlen_q=1, seqlen_k=seqlen_k)
    layer = rrattn.RRAttention(threshold=0.01)
    out = layer(query, key, value, causal=True)
    np.testing.assert_allclose(out.numpy(), dense_attention(query, key, value), atol=2e-5)
    assert layer.last_selection is None and layer.last_density is None


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"dense_layers": (0,)}, True),
        ({"min_length": 701}, True),
        ({"min_length": 700}, False),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_kept_dense_and_short(settings, dense, causal):
    query, key, value = make_inputs()
    layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.01, **settings))
    out = layer(query, key, value, causal=causal).numpy()
    expected = dense_attention(query, key, value, causal)
    if dense:
        np.testing.assert_allclose(out, expected, atol=2e-5)
        assert (layer.last_density == 1).all()
    else:
        assert np.abs(out - expected).max() > 1e-2
        assert (layer.last_density < 1).all()


def test_kept_dense_has_the_gradients_of_threshold_one():
    gradients = []
    for config in (rrattn.RRAttentionConfig(dense_layers=[0]), rrattn.RRAttentionConfig(threshold=1.0)):
        inputs = make_inputs()
        for tensor in inputs:
            tensor.stop_gradient = False
        rrattn.RRAttention(config)(*inputs, causal=True).square().sum().backward()
        gradients.append([tensor.grad.numpy() for tensor in inputs])
    for ours, expected in zip(*gradients):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_layers": 3}, "dense_layers is 3"),
        ({"dense_layers": [-1]}, r"dense_layers is \[-1\]"),
        ({"dense_layers": [True]}, r"dense_layers is \[True\]"),
        ({"min_length": -1}, "min_length is -1"),
        ({"min_length": 0.5}, "min_length is 0.5"),
    ],
)
def test_settings_that_are_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        rrattn.RRAttentionConfig(**settings)


def test_decoding_honours_row_bounds_and_scale():
    query, key, value = make_inputs(seqlen_q=1, seqlen_k=200)
    keep = paddle.ones([2, 200])
    keep[:, :70] = 0
    rows = masks.padding_startend_rows(keep, seqlen_q=1)
    out = rrattn.RRAttention()(query, key, value, rows, causal=True, softmax_scale=0.3)
    expected = dense_attention(query, key[:, 70:], value[:, 70:], scale=0.3)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)


def test_scale_of_the_config_comes_first():
    query, key, value = make_inputs()
    layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=1.0, softmax_scale=0.5))
    expected = dense_attention(query, key, value, scale=0.5)
    np.testing.assert_allclose(layer(query, key, value, causal=True, softmax_scale=0.1).numpy(), expected, atol=2e-5)


def test_gradients_flow_in_train_and_eval_but_not_under_no_grad():
    layer = rrattn.RRAttention(threshold=0.5)
    gradients = []
    for mode in (layer.train, layer.eval):
        mode()
        inputs = make_inputs()
        for tensor in inputs:
            tensor.stop_gradient = False
        layer(*inputs, causal=True).square().sum().backward()
        gradients.append([tensor.grad.numpy() for tensor in inputs])
        with paddle.no_grad():
            assert layer(*inputs, causal=True).stop_gradient
    for in_train, in_eval in zip(*gradients):
        assert np.abs(in_train).max() > 0
        np.testing.assert_array_equal(in_train, in_eval)
    assert layer(*make_inputs()).stop_gradient


def test_density_under_row_bounds():
    query, key, value = make_inputs()
    rows = masks.document_startend_rows([[300, 400], [100, 500]])
    sizes = {"causal": True, "seqlen_q": 700, "seqlen_k": 700}
    layer = rrattn.RRAttention(threshold=0.4)
    _, mask = rrattn.rr_attention(query, key, value, rows, causal=True, threshold=0.4, return_block_mask=True)
    layer(query, key, value, rows, causal=True)
    assert (layer.last_density == rrattn.block_density(mask, rows, **sizes)).all()
    assert (layer.last_density > rrattn.block_density(mask, **sizes)).all()
    assert (layer.last_selection.startend_row_indices == rows).all()
    for dense in (rrattn.RRAttention(threshold=1.0), rrattn.RRAttention(rrattn.RRAttentionConfig(dense_layers=(0,)))):
        dense(query, key, value, rows, causal=True)
        assert (dense.last_density == 1).all()


@pytest.mark.parametrize("change", (lambda rows: rows.fill_(700), lambda rows: rows.set_value(rows.numpy() * 0 + 700)))
def test_row_bounds_changed_after_the_call_are_not_counted_with(change):
    query, key, value = make_inputs()
    rows = masks.document_startend_rows([[300, 400], [100, 500]])
    layer = rrattn.RRAttention(threshold=1.0)
    layer(query, key, value, rows, causal=True)
    change(rows)
    assert (layer.last_density == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_large_mask_is_reduced_to_its_density(monkeypatch, packed):
    query, key, value = make_inputs()
    rows = masks.document_startend_rows([[300, 400], [100, 500]]) if packed else None
    layer = rrattn.RRAttention(threshold=0.5)
    layer(query, key, value, rows, causal=True)
    kept = layer.last_selection
    size = kept.block_mask.size + (rows.size if packed else 0)
    monkeypatch.setattr(layer_module, "MASK_BYTES_KEPT", size * 4)
    layer(query, key, value, rows, causal=True)
    assert layer.last_selection.block_mask is not None
    monkeypatch.setattr(layer_module, "MASK_BYTES_KEPT", size * 4 - 1)
    layer(query, key, value, rows, causal=True)
    assert layer.last_selection.block_mask is None and layer.last_selection.startend_row_indices is None
    assert (layer.last_density == kept.density).all()


def test_layer_has_no_state():
    layer = rrattn.RRAttention(threshold=(0.5, 0.6, 0.7, 0.8))
    layer(*make_inputs())
    assert not layer.state_dict() and not layer.parameters()
    assert "0.7" in repr(layer)


def test_traced_layer_equals_the_eager_one():
    query, key, value = make_inputs()
    expected = rrattn.RRAttention(threshold=(0.5, 0.6, 0.7, 0.8))(query, key, value)
    layer = rrattn.RRAttention(threshold=(0.5, 0.6, 0.7, 0.8))
    traced = paddle.jit.to_static(layer, full_graph=True)
    assert (traced(query, key, value) == expected).all()
    assert layer.last_selection is None


def test_traced_layer_with_open_sizes_selects():
    sizes = [paddle.static.InputSpec([None, None, heads, 32], "float32") for heads in (4, 2, 2)]
    query, key, value = make_inputs()
    for settings, equal in (({"dense_layers": (0,)}, 1.0), ({"min_length": 5000}, 0.3)):
        layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.3, **settings))
        expected = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=equal))(query, key, value)
        traced = paddle.jit.to_static(layer, full_graph=True, input_spec=sizes)
        assert (traced(query, key, value) == expected).all()
