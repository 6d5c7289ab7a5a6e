"""Settings for inference alone, compensation and eight bits: as the kernels compute them, and without gradients."""

import paddle
import pytest
from cases import DTYPES, Case, make_inputs
from harness import Kernels, assert_identical
from paddle_harness import CASE, assert_all_identical, attend, bounds_of, run, to_numpy, to_tensors

import rrattn
from rrattn import functional, reference

# setting: on, off
SETTINGS = {"compensate": (True, False), "quantization": ("qk_int8_pv_fp8", None)}
REFUSED_BACKWARD = {
    "compensate": "compensate is True, but attention that is compensated has no gradients: .*compensate=False",
    "quantization": (
        'quantization is "qk_int8_pv_fp8", but attention in eight bits has no gradients: .*quantization=None'
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flashmask, sink", ((None, False), ("window_with_full_tail", True)))
@pytest.mark.parametrize("name", SETTINGS)
def test_both_functions_give_what_the_kernels_give(name, flashmask, sink, dtype):
    case = Case(500, 1100, num_heads=4, num_heads_k=2, head_dim=32, batch=2, flashmask=flashmask, sink=sink)
    inputs = make_inputs(case, dtype)
    tensors, bounds = to_tensors(inputs, dtype), bounds_of(inputs)
    setting = {name: SETTINGS[name][0]}
    with_sink = {"sink": paddle.to_tensor(inputs.sink)} if sink else {}
    out, lse, block_mask = run(tensors, bounds, keep_last=False, **setting, **with_sink)
    selected = reference.unpack(block_mask.numpy(), case.block_shape[-1])
    arrays = *inputs.forward, selected, inputs.startend
    expected = Kernels().attend(*arrays, causal=True, dtype=dtype, sink=inputs.sink, **setting)
    assert_identical((to_numpy(out), to_numpy(lse)), expected)
    again = attend(tensors, block_mask, startend_row_indices=bounds, **setting, **with_sink)
    assert_all_identical(again, (out, lse))
    plain = run(tensors, bounds, keep_last=False, **with_sink)
    assert_all_identical(block_mask[None], plain[2][None])
    assert (to_numpy(out) != to_numpy(plain[0])).any()


@pytest.mark.parametrize("which", (0, 1, 2))
@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_that_would_record_gradients_is_refused(name, which):
    on, off = SETTINGS[name]
    tensors = to_tensors(make_inputs(CASE))
    block_mask = run(tensors)[2]
    tensors[which].stop_gradient = False
    for attention in (
        lambda **options: run(tensors, **options),
        lambda **options: attend(tensors, block_mask, **options),
    ):
        message = rf"{name} is {on!r}.*no gradients.*{name}={off}.*paddle\.no_grad\(\)"
        with pytest.raises(ValueError, match=message):
            attention(**{name: on})
        assert not attention(**{name: off})[0].stop_gradient
        with paddle.no_grad():
            assert attention(**{name: on})[0].stop_gradient
    assert run(tensors, **{name: on}, training=False)[0].stop_gradient


@pytest.mark.parametrize("name", SETTINGS)
def test_the_operators_refuse_the_backward_pass(name, monkeypatch):
    """As a program may ask for it that no Python has looked at."""
    monkeypatch.setattr(functional, "refuse_inference_gradients", lambda *_: None)
    setting = {name: SETTINGS[name][0]}
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    out, _, block_mask = run(tensors, **setting)
    for attended in (out, attend(tensors, block_mask, **setting)[0]):
        with pytest.raises(ValueError, match=REFUSED_BACKWARD[name]):
            attended.sum().backward()


def compensated(query, key, value):
    return run((query, key, value), compensate=True)


def quantized(query, key, value):
    return run((query, key, value), quantization="qk_int8_pv_fp8")


@pytest.mark.parametrize("name, function", zip(SETTINGS, (compensated, quantized)), ids=SETTINGS)
def test_a_traced_function_infers_and_refuses_its_backward_pass(name, function):
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    with paddle.no_grad():
        expected = function(*tensors)
        assert_all_identical(paddle.jit.to_static(function, full_graph=True)(*tensors), expected)
    out = paddle.jit.to_static(function, full_graph=True)(*tensors)[0]
    assert_all_identical([out], expected[:1])
    with pytest.raises(ValueError, match=REFUSED_BACKWARD[name]):
        out.sum().backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_programs(name, tmp_path):
    path = str(tmp_path / "attention")
    heads = CASE.num_heads, CASE.num_heads_k, CASE.num_heads_k
    spec = [
        paddle.static.InputSpec([None, None, h, CASE.head_dim], "float32", name=f"input{i}")
        for i, h in enumerate(heads)
    ]
    layer = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.5, **{name: SETTINGS[name][0]}))
    tensors = to_tensors(make_inputs(CASE))
    expected = layer(*tensors)
    assert (expected != rrattn.rr_attention(*tensors, threshold=0.5)).any()
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec, full_graph=True), path)
    assert_all_identical([paddle.jit.load(path)(*tensors)], [expected])
    config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_glog_info()
    assert_all_identical(paddle.inference.create_predictor(config).run(tensors), [expected])
