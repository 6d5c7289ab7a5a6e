"""What PaddleFormers alone has: the flag, the table of attention functions, and what it passes to them."""

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import paddle
import pytest

import rrattn

pytest.importorskip("paddleformers")

from paddleformers import transformers  # noqa: E402
from paddleformers.nn.attention.eager_attention import eager_attention_forward  # noqa: E402
from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from paddleformers.utils.log import logger  # noqa: E402
from tiny_models import (  # noqa: E402
    DENSE,
    MODELS,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    attention_layers,
    forward,
    generate,
    logits,
    make_model,
    make_tokens,
)

from rrattn.integrations.common import settings_of  # noqa: E402

# The flag


def test_the_flag_alone_runs_the_defaults(model, tokens):
    model.config._attn_implementation = "rrattn"
    by_flag = logits(model, tokens)
    assert (by_flag == logits(rrattn.enable(make_model()), tokens)).all()
    assert len(rrattn.layer_densities(model)) == NUM_LAYERS


def test_the_flag_alone_runs_the_settings_of_the_config(model, tokens):
    model.config._attn_implementation = "rrattn"
    model.config.rrattn_threshold = 0.5
    model.config.rrattn_keep_last = False
    assert (logits(model, tokens) == logits(rrattn.enable(make_model(), SPARSE), tokens)).all()


@pytest.fixture
def messages(monkeypatch):
    """What rrattn logs of what runs."""
    messages = []
    monkeypatch.setattr(logger, "info", lambda message: messages.append(message) if "rrattn" in message else None)
    return messages


def test_what_the_flag_runs_is_logged_once(model, tokens, messages):
    model.config._attn_implementation = "rrattn"
    model.config.rrattn_threshold = 0.5
    expected = "rrattn runs 2 attention layers of a llama model (PaddleFormers): threshold 0.5, stride 8"
    for _ in range(2):
        logits(model, tokens)
        rrattn.layer_densities(model)
    assert messages == [expected]
    model.config._attn_implementation = "eager"
    logits(model, tokens)
    model.config._attn_implementation = "rrattn"
    logits(model, tokens)
    assert messages == [expected]
    model.config.rrattn_stride = 16
    logits(model, tokens)
    assert messages == [expected, expected.replace("stride 8", "stride 16")]


def test_the_flag_follows_changed_settings(model, tokens):
    model.config._attn_implementation = "rrattn"
    for settings in (
        {"threshold": 0.9},
        {"threshold": 0.5},
        {"keep_last": False},
        {"stride": 16},
        {"dense_layers": [1]},
    ):
        for name, setting in settings.items():
            setattr(model.config, f"rrattn_{name}", setting)
        expected = logits(rrattn.enable(make_model(), settings_of(model.config)), tokens)
        assert (logits(model, tokens) == expected).all()
    model.config.rrattn_dense_layers.append(0)
    logits(model, tokens)
    assert all((density == 1).all() for density in rrattn.layer_densities(model))
    model.config.rrattn_treshold = 0.5
    with pytest.raises(ValueError, match="rrattn_treshold.*rrattn_threshold"):
        model(tokens)
    del model.config.rrattn_treshold
    model.config.rrattn_threshold = 0
    with pytest.raises(ValueError, match="threshold is 0"):
        model(tokens)


def test_settings_do_not_change_while_statistics_are_collected(model, tokens):
    model.config._attn_implementation = "rrattn"
    with rrattn.collect_stats(model):
        logits(model, tokens)
        model.config.rrattn_threshold = 0.5
        with pytest.raises(ValueError, match="statistics of this model are being collected"):
            model(tokens)
    logits(model, tokens)


def test_a_layer_that_says_not_which_it_is_is_refused():
    query, (key, value) = paddle.randn([1, 4, 256, 16]), paddle.randn([2, 1, 2, 256, 16])
    with pytest.raises(ValueError, match="Layer has no config and layer_idx"):
        ALL_ATTENTION_FUNCTIONS["rrattn"](paddle.nn.Layer(), query, key, value)


def test_a_flag_that_a_layer_does_not_follow_is_an_error(tokens):
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"head_dim": 16, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3TextConfig(**settings, vocab_size=97, pad_token_id=0)
    config.fuse_rms_norm = False
    config._attn_implementation = "rrattn"
    model = transformers.Gemma3ForCausalLM(config)
    model.eval()
    with pytest.raises(ValueError, match="is 'rrattn', but Gemma3Attention runs 'sdpa'.*rrattn.enable"):
        model(tokens)
    config._attn_implementation = "sdpa"  # its layers took the flag when they were built
    with pytest.raises(ValueError, match="is 'sdpa', but Gemma3Attention runs 'rrattn'"):
        model(tokens)


