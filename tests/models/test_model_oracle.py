"""Below threshold 1: models behind the flag against the NumPy oracle's attention put into the same model."""

import numpy as np
import paddle
import pytest
from model_oracle import oracle_forward
from paddle_harness import eager_auto_cast
from tiny_models import (
    LENGTH,
    MODELS,
    NUM_LAYERS,
    assert_same,
    assert_same_gradients,
    enable_recompute,
    forward,
    generate,
    gradients,
    logits,
    make_model,
    make_tokens,
    packing,
)

import rrattn

CONFIG = rrattn.RRAttentionConfig(threshold=[0.4, (0.3, 0.6, 1.0, 0.4)], keep_last=True, keep_local=1)


@pytest.fixture(params=MODELS)
def model(request):
    """A model that runs rrattn."""
    return rrattn.enable(make_model(request.param), CONFIG)


def padding(side):
    keep = np.ones([2, LENGTH], dtype=np.int64)
    keep[1, slice(0, 300) if side == "left" else slice(400, LENGTH)] = 0
    return paddle.to_tensor(keep)


def test_prefill(model, tokens, by_oracle):
    ours = logits(model, tokens)
    assert all(float(density.min()) < 1 for density in rrattn.layer_densities(model))
    assert_same(ours, by_oracle(logits, model, tokens))


@paddle.no_grad()
def chunked(model, tokens):
    """Logits by two chunks, of 384 and 315 tokens, and a decoding step."""
    cache, parts = None, []
    for begin, end in ((0, 384), (384, LENGTH - 1), (LENGTH - 1, LENGTH)):
        part = forward(model, tokens[:, begin:end], begin=begin, cache=cache, use_cache=True)
        cache = part.past_key_values
        parts.append(part.logits.numpy())
    return np.concatenate(parts, axis=1)


def test_chunks_and_decoding(model, tokens, by_oracle):
    assert_same(chunked(model, tokens), by_oracle(chunked, model, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, tokens, side, by_oracle):
    keep = padding(side)
    ours = logits(model, tokens, attention_mask=keep)
    assert_same(ours, by_oracle(logits, model, tokens, attention_mask=keep))


@pytest.mark.parametrize("settings", [{}, {"decode_strategy": "sampling", "top_k": 5}])
def test_generation(model, tokens, settings, by_oracle):
    def seeded():
        paddle.seed(5)
        return generate(model, tokens, 8, attention_mask=padding("left"), **settings)

    np.testing.assert_array_equal(seeded(), by_oracle(seeded))


@paddle.no_grad()
def test_amp(model, tokens, monkeypatch):
    """Layer by layer, on the same inputs: what one layer rounds may change what the next one selects."""
    calls = []
    attend = rrattn.RRAttention.forward

    def record(core, query, key, value, *arguments, **options):
        out = attend(core, query, key, value, *arguments, **options)
        calls.append((core, (query, key, value), arguments, options, out, core.last_selection.density))
        return out

    monkeypatch.setattr(rrattn.RRAttention, "forward", record)
    with eager_auto_cast("O1"):
        logits(model, tokens)
    assert len(calls) == NUM_LAYERS
    for core, tensors, arguments, options, out, density in calls:
        assert out.dtype == paddle.bfloat16 and float(density.min()) < 1
        exact = oracle_forward(core, *(x.astype("bfloat16").astype("float32") for x in tensors), *arguments, **options)
        error = (out.astype("float32") - exact).abs()
        assert float(error.max()) <= 2**-8 * float(exact.abs().max())  # half a unit in the last place, and some


def test_packing(model, by_oracle):
    lengths = (200, 384, 116)
    tokens, packed = make_tokens(sum(lengths), batch=1), packing(model, lengths, dense=False)
    assert_same(logits(model, tokens, **packed), by_oracle(logits, model, tokens, **packed))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(model, tokens, recompute, by_oracle):
    if recompute:
        enable_recompute(model)
    ours = gradients(model, tokens, attention_mask=padding("right"))
    assert_same_gradients(ours, by_oracle(gradients, model, tokens, attention_mask=padding("right")))
