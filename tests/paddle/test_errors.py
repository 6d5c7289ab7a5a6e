"""Bad input, through rrattn.direct and Paddle: a Python exception that names the value and what is allowed,
and outputs left as they were."""

import tempfile

import harness
import numpy as np
import paddle
import pytest
from bad_arguments import HKV, HQ, KEYWORDS, LK, LQ, MK, MQ, STAGES, B, D, good, zeros
from harness import assert_identical

import rrattn
from rrattn import direct, reference
from rrattn.operators import call


def parameters(*stages):
    return pytest.mark.parametrize(
        "stage, changes, message",
        [pytest.param(stage, *bad, id=f"{stage}: {name}") for stage in stages for name, bad in STAGES[stage].items()],
    )


OUTPUTS = {
    "estimate": ("block_scores",),
    "select": ("block_mask",),
    "attend": ("out", "lse"),
    "backward": ("grad_query", "grad_key", "grad_value"),
    "rr_attention": ("out", "lse", "block_mask", "block_scores"),
}


def outputs_of(stage):
    """Poisoned outputs for the good arguments, in the order of OUTPUTS."""
    query, key = ((B, L, H, D) for L, H in ((LQ, HQ), (LK, HKV)))
    shapes = {"out": query, "lse": (B, HQ, LQ), "block_scores": (B, HQ, MQ, MK), "block_mask": (B, HQ, MQ, 1)}
    shapes |= {"grad_query": query, "grad_key": key, "grad_value": key}
    return [harness.poisoned(shapes[name], "int32" if name == "block_mask" else "float32") for name in OUTPUTS[stage]]


def call_direct(stage, outputs, changes):
    a = {**good(), **changes}
    keywords = {name: a[name] for name in ("causal", "dtype", "num_threads", *KEYWORDS[stage]) if name in a}
    keywords |= dict(zip(OUTPUTS[stage], outputs))
    bounds = a["startend_row_indices"]
    if stage == "estimate":
        direct.estimate_block_scores(a["query"], a["key"], bounds, **keywords)
    elif stage == "select":
        keywords = {"seqlen_q": LQ, "seqlen_k": LK, **keywords}
        direct.select_blocks(a["block_scores"], keywords.pop("threshold", 0.9), bounds, **keywords)
    elif stage == "attend":
        direct.block_sparse_attention(a["query"], a["key"], a["value"], a["block_mask"], bounds, **keywords)
    elif stage == "backward":
        forward = {"out": zeros(B, LQ, HQ, D), "lse": zeros(B, HQ, LQ), "grad_out": zeros(B, LQ, HQ, D), **changes}
        inputs = [a[name] for name in ("query", "key", "value", "block_mask")]
        inputs += [forward[name] for name in ("out", "lse", "grad_out")]
        direct.block_sparse_attention_backward(*inputs, bounds, **keywords)
    else:
        direct.rr_attention(a["query"], a["key"], a["value"], bounds, **keywords)


def call_paddle(stage, changes):
    a = {name: paddle.to_tensor(x) if isinstance(x, np.ndarray) else x for name, x in {**good(), **changes}.items()}
    bounds = a["startend_row_indices"]
    keywords = {name: a[name] for name in ("causal", *KEYWORDS[stage]) if name in a}
    if stage == "estimate":
        return rrattn.estimate_block_scores(a["query"], a["key"], bounds, **keywords)
    if stage == "select":
        keywords = {"threshold": 0.9, "seqlen_q": LQ, "seqlen_k": LK, **keywords}
        return rrattn.select_blocks(a["block_scores"], keywords.pop("threshold"), bounds, **keywords)
    if stage == "attend":
        return rrattn.block_sparse_attention(a["query"], a["key"], a["value"], a["block_mask"], bounds, **keywords)
    return rrattn.rr_attention(a["query"], a["key"], a["value"], bounds, **keywords)


def assert_untouched(outputs):
    for output in outputs:
        poison = harness.poisoned(output.shape, "int32" if output.dtype == np.int32 else "float32")
        assert output.tobytes() == poison.tobytes()


@pytest.mark.parametrize("stage", OUTPUTS)
def test_good_arguments_are_accepted_directly(stage):
    """Otherwise the tests below could pass for another reason."""
    outputs = outputs_of(stage)
    call_direct(stage, outputs, {})
    for output in outputs:
        assert not np.isnan(output).any() and not (output == 0x7F7F7F7F).any()


