"""Sinks, values of another head size and gradients through the log-sum-exp in Paddle: functions, layer, programs."""

import itertools
from dataclasses import replace

import numpy as np
import paddle
import pytest
from cases import DTYPES, Case, make_inputs
from harness import Kernels, assert_identical
from paddle.distributed.fleet.utils import recompute
from paddle_harness import THRESHOLD, assert_all_identical, bounds_of, eager_auto_cast, run, to_numpy, to_tensors

import rrattn
from rrattn import reference
from rrattn.integrations.common import attend as attend_in_a_model

CASE = Case(300, 500, num_heads=4, num_heads_k=2, head_dim=32, batch=2, head_dim_v=72, sink=True, grad_lse=True)
FLASH_MASKED = replace(CASE, flashmask="window_with_full_tail", head_dim_v=None)
LENGTHS = {"seqlen_q": CASE.seqlen_q, "seqlen_k": CASE.seqlen_k}
each_function = pytest.mark.parametrize("function", ("rr_attention", "block_sparse_attention"))


def leaves_of(inputs, dtype="float32", requires_grad="query key value sink"):
    """Query, key, value and sink; gradients of those named here."""
    leaves = [*to_tensors(inputs, dtype), paddle.to_tensor(inputs.sink)]
    for leaf, name in zip(leaves, ("query", "key", "value", "sink")):
        leaf.stop_gradient = name not in requires_grad
    return leaves


def attend(function, query, key, value, sink, bounds=None, block_mask=None, **options):
    """(out, lse, block mask) of either function."""
    if function == "rr_attention":
        return run((query, key, value), bounds, sink=sink, **options)
    if block_mask is None:
        block_mask = paddle.to_tensor(reference.pack(make_inputs(CASE).block_mask))
    results = rrattn.block_sparse_attention(
        query, key, value, block_mask, bounds, causal=True, sink=sink, return_softmax_lse=True, **options
    )
    return *results, block_mask


def backward_of_kernels(inputs, block_mask, dtype="float32", **changes):
    """The gradients that the kernels give without Paddle."""
    selected = reference.unpack(block_mask.numpy(), CASE.block_shape[-1])
    options = {"sink": inputs.sink, "grad_lse": inputs.grad_lse, **changes}
    grad_out = options.pop("grad_out", inputs.grad_out)
    return Kernels().backward(*inputs.forward, selected, grad_out, inputs.startend, causal=True, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (CASE, FLASH_MASKED), ids=str)
@each_function
def test_functions_give_what_the_kernels_give(function, case, dtype):
    inputs = make_inputs(case, dtype)
    leaves, bounds = leaves_of(inputs, dtype), bounds_of(inputs)
    out, lse, block_mask = attend(function, *leaves, bounds)
    arrays = *inputs.forward, reference.unpack(block_mask.numpy(), case.block_shape[-1]), inputs.startend
    assert_identical(
        (to_numpy(out), to_numpy(lse)), Kernels().attend(*arrays, causal=True, dtype=dtype, sink=inputs.sink)
    )
    given = [paddle.to_tensor(inputs.grad_out).astype(dtype), paddle.to_tensor(inputs.grad_lse)]
    grads = paddle.grad([out, lse], leaves, given)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    assert_identical(tuple(map(to_numpy, grads)), backward_of_kernels(inputs, block_mask, dtype))


def test_the_estimate_and_the_selection_know_the_sink():
    inputs = make_inputs(CASE)
    query, key, value, sink = leaves_of(inputs)
    scores = rrattn.estimate_block_scores(query, key, causal=True, sink=sink)
    assert scores.stop_gradient
    assert_identical(scores.numpy(), Kernels().estimate(*inputs.forward[:2], causal=True, sink=inputs.sink))
    assert (scores.sum(-1) < rrattn.estimate_block_scores(query, key, causal=True).sum(-1)).all()
    selected = rrattn.select_blocks(scores, THRESHOLD, causal=True, **LENGTHS)
    assert_all_identical([run((query, key, value), sink=sink)[2]], [selected])


@each_function
@pytest.mark.parametrize("static", (False, True), ids=("eager", "static"))
@pytest.mark.parametrize(
    "with_sink, requires_grad",
    (
        (True, "query key value sink"),
        (True, "sink"),
        (True, "query"),
        (True, "value sink"),
        (False, "query key value"),
        (False, "key"),
    ),
)
@pytest.mark.parametrize("used", ("out", "lse", "out lse"))
def test_any_input_may_want_a_gradient_and_any_output_may_have_one(function, static, with_sink, requires_grad, used):
    inputs = make_inputs(CASE)
    leaves = leaves_of(inputs, requires_grad=requires_grad)
    if not with_sink:
        leaves[3], inputs = None, replace(inputs, sink=None)
    wanted = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and not leaf.stop_gradient}

    def forward(query, key, value, sink):
        return attend(function, query, key, value, sink)

    out, lse, block_mask = (paddle.jit.to_static(forward, full_graph=True) if static else forward)(*leaves)
    outputs = {"out": (out, inputs.grad_out), "lse": (lse, inputs.grad_lse)}
    results, given = zip(*(outputs[name] for name in used.split()))
    grads = paddle.grad(list(results), list(wanted.values()), [paddle.to_tensor(x) for x in given])
    changes = {}
    if "lse" not in used:
        changes["grad_lse"] = None
    if "out" not in used:
        changes["grad_out"] = np.zeros_like(inputs.grad_out)
    expected = backward_of_kernels(inputs, block_mask, **changes)
    for (i, leaf), grad in zip(wanted.items(), grads):
        assert grad.shape == leaf.shape
        assert_identical(grad.numpy(), expected[i])


