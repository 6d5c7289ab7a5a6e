"""What PaddleNLP alone has: repeated key heads, a flag read at every call, its ways of recompute, and two hooks."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import rrattn

paddlenlp = pytest.importorskip("paddlenlp")

from tiny_models import (  # noqa: E402
    DENSE,
    MODELS,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    attention_layers,
    enable_recompute,
    gradients,
    logits,
    make_model,
)

from rrattn.integrations import common  # noqa: E402
from rrattn.integrations import paddlenlp as integration  # noqa: E402

# The flag


def test_the_flag_is_read_at_every_call(model, tokens):
    dense = logits(model, tokens)
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    assert model.config.use_rrattn is True
    model.config.use_rrattn = False
    assert (logits(model, tokens) == dense).all()
    model.config.use_rrattn = True
    assert (logits(model, tokens) == sparse).all()


@pytest.mark.parametrize("before", [True, False])
def test_disable_restores_the_flag(model, before):
    model.config.use_rrattn = before
    rrattn.enable(model, DENSE)
    rrattn.enable(model, SPARSE)
    assert model.config.use_rrattn is True
    rrattn.disable(model)
    assert model.config.use_rrattn is before


def test_models_without_a_known_layer_are_refused(model):
    with pytest.raises(ValueError, match="no attention layers in LlamaLMHead.*LlamaAttention, Qwen2Attention"):
        rrattn.enable(model.lm_head)


# Repeated heads, sequence parallelism, parts of a model


def test_keys_that_are_not_repeated_are_left_alone(model, tokens):
    dense = logits(model, tokens)
    model.config.use_flash_attention = True  # then PaddleNLP repeats nothing
    expected = logits(rrattn.enable(model, SPARSE), tokens)
    assert_same(logits(rrattn.enable(model, DENSE), tokens), dense)
    model.config.use_flash_attention = False
    np.testing.assert_array_equal(logits(rrattn.enable(model, SPARSE), tokens), expected)


def bare_layer(kv_heads, config):
    """(layer, attention function), without its weights."""
    settings = SimpleNamespace(use_flash_attention=False)
    layer = paddle.nn.Layer()
    layer.config, layer.num_key_value_groups = settings, 2
    layer.num_key_value_heads, layer.kv_indices = kv_heads, None
    place = common.Place(num_layers=1, num_heads=NUM_HEADS)
    common.set_core(layer, common.make_core(config, place, 0))
    original = sys.modules["paddlenlp.transformers.llama.modeling"].scaled_dot_product_attention
    return layer, integration.LayerAttention(layer, original)


def test_sequence_parallel_layers_get_their_shape():
    layer, attention = bare_layer(2, SPARSE)
    query, (key, value) = paddle.randn([2, 256, 4, 16]), paddle.randn([2, 2, 256, 4, 16])
    out = attention(query, layer.config, key, value, None, False)
    flat = attention(query, layer.config, key, value, None, False, sequence_parallel=True)
    assert out.shape == [2, 256, 64] and flat.shape == [512, 64]
    assert (flat.reshape([2, 256, 64]) == out).all()


def test_a_part_of_the_layers(model, tokens):
    part = model.llama.layers[0]  # as a stage of a pipeline holds it
    both = logits(rrattn.enable(model, SPARSE), tokens)
    rrattn.disable(model)
    dense = logits(model, tokens)
    rrattn.enable(part, SPARSE)
    first = logits(model, tokens)
    assert_differs(first, both)
    assert_differs(first, dense)
    assert rrattn.layer_densities(part)[0].shape == [2, NUM_HEADS]
    assert (logits(model, tokens) == first).all()
    assert (logits(rrattn.disable(part) and model, tokens) == dense).all()
    for config in (rrattn.RRAttentionConfig(threshold=[0.5, 0.6]), rrattn.RRAttentionConfig(dense_layers=[1])):
        with pytest.raises(ValueError, match="1 of its 2 attention layers"):
            rrattn.enable(part, config)


# Recompute


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("granularity", ["full", "full_attn", "core_attn"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_every_way_of_recompute(model_type, granularity, reentrant, tokens, monkeypatch):
    model = make_model(model_type)
    expected = gradients(rrattn.enable(model, SPARSE), tokens)
    calls = []
    attend = rrattn.RRAttention.forward
    monkeypatch.setattr(rrattn.RRAttention, "forward", lambda *a, **k: calls.append(0) or attend(*a, **k))
    model.config.recompute_use_reentrant = reentrant
    enable_recompute(model, granularity)
    again = gradients(model, tokens)
    assert len(calls) == 2 * NUM_LAYERS  # so recompute did take place
    for name, gradient in expected[1].items():
        np.testing.assert_array_equal(again[1][name], gradient, err_msg=name)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"alibi": paddle.zeros([2 * NUM_HEADS, 1, 256])}, "alibi"),
        ({"attention_mask": paddle.zeros([2, 1, 256, 256])}, "not causal"),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(arguments, message):
    layer, attention = bare_layer(2, SPARSE)
    query, (key, value) = paddle.randn([2, 256, 4, 16]), paddle.randn([2, 2, 256, 4, 16])
    with pytest.raises(ValueError, match=message):
        attention(query, layer.config, key, value, **{"attention_mask": None, "output_attentions": False, **arguments})


@pytest.mark.parametrize(
    ("name", "setting"), [("alibi", True), ("context_parallel_degree", 2), ("sep_parallel_degree", 2)]
)
def test_configs_that_are_not_supported_are_refused(model, name, setting):
    setattr(model.config, name, setting)
    with pytest.raises(ValueError, match=f"{name}={setting}"):
        rrattn.enable(model)
    assert common.core_of(attention_layers(model)[0]) is None


@pytest.mark.skipif("qwen2" not in MODELS, reason="LLaMA has no attention dropout")
def test_attention_dropout_in_training_is_an_error(tokens):
    model = make_model("qwen2", attention_dropout=0.1)
    logits(rrattn.enable(model), tokens)
    model.train()
    with pytest.raises(ValueError, match="dropout.*0.1"):
        model(tokens)


# The two hooks


def test_the_hook_is_the_one_of_the_version(model):
    layers = attention_layers(rrattn.enable(model, SPARSE))
    hook = "forward" if paddlenlp.__version__.startswith("2.") else "attn_func"
    assert all(hook in vars(layer) for layer in layers)
    assert type(layers[0]).forward is not vars(layers[0]).get("forward")


def test_other_models_stay_as_they_are(model, tokens):
    other = make_model()
    dense = logits(other, tokens)
    rrattn.enable(model, SPARSE)
    assert (logits(other, tokens) == dense).all()
    assert (logits(make_model(), tokens) == dense).all()


def test_layers_that_call_something_else_are_refused(model, monkeypatch):
    for layer in attention_layers(model):
        vars(layer).pop("attn_func", None)
    monkeypatch.setattr(type(attention_layers(model)[0]), "forward", lambda self, hidden: hidden)
    with pytest.raises(ValueError, match="LlamaAttention calls no scaled_dot_product_attention"):
        rrattn.enable(model)


@pytest.mark.skipif(paddlenlp.__version__.startswith("2."), reason="PaddleNLP 2.8 has no refined recompute")
def test_arguments_that_were_bound_to_the_hook(model, tokens):
    layer = attention_layers(model)[0]
    bound = layer.attn_func = partial(layer.attn_func, skip_recompute=True)  # as refined recompute has it
    assert_same(logits(rrattn.enable(model, DENSE), tokens), logits(make_model(), tokens))
    rrattn.disable(model)
    assert layer.attn_func is bound