@pytest.mark.parametrize("stage", ("estimate", "select", "attend", "rr_attention"))
def test_good_arguments_are_accepted_by_paddle(stage):
    assert np.isfinite(call_paddle(stage, {}).numpy()).all()


@parameters(*OUTPUTS)
def test_direct(stage, changes, message):
    outputs = outputs_of(stage)
    with pytest.raises(ValueError, match=message):
        call_direct(stage, outputs, changes)
    assert_untouched(outputs)


@parameters("estimate", "select", "attend", "rr_attention")
def test_paddle(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        call_paddle(stage, changes)


every_stage = pytest.mark.parametrize("stage", ("estimate", "attend", "backward", "rr_attention"))


@every_stage
@pytest.mark.parametrize(
    "changes, message",
    (
        ({"dtype": "float64"}, "dtype is float64.*float32, float16 or bfloat16"),
        ({"dtype": "float16"}, "has dtype float32.*dtype is float16"),
        ({"dtype": "bfloat16"}, "has dtype float32.*dtype is bfloat16"),
        (
            {"query": zeros(B, LQ, HQ, D, dtype=np.uint16)},
            "query has dtype uint16.*float32, float16 or bfloat16",
        ),
        ({"num_threads": 0}, "num_threads is 0,.*at least 1"),
        (
            {"query": zeros(B, LQ, HQ, 2 * D)[..., ::2]},
            r"query has strides \[.*, 2\].*last dimension.*contiguous",
        ),
        ({"sink": zeros(2 * HQ)[::2]}, r"sink has strides \[2\] for shape \[4\], but must be contiguous"),
        (
            {"key": zeros(B, LK, D, HKV).swapaxes(2, 3)},
            r"key has strides \[.*, 2\].*last dimension.*contiguous",
        ),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_direct_layouts_and_dtypes(stage, changes, message):
    outputs = outputs_of(stage)
    with pytest.raises(ValueError, match=message):
        call_direct(stage, outputs, changes)
    assert_untouched(outputs)


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"out": zeros(B, LQ, HQ, D, dtype=np.float16)}, "out has dtype float16.*must have float32"),
        ({"out": zeros(B, LQ, HKV, D)}, r"out has shape \[2, 200, 2, 16\].*\[2, 200, 4, 16\]"),
        ({"lse": zeros(B, LQ, HQ)}, r"lse has shape \[2, 200, 4\].*\[2, 4, 200\]"),
        ({"lse": zeros(B, HQ, LQ, dtype=np.float64)}, "lse has dtype float64.*must have float32"),
        ({"grad_out": zeros(B, LK, HQ, D)}, r"grad_out has shape \[2, 300, 4, 16\].*\[2, 200, 4, 16\]"),
        (
            {"grad_out": zeros(B, LQ, HQ, D, dtype=np.float16)},
            "grad_out has dtype float16.*must have float32",
        ),
        ({"grad_lse": zeros(B, LQ, HQ)}, r"grad_lse has shape \[2, 200, 4\].*\[2, 4, 200\]"),
        ({"grad_lse": zeros(B, HQ, LQ, dtype=np.float16)}, "grad_lse has dtype float16.*must have float32"),
        ({"sink": zeros(HQ)}, "sink is given, but grad_sink is not: give both or neither"),
        ({"grad_sink": zeros(HQ)}, "grad_sink is given, but sink is not: give both or neither"),
        ({"sink": zeros(HQ), "grad_sink": zeros(3)}, r"grad_sink has shape \[3\].*\[4\]"),
        ({"sink": zeros(HQ), "grad_sink": zeros(HQ, dtype=np.float16)}, "grad_sink has dtype float16.*float32"),
    ),
)
def test_what_the_forward_leaves_for_the_backward(changes, message):
    outputs = outputs_of("backward")
    with pytest.raises(ValueError, match=message):
        call_direct("backward", outputs, changes)
    assert_untouched(outputs)


