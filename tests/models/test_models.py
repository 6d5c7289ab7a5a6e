"""Models behind the flag: the dense twin is the model's own eager attention."""

import copy
import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle_harness import eager_auto_cast
from tiny_models import (
    DENSE,
    LENGTH,
    LIBRARY,
    MODELS,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    assert_same_gradients,
    attention_layers,
    enable_recompute,
    forward,
    generate,
    gradients,
    logits,
    make_model,
    make_tokens,
)

import rrattn
from rrattn import functional
from rrattn.integrations import common

# Switching over and back


@pytest.mark.parametrize("model_type", MODELS)
def test_every_block_selected_equals_the_dense_twin(model_type, tokens):
    model = make_model(model_type)
    dense = logits(model, tokens)
    assert_same(logits(rrattn.enable(model, DENSE), tokens), dense)
    assert_differs(logits(rrattn.enable(model, SPARSE), tokens), dense)
    assert (logits(rrattn.disable(model), tokens) == dense).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (8, 1)])
def test_key_heads_shared_by_any_number_of_query_heads(heads, kv_heads, tokens):
    model = make_model(heads=heads, kv_heads=kv_heads)
    dense = logits(model, tokens)
    shapes = []
    core = common.core_of(attention_layers(rrattn.enable(model, DENSE))[0])
    attend = core._attend
    core._attend = lambda *a, **k: shapes.append([tensor.shape[2] for tensor in a[:3]]) or attend(*a, **k)
    assert_same(logits(model, tokens), dense)
    assert shapes == [[heads, kv_heads, kv_heads]]


def test_disable_leaves_nothing_behind(model):
    attributes = [dict(vars(layer)) for layer in model.sublayers()]
    settings = model.config.to_dict()
    rrattn.enable(model, DENSE)
    rrattn.enable(model, SPARSE)
    assert rrattn.disable(model) is model
    for layer, before in zip(model.sublayers(), attributes):
        assert set(vars(layer)) == set(before)
        assert all(vars(layer)[name] is value or vars(layer)[name] == value for name, value in before.items())
    assert model.config.to_dict() == settings
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(model)


def test_enabling_leaves_the_state_as_it_is(model, tokens):
    names = list(model.state_dict())
    logits(rrattn.enable(model, SPARSE), tokens)
    assert list(model.state_dict()) == names


def test_a_copy_of_an_enabled_model_runs_by_itself(model, tokens):
    expected = logits(rrattn.enable(model, SPARSE), tokens)
    selections = rrattn.layer_selections(model)
    duplicate = copy.deepcopy(model)
    rrattn.disable(model)
    assert (logits(duplicate, tokens) == expected).all()
    assert rrattn.layer_selections(duplicate)[0] is not selections[0]
    assert_differs(logits(rrattn.disable(duplicate), tokens), expected)


@pytest.mark.parametrize("threshold", [0.5, [0.5, 1.0]])
def test_settings_in_the_config_of_the_model(model, tokens, threshold):
    model.config.rrattn_threshold = threshold
    model.config.rrattn_stride = 16
    by_model = logits(rrattn.enable(model), tokens)
    config = rrattn.RRAttentionConfig(threshold=threshold, stride=16)
    assert (by_model == logits(rrattn.enable(make_model(), config), tokens)).all()
    assert_differs(by_model, logits(rrattn.enable(model, DENSE), tokens))


@pytest.mark.parametrize("in_the_model", (False, True))
def test_deterministic_reaches_the_operator_of_every_layer(model, tokens, in_the_model, monkeypatch):
    """Of dense layers and of those that select."""
    config = replace(SPARSE, deterministic=True, dense_layers=[0])
    if in_the_model:
        model.config.rrattn_deterministic, model.config.rrattn_dense_layers, config = True, [0], None
    given, call = [], functional.call
    monkeypatch.setattr(functional, "call", lambda name, *rest: given.append((name, rest[-3])) or call(name, *rest))
    logits(rrattn.enable(model, config), tokens)
    assert given == [("attend", True)] + [("rr_attention", True)] * (NUM_LAYERS - 1)