def test_a_flag_that_no_layer_looks_up_is_an_error(model, tokens, monkeypatch):
    dense = logits(model, tokens)
    modeling = sys.modules[type(model).__module__]
    theirs = eager_attention_forward  # instead of what stands in the table
    monkeypatch.setattr(modeling, "ALL_ATTENTION_FUNCTIONS", {"rrattn": theirs, "sdpa": theirs, "eager": theirs})
    assert (logits(model, tokens) == dense).all()
    model.config._attn_implementation = "rrattn"
    for part, inputs in ((model, tokens), (model.model, tokens)):
        with pytest.raises(ValueError, match=f"no attention layer of {type(part).__name__} looks it up"):
            part(inputs)
    monkeypatch.undo()
    assert (logits(model, tokens) == logits(rrattn.enable(make_model()), tokens)).all()


@pytest.mark.parametrize("order", ["rrattn, paddleformers", "paddleformers, rrattn"])
def test_the_order_of_imports_does_not_matter(order):
    program = f"""
import sys
for name in {order!r}.split(", "):
    __import__(name)
    if name == "rrattn" and {order!r}.startswith("rrattn"):
        assert "paddleformers" not in sys.modules, "importing rrattn must not import model libraries"
from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS
print(ALL_ATTENTION_FUNCTIONS["rrattn"].__name__)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "rrattn_attention_forward"


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "rrattn", "my own"])
def test_disable_restores_the_flag(model, implementation):
    model.config._attn_implementation = implementation
    rrattn.enable(model, DENSE)
    rrattn.enable(model, SPARSE)
    assert model.config._attn_implementation == "rrattn"
    rrattn.disable(model)
    assert model.config._attn_implementation == implementation


def test_enabling_changes_the_flag_alone(model):
    settings = model.config.to_dict()
    rrattn.enable(model, SPARSE)
    assert model.config._attn_implementation == model.config["_attn_implementation"] == "rrattn"
    assert model.config.to_dict() == settings  # of which others are built


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_family_that_is_not_tested_works_with_one_warning(model, tokens, by_flag, monkeypatch):
    expected = logits(rrattn.enable(make_model()), tokens)
    warnings = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    model.config.model_type = "new_family"
    if by_flag:
        model.config._attn_implementation = "rrattn"
    else:
        rrattn.enable(model)
    for _ in range(2):
        assert (logits(model, tokens) == expected).all()
    assert len(warnings) == 1 and "not tested with new_family models of PaddleFormers" in warnings[0]


def test_models_without_attention_layers_are_refused(model):
    model.model.layers = paddle.nn.LayerList()
    with pytest.raises(ValueError, match="no attention layers in LlamaForCausalLM"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["context_parallel_size", "sep_parallel_size"])
def test_configs_that_are_not_supported_are_refused(model, tokens, name):
    setattr(model.config, name, 2)
    with pytest.raises(ValueError, match=f"{name}=2 in PaddleFormers.*must be 1: layers .* their own rank alone"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "rrattn"
    with pytest.raises(ValueError, match=f"{name}=2"):
        model(tokens)


# Sliding windows, of which the cache holds the last keys and the mask says all. PaddleFormers' own attention takes the
# first columns of such a mask once the cache is full, so that the dense twin runs without a cache.

WINDOW = 128


@pytest.fixture(params=["qwen2", "qwen3"])
def sliding_model(request):
    if request.param not in MODELS:
        pytest.skip("another library's model in this version")
    # one layer with the window after one without
    return make_model(request.param, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)


@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("length", [60, WINDOW - 1, WINDOW, WINDOW + 1, 300])
def test_generation_with_a_sliding_window_equals_the_dense_twin(sliding_model, length, padding):
    tokens = make_tokens(length)
    keep = paddle.ones_like(tokens)
    keep[1, :padding] = 0
    dense = generate(sliding_model, tokens, 4, attention_mask=keep, use_cache=False)
    assert (generate(rrattn.enable(sliding_model, DENSE), tokens, 4, attention_mask=keep) == dense).all()


@paddle.no_grad()
@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("pieces", [(60, 1, 80, 1, 1), (127, 1, 1), (128, 1, 5), (300, 7, 1, 140, 1)])
def test_pieces_after_the_cache_of_a_sliding_window_equal_the_dense_twin(sliding_model, pieces, padding):
    tokens = make_tokens(sum(pieces))
    keep = paddle.ones_like(tokens)
    keep[1, :padding] = 0
    positions = paddle.arange(sum(pieces)).unsqueeze(0).expand([2, -1])
    dense = logits(sliding_model, tokens, attention_mask=keep, position_ids=positions, use_cache=False)
    rrattn.enable(sliding_model, DENSE)
    cache, parts, begin = None, [], 0
    for count in pieces:
        inputs = {"attention_mask": keep[:, : begin + count], "begin": begin, "cache": cache, "use_cache": True}
        out = forward(sliding_model, tokens[:, begin : begin + count], **inputs)
        cache, begin = out.past_key_values, begin + count
        parts.append(out.logits.numpy())
    ours = np.concatenate(parts, axis=1)
    assert_same(ours[0], dense[0])
    assert_same(ours[1, padding:], dense[1, padding:])


# The attention function


def call(model, length=256, **arguments):
    layer = model.model.layers[0].self_attn
    paddle.seed(0)
    query = paddle.randn([1, NUM_HEADS, length, 16])
    key, value = paddle.randn([2, 1, 2, length, 16])
    return ALL_ATTENTION_FUNCTIONS["rrattn"](layer, query, key, value, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout.*0.1"),
        ({"softcap": 50.0}, "attention argument softcap, got 50.0"),
        ({"bias": paddle.zeros([NUM_HEADS, 256])}, r"attention argument bias, got a tensor of shape \[4, 256\]"),
        ({"sliding_window": 128}, "LLamaAttention 0 has a sliding_window of 128, but neither .* its 256 keys"),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(model, **arguments)


def test_arguments_that_are_not_set_are_fine(model):
    out, weights = call(model, sliding_window=None, dropout=0.0, softcap=None, output_attentions=False)
    assert out.shape == [1, 256, NUM_HEADS * 16] and weights is None
    assert (call(model, sliding_window=256, position_ids=paddle.arange(256), return_dict=True)[0] == out).all()


def test_attention_dropout_in_training_is_an_error(tokens):
    model = make_model(attention_dropout=0.1)
    logits(rrattn.enable(model), tokens)
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        model(tokens)


def test_scaling_and_causality_are_honoured(model):
    out, _ = call(model, scaling=0.5)
    assert (call(model, scaling=0.5)[0] == out).all()
    assert_differs(call(model, scaling=0.25)[0].numpy(), out.numpy())
    assert_differs(call(model, scaling=0.5, is_causal=False)[0].numpy(), out.numpy())


def test_a_window_must_be_in_a_mask(model):
    """Layers of full attention pass the config's window as well, and others have it in a mask."""
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 128
    out, _ = call(model)
    assert (call(model, sliding_window=128)[0] == out).all()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_window of 128, but neither attention_mask nor"):
        call(model)
    position = paddle.arange(256)
    distance = position.unsqueeze(-1) - position
    mask = ((distance >= 0) & (distance < 128)).reshape([1, 1, 256, 256])
    assert_differs(call(model, attention_mask=mask, sliding_window=128)[0].numpy(), out.numpy())