@pytest.mark.parametrize(
    "stage, index, name, wrong_shape",
    (
        ("estimate", 0, "block_scores", (B, HQ, MQ, MK + 1)),
        ("select", 0, "block_mask", (B, HQ, MQ, 2)),
        ("attend", 0, "out", (B, LQ, HQ, D + 8)),
        ("attend", 1, "lse", (B, LQ, HQ)),
        ("backward", 0, "grad_query", (B, LQ, HKV, D)),
        ("backward", 1, "grad_key", (B, LQ, HKV, D)),
        ("backward", 2, "grad_value", (B, LK, HQ, D)),
        ("rr_attention", 0, "out", (B, LK, HQ, D)),
        ("rr_attention", 1, "lse", (B, LQ, HQ)),
        ("rr_attention", 2, "block_mask", (B, HQ, MQ, 2)),
        ("rr_attention", 3, "block_scores", (B, HQ, MQ, MK + 1)),
    ),
)
def test_direct_outputs_of_the_wrong_shape_dtype_or_layout(stage, index, name, wrong_shape):
    right = outputs_of(stage)[index]
    text = ", ".join(map(str, right.shape))
    wrong = [
        (
            harness.poisoned(wrong_shape, "int32" if name == "block_mask" else "float32"),
            rf"{name} has shape.*\[{text}\]",
        ),
        (np.full(right.shape, np.nan), rf"{name} has dtype float64.*must have {right.dtype}"),
        (np.repeat(right, 2, axis=-1)[..., ::2], rf"{name} has strides.*contiguous"),
    ]
    for output, message in wrong:
        outputs = outputs_of(stage)
        outputs[index] = output
        with pytest.raises(ValueError, match=message):
            call_direct(stage, outputs, {})
        assert_untouched(x for x in outputs if x is not output)
        assert output.tobytes() == np.full(output.shape, output.flat[0], output.dtype).tobytes()


def test_direct_objects_that_are_no_arrays():
    for stage, name in (("estimate", "key"), ("attend", "value"), ("select", "block_scores")):
        outputs = outputs_of(stage)
        with pytest.raises(TypeError, match=f"{name} is a list, but must be an array with __dlpack__"):
            call_direct(stage, outputs, {name: [1.0, 2.0]})
        assert_untouched(outputs)


@pytest.mark.parametrize(
    "stage, index, name",
    (
        ("estimate", 0, "block_scores"),
        ("select", 0, "block_mask"),
        ("attend", 0, "out"),
        ("attend", 1, "lse"),
        ("backward", 0, "grad_query"),
        ("backward", 1, "grad_key"),
        ("backward", 2, "grad_value"),
        ("rr_attention", 0, "out"),
        ("rr_attention", 1, "lse"),
        ("rr_attention", 2, "block_mask"),
        ("rr_attention", 3, "block_scores"),
    ),
)
def test_direct_outputs_that_are_read_only_or_whose_elements_share_memory(stage, index, name):
    right = outputs_of(stage)[index]
    read_only = right.copy()
    read_only.flags.writeable = False
    shared = np.lib.stride_tricks.as_strided(right.copy(), right.shape, (0, *right.strides[1:]))
    for output, message in ((read_only, f"{name} is read-only"), (shared, f"{name} has strides .*(share|contiguous)")):
        outputs = outputs_of(stage)
        outputs[index] = output
        with pytest.raises(ValueError, match=message):
            call_direct(stage, outputs, {})
        assert_untouched(outputs)