@pytest.mark.parametrize("in_the_model", (False, True))
def test_compensate_reaches_the_operator_of_every_layer(model, tokens, in_the_model, monkeypatch):
    """Of those that select, for inference alone."""
    config = replace(SPARSE, compensate=True, dense_layers=[0])
    expected = logits(rrattn.enable(make_model(), replace(config, compensate=False)), tokens)
    if in_the_model:
        given = {
            name: value for name, value in vars(config).items() if value != getattr(rrattn.RRAttentionConfig(), name)
        }
        for name, value in given.items():
            setattr(model.config, f"rrattn_{name}", value)
        config = None
    given, call = [], functional.call
    monkeypatch.setattr(functional, "call", lambda name, *rest: given.append((name, rest[-2])) or call(name, *rest))
    assert_differs(logits(rrattn.enable(model, config), tokens), expected)
    assert given == [("attend", False)] + [("rr_attention", True)] * (NUM_LAYERS - 1)
    model.train()
    with pytest.raises(ValueError, match=r"compensate is True.*compensate=False.*paddle\.no_grad"):
        model(tokens)


@pytest.mark.parametrize("in_the_model", (False, True))
def test_quantization_reaches_the_operator_of_every_layer(model, tokens, in_the_model, monkeypatch):
    """Of dense layers and of those that select, for inference alone."""
    config = replace(SPARSE, quantization="qk_int8_pv_fp8", dense_layers=[0])
    expected = logits(rrattn.enable(make_model(), replace(config, quantization=None)), tokens)
    if in_the_model:
        for name, value in vars(config).items():
            if value != getattr(rrattn.RRAttentionConfig(), name):
                setattr(model.config, f"rrattn_{name}", value)
        config = None
    given, call = [], functional.call
    monkeypatch.setattr(functional, "call", lambda name, *rest: given.append((name, rest[-1])) or call(name, *rest))
    assert_differs(logits(rrattn.enable(model, config), tokens), expected)
    quantized = "qk_int8_pv_fp8"
    assert given == [("attend", quantized)] + [("rr_attention", quantized)] * (NUM_LAYERS - 1)
    model.train()
    with pytest.raises(ValueError, match=r"quantization is 'qk_int8_pv_fp8'.*quantization=None.*paddle\.no_grad"):
        model(tokens)


def test_unknown_settings_in_the_config_of_the_model(model):
    model.config.rrattn_treshold = 0.5
    with pytest.raises(ValueError, match="rrattn_treshold.*rrattn_threshold"):
        rrattn.enable(model)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"Linear.*paddleformers.*paddlenlp"):
        rrattn.enable(paddle.nn.Linear(2, 2))


def test_what_changed_is_logged_once(model, monkeypatch):
    logger = importlib.import_module(f"{LIBRARY}.utils.log").logger
    messages = []
    monkeypatch.setattr(logger, "info", messages.append)
    settings = {"threshold": 0.9, "dense_layers": [1], "min_length": 1000, "compensate": True}
    rrattn.enable(model, rrattn.RRAttentionConfig(**settings))
    name = {"paddleformers": "PaddleFormers", "paddlenlp": "PaddleNLP"}[LIBRARY]
    assert messages == [
        f"rrattn runs 2 attention layers of LlamaForCausalLM ({name}): threshold 0.9, stride 8, dense in layers 1, "
        "dense below 1000 keys, compensated"
    ]


# Selection, and its view


