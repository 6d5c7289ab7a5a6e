"""PaddleFormers models behind the flag: the dense twin is the model's own eager attention."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import rrattn

pytest.importorskip("paddleformers")

from tiny_models import (  # noqa: E402
    DENSE,
    LENGTH,
    MODELS,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    logits,
    make_model,
    make_tokens,
)

from rrattn.integrations import paddleformers as integration  # noqa: E402


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokens():
    return make_tokens()


# Switching over and back


@pytest.mark.parametrize("model_type", MODELS)
def test_every_block_selected_equals_the_dense_twin(model_type, tokens):
    model = make_model(model_type)
    dense = logits(model, tokens)
    assert_same(logits(rrattn.enable(model, DENSE), tokens), dense)
    assert_differs(logits(rrattn.enable(model, SPARSE), tokens), dense)
    assert_same(logits(rrattn.disable(model), tokens), dense)


def test_the_flag_alone_runs_the_defaults(model, tokens):
    model.config._attn_implementation = "rrattn"
    by_flag = logits(model, tokens)
    assert (by_flag == logits(rrattn.enable(make_model()), tokens)).all()
    assert len(rrattn.layer_densities(model)) == NUM_LAYERS


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
def test_disable_restores_what_was_there(model, implementation):
    model.config._attn_implementation = implementation
    attributes = [set(vars(layer)) for layer in model.sublayers()]
    rrattn.enable(model, DENSE)
    rrattn.enable(model, SPARSE)
    assert model.config._attn_implementation == "rrattn"
    assert rrattn.disable(model) is model
    assert model.config._attn_implementation == implementation
    assert [set(vars(layer)) for layer in model.sublayers()] == attributes
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(model)


def test_enabling_leaves_state_and_config_as_they_are(model, tokens, tmp_path):
    names, settings = list(model.state_dict()), model.config.to_dict()
    logits(rrattn.enable(model, SPARSE), tokens)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == settings | {"_attn_implementation": "rrattn"}
    model.config.save_pretrained(str(tmp_path))
    assert "rrattn" not in (tmp_path / "config.json").read_text()
    duplicate = copy.deepcopy(model)
    assert (logits(duplicate, tokens) == logits(model, tokens)).all()


def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match=r"Linear.*paddleformers"):
        rrattn.enable(paddle.nn.Linear(2, 2))
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="llama, qwen2, qwen3.*'mamba'"):
        rrattn.enable(model)
    assert model.config._attn_implementation == "eager"


# Selection, and its view


def test_densities_are_of_the_last_prefill(model, tokens):
    rrattn.enable(model, SPARSE)
    assert rrattn.layer_densities(model) == [None] * NUM_LAYERS
    logits(model, tokens)
    densities = rrattn.layer_densities(model)
    for density, selection in zip(densities, rrattn.layer_selections(model)):
        assert density.shape == [2, NUM_HEADS] and 0.3 < float(density.min()) < 1
        bits = rrattn.unpack_block_mask(selection.block_mask, 6).numpy() & np.tril(np.ones([6, 6], dtype=bool))
        np.testing.assert_allclose(density.numpy(), bits.sum((2, 3)) / 21, rtol=1e-6)
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=0.2))
    logits(model, tokens)
    for lower, higher in zip(rrattn.layer_densities(model)[:1], densities):
        assert (lower <= higher).all() and float(lower.mean()) < float(higher.mean())


def test_thresholds_per_layer_and_per_head(model, tokens):
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[1.0, (0.2, 1.0, 0.2, 1.0)]))
    logits(model, tokens)
    first, second = (density.numpy() for density in rrattn.layer_densities(model))
    assert (first == 1).all() and (second[:, 1::2] == 1).all() and (second[:, ::2] < 1).all()


@pytest.mark.parametrize("threshold", [[0.5], [0.5, (0.5, 0.5)], [0.5, 0.5, 0.5]])
def test_thresholds_that_do_not_fit_the_model(model, threshold):
    with pytest.raises(ValueError, match="1|2|3"):
        rrattn.enable(model, rrattn.RRAttentionConfig(threshold=threshold))
    assert model.config._attn_implementation == "eager"


def test_heads_split_over_ranks_select_what_one_rank_does():
    paddle.seed(0)
    query = 3 * paddle.randn([1, NUM_HEADS, LENGTH, 16])
    key, value = paddle.randn([2, 1, 2, LENGTH, 16])
    config = rrattn.RRAttentionConfig(threshold=[(0.5, 0.2, 0.7, 0.4)])

    def attend(rank, ranks, heads, kv_heads):
        settings = SimpleNamespace(
            num_attention_heads=NUM_HEADS,
            num_hidden_layers=1,
            tensor_model_parallel_size=ranks,
            tensor_parallel_rank=rank,
        )
        layer = paddle.nn.Layer()
        layer.config, layer.layer_idx = settings, 0
        layer.__dict__["_rrattn"] = integration._make_core(layer, config)
        out, _ = integration.rrattn_attention_forward(layer, query[:, heads], key[:, kv_heads], value[:, kv_heads])
        return out.reshape([1, LENGTH, -1, 16]).numpy(), layer._rrattn.last_density.numpy()

    out, density = attend(0, 1, slice(0, 4), slice(0, 2))
    parts = [attend(rank, 2, slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts], axis=2), out)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], axis=1), density)


# Generation


def test_generation_equals_the_dense_twin(model, tokens):
    settings = {"max_new_tokens": 6, "decode_strategy": "greedy_search", "eos_token_id": -1}
    dense, _ = model.generate(tokens, **settings)
    ours, _ = rrattn.enable(model, DENSE).generate(tokens, **settings)
    assert dense.shape[1] == 6
    assert (dense == ours).all()


@paddle.no_grad()
def test_decoding_is_dense_and_leaves_the_selection(model, tokens):
    rrattn.enable(model, SPARSE)
    caches = [model(tokens[:, :-1], use_cache=True, return_dict=True).past_key_values for _ in range(2)]
    selections = rrattn.layer_selections(model)
    ours = model(tokens[:, -1:], use_cache=True, past_key_values=caches[0], return_dict=True).logits
    assert rrattn.layer_selections(model) == selections
    rrattn.disable(model)
    dense = model(tokens[:, -1:], use_cache=True, past_key_values=caches[1], return_dict=True).logits
    assert_same(ours.numpy(), dense.numpy())


@paddle.no_grad()
@pytest.mark.parametrize(("config", "chunk"), [(SPARSE, 128), (SPARSE, 256), (DENSE, 100)])
def test_prefill_in_chunks_equals_one_prefill(model, tokens, config, chunk):
    whole = logits(rrattn.enable(model, config), tokens)
    cache, parts = None, []
    for begin in range(0, LENGTH, chunk):
        part = model(tokens[:, begin : begin + chunk], use_cache=True, past_key_values=cache, return_dict=True)
        cache = part.past_key_values
        parts.append(part.logits.numpy())
    assert_same(np.concatenate(parts, axis=1), whole)


# Training


def gradients(model, tokens, **inputs):
    model.train()
    model.clear_gradients()
    loss = model(tokens, labels=tokens, return_dict=True, **inputs).loss
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected):
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, atol=1e-4 * np.abs(gradient).max() + 1e-7, err_msg=name)


def test_gradients_equal_the_dense_twin(model, tokens):
    dense = gradients(model, tokens)
    assert_same_gradients(gradients(rrattn.enable(model, DENSE), tokens), dense)
    sparse = gradients(rrattn.enable(model, SPARSE), tokens)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert np.abs(sparse[name] - dense[name]).max() > 1e-3 * np.abs(dense[name]).max()


@pytest.mark.parametrize("padded", [False, True])
def test_recompute_selects_the_same_blocks(model, tokens, padded, monkeypatch):
    inputs = {}
    if padded:
        inputs["attention_mask"] = paddle.ones([2, LENGTH], dtype="int64")
        inputs["attention_mask"][1, :200] = 0
    expected = gradients(rrattn.enable(model, SPARSE), tokens, **inputs)
    calls, reads = [], []
    read = integration.startend_rows_from_dense
    forward = rrattn.RRAttention.forward
    monkeypatch.setattr(integration, "startend_rows_from_dense", lambda mask: reads.append(0) or read(mask))
    monkeypatch.setattr(rrattn.RRAttention, "forward", lambda *a, **k: calls.append(0) or forward(*a, **k))
    model.config.recompute_granularity = "full"
    model.config.recompute_method = "uniform"
    model.config.recompute_num_layers = 1
    again = gradients(model, tokens, **inputs)
    assert len(calls) == 2 * NUM_LAYERS  # so recompute did take place
    assert len(reads) == padded
    for name, gradient in expected.items():
        np.testing.assert_array_equal(again[name], gradient, err_msg=name)


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