# ERNIE 4.5, whose layers read the flag when they are built


def test_ernie_layers_follow_enable_and_disable(tokens):
    model = make_model("ernie4_5")
    dense = logits(model, tokens)
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    assert_differs(sparse, dense)
    rrattn.enable(model, DENSE)
    assert {layer.attn_implementation for layer in attention_layers(model)} == {"rrattn"}
    rrattn.disable(model)
    assert {layer.attn_implementation for layer in attention_layers(model)} == {"eager"}
    assert model.config._attn_implementation == "eager" and (logits(model, tokens) == dense).all()


@pytest.mark.parametrize("built_with", ["eager", "sdpa", "my own"])
def test_a_flag_that_comes_too_late_for_ernie_is_an_error(tokens, built_with, monkeypatch):
    functions = {**type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "my own": eager_attention_forward}
    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "_global_mapping", functions)
    model = make_model("ernie4_5", implementation=built_with)
    model.config._attn_implementation = "rrattn"  # for which PaddleFormers makes no mask
    with pytest.raises(ValueError, match=f"is 'rrattn', but Ernie4_5Attention runs '{built_with}'.*rrattn.enable"):
        model(tokens)
    with pytest.raises(ValueError, match="not enabled"), rrattn.collect_stats(model):
        pass
    assert rrattn.layer_densities(model) == [None] * NUM_LAYERS
    assert (logits(rrattn.enable(model, SPARSE), tokens) == logits(ernie_by_flag(SPARSE), tokens)).all()


def test_a_flag_that_is_taken_from_ernie_is_an_error(tokens):
    by_flag, enabled = ernie_by_flag(SPARSE), rrattn.enable(make_model("ernie4_5"), SPARSE)
    for model in (by_flag, enabled):
        logits(model, tokens)
        model.config._attn_implementation = "eager"
        assert rrattn.layer_densities(model) == [None] * NUM_LAYERS
        with pytest.raises(ValueError, match="is 'eager', but Ernie4_5Attention runs 'rrattn'.*rrattn.disable"):
            model(tokens)
    assert (logits(rrattn.disable(enabled), tokens) == logits(make_model("ernie4_5"), tokens)).all()


def ernie_by_flag(config):
    """An ERNIE 4.5 model that is built with the flag and settings."""
    settings = {f"rrattn_{name}": setting for name, setting in asdict(config).items()}
    return make_model("ernie4_5", implementation="rrattn", **settings)


def test_an_ernie_model_built_with_the_flag(tokens):
    model = ernie_by_flag(SPARSE)
    assert (logits(model, tokens) == logits(rrattn.enable(make_model("ernie4_5"), SPARSE), tokens)).all()


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_ernie_with_experts(tokens, threshold):
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
    # without a layer of experts, which Paddle's CPU build lacks operators for
    model = make_model("ernie4_5_moe", **experts, moe_layer_start_index=NUM_LAYERS)
    dense = logits(model, tokens)
    ours = logits(rrattn.enable(model, rrattn.RRAttentionConfig(threshold=threshold)), tokens)
    (assert_same if threshold == 1 else assert_differs)(ours, dense)
    assert (logits(rrattn.disable(model), tokens) == dense).all()