def test_direct_outputs_over_each_other_or_over_inputs():
    """And the same memory without a common element is allowed, as is out in the place of query."""
    x = good()
    buffer = np.zeros((B, LQ + 1, HQ, D), np.float32)
    buffer[:, :LQ] = x["query"]
    first, second = buffer[:, :LQ], buffer[:, 1:]
    lse = zeros(B, HQ, LQ)

    def attend(out, lse=lse, **changes):
        call_direct("attend", [out, lse], changes)

    with pytest.raises(ValueError, match="out shares memory with query, but must have its own"):
        attend(second, query=first)
    with pytest.raises(ValueError, match="out shares memory with query"):
        attend(first[:, ::-1], query=first)
    with pytest.raises(ValueError, match="lse shares memory with out"):
        attend(first, first[0].reshape(-1)[: lse.size].reshape(lse.shape))
    with pytest.raises(ValueError, match="block_mask"):
        attend(
            first, block_mask=buffer.view(np.int32).reshape(-1)[: x["block_mask"].size].reshape(x["block_mask"].shape)
        )
    expected = zeros(B, LQ, HQ, D)
    attend(expected)
    attend(first, query=first)
    assert_identical(first.copy(), expected)

    side_by_side = np.zeros((B, LK, 2 * HKV, D), np.float32)  # [B, L, K and V, H, D] and the like
    grads = outputs_of("backward")
    call_direct("backward", grads, {})
    call_direct("backward", [grads[0], side_by_side[:, :, :HKV], side_by_side[:, :, HKV:]], {})
    assert_identical(side_by_side, np.concatenate(grads[1:], axis=2))
    with pytest.raises(ValueError, match="grad_value shares memory with grad_key"):
        call_direct("backward", [grads[0], grads[1], grads[1]], {})
    with pytest.raises(ValueError, match="grad_value shares memory with grad_key"):
        call_direct("backward", [grads[0], side_by_side[:, :, :HKV], side_by_side[:, :, HKV - 1 : -1]], {})
    with pytest.raises(ValueError, match="grad_query shares memory with query"):
        call_direct("backward", [first, *grads[1:]], {"query": first})
    sinks = zeros(HQ + 1)
    with pytest.raises(ValueError, match="grad_sink shares memory with sink"):
        call_direct("backward", grads, {"sink": sinks[1:], "grad_sink": sinks[:-1]})
    with pytest.raises(ValueError, match="lse shares memory with sink"):
        attend(first, sink=lse.reshape(-1)[:HQ])
    with pytest.raises(ValueError, match="grad_sink shares memory with grad_lse"):
        call_direct("backward", grads, {"sink": sinks[1:], "grad_lse": lse, "grad_sink": lse.reshape(-1)[:HQ]})
    with pytest.raises(ValueError, match="workspace shares memory with query"):
        q = np.zeros((B, LQ + 500, HQ, 64), np.float32)
        inputs = q[:, :LQ, :, :D], x["key"], x["value"], x["block_mask"]
        direct.block_sparse_attention(*inputs, out=expected, lse=lse, causal=True, workspace=q)


def test_direct_outputs_of_one_call_over_what_another_stage_reads_or_writes():
    """Each stage by itself would not see it."""
    x, (out, lse, block_mask, block_scores) = good(), outputs_of("rr_attention")
    words = np.zeros(block_mask.size, np.float32)  # of which the sinks are the first
    x["sink"] = words[:HQ]

    def within(array, like):
        return array.reshape(-1)[: like.size].view(like.dtype).reshape(like.shape)

    for outputs, message in (
        ([out, lse, block_mask, within(out, block_scores)], "block_scores shares memory with out"),
        ([out, lse, block_mask, within(lse, block_scores)], "block_scores shares memory with lse"),
        ([out, lse, block_mask, within(x["value"], block_scores)], "block_scores shares memory with value"),
        ([out, lse, within(x["key"], block_mask), block_scores], "block_mask shares memory with key"),
        ([out, lse, within(words, block_mask), block_scores], "block_mask shares memory with sink"),
    ):
        with pytest.raises(ValueError, match=f"{message}, but must have its own"):
            call_direct("rr_attention", outputs, {name: x[name] for name in ("key", "value", "sink")})
    workspace = np.zeros(1 << 20, np.float32)
    with pytest.raises(ValueError, match="workspace shares memory with query, but must have its own"):
        direct.rr_attention(within(workspace, out), x["key"], x["value"], out=out, causal=True, workspace=workspace)
    assert_untouched((out, lse, block_mask, block_scores))

    expected = outputs_of("rr_attention")
    call_direct("rr_attention", expected, {})
    call_direct("rr_attention", [x["query"], lse, block_mask, block_scores], {"query": x["query"]})
    assert_identical((x["query"], lse, block_mask, block_scores), expected)


def test_direct_takes_what_speaks_dlpack_and_arrays_that_are_read_only():
    x = good()
    expected = outputs_of("attend")
    call_direct("attend", expected, {})
    for convert in (paddle.to_tensor, read_only_copy, mapped):
        outputs = outputs_of("attend")
        call_direct("attend", outputs, {name: convert(x[name]) for name in ("query", "key", "value", "block_mask")})
        assert_identical(tuple(outputs), tuple(expected))
    one_head = np.ascontiguousarray(x["key"][:, :, :1])
    call_direct("attend", expected, {"key": np.repeat(one_head, HKV, axis=2)})
    outputs = outputs_of("attend")
    call_direct("attend", outputs, {"key": np.broadcast_to(one_head, x["key"].shape)})
    assert_identical(tuple(outputs), tuple(expected))


def read_only_copy(array):
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def mapped(array):
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/array.npy", array)
        return np.load(f"{folder}/array.npy", mmap_mode="r")


