"""The operators in Paddle's machinery: traced, saved, in the inference predictor, recomputed, in mixed precision."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from cases import Case, make_inputs
from paddle.distributed.fleet.utils import recompute
from paddle_harness import CASE, assert_all_identical, bounds_of, eager_auto_cast, gradients, run, to_tensors

import rrattn

# Traced and saved


class Attention(paddle.nn.Layer):
    """rr_attention with a threshold for each head that is saved along."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", paddle.to_tensor([0.3, 0.5, 0.7, 0.9]))

    def forward(self, query, key, value, startend_row_indices=None):
        out, lse, mask = run((query, key, value), startend_row_indices, threshold=self.threshold)
        return out, lse, mask


def input_spec(with_bounds):
    """Any batch and lengths, CASE's heads."""
    spec = [
        paddle.static.InputSpec([None, None, heads, CASE.head_dim], "float32", name=name)
        for name, heads in (("query", CASE.num_heads), ("key", CASE.num_heads_k), ("value", CASE.num_heads_k))
    ]
    bounds = paddle.static.InputSpec([None, 1, None, 2], "int32", name="startend_row_indices")
    return [*spec, bounds] if with_bounds else spec


def saved_cases(with_bounds):
    """Inputs of more than one shape for one program."""
    for seqlen_q, seqlen_k in ((300, 500), (129, 129)):
        flashmask = "window_with_full_tail" if with_bounds else None
        case = Case(seqlen_q, seqlen_k, num_heads=4, num_heads_k=2, head_dim=32, flashmask=flashmask)
        inputs = make_inputs(case)
        yield [*to_tensors(inputs), *([bounds_of(inputs)] if with_bounds else [])]


def test_traced_forward_and_backward():
    inputs = make_inputs(CASE)
    results = []
    for layer in (Attention(), paddle.jit.to_static(Attention(), full_graph=True)):
        tensors = to_tensors(inputs, requires_grad=True)
        out, lse, mask = layer(*tensors)
        results.append((out, lse, mask, *gradients(out, tensors, inputs.grad_out)))
    assert_all_identical(*results)


def test_traced_inference():
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)

    def infer(query, key, value):
        return run((query, key, value), training=False)

    traced = paddle.jit.to_static(infer, full_graph=True)(*tensors)
    assert_all_identical(traced, run(tensors))
    assert all(x.stop_gradient for x in traced)


@pytest.mark.parametrize("sizes_known", (True, False))
def test_shapes_and_dtypes_of_a_program(sizes_known):
    """What Paddle infers while it traces, before anything runs."""
    traced_values = {}

    def stages(query, key, value):
        scores = rrattn.estimate_block_scores(query, key, causal=True)
        out, lse, mask = run((query, key, value))
        selected = rrattn.select_blocks(scores, 0.5, causal=True, seqlen_q=300, seqlen_k=4200)
        attended = rrattn.block_sparse_attention(query, key, value, selected, causal=True, return_softmax_lse=True)
        values = {"scores": scores, "out": out, "lse": lse, "mask": mask, "selected": selected}
        values.update(attended=attended[0], attended_lse=attended[1])
        traced_values.update(values)
        return out

    spec = input_spec(with_bounds=False)
    if sizes_known:
        lengths = 300, 4200, 4200
        spec = [paddle.static.InputSpec([2, n, *x.shape[2:]], x.dtype) for n, x in zip(lengths, spec)]
    program = paddle.jit.to_static(stages, input_spec=spec, full_graph=True).concrete_program
    assert program is not None
    batch, seqlen_q, num_q_blocks, num_k_blocks, words = (2, 300, 3, 33, 2) if sizes_known else [-1] * 5
    float32, int32 = str(paddle.pir.core.DataType.FLOAT32), str(paddle.pir.core.DataType.INT32)
    expected = {
        "scores": ([batch, 4, num_q_blocks, num_k_blocks], float32),
        "out": ([batch, seqlen_q, 4, 32], float32),
        "lse": ([batch, 4, seqlen_q], float32),
        "mask": ([batch, 4, num_q_blocks, words], int32),
    }
    expected.update(selected=expected["mask"], attended=expected["out"], attended_lse=expected["lse"])
    assert {name: (list(x.shape), str(x.dtype)) for name, x in traced_values.items()} == expected


@pytest.fixture(params=(False, True), ids=("plain", "flashmask"))
def saved(request, tmp_path):
    """(path of a saved program, inputs to run it with)."""
    path = str(tmp_path / "attention")
    traced = paddle.jit.to_static(Attention(), input_spec=input_spec(request.param), full_graph=True)
    paddle.jit.save(traced, path)
    return path, saved_cases(request.param)


def test_saved_and_loaded(saved):
    path, cases = saved
    loaded = paddle.jit.load(path)
    for tensors in cases:
        assert_all_identical(loaded(*tensors), Attention()(*tensors))


def test_inference_predictor(saved):
    path, cases = saved
    config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    for tensors in cases:
        assert_all_identical(predictor.run(tensors), Attention()(*tensors))