def test_the_readme_prints_densities_before_the_first_call_too(model, tokens, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.search(r"^for density in rrattn.layer_densities.*\n    print.*$", readme, re.MULTILINE).group()
    rrattn.enable(model, SPARSE)
    exec(lines, {"rrattn": rrattn, "model": model})
    logits(model, tokens)
    exec(lines, {"rrattn": rrattn, "model": model})
    expected = [float(density.mean()) for density in rrattn.layer_densities(model)]
    assert capsys.readouterr().out.splitlines()[-2 * NUM_LAYERS :] == [
        *["no prefill yet"] * NUM_LAYERS,
        *map(str, expected),
    ]


def test_densities_are_of_the_last_prefill(model, tokens):
    rrattn.enable(model, SPARSE)
    assert rrattn.layer_densities(model) == [None] * NUM_LAYERS
    logits(model, tokens)
    densities = rrattn.layer_densities(model)
    for density, selection in zip(densities, rrattn.layer_selections(model)):
        assert density.shape == [2, NUM_HEADS] and 0.3 < float(density.min()) < 1
        bits = rrattn.unpack_block_mask(selection.block_mask, 6).numpy() & np.tril(np.ones([6, 6], dtype=bool))
        np.testing.assert_allclose(density.numpy(), bits.sum((2, 3)) / 21, rtol=1e-6)
    rrattn.enable(model, replace(SPARSE, threshold=0.2))
    logits(model, tokens)
    for lower, higher in zip(rrattn.layer_densities(model)[:1], densities):
        assert (lower <= higher).all() and float(lower.mean()) < float(higher.mean())


def test_thresholds_per_layer_and_per_head(model, tokens):
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[1.0, (0.2, 1.0, 0.2, 1.0)]))
    logits(model, tokens)
    first, second = (density.numpy() for density in rrattn.layer_densities(model))
    assert (first == 1).all() and (second[:, 1::2] == 1).all() and (second[:, ::2] < 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": [0.5]},
        {"threshold": [0.5, (0.5, 0.5)]},
        {"threshold": [0.5, 0.5, 0.5]},
        {"dense_layers": [2]},
    ],
)
def test_settings_that_do_not_fit_the_model(model, tokens, settings):
    dense = logits(model, tokens)
    with pytest.raises(ValueError, match="1|2|3"):
        rrattn.enable(model, rrattn.RRAttentionConfig(**settings))
    assert (logits(model, tokens) == dense).all()


def test_layers_kept_dense(model, tokens, monkeypatch):
    dense = logits(model, tokens)
    monkeypatch.setattr(rrattn.layer, "rr_attention", None)  # a dense layer estimates nothing
    both = rrattn.RRAttentionConfig(threshold=0.1, dense_layers=(0, 1))
    assert_same(logits(rrattn.enable(model, both), tokens), dense)
    monkeypatch.undo()
    one = rrattn.RRAttentionConfig(threshold=0.1, dense_layers=(1,))
    assert_differs(logits(rrattn.enable(model, one), tokens), dense)
    first, second = (density.numpy() for density in rrattn.layer_densities(model))
    assert (first < 1).all() and (second == 1).all()


@paddle.no_grad()
def test_short_inputs_are_dense(model, tokens):
    dense = logits(model, tokens)
    config = rrattn.RRAttentionConfig(threshold=0.1, min_length=LENGTH)
    sparse = logits(rrattn.enable(model, config), tokens)
    assert_differs(sparse, dense)
    assert_same(logits(model, tokens[:, :-1]), dense[:, :-1])
    assert (rrattn.layer_densities(model)[0] == 1).all()
    cache = forward(model, tokens[:, :400], use_cache=True).past_key_values
    chunk = forward(model, tokens[:, 400:], begin=400, cache=cache, use_cache=True)  # as many keys as are not short
    assert float(rrattn.layer_densities(model)[0].max()) < 1
    assert_differs(chunk.logits.numpy(), dense[:, 400:])


# Generation


@pytest.mark.parametrize("model_type", MODELS)
def test_generation_equals_the_dense_twin(model_type, tokens):
    model = make_model(model_type)
    sampling = {"decode_strategy": "sampling", "top_k": 5, "temperature": 0.7}
    for settings in ({}, sampling):
        paddle.seed(3)
        dense = generate(model, tokens, 10, **settings)
        rrattn.enable(model, DENSE)
        paddle.seed(3)
        ours = generate(model, tokens, 10, **settings)
        assert dense.shape == (2, 10)
        assert (dense == ours).all()
        rrattn.disable(model)