@each_function
def test_a_transposed_log_sum_exp_gives_its_gradient(function):
    inputs = make_inputs(CASE)
    grads = []
    for order in ([0, 1, 2], [0, 2, 1]):
        leaves = leaves_of(inputs)
        lse = attend(function, *leaves)[1].transpose(order)
        given = paddle.to_tensor(inputs.grad_lse.transpose(order))
        grads.append(paddle.grad([lse], leaves, [given]))
    assert_all_identical(*grads)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@each_function
def test_sinks_of_16_bits_are_cast(function, dtype):
    """As parameters of a model in that dtype; so is their gradient."""
    inputs = make_inputs(CASE, dtype)
    sink = paddle.to_tensor(reference.cast(inputs.sink, dtype)).astype(dtype)
    sink.stop_gradient = False
    query, key, value, _ = leaves_of(inputs, dtype)
    out, lse, block_mask = attend(function, query, key, value, sink)
    in_float32 = sink.detach().astype("float32")
    in_float32.stop_gradient = False
    expected = attend(function, query, key, value, in_float32)
    assert_all_identical((out, lse, block_mask), expected)
    grad = paddle.grad(out.sum(), sink)[0]
    assert grad.dtype == sink.dtype
    assert_all_identical([grad], [paddle.grad(expected[0].sum(), in_float32)[0].astype(dtype)])
    scores = [rrattn.estimate_block_scores(query, key, causal=True, sink=x) for x in (sink, in_float32)]
    assert_all_identical(scores[:1], scores[1:])


def test_auto_cast_leaves_the_sink_in_float32():
    inputs = make_inputs(CASE)
    leaves = leaves_of(inputs)
    with eager_auto_cast("O1"):
        actual = run(leaves[:3], sink=leaves[3])
    assert_all_identical(actual, run([x.astype("bfloat16") for x in leaves[:3]], sink=leaves[3]))


@each_function
def test_compensation_is_refused_where_the_sink_wants_a_gradient(function):
    leaves = leaves_of(make_inputs(CASE), requires_grad="sink")
    with pytest.raises(ValueError, match=r"compensate is True.*sink asks for them.*compensate=False"):
        attend(function, *leaves, compensate=True)
    with paddle.no_grad():
        out, lse, block_mask = attend(function, *leaves, compensate=True)
    inputs = make_inputs(CASE)
    arrays = *inputs.forward, reference.unpack(block_mask.numpy(), CASE.block_shape[-1])
    expected = Kernels().attend(*arrays, causal=True, compensate=True, sink=inputs.sink)
    assert_identical((out.numpy(), lse.numpy()), expected)


@each_function
def test_second_order_gradients_are_refused(function):
    leaves = leaves_of(make_inputs(CASE))
    for results in itertools.chain(*([attend(function, *leaves)[:2]])):
        grads = paddle.grad(results.sum(), leaves, create_graph=True, allow_unused=True)
        with pytest.raises(NotImplementedError, match="no second-order gradients.*create_graph=True"):
            sum((grad * grad).sum() for grad in grads if grad is not None).backward()


@each_function
def test_without_gradients_nothing_is_recorded(function):
    with paddle.no_grad():
        assert all(x.stop_gradient for x in attend(function, *leaves_of(make_inputs(CASE))))
    assert all(x.stop_gradient for x in run(leaves_of(make_inputs(CASE))[:3], training=False, sink=None))


@pytest.mark.parametrize("bad", (np.zeros(4, np.float32), [0.0] * 4, 1.0))
@each_function
def test_what_is_no_tensor_is_refused(function, bad):
    query, key, value, _ = leaves_of(make_inputs(CASE))
    with pytest.raises(TypeError, match=f"sink is a {type(bad).__name__}, but must be a paddle.Tensor"):
        attend(function, query, key, value, bad)


# The layer


class Attention(paddle.nn.Layer):
    """A layer with sinks of its own, as models have them."""

    def __init__(self, **settings):
        super().__init__()
        self.sink = self.create_parameter([CASE.num_heads])
        self.sink.set_value(make_inputs(CASE).sink)
        self.attention = rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=THRESHOLD, **settings))

    def forward(self, query, key, value):
        return self.attention(query, key, value, causal=True, sink=self.sink)


