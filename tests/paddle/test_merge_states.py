"""Attention over two sets of keys, merged from the attention over each of them."""

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import reference
from rrattn.serving import merge_attention_states, ragged_attention


def states_of(shape, rng):
    """(out, lse) twice, of a shape [..., L, Hq, Dv]: rows that see nothing of one part, of the other and of both."""
    lse_shape = *shape[:-3], shape[-2], shape[-3]
    states = []
    for blind in ((0, 2), (1, 2)):
        lse = 4 * rng.standard_normal(lse_shape)
        lse[..., blind] = -np.inf
        out = rng.standard_normal(shape)
        out[np.isneginf(np.swapaxes(lse, -1, -2))] = 0
        states += [out.astype("float32"), lse.astype("float32")]
    return states


@pytest.mark.parametrize("shape", ((2, 7, 3, 16), (7, 4, 8), (2, 3, 5, 1, 8)), ids=str)
def test_merged_states_are_the_oracles(shape, rng):
    states = states_of(shape, rng)
    out, lse = merge_attention_states(*map(paddle.to_tensor, states))
    expected_out, expected_lse = reference.merge(*states)
    np.testing.assert_allclose(out.numpy(), expected_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6)
    assert np.isneginf(lse.numpy()[..., 2]).all() and (out.numpy()[..., 2, :, :] == 0).all()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_two_calls_over_parts_of_the_keys_are_one_call(dtype):
    """The prefix in pages that many requests share, and each request's own keys."""
    paddle.seed(0)
    query, key = paddle.randn([40, 4, 32]).astype(dtype), paddle.randn([300, 2, 32]).astype(dtype)
    value = paddle.randn([300, 2, 32]).astype(dtype)
    options = {"threshold": 1.0, "return_softmax_lse": True}
    lengths = [paddle.to_tensor([n], "int32") for n in (260, 40, 300)]
    rows = paddle.to_tensor([0, 40], "int32")
    own = ragged_attention(query, key[260:], value[260:], rows, lengths[1], **options)
    prefix = rrattn.rr_attention(*(x.unsqueeze(0) for x in (query, key[:260], value[:260])), **options)
    whole = ragged_attention(query, key, value, rows, lengths[2], **options)
    out, lse = merge_attention_states(*own, *(x.squeeze(0) for x in prefix))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert out.dtype == whole[0].dtype
    np.testing.assert_allclose(
        out.astype("float32").numpy(), whole[0].astype("float32").numpy(), atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(lse.numpy(), whole[1].numpy(), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_differences(rng):
    """Through lse too, and finite where rows see nothing."""
    states = [paddle.to_tensor(x) for x in states_of((4, 2, 8), rng)]
    for tensor in states:
        tensor.stop_gradient = False
    weights = [paddle.to_tensor(rng.standard_normal(n).astype("float32")) for n in ((4, 2, 8), (2, 4))]

    def loss(parts):
        out, lse = merge_attention_states(*parts)
        return (out * weights[0]).sum() + paddle.where(lse == -np.inf, paddle.zeros_like(lse), lse * weights[1]).sum()

    def oracle(parts):
        out, lse = reference.merge(*parts)
        return (out * weights[0].numpy()).sum() + np.where(np.isneginf(lse), 0, lse * weights[1].numpy()).sum()

    gradients = paddle.grad(loss(states), states)
    arrays = [tensor.numpy().astype(np.float64) for tensor in states]
    for i, (array, gradient) in enumerate(zip(arrays, gradients)):
        assert np.isfinite(gradient.numpy()).all()
        for index in rng.permutation(list(np.ndindex(array.shape)))[:12]:
            at = tuple(index)
            if np.isneginf(array[at]):
                assert gradient.numpy()[at] == 0
                continue
            losses = []
            for step in (1e-4, -1e-4):
                moved = [*arrays[:i], array.copy(), *arrays[i + 1 :]]
                moved[i][at] += step
                losses.append(oracle(moved))
            expected = (losses[0] - losses[1]) / 2e-4
            np.testing.assert_allclose(gradient.numpy()[at], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"out_b": np.zeros((4, 2, 8))}, TypeError, "out_b is a ndarray"),
        ({"out_b": paddle.zeros([4, 2, 9])}, ValueError, r"out_b has shape \[4, 2, 9\] .* must have \[4, 2, 8\]"),
        ({"lse_a": paddle.zeros([4, 2])}, ValueError, r"lse_a has shape \[4, 2\] .* must have \[2, 4\]"),
        ({"lse_b": paddle.zeros([2, 4], "bfloat16")}, ValueError, "lse_b has shape .* must have .*float32"),
        ({"out_a": paddle.zeros([4, 2, 8], "int32")}, ValueError, "out_a has dtype .*int32, but must have float32"),
        ({"out_a": paddle.zeros([4, 8])}, ValueError, r"out_a has shape \[4, 8\], but must have three dimensions"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    states = {"out_a": paddle.zeros([4, 2, 8]), "lse_a": paddle.zeros([2, 4])}
    states.update(out_b=states["out_a"], lse_b=states["lse_a"])
    with pytest.raises(error, match=message):
        merge_attention_states(**{**states, **change})