@paddle.no_grad()
def test_decoding_is_dense_and_leaves_the_selection(model, tokens):
    rrattn.enable(model, SPARSE)
    caches = [forward(model, tokens[:, :-1], use_cache=True).past_key_values for _ in range(2)]
    selections = rrattn.layer_selections(model)
    step = {"begin": LENGTH - 1, "use_cache": True}
    ours = forward(model, tokens[:, -1:], cache=caches[0], **step).logits
    assert rrattn.layer_selections(model) == selections
    rrattn.disable(model)
    dense = forward(model, tokens[:, -1:], cache=caches[1], **step).logits
    assert_same(ours.numpy(), dense.numpy())


@paddle.no_grad()
@pytest.mark.parametrize(("config", "chunk"), [(SPARSE, 128), (SPARSE, 256), (DENSE, 100)])
def test_prefill_in_chunks_equals_one_prefill(model, tokens, config, chunk):
    whole = logits(rrattn.enable(model, config), tokens)
    cache, parts = None, []
    for begin in range(0, LENGTH, chunk):
        part = forward(model, tokens[:, begin : begin + chunk], begin=begin, cache=cache, use_cache=True)
        cache = part.past_key_values
        parts.append(part.logits.numpy())
    assert_same(np.concatenate(parts, axis=1), whole)


# Training


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_equal_the_dense_twin(model_type, tokens):
    model = make_model(model_type)
    dense = gradients(model, tokens)
    assert_same_gradients(gradients(rrattn.enable(model, DENSE), tokens), dense)
    sparse = gradients(rrattn.enable(model, SPARSE), tokens)
    name = next(name for name in dense[1] if re.search("layers.0.self_attn.(k|qkv)_proj.weight$", name))
    assert np.abs(sparse[1][name] - dense[1][name]).max() > 1e-3 * np.abs(dense[1][name]).max()


@pytest.mark.parametrize("padded", [False, True])
def test_recompute_selects_the_same_blocks(model, tokens, padded, monkeypatch):
    inputs = {}
    if padded:
        inputs["attention_mask"] = paddle.ones([2, LENGTH], dtype="int64")
        inputs["attention_mask"][1, :200] = 0
    expected = gradients(rrattn.enable(model, SPARSE), tokens, **inputs)
    calls = []
    attend = rrattn.RRAttention.forward
    monkeypatch.setattr(rrattn.RRAttention, "forward", lambda *a, **k: calls.append(0) or attend(*a, **k))
    enable_recompute(model)
    again = gradients(model, tokens, **inputs)
    assert len(calls) == 2 * NUM_LAYERS  # so recompute did take place
    for name, gradient in expected[1].items():
        np.testing.assert_array_equal(again[1][name], gradient, err_msg=name)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (8, 1)])
def test_gradients_of_key_heads_shared_by_any_number_of_query_heads(heads, kv_heads, tokens):
    model = make_model(heads=heads, kv_heads=kv_heads)
    dense = gradients(model, tokens)
    assert_same_gradients(gradients(rrattn.enable(model, DENSE), tokens), dense)


def accumulated(model, tokens):
    """What `gradients` returns, by one backward pass per row."""
    model.train()
    model.clear_gradients()
    losses = [model(row.unsqueeze(0), labels=row.unsqueeze(0), return_dict=True).loss / len(tokens) for row in tokens]
    for loss in losses:
        loss.backward()
    return float(sum(losses)), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", MODELS)
def test_accumulated_gradients_are_those_of_the_batch(model_type, tokens):
    model = make_model(model_type)
    dense = accumulated(model, tokens)
    assert_same_gradients(accumulated(rrattn.enable(model, DENSE), tokens), dense)
    sparse = gradients(rrattn.enable(model, SPARSE), tokens)
    assert_same_gradients(accumulated(model, tokens), sparse)
    assert abs(sparse[0] - dense[0]) > 1e-3


