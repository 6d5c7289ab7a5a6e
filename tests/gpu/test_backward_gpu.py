"""The gradients on a GPU at sizes that are too large for the oracle, and what a GPU does not take."""

import numpy as np
import pytest
import torch
from harness import assert_as_good_as_naive
from test_attend_gpu import attend, random_inputs, random_mask, torch_attend, with_workspace, words

from rrattn import direct


def backward(inputs, block_mask, grad_out, causal=True, **options):
    """Gradients of (query, key, value) after a forward of its own, given the words of the block mask."""
    out, lse = attend(*inputs, block_mask, causal)
    grads = [torch.full_like(x, float("nan")) for x in inputs]
    arrays = *inputs, block_mask, out, lse, grad_out
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), grads))
    with_workspace(direct.block_sparse_attention_backward, *arrays, **outputs, causal=causal, **options)
    return grads


def torch_backward(inputs, mask, grad_out, causal):
    """The same by torch's autograd, in the dtype of its arguments."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = torch_out(*leaves, mask, causal)
    return torch.autograd.grad(out, leaves, grad_out)


def torch_out(query, key, value, mask, causal):
    heads = []
    group = query.shape[2] // key.shape[2]
    row = torch.arange(query.shape[1], device="cuda")[:, None] + key.shape[1] - query.shape[1]
    visible = torch.arange(key.shape[1], device="cuda") <= row if causal else row.new_ones(1, dtype=torch.bool)
    for h in range(query.shape[2]):
        selected = torch.from_numpy(mask[0, h]).cuda().repeat_interleave(128, 0).repeat_interleave(128, 1)
        selected = selected[: query.shape[1], : key.shape[1]] & visible
        scores = query[0, :, h] @ key[0, :, h // group].T * query.shape[3] ** -0.5
        heads.append(scores.masked_fill(~selected, float("-inf")).softmax(-1) @ value[0, :, h // group])
    return torch.stack(heads, 1)[None]


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("density", (0.1, 0.5, 1.0))
@pytest.mark.parametrize(
    "sizes",
    (
        (2048, 2048, 8, 2, 64),
        (2000, 4333, 8, 1, 64),
        (4096, 4096, 4, 4, 128),
        (4096, 4096, 4, 1, 128),
        (2048, 2304, 4, 2, 256),
        (8192, 8192, 12, 3, 128),  # two key heads in the first section of the work, one in the last
    ),
    ids=str,
)
def test_long_sequences(dtype, sizes, density, deterministic):
    inputs = random_inputs(*sizes, dtype=getattr(torch, dtype))
    mask = random_mask(*inputs[:2], density)
    grad_out = torch.randn_like(inputs[0])
    grads = backward(inputs, words(mask), grad_out, deterministic=deterministic)
    exact = torch_backward([x.float() for x in inputs], mask, grad_out.float(), causal=True)
    naive = torch_backward(inputs, mask, grad_out, causal=True)
    for actual, oracle, same_dtype in zip(grads, exact, naive):
        assert_as_good_as_naive(*(x.float().cpu().numpy() for x in (actual, oracle, same_dtype)))


@pytest.mark.parametrize("head_dim", (128, 256))
def test_deterministic_gradients_are_identical_over_a_hundred_runs(head_dim):
    inputs = random_inputs(4096, 4096, 8, 2, head_dim)
    mask = random_mask(*inputs[:2], 0.5)
    grad_out = torch.randn_like(inputs[0])
    first = backward(inputs, words(mask), grad_out, deterministic=True)
    for _ in range(100):
        assert all(map(torch.equal, backward(inputs, words(mask), grad_out, deterministic=True), first))
    for quick, same in zip(backward(inputs, words(mask), grad_out), first):
        torch.testing.assert_close(quick, same, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("scale", (1e-6, 1.0, 100.0))
@pytest.mark.parametrize("head_dim", (128, 192))
def test_deterministic_gradients_of_any_size(head_dim, scale):
    """Sums of whole numbers, whose unit goes with the data: outliers among keys and values, and small dO."""
    inputs = random_inputs(1024, 1024, 4, 2, head_dim)
    inputs[1][..., 7] *= 50
    inputs[2][:, 5] *= 30
    mask = random_mask(*inputs[:2], 0.5)
    grad_out = torch.randn_like(inputs[0]) * scale
    grads = backward(inputs, words(mask), grad_out, deterministic=True)
    exact = torch_backward([x.float() for x in inputs], mask, grad_out.float(), causal=True)
    naive = torch_backward(inputs, mask, grad_out, causal=True)
    for actual, oracle, same_dtype in zip(grads, exact, naive):
        assert_as_good_as_naive(*(x.float().cpu().numpy() / scale for x in (actual, oracle, same_dtype)))


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("head_dim", (64, 192))
def test_bad_values_show(head_dim, where, bad, deterministic):
    inputs = random_inputs(300, 300, 2, 1, head_dim)
    grad_out = torch.randn_like(inputs[0])
    [*inputs, grad_out][where][0, 130, 0, 3] = bad
    mask = random_mask(*inputs[:2], 1.0)
    grad_query = backward(inputs, words(mask), grad_out, deterministic=deterministic)[0]
    assert not grad_query[0, 130, 0].isfinite().all()


def test_the_forward_that_these_gradients_are_of_is_the_other_files():
    inputs = random_inputs(512, 512, 2, 1, 64, dtype=torch.float32)
    mask = random_mask(*inputs[:2], 0.5)
    expected = torch_attend(*inputs, mask, True)[0]
    np.testing.assert_allclose(torch_out(*inputs, mask, True).cpu(), expected.cpu(), atol=1e-5)