class Unexportable:
    """As a torch tensor that requires a gradient."""

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        raise BufferError("cannot export, use detach()")


@pytest.mark.parametrize(
    "key, message",
    (
        (Unexportable(), "key cannot be had in place: BufferError: cannot export, use detach"),
        (zeros(B, LK, HKV, D).astype(bool), "key has dtype bool, but must have float32"),
        (zeros(B, LK, HKV, D).astype(np.complex64), "key has dtype complex64, but must have float32"),
        (zeros(B, LK, HKV, D).astype(">f4"), "key has dtype >f4, but must have float32"),
        (
            zeros(B, LK, HKV, 4 * D + 1, dtype=np.uint8)[..., : 4 * D].view(np.float32),
            r"key has a stride of \d+ bytes, but must have multiples of 4",
        ),
        (
            zeros(B, LK, HKV, 4 * D + 4, dtype=np.uint8)[..., 1 : 4 * D + 1].view(np.float32),
            "key lies at an address that is no multiple of its elements' 4 bytes",
        ),
    ),
    ids=("unexportable", "bool", "complex", "big-endian", "stride", "address"),
)
def test_direct_arrays_that_cannot_be_read(key, message):
    outputs = outputs_of("attend")
    with pytest.raises(ValueError, match=message):
        call_direct("attend", outputs, {"key": key})
    assert_untouched(outputs)


def test_messages_name_no_source_file():
    with pytest.raises(ValueError) as error:
        call_paddle("attend", {"key": zeros(B, LK, HKV, D + 8)})
    assert str(error.value) == f"key has head_dim {D + 8}, but must have that of query, {D}"


def test_paddle_objects_that_are_no_tensors():
    for name in ("query", "key", "value"):
        arguments = {n: paddle.zeros([1, 4, 2, 8]) for n in ("query", "key", "value")}
        arguments[name] = np.zeros((1, 4, 2, 8), np.float32)
        with pytest.raises(TypeError, match=f"{name}.*ndarray.*Tensor"):
            rrattn.rr_attention(*arguments.values())


def test_the_operator_itself_refuses_a_negative_keep_local():
    """As a saved program may hold it, which no Python looks at."""
    scores = paddle.zeros([B, HQ, MQ, MK])
    with pytest.raises(ValueError, match="keep_local is -1, but must be at least 0"):
        call("select", scores, None, None, True, LQ, LK, 0.9, True, False, -1, 0.0)


@pytest.mark.parametrize(
    "sampling, message",
    (
        ((8, 5, 0, 1.0, 0.0), "key_stride is 5, but must be a divisor of 128 from 1 to 64"),
        ((8, 8, 0, 1.0, -1.0), "spread is -1.*at least 0"),
        ((8, 8, 0, 1.0, float("inf")), "spread is inf.*finite"),
    ),
)
def test_the_operator_itself_refuses_sampling(sampling, message):
    query, key = paddle.zeros([B, LQ, HQ, 8]), paddle.zeros([B, LK, HQ, 8])
    with pytest.raises(ValueError, match=message):
        call("estimate", query, key, None, None, True, *sampling)