def relative_errors(actual, exact):
    """Of the loss and of each gradient, in norm; of two results of `gradients`."""
    yield abs(actual[0] - exact[0]) / abs(exact[0])
    for name, gradient in exact[1].items():
        yield np.linalg.norm(actual[1][name] - gradient) / np.linalg.norm(gradient)


@pytest.mark.parametrize("model_type", MODELS)
def test_attention_under_amp_is_as_exact_as_its_dtype(model_type, tokens, monkeypatch):
    """Level O1, in which rrattn casts what it gets; Paddle's own operators have no amp on the CPU."""
    attend = rrattn.RRAttention.forward

    def rounded(core, *tensors, **options):
        """In float32, from inputs and to an output that bfloat16 holds; gradients likewise."""
        halves = (tensor.astype("bfloat16").astype("float32") for tensor in tensors[:3])
        return attend(core, *halves, *tensors[3:], **options).astype("bfloat16").astype("float32")

    model = make_model(model_type)
    exact = gradients(model, tokens)
    rrattn.enable(model, DENSE)
    with eager_auto_cast("O1"):
        ours = gradients(model, tokens)
    monkeypatch.setattr(rrattn.RRAttention, "forward", rounded)
    noise = list(relative_errors(gradients(model, tokens), exact))
    assert np.median(noise) > 1e-3
    for error, expected in zip(relative_errors(ours, exact), noise):
        assert error <= 2 * expected + 1e-3


def test_training_lowers_the_loss(model):
    tokens = make_tokens(256)
    rrattn.enable(model, SPARSE).train()
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=model.parameters())
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens, return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


# The published release's names


@pytest.mark.parametrize("model_type", MODELS)
def test_the_published_names_patch_models(model_type, tokens):
    patch = getattr(rrattn, f"patch_{model_type.rstrip('0123456789_')}_attention")
    model = make_model(model_type)
    with pytest.warns(DeprecationWarning, match=f"^use_triton, chunk_size of {patch.__name__}") as caught:
        assert patch(model, "rrattn", [0.5, 0.7], use_triton=True, chunk_size=2048, keep_recent=False) is model
    assert len([entry for entry in caught if entry.category is DeprecationWarning]) == 1
    patched = logits(model, tokens)
    off = {"keep_local": 0, "spread": 0, "min_share": 0}
    config = rrattn.RRAttentionConfig(threshold=[0.5, 0.7], keep_last=False, **off)
    assert (patched == logits(rrattn.enable(make_model(model_type), config), tokens)).all()
    defaults = rrattn.RRAttentionConfig(threshold=0.9, keep_last=True, **off)
    expected = logits(rrattn.enable(make_model(model_type), defaults), tokens)
    assert (logits(patch(model), tokens) == expected).all()


@pytest.mark.parametrize(
    ("patch", "arguments", "error", "message"),
    [
        (rrattn.patch_llama_attention, {"method": "full"}, ValueError, "method is 'full', but must be 'rrattn'"),
        (rrattn.patch_qwen_attention, {}, ValueError, "patch_qwen_attention.*qwen2, qwen3;.*'llama'"),
        (rrattn.patch_ernie_attention, {}, ValueError, "ernie4_5, ernie4_5_moe;.*'llama'"),
        (rrattn.patch_llama_attention, {"stride": [8, 16]}, ValueError, r"stride is \[8, 16\]"),
        (rrattn.patch_llama_attention, {"keep_recent": 1}, ValueError, "keep_recent is 1, but must be True or False"),
        (rrattn.patch_llama_attention, {"tau": 0.1}, TypeError, "patch_llama_attention has no argument tau"),
    ],
)
def test_what_the_published_names_refuse(model, tokens, patch, arguments, error, message):
    dense = logits(model, tokens)
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert (logits(model, tokens) == dense).all()
