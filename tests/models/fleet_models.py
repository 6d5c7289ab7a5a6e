"""Tiny models of PaddleFleet's stand-in, and what their tests compare with."""

import numpy as np
import paddle
import paddlefleet_stand_in as stand_in

LENGTH = 700  # six blocks, the last one partial


def make_model(core_attention=stand_in.DotProductAttention, **settings):
    """A GPTModel in eval mode with random weights, the same for the same settings but those of rrattn."""
    config = stand_in.TransformerConfig()
    vars(config).update(settings)
    paddle.seed(0)
    model = stand_in.GPTModel(config, core_attention)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # large enough for attention to have preferences
            parameter.set_value(0.3 * paddle.randn(parameter.shape))
    model.eval()
    return model


def make_tokens(length=LENGTH, batch=2):
    return paddle.to_tensor(np.random.default_rng(1).integers(0, 97, [batch, length]))


def logits(model, tokens, **inputs):
    return model({"input_ids": tokens, **inputs})


def gradients(model, tokens, **inputs):
    """(loss, name -> gradient) of a training step on the tokens."""
    model.train()
    model.clear_gradients()
    out = logits(model, tokens, **inputs)[:, :-1]
    loss = paddle.nn.functional.cross_entropy(out.reshape([-1, out.shape[-1]]), tokens[:, 1:].reshape([-1]))
    loss.backward()
    return float(loss), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@paddle.no_grad()
def generate(model, tokens, count):
    """`count` more tokens [B, count], greedy, by a prefill and decoding steps over a cache."""
    cache, new = stand_in.Cache(), []
    for _ in range(count):
        out = logits(model, new[-1] if new else tokens, past_key_values=cache, use_cache=True)
        new.append(out[:, -1:].argmax(-1))
    return paddle.concat(new, axis=1).numpy()


def assert_same(actual, expected):
    """Equal up to the order of float32 sums."""
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-4 * max(1.0, float(expected.abs().max())))


def assert_same_gradients(actual, expected):
    """Of two results of `gradients`."""
    assert abs(actual[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(actual[1][name], gradient, atol=1e-4 * np.abs(gradient).max() + 1e-7, err_msg=name)