@pytest.mark.parametrize("settings", ({}, {"dense_layers": [0]}, {"min_length": 10000}), ids=str)
def test_the_layer(settings):
    inputs = make_inputs(CASE)
    layer, leaves = Attention(**settings), leaves_of(inputs)
    out = layer(*leaves[:3])
    expected = run(leaves[:3], sink=leaves[3], threshold=1.0 if settings else THRESHOLD)
    assert_all_identical([out, layer.attention.last_selection.block_mask.bitwise_and(expected[2])], expected[::2])
    given = paddle.to_tensor(inputs.grad_out)
    grads = paddle.grad(out, [*leaves[:3], layer.sink], given)
    assert_all_identical(grads, paddle.grad(expected[0], leaves, given))


def test_the_layer_has_gradients_of_the_sink_alone():
    layer = Attention()
    out = layer(*to_tensors(make_inputs(CASE)))
    out.sum().backward()
    assert np.abs(layer.sink.grad.numpy()).min() > 0


def test_a_decoding_step_has_the_sink():
    inputs = make_inputs(CASE)
    query, key, value, sink = leaves_of(inputs)
    out = rrattn.RRAttention()(query[:, -1:], key, value, causal=True, sink=sink)
    everything = np.ones((CASE.batch, CASE.num_heads, 1, CASE.block_shape[-1]), bool)
    expected = reference.attend(inputs.query[:, -1:], *inputs.forward[1:], everything, causal=True, sink=inputs.sink)
    np.testing.assert_allclose(out.numpy(), expected[0], atol=1e-5)


def test_models_pass_it_on():
    query, key, value, sink = leaves_of(make_inputs(CASE))
    core = rrattn.RRAttention()
    out = attend_in_a_model(core, query, key, value, None, None, causal=True, sink=sink)
    assert_all_identical([out], [core(query, key, value, causal=True, sink=sink)])
    assert (out != core(query, key, value, causal=True)).any()


# Programs


def input_spec():
    """Any batch and lengths."""
    sizes = (
        ("query", CASE.num_heads, CASE.head_dim),
        ("key", CASE.num_heads_k, CASE.head_dim),
        ("value", CASE.num_heads_k, CASE.head_dim_v),
    )
    return [paddle.static.InputSpec([None, None, heads, dim], "float32", name=name) for name, heads, dim in sizes]


def test_traced_forward_and_backward():
    inputs = make_inputs(CASE)
    results = []
    for static in (False, True):
        layer, leaves = Attention(), leaves_of(inputs)[:3]
        out = (paddle.jit.to_static(layer, full_graph=True) if static else layer)(*leaves)
        out.backward(paddle.to_tensor(inputs.grad_out))
        results.append((out, *(leaf.grad for leaf in leaves), layer.sink.grad))
    assert_all_identical(*results)


def test_shapes_of_a_program():
    seen = {}

    def stages(query, key, value, sink):
        out, lse, mask = run((query, key, value), sink=sink)
        attended = rrattn.block_sparse_attention(query, key, value, mask, causal=True, sink=sink)
        scores = rrattn.estimate_block_scores(query, key, causal=True, sink=sink)
        seen.update(out=out, lse=lse, mask=mask, attended=attended, scores=scores)
        return out

    spec = [*input_spec(), paddle.static.InputSpec([CASE.num_heads], "float32", name="sink")]
    program = paddle.jit.to_static(stages, input_spec=spec, full_graph=True).concrete_program
    assert program is not None
    out = [-1, -1, CASE.num_heads, CASE.head_dim_v]
    expected = {"out": out, "attended": out, "lse": [-1, 4, -1], "mask": [-1, 4, -1, -1], "scores": [-1, 4, -1, -1]}
    assert {name: list(value.shape) for name, value in seen.items()} == expected


def test_saved_and_loaded(tmp_path):
    path = str(tmp_path / "attention")
    layer = Attention()
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=input_spec(), full_graph=True), path)
    loaded = paddle.jit.load(path)
    config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    for seqlen_q, seqlen_k in ((300, 500), (129, 129)):
        tensors = to_tensors(make_inputs(replace(CASE, seqlen_q=seqlen_q, seqlen_k=seqlen_k)))
        expected = [layer(*tensors)]
        assert_all_identical([loaded(*tensors)], expected)
        assert_all_identical(predictor.run(tensors), expected)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_recompute(use_reentrant):
    inputs = make_inputs(CASE)
    results = []
    for again in (False, True):
        layer, leaves = Attention(), leaves_of(inputs)[:3]
        out = recompute(layer, *leaves, use_reentrant=use_reentrant) if again else layer(*leaves)
        out.backward(paddle.to_tensor(inputs.grad_out))
        results.append((out, *(leaf.grad for leaf in leaves), layer.sink.grad))
    assert_all_identical(*results)