@pytest.mark.parametrize("min_share", (-0.5, 1.5, float("nan")))
def test_the_operator_itself_refuses_a_min_share(min_share):
    scores = paddle.zeros([B, HQ, MQ, MK])
    with pytest.raises(ValueError, match=r"min_share is .*, but must be in \[0, 1\]"):
        call("select", scores, None, None, True, LQ, LK, 0.9, True, False, 1, min_share)


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"stride": 7}, "stride is 7,.*2, 4, 8, 16, 32, 64"),
        ({"stride": 128}, "stride is 128,.*2, 4, 8, 16, 32, 64"),
        ({"threshold": 0}, r"threshold is 0,.*\(0, 1\]"),
        ({"threshold": 1.01}, r"threshold is 1.01,.*\(0, 1\]"),
        ({"threshold": float("nan")}, r"threshold is nan,.*\(0, 1\]"),
        ({"threshold": "0.9"}, r"threshold is '0.9',.*\(0, 1\]"),
        ({"threshold": [0.9, [0.5, 2.0]]}, r"threshold\[1\]\[1\] is 2.0,.*\(0, 1\]"),
        ({"head_offset": -1}, "head_offset is -1,.*at least 0"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf,.*finite"),
        ({"keep_last": 1}, "keep_last is 1,.*True or False"),
        ({"keep_local": -1}, "keep_local is -1,.*integer of at least 0"),
        ({"keep_local": True}, "keep_local is True,.*integer of at least 0"),
        ({"keep_local": 0.5}, "keep_local is 0.5,.*integer of at least 0"),
        ({"compensate": 1}, "compensate is 1,.*True or False"),
        ({"quantization": "int8"}, "quantization is 'int8',.*None or 'qk_int8_pv_fp8'"),
        ({"quantization": 8}, "quantization is 8,.*None or 'qk_int8_pv_fp8'"),
        (
            {"quantization": "qk_int8_pv_fp8", "compensate": True},
            "quantization is 'qk_int8_pv_fp8', but attention in eight bits is not compensated",
        ),
        ({"key_stride": 3}, "key_stride is 3,.*1, 2, 4, 8, 16, 32, 64"),
        ({"key_stride": 128}, "key_stride is 128,.*1, 2, 4, 8, 16, 32, 64"),
        ({"key_stride": "8"}, "key_stride is '8',.*integer"),
        ({"spread": -0.1}, "spread is -0.1,.*at least 0"),
        ({"spread": 1e39}, "spread is 1e.39, which is inf in float32,.*finite"),
        ({"spread": True}, "spread is True,.*number"),
        ({"min_share": 1.1}, r"min_share is 1.1,.*\[0, 1\]"),
        ({"min_share": float("nan")}, r"min_share is nan,.*\[0, 1\]"),
        ({"min_share": None}, r"min_share is None,.*\[0, 1\]"),
    ),
    ids=str,
)
def test_config(settings, message):
    with pytest.raises(ValueError, match=message):
        rrattn.RRAttentionConfig(**settings)


def test_config_for_another_number_of_layers():
    config = rrattn.RRAttentionConfig(threshold=[0.9, 0.8])
    assert config.layer_threshold(1, 2) == 0.8
    with pytest.raises(ValueError, match="threshold has 2 entries.*3 layers"):
        config.layer_threshold(1, 3)


def test_gpu_paths():
    before = direct.gpu_path()
    assert before in direct.available_gpu_paths()
    with pytest.raises(ValueError, match='GPU path is "hopper", but this build has: auto'):
        direct.set_gpu_path("hopper")
    with pytest.raises(TypeError, match="GPU path is 3,.*auto"):
        direct.set_gpu_path(3)
    with pytest.raises(ValueError, match='GPU path is "hopper", but this build has: auto'):
        direct.gpu_kernels(path="hopper")
    with pytest.raises(TypeError, match="GPU path is 3, but must be a name, one of auto"):
        direct.gpu_kernels(path=3)
    with pytest.raises(ValueError, match="device is -1, but must be 0 or more"):
        direct.gpu_kernels(-1)
    if not direct.cuda_archs():
        with pytest.raises(ValueError, match="this build of rrattn has no GPU kernels"):
            direct.gpu_kernels()
    assert direct.gpu_path() == before
    for path in direct.available_gpu_paths():
        direct.set_gpu_path(path)
        assert direct.gpu_path() == path
    direct.set_gpu_path(before)


def test_simd_levels():
    before = direct.simd()
    with pytest.raises(ValueError, match="mmx.*baseline"):
        direct.set_simd("mmx")
    with pytest.raises(TypeError, match="simd is 3,.*baseline"):
        direct.set_simd(3)
    assert direct.simd() == before


@pytest.mark.parametrize(
    "lengths, causal", (((0, 0), True), ((0, 300), True), ((0, 300), False), ((200, 0), False)), ids=str
)
def test_paddle_sizes_of_zero(lengths, causal):
    query = paddle.ones([1, lengths[0], HQ, D])
    key = paddle.ones([1, lengths[1], HKV, D])
    query.stop_gradient = key.stop_gradient = False
    out, lse, mask = rrattn.rr_attention(
        query, key, key, causal=causal, return_softmax_lse=True, return_block_mask=True
    )
    blocks, words = reference.num_blocks(lengths[0]), -(-reference.num_blocks(lengths[1]) // 32)
    assert out.shape == query.shape and lse.shape == [1, HQ, lengths[0]] and mask.shape == [1, HQ, blocks, words]
    assert not out.numpy().any() and np.isneginf(lse.numpy()).all()
    out.sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape
    assert not query.grad.numpy().any() and not key.grad.numpy().any()
