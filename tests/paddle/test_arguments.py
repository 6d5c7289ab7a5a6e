"""Numbers, flags and sequences: what counts as one counts in every function, and settings are checked where given.

What is refused by the functions is in bad_arguments.py and test_errors.py.
"""

import inspect
import json
import re
from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction

import numpy as np
import paddle
import pytest
from cases import make_inputs
from paddle_harness import CASE, assert_all_identical, run, to_tensors

import rrattn
from rrattn import _direct, direct

PLAIN = {
    "stride": 16,
    "key_stride": 4,
    "threshold": 0.5,
    "keep_sink": False,
    "keep_last": True,
    "keep_local": 2,
    "min_share": 0.125,
    "head_offset": 3,
    "softmax_scale": 0.25,
    "spread": 0.5,
}
SAMPLING = ("stride", "key_stride", "head_offset", "softmax_scale", "spread")
KEEP = ("keep_sink", "keep_last", "keep_local", "min_share")


def as_scalars(numbers):
    """The same as NumPy's own scalars, in small types."""
    kinds = {bool: np.bool_, int: np.int8, float: np.float16}
    return {name: kinds[type(number)](number) for name, number in numbers.items()}


def as_arrays(numbers):
    return {name: np.array(number) for name, number in numbers.items()}


def as_fractions(numbers):
    return {name: Fraction(number) if isinstance(number, float) else number for name, number in numbers.items()}


class Index:
    """What Python takes as an index and nothing else knows."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def as_indices(numbers):
    return {name: Index(number) if type(number) is int else number for name, number in numbers.items()}


every_kind = pytest.mark.parametrize("kind", (as_scalars, as_arrays, as_fractions, as_indices))


@every_kind
def test_functions_take_any_numbers(kind):
    tensors = to_tensors(make_inputs(CASE))
    flags = kind({"causal": True, "training": False, "compensate": False})
    assert_all_identical(run(tensors, **kind(PLAIN), **flags), run(tensors, **PLAIN))
    sampling = {name: PLAIN[name] for name in SAMPLING}
    keep = {name: PLAIN[name] for name in KEEP}
    keep |= {"seqlen_q": CASE.seqlen_q, "seqlen_k": CASE.seqlen_k}
    if kind is as_scalars:  # lengths do not fit int8
        keep.update(seqlen_q=np.int16(CASE.seqlen_q), seqlen_k=np.uint64(CASE.seqlen_k))
    scores = rrattn.estimate_block_scores(*tensors[:2], causal=np.bool_(True), **kind(sampling))
    threshold = kind({"threshold": 0.5})["threshold"]
    mask = rrattn.select_blocks(scores, threshold, causal=np.bool_(True), **keep)
    out = rrattn.block_sparse_attention(*tensors, mask, causal=np.bool_(True), **kind({"softmax_scale": 0.25}))
    assert_all_identical((out, mask), run(tensors, **PLAIN)[::2])


@every_kind
def test_direct_takes_any_numbers(kind):
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 200, 4, 16)).astype(np.float32)
    results = []
    for convert in (dict, kind):
        scores, mask = np.zeros((1, 4, 2, 2), np.float32), np.zeros((1, 4, 2, 1), np.int32)
        sampling = convert({**{name: PLAIN[name] for name in SAMPLING}, "num_threads": 1, "causal": True})
        size = direct.estimate_block_scores(query, key, block_scores=scores, **sampling)
        keep = convert({"threshold": 0.5, **{name: PLAIN[name] for name in KEEP}, "causal": True})
        threshold = keep.pop("threshold")
        lengths = {"seqlen_q": 200, "seqlen_k": np.int64(200)}
        direct.select_blocks(scores, threshold, block_mask=mask, **lengths, **keep)
        out = np.zeros_like(query)
        direct.rr_attention(query, key, key, out=out, threshold=threshold, **{**sampling, **keep})
        results.append((size, scores.tobytes(), mask.tobytes(), out.tobytes()))
    assert results[0] == results[1]


@every_kind
def test_settings_are_kept_as_plain_python(kind, tmp_path):
    others = {"min_length": 100, "deterministic": True, "compensate": True}
    config = rrattn.RRAttentionConfig(**kind(PLAIN), **kind(others))
    assert config == rrattn.RRAttentionConfig(**PLAIN, **others)
    types = [int, int, float, bool, bool, int, float, int, float, float, tuple, int, bool, bool, type(None)]
    assert [type(value) for value in asdict(config).values()] == types
    config.to_json(tmp_path / "config.json")
    assert rrattn.RRAttentionConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("deterministic", (True, False, None))
def test_deterministic_survives_a_file(deterministic, tmp_path):
    config = rrattn.RRAttentionConfig(deterministic=deterministic)
    config.to_json(tmp_path / "config.json")
    assert rrattn.RRAttentionConfig.from_json(tmp_path / "config.json").deterministic is deterministic
    (tmp_path / "older.json").write_text("{}")
    assert rrattn.RRAttentionConfig.from_json(tmp_path / "older.json").deterministic is None


def test_the_groups_of_settings_are_keywords_of_the_functions_that_take_them():
    config = rrattn.RRAttentionConfig(**PLAIN)
    assert {**config.sampling(), **config.keep_rules(), "threshold": config.threshold} == PLAIN
    for module in (rrattn, direct):
        takes = {name: set(inspect.signature(function).parameters) for name, function in vars_of(module).items()}
        assert set(config.sampling()) < takes["estimate_block_scores"]
        assert set(config.keep_rules()) < takes["select_blocks"]
        assert {*config.sampling(), *config.keep_rules()} < takes["rr_attention"]


def test_the_kernels_take_the_settings_in_the_order_of_the_config():
    """Operators take their attributes by position."""
    taken = re.findall(r"(\w+): ", _direct.KeepRules.__init__.__doc__)
    assert taken == ["self", "threshold", *rrattn.RRAttentionConfig().keep_rules()]


def test_causal_has_one_default():
    """That of Paddle's own functions."""
    functions = [*vars_of(rrattn).values(), *vars_of(direct).values(), rrattn.RRAttention.forward]
    functions += [paddle.nn.functional.flashmask_attention]
    assert [inspect.signature(function).parameters["causal"].default for function in functions] == [False] * 11
    assert inspect.signature(paddle.nn.functional.scaled_dot_product_attention).parameters["is_causal"].default is False