RUN_SAVED = {
    "jit.load": "outputs = paddle.jit.load(path)(*tensors)",
    "inference": """config = paddle.inference.Config(f"{path}.json", f"{path}.pdiparams")
outputs = paddle.inference.create_predictor(config).run(tensors)""",
}


@pytest.mark.parametrize("loader", RUN_SAVED)
@pytest.mark.parametrize("imported", (True, False), ids=("rrattn imported", "rrattn not imported"))
def test_a_saved_program_in_another_process(saved, loader, imported):
    """It takes an import of rrattn: without it Paddle has no such operators, and its loader does not check."""
    path, cases = saved
    tensors = next(cases)
    np.savez(f"{path}.npz", *(tensor.numpy() for tensor in tensors))
    program = f"""
import numpy as np, paddle
{"import rrattn" if imported else ""}
path = {path!r}
tensors = [paddle.to_tensor(array) for array in np.load(path + ".npz").values()]
{RUN_SAVED[loader]}
np.savez(path + ".out.npz", *(output.numpy() for output in outputs))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (result.returncode == 0) == imported, result.stderr
    if imported:
        outputs = [paddle.to_tensor(array) for array in np.load(f"{path}.out.npz").values()]
        assert_all_identical(outputs, Attention()(*tensors))


def test_a_program_of_another_version(saved):
    """Saved where the operator did not have keep_local yet."""
    path, cases = saved
    program, count = re.subn(r'\{[^{}]*\{[^{}]*\},"N":"keep_local"\},', "", Path(f"{path}.json").read_text())
    assert count == 1
    Path(f"{path}.json").write_text(program)
    with pytest.raises(RuntimeError, match="keep_local"):
        paddle.jit.load(path)(*next(cases))


# In training


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_recompute(use_reentrant):
    """The forward pass that runs again selects the same blocks, and gradients are those without recompute."""
    inputs = make_inputs(CASE)
    masks = []

    def attention(*tensors):
        out, _, mask = run(tensors)
        masks.append(mask)
        return out

    results = []
    for forward in (attention, lambda *tensors: recompute(attention, *tensors, use_reentrant=use_reentrant)):
        tensors = to_tensors(inputs, requires_grad=True)
        out = forward(*tensors)
        out.backward(paddle.to_tensor(inputs.grad_out))
        results.append((out, *(tensor.grad for tensor in tensors)))
    assert_all_identical(masks, [masks[0]] * 3)  # without recompute, and twice with it
    lengths = {"seqlen_q": CASE.seqlen_q, "seqlen_k": CASE.seqlen_k}
    assert float(rrattn.block_density(masks[0], causal=True, **lengths).mean()) < 1
    assert_all_identical(*results)


def assert_computes_as_cast_by_hand(function, inputs):
    """function(query, key, value) -> (out, lse, block_mask) of float32 inputs does what it does of bfloat16 inputs."""
    by_hand = to_tensors(inputs, requires_grad=True)
    expected = run([x.astype("bfloat16") for x in by_hand])
    tensors = to_tensors(inputs, requires_grad=True)
    actual = function(*tensors)
    assert actual[0].dtype == paddle.bfloat16
    assert_all_identical(actual, expected)
    grads = gradients(actual[0], tensors, inputs.grad_out)
    assert all(grad.dtype == paddle.float32 for grad in grads)
    assert_all_identical(grads, gradients(expected[0], by_hand, inputs.grad_out))


@pytest.mark.parametrize("level", ("O1", "O2"))
def test_auto_cast_in_a_traced_function(level):
    def function(query, key, value):
        with paddle.amp.auto_cast(level=level, dtype="bfloat16"):
            return run((query, key, value))

    assert_computes_as_cast_by_hand(paddle.jit.to_static(function, full_graph=True), make_inputs(CASE))


@pytest.mark.parametrize("level", ("O1", "O2"))
def test_eager_auto_cast(level):
    inputs = make_inputs(CASE)

    def function(query, key, value):
        with eager_auto_cast(level):
            return run((query, key, value))

    def partly_cast(query, key, value):
        return function(query, key.astype("bfloat16"), value)

    assert_computes_as_cast_by_hand(function, inputs)
    assert_computes_as_cast_by_hand(partly_cast, inputs)

    tensors = to_tensors(inputs)
    halves = [x.astype("bfloat16") for x in tensors]
    block_mask = run(halves)[2]
    stages = {
        rrattn.estimate_block_scores: lambda q, k, v: (q, k),
        rrattn.block_sparse_attention: lambda q, k, v: (q, k, v, block_mask),
    }
    for stage, arguments in stages.items():
        with eager_auto_cast(level):
            actual = stage(*arguments(*tensors), causal=True)
        assert_all_identical([actual], [stage(*arguments(*halves), causal=True)])


def test_auto_cast_that_is_off_changes_nothing():
    tensors = to_tensors(make_inputs(CASE))
    expected = run(tensors)
    with paddle.amp.auto_cast(enable=False, dtype="bfloat16"):
        assert_all_identical(run(tensors), expected)
    with pytest.warns(UserWarning, match="makes no effect"), paddle.amp.auto_cast(dtype="bfloat16"):
        assert_all_identical(run(tensors), expected)
