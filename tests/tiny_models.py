"""Tiny PaddleFormers models, and what their tests compare with."""

import numpy as np
import paddle
from paddleformers.transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rrattn

MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 97
NUM_LAYERS = 2
NUM_HEADS = 4
LENGTH = 700  # six blocks, the last one partial
DENSE = rrattn.RRAttentionConfig(threshold=1.0)
SPARSE = rrattn.RRAttentionConfig(threshold=0.5)


def make_model(model_type="llama", **settings):
    paddle.seed(0)
    config_class, model_class = MODELS[model_type]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.3,  # large enough for attention to have preferences
        pad_token_id=0,
        **settings,
    )
    config.fuse_rms_norm = False
    config._attn_implementation = "eager"
    model = model_class(config)
    model.eval()
    return model


def make_tokens(length=LENGTH, batch=2):
    return paddle.to_tensor(np.random.default_rng(1).integers(3, VOCABULARY, [batch, length]))


@paddle.no_grad()
def logits(model, tokens, **inputs):
    return model(tokens, return_dict=True, **inputs).logits.numpy()


def assert_same(actual, expected):
    """Equal up to the order of float32 sums; logits are of order 10."""
    np.testing.assert_allclose(actual, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def assert_differs(actual, expected):
    assert np.abs(actual - expected).max() > 1e-2