def vars_of(module):
    """The functions of a module that attend or select."""
    names = ("rr_attention", "estimate_block_scores", "select_blocks", "block_sparse_attention")
    names += ("block_sparse_attention_backward",) if module is direct else ()
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize(
    "given, kept",
    (
        ({"dense_layers": range(2)}, (0, 1)),
        ({"dense_layers": np.array([1, 0])}, (1, 0)),
        ({"dense_layers": iter([np.int64(1)])}, (1,)),
        ({"dense_layers": (layer for layer in range(3))}, (0, 1, 2)),
        ({"threshold": np.array([0.5, 0.25], np.float32)}, (0.5, 0.25)),
        ({"threshold": np.array([[0.5, 0.25]])}, ((0.5, 0.25),)),
        ({"threshold": map(float, ("0.5", "1"))}, (0.5, 1.0)),
        ({"threshold": [0.5, iter([np.float32(0.25), 1])]}, (0.5, (0.25, 1.0))),
    ),
    ids=lambda x: type(next(iter(x.values()))).__name__ if isinstance(x, dict) else "",
)
def test_settings_of_sequences(given, kept, tmp_path):
    config = rrattn.RRAttentionConfig(**given)
    assert getattr(config, *given) == kept
    config.to_json(tmp_path / "config.json")
    assert rrattn.RRAttentionConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"stride": 8.0}, "stride is 8.0, but must be an integer"),
        ({"stride": True}, "stride is True, but must be an integer"),
        ({"stride": "8"}, "stride is '8', but must be an integer"),
        ({"threshold": True}, "threshold is True, but must be a number"),
        ({"threshold": None}, "threshold is None, but must be a number"),
        ({"threshold": {0.5}}, r"threshold is \{0.5\}, but must be a number"),
        ({"threshold": {"0": 0.5}}, r"threshold is \{'0': 0.5\}, but must be a number"),
        ({"threshold": Decimal("0.5")}, "threshold is Decimal.*but must be a number"),
        ({"threshold": []}, r"threshold is \[\], but must be .* at least one"),
        ({"threshold": [[0.5], []]}, r"threshold\[1\] is \[\], but must be .* at least one"),
        ({"threshold": [0.5, [0.5, [0.5]]]}, r"threshold\[1\]\[1\] is \[0.5\], but must be a number"),
        ({"threshold": 1e-60}, "threshold is 1e-60, which is 0 in float32"),
        ({"softmax_scale": "0.1"}, "softmax_scale is '0.1', but must be a finite number"),
        ({"softmax_scale": False}, "softmax_scale is False, but must be a finite number"),
        ({"softmax_scale": 1e300}, "softmax_scale is 1e\\+300, which is inf in float32"),
        ({"keep_last": "False"}, "keep_last is 'False', but must be True or False"),
        ({"keep_sink": None}, "keep_sink is None, but must be True or False"),
        ({"head_offset": 2**63}, "head_offset is 9223372036854775808, but must be .* below 2\\^63"),
        ({"head_offset": 0.0}, "head_offset is 0.0, but must be an integer"),
        ({"dense_layers": "01"}, "dense_layers is '01', but must be a sequence of integers"),
        ({"dense_layers": {"0": True}}, r"dense_layers is \{'0': True\}, but must be a sequence of integers"),
        ({"dense_layers": iter([0.0])}, r"dense_layers is \[0.0\], but must be a sequence of integers"),
        ({"dense_layers": np.array([True])}, r"dense_layers is \[True\], but must be a sequence of integers"),
        ({"min_length": "4096"}, "min_length is '4096', but must be an integer of at least 0"),
        ({"deterministic": 1}, "deterministic is 1, but must be True, False or None"),
    ),
    ids=str,
)
def test_settings_that_are_none(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rrattn.RRAttentionConfig(**settings)
    try:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    except TypeError:  # what JSON cannot say either
        return
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        rrattn.RRAttentionConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("name, value", (("threshold", [0.5]), ("softmax_scale", 0.1), ("dense_layers", [0])))
def test_tensors_are_no_settings(name, value):
    with pytest.raises(TypeError, match=f"{name} is a Tensor, but must be a"):
        rrattn.RRAttentionConfig(**{name: paddle.to_tensor(value)})


def test_a_setting_that_stands_twice_in_a_file(tmp_path):
    (tmp_path / "config.json").write_text('{"stride": 8, "threshold": 0.9, "stride": 16}')
    with pytest.raises(ValueError, match="config.json: stride is set more than once"):
        rrattn.RRAttentionConfig.from_json(tmp_path / "config.json")


NO_CONFIGS = pytest.mark.parametrize(
    "config, shown",
    (
        (0.9, "0.9"),
        ({"threshold": 0.9}, r"\{'threshold': 0.9\}"),
        ("config.json", "'config.json'"),
        (rrattn.RRAttentionConfig, "<class"),
    ),
    ids=str,
)


@NO_CONFIGS
def test_a_layer_needs_a_config(config, shown):
    with pytest.raises(TypeError, match=rf"config is {shown}.*, but must be an RRAttentionConfig: .*threshold=0.9"):
        rrattn.RRAttention(config)


@NO_CONFIGS
def test_enable_needs_a_config(config, shown):
    """Before it looks at the model, which may be anything."""
    with pytest.raises(TypeError, match=rf"config is {shown}.*, but must be an RRAttentionConfig: .*threshold=0.9"):
        rrattn.enable(paddle.nn.Linear(2, 2), config)


@pytest.mark.parametrize(
    "threshold, message",
    (
        (1.5, r"threshold is 1.5, but must be in \(0, 1\]"),
        ((0.5, 0), r"threshold\[1\] is 0, but must be in \(0, 1\]"),
        ("0.5", "threshold is '0.5', but must be a number"),
        ((), r"threshold is \[\], but must be .* at least one"),
    ),
    ids=str,
)
def test_the_threshold_of_a_layer_has_its_name(threshold, message):
    with pytest.raises(ValueError, match=message):
        rrattn.RRAttention(threshold=threshold)


def test_a_layer_takes_any_sequence_of_thresholds():
    tensors = to_tensors(make_inputs(CASE))
    expected = rrattn.RRAttention(threshold=(0.25, 0.5, 0.75, 1.0))(*tensors)
    for thresholds in (np.linspace(0.25, 1, 4, dtype=np.float32), (k / 4 for k in range(1, 5))):
        assert (rrattn.RRAttention(threshold=thresholds)(*tensors) == expected).all()


@pytest.mark.parametrize(
    "changes, error, message",
    (
        ({"causal": "False"}, ValueError, "causal is 'False', but must be True or False"),
        ({"softmax_scale": "0.1"}, ValueError, "softmax_scale is '0.1', but must be a finite number"),
        ({"query": [1.0]}, TypeError, "query is a list, but must be a paddle.Tensor"),
        ({"value": np.zeros((1, 4, 2, 8), np.float32)}, TypeError, "value is a ndarray, but must be a paddle.Tensor"),
        ({"key": paddle.zeros([4, 2, 8])}, ValueError, r"key has 3 dimensions, shape \[4, 2, 8\], but must have 4"),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("config", ({}, {"softmax_scale": 0.5}, {"dense_layers": [0]}), ids=str)
def test_what_a_layer_is_called_with(config, changes, error, message):
    """Whatever its config says of the same."""
    given = {name: paddle.zeros([1, 4, 2, 8]) for name in ("query", "key", "value")} | changes
    with pytest.raises(error, match=message):
        rrattn.RRAttention(rrattn.RRAttentionConfig(**config))(**given)


@pytest.mark.parametrize("name", ("training", "return_softmax_lse", "return_block_mask"))
@pytest.mark.parametrize("value", ("False", 1, None))
def test_flags_of_calls(name, value):
    query = paddle.zeros([1, 4, 2, 8])
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but must be True or False"):
        rrattn.rr_attention(query, query, query, causal=True, **{name: value})


def test_an_empty_tensor_of_thresholds_is_not_an_absent_one():
    """Paddle hands it to the operator as that, and the call would be dense."""
    query = paddle.zeros([1, 4, 2, 8])
    with pytest.raises(ValueError, match=r"threshold has shape \[0\], but must have"):
        rrattn.rr_attention(query, query, query, causal=True, threshold=paddle.zeros([0]))


@pytest.mark.parametrize(
    "function, inputs, outputs, own",
    (
        (
            direct.estimate_block_scores,
            2,
            "block_scores",
            "sink, causal, stride, key_stride, head_offset, softmax_scale, spread, dtype",
        ),
        (
            direct.select_blocks,
            2,
            "block_mask",
            "causal, seqlen_q, seqlen_k, keep_sink, keep_last, keep_local, min_share",
        ),
        (direct.block_sparse_attention, 4, "out, lse", "sink, causal, softmax_scale, compensate, quantization, dtype"),
        (
            direct.block_sparse_attention_backward,
            7,
            "grad_query, grad_key, grad_value",
            "sink, grad_sink, grad_lse, causal, softmax_scale, deterministic, dtype",
        ),
        (
            direct.rr_attention,
            3,
            "out, lse, block_mask, block_scores",
            "sink, causal, stride, key_stride, threshold, head_offset, softmax_scale, spread, keep_sink, keep_last, "
            "keep_local, min_share, compensate, quantization, dtype",
        ),
        (direct.startend_rows_from_dense, 1, "start_rows, verdict", "dtype"),
    ),
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize(
    "options, message",
    (
        ({"treads": 2}, "has no argument treads; by name it takes OWN, num_threads, workspace, stream, size_only"),
        ({"num_threads": 1.0}, "num_threads is 1.0, but must be an integer of at least 1"),
        ({"stream": "0"}, "stream is '0', but must be an integer"),
        ({"size_only": 1}, "size_only is 1, but must be True or False"),
        ({"dtype": np.float32}, "dtype is <class 'numpy.float32'>, but must be a name: 'float32', 'float16'"),
        ({"deterministic": None}, "deterministic is None, but must be True or False"),
        ({"deterministic": "no"}, "deterministic is 'no', but must be True or False"),
    ),
    ids=str,
)
def test_options_of_direct(function, inputs, outputs, own, options, message):
    arguments, keywords = [None] * inputs, {**dict.fromkeys(outputs.split(", ")), **options}
    if function is direct.select_blocks:
        arguments[1], keywords = 0.5, {"seqlen_q": 4, "seqlen_k": 4, **keywords}
    for name in options:
        if name in ("dtype", "deterministic") and name not in own.split(", "):
            message = f"has no argument {name}; by name it takes OWN, num_threads"
    with pytest.raises((TypeError, ValueError), match=message.replace("OWN", f"{outputs}, {own}")) as caught:
        function(*arguments, **keywords)
    if "no argument" in message:
        assert str(caught.value).startswith(f"rrattn.direct.{function.__name__} has")
