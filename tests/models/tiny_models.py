"""Tiny models of the library that is installed, PaddleFormers or PaddleNLP, and what their tests compare with.

Where the libraries differ, the difference is here, so that the same tests run with both.
"""

from importlib import metadata
from importlib.util import find_spec
from inspect import signature

import numpy as np
import paddle
import pytest
from families import PADDLENLP

import rrattn

LIBRARY = next((name for name in ("paddleformers", "paddlenlp") if find_spec(name)), None)
if LIBRARY is None:
    pytest.skip("no model library is installed", allow_module_level=True)
transformers = pytest.importorskip(f"{LIBRARY}.transformers")

NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "ernie4_5": "Ernie4_5", "ernie4_5_moe": "Ernie4_5_Moe"}


def _is_there(name):
    try:
        return hasattr(transformers, f"{NAMES[name]}ForCausalLM")
    except ImportError:  # PaddleFormers 1.2 builds Qwen on PaddleFleet
        return False


# of PaddleFormers those that show what all have in common; test_families.py has all
MODELS = {
    "paddleformers": lambda: tuple(filter(_is_there, ("llama", "qwen2", "qwen3", "ernie4_5"))),
    "paddlenlp": lambda: PADDLENLP[metadata.version("paddlenlp")],
}[LIBRARY]()
VOCABULARY = 97
NUM_LAYERS = 2
NUM_HEADS = 4
LENGTH = 700  # six blocks, the last one partial
DENSE = rrattn.RRAttentionConfig(threshold=1.0)
SPARSE = rrattn.RRAttentionConfig(threshold=0.5, keep_last=False)  # chunks select what one prefill does


def make_model(model_type="llama", heads=NUM_HEADS, kv_heads=2, implementation="eager", **settings):
    """A model in eval mode with random weights; head size 16. Its own attention is the dense twin.

    In PaddleFormers, `implementation` is the flag with which it is built; "eager" is that attention.
    """
    paddle.seed(0)
    if LIBRARY == "paddleformers":
        settings["head_dim"] = 16
    config = getattr(transformers, f"{NAMES[model_type]}Config")(
        hidden_size=16 * heads,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.3,  # large enough for attention to have preferences
        pad_token_id=0,
        **{"vocab_size": VOCABULARY, **settings},
    )
    config.fuse_rms_norm = False
    if LIBRARY == "paddleformers":
        config._attn_implementation = implementation
    model = getattr(transformers, f"{NAMES[model_type]}ForCausalLM")(config)
    model.eval()
    return model


def attention_layers(model):
    """Its attention layers, in order."""
    return [layer for layer in model.sublayers() if type(layer).__name__.endswith("Attention") and layer.sublayers()]


def make_tokens(length=LENGTH, batch=2):
    return paddle.to_tensor(np.random.default_rng(1).integers(3, VOCABULARY, [batch, length]))


@paddle.no_grad()
def logits(model, tokens, **inputs):
    return forward(model, tokens, **inputs).logits.numpy()


def forward(model, tokens, *, begin=0, cache=None, **inputs):
    """The model's output; with `begin`, of the tokens from that position on, after those in the cache."""
    if cache is not None:
        positions = paddle.arange(begin, begin + tokens.shape[1])
        inputs.update(past_key_values=cache, position_ids=positions.unsqueeze(0).expand([tokens.shape[0], -1]))
    return model(tokens, return_dict=True, **inputs)


def generate(model, tokens, count, attention_mask=None, **settings):
    """`count` more tokens [B, count], greedy unless the settings say otherwise."""
    mask = paddle.ones_like(tokens) if attention_mask is None else attention_mask
    settings = {"decode_strategy": "greedy_search", "eos_token_id": -1, **settings}
    return model.generate(tokens, attention_mask=mask, max_new_tokens=count, **settings)[0].numpy()


def packing(model, lengths, *, dense):
    """Inputs that pack documents of these lengths into one row, as rrattn or as the dense twin takes them."""
    positions = paddle.concat([paddle.arange(length) for length in lengths]).unsqueeze(0)
    if LIBRARY == "paddlenlp" and dense:  # its own dense attention does not read row bounds
        document = paddle.to_tensor(np.repeat(np.arange(len(lengths)), lengths))
        mask = paddle.tril((document.unsqueeze(0) == document.unsqueeze(1)).astype("int64")).unsqueeze(0)
        return {"attention_mask": mask, "position_ids": positions}
    if "attn_mask_startend_row_indices" not in signature(model.forward).parameters:
        pytest.skip("this version of the library knows no row bounds")
    rows = rrattn.masks.document_startend_rows(lengths)
    return {"attn_mask_startend_row_indices": rows.squeeze(-1), "position_ids": positions}


def enable_recompute(model, granularity="full"):
    """Lets the model compute its layers (or their attention alone, "core_attn", in PaddleNLP) again in the backward."""
    if LIBRARY == "paddleformers":
        model.config.recompute_granularity = granularity
        model.config.recompute_method = "uniform"
        model.config.recompute_num_layers = 1
        model.config.use_cache = False  # a cache would grow twice, also in the dense twin
        return
    model.recompute_enable()
    for layer in model.sublayers(include_self=True):
        if hasattr(layer, "recompute_granularity"):
            layer.recompute_granularity = granularity


def gradients(model, tokens, **inputs):
    """(loss, name -> gradient) of a training step on the tokens, for the parameters that take part in it."""
    model.train()
    model.clear_gradients()
    loss = model(tokens, labels=tokens, return_dict=True, **inputs).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(loss), {name: grad.numpy() for name, grad in grads.items() if grad is not None}


def assert_same(actual, expected):
    """Equal up to the order of float32 sums; logits are of order 10."""
    np.testing.assert_allclose(actual, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def assert_differs(actual, expected):
    assert np.abs(actual - expected).max() > 1e-2


def assert_same_gradients(actual, expected):
    """Of two results of `gradients`."""
    assert abs(actual[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(actual[1][name], gradient, atol=1e-4 * np.abs(gradient).max() + 1e-7, err_msg=name)
