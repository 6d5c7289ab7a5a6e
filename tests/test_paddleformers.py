"""What PaddleFormers alone has: the flag, the table of attention functions, and what it passes to them."""

import subprocess
import sys

import paddle
import pytest

import rrattn

pytest.importorskip("paddleformers")

from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from tiny_models import (  # noqa: E402
    DENSE,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    attention_layers,
    logits,
    make_model,
)

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


def test_models_of_other_types_are_refused(model):
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="llama, qwen2, qwen3, ernie4_5, ernie4_5_moe.*'mamba'"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"


def test_models_without_attention_layers_are_refused(model):
    model.model.layers = paddle.nn.LayerList()
    with pytest.raises(ValueError, match="no attention layers in LlamaForCausalLM"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["context_parallel_size", "sep_parallel_size"])
def test_configs_that_are_not_supported_are_refused(model, tokens, name):
    setattr(model.config, name, 2)
    with pytest.raises(ValueError, match=f"{name}=2 in PaddleFormers.*must be 1"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "rrattn"
    with pytest.raises(ValueError, match=f"{name}=2"):
        model(tokens)


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
        ({"sink": paddle.zeros([NUM_HEADS])}, "sink"),
        ({"sliding_window": 128}, "sliding_window.*128"),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(model, **arguments)


def test_arguments_that_are_not_set_are_fine(model):
    out, weights = call(model, sliding_window=None, dropout=0.0)
    assert out.shape == [1, 256, NUM_HEADS * 16] and weights is None


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
    model.config._attn_implementation = "rrattn"  # too late for this model, so that it must not look enabled
    with pytest.raises(ValueError, match="not enabled"), rrattn.collect_stats(model):
        pass


def test_an_ernie_model_built_with_the_flag(tokens):
    model = make_model("ernie4_5", implementation="rrattn", rrattn_threshold=0.5, rrattn_keep_last=False)
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
