"""The gradients on a GPU at sizes that are too large for the oracle, and what a GPU does not take."""

import numpy as np
import pytest
import torch
from harness import assert_as_good_as_naive
from test_attend_gpu import attend, random_inputs, random_mask, torch_attend, with_workspace, words

from rrattn import direct

GRADS = ("grad_query", "grad_key", "grad_value")


def backward(inputs, block_mask, grad_out, causal=True, **options):
    """Gradients of (query, key, value) after a forward of its own, given the words of the block mask."""
    out, lse = attend(*inputs, block_mask, causal)
    grads = [torch.full_like(x, float("nan")) for x in inputs]
    arrays = *inputs, block_mask, out, lse, grad_out
    outputs = dict(zip(GRADS, grads))
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
        weights = scores.masked_fill(~selected, float("-inf")).softmax(-1)
        heads.append(weights.nan_to_num(0) @ value[0, :, h // group])  # NaN: a row that sees nothing
    return torch.stack(heads, 1)[None]


def check(inputs, mask, grad_out, deterministic):
    """Gradients of the kernel, found as good as torch's in the same dtype."""
    grads = backward(inputs, words(mask), grad_out, deterministic=deterministic)
    exact = torch_backward([x.float() for x in inputs], mask, grad_out.float(), causal=True)
    naive = torch_backward(inputs, mask, grad_out, causal=True)
    for actual, oracle, same_dtype in zip(grads, exact, naive):
        assert_as_good_as_naive(*(x.float().cpu().numpy() for x in (actual, oracle, same_dtype)))
    return grads


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("density", (0.1, 0.5, 1.0))
@pytest.mark.parametrize(
    "sizes",
    (
        (2048, 2048, 8, 2, 64),
        (2000, 4333, 8, 1, 64),
        (2000, 4333, 8, 1, 96),
        (4096, 4096, 4, 4, 128),
        (4096, 4096, 4, 1, 128),
        (2048, 2304, 4, 2, 256),
        (8192, 8192, 12, 3, 128),  # two key heads in the first section of the work, one in the last
        (4096, 4096, 32, 1, 128),  # many parts of a walk, by heads
        (8192, 8192, 4, 1, 128),  # where all items wait for one another at once
        (8192, 8192, 4, 1, 64),
    ),
    ids=str,
)
def test_long_sequences(dtype, sizes, density, deterministic):
    inputs = random_inputs(*sizes, dtype=getattr(torch, dtype))
    check(inputs, random_mask(*inputs[:2], density), torch.randn_like(inputs[0]), deterministic)


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_rows_and_keys_without_blocks_among_others(head_dim, deterministic):
    inputs = random_inputs(2048, 2048, 8, 2, head_dim)
    mask = random_mask(*inputs[:2], 0.3)
    mask[:, ::3, ::5] = False
    mask[:, 5] = False
    mask[:, :4, :, 3] = False  # of all query heads of the first key head
    grad_query, grad_key, grad_value = check(inputs, mask, torch.randn_like(inputs[0]), deterministic)
    nothing = torch.from_numpy(np.repeat(~mask.any(-1), 128, axis=2)).cuda()
    assert not grad_query.transpose(1, 2)[nothing].any()
    assert not grad_key[:, 384:512, 0].any() and not grad_value[:, 384:512, 0].any()


@pytest.mark.one_table
@pytest.mark.parametrize("deterministic", (False, True))
def test_a_million_keys(deterministic):
    """A few blocks among them, the first and the last too; offsets pass 2^31 elements, heads lie 20 * 128 apart."""
    seqlen_q, seqlen_k, heads = 256, 1 << 20, 4
    torch.manual_seed(0)
    query = 2 * torch.randn(1, seqlen_q, heads, 128, device="cuda", dtype=torch.bfloat16)
    grad_out = torch.randn_like(query)
    buffer = torch.full((1, seqlen_k, 20, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    buffer[:, :, 18:].normal_()
    grad_key, grad_value, value, key = buffer[:, :, 16:].split(1, 2)
    grad_query = torch.full_like(query, float("nan"))
    mask = np.random.default_rng(0).random((1, heads, 2, seqlen_k // 128)) < 0.003
    mask[..., 0] = mask[..., -1] = True
    out, lse = attend(query, key, value, words(mask))
    outputs = dict(zip(GRADS, (grad_query, grad_key, grad_value)))
    arrays = query, key, value, words(mask), out, lse, grad_out
    options = {**outputs, "causal": True, "deterministic": deterministic}
    with_workspace(direct.block_sparse_attention_backward, *arrays, **options)
    exact = [torch.zeros(shape, device="cuda") for shape in (query.shape, (seqlen_k, 128), (seqlen_k, 128))]
    row = torch.arange(seqlen_k - seqlen_q, seqlen_k, device="cuda")
    for h, m in np.ndindex(heads, 2):
        rows = slice(m * 128, (m + 1) * 128)
        blocks = torch.from_numpy(np.flatnonzero(mask[0, h, m])).cuda()
        token = (blocks[:, None] * 128 + torch.arange(128, device="cuda")).flatten()
        leaves = [x.float().requires_grad_() for x in (query[0, rows, h], key[0, token, 0], value[0, token, 0])]
        scores = (leaves[0] @ leaves[1].T / 128**0.5).masked_fill(token > row[rows, None], float("-inf"))
        grads = torch.autograd.grad(scores.softmax(-1) @ leaves[2], leaves, grad_out[0, rows, h].float())
        exact[0][0, rows, h] = grads[0]
        exact[1].index_add_(0, token, grads[1])
        exact[2].index_add_(0, token, grads[2])
    for actual, expected in zip((grad_query, grad_key[0, :, 0], grad_value[0, :, 0]), exact):
        assert (actual.float() - expected).norm() <= 0.01 * expected.norm()
    unseen = torch.from_numpy(~mask[0].any((0, 1))).cuda().repeat_interleave(128)
    assert not grad_key[0, unseen].any() and not grad_value[0, unseen].any()


def gathered_backward(query, key, value, mask, grad_out):
    """The same of one batch entry in float32, of queries from the start of the keys on, by the few blocks selected."""
    grads = [torch.zeros(x.shape, device="cuda") for x in (query, key, value)]
    group = query.shape[2] // key.shape[2]
    for h, m in np.ndindex(*mask.shape[1:3]):
        rows = slice(m * 128, (m + 1) * 128)
        row = torch.arange(query.shape[1], device="cuda")[rows]
        blocks = torch.from_numpy(np.flatnonzero(mask[0, h, m])).cuda()
        token = (blocks[:, None] * 128 + torch.arange(128, device="cuda")).flatten()
        token = token[token < key.shape[1]]
        leaves = query[0, rows, h], key[0, token, h // group], value[0, token, h // group]
        leaves = [x.float().requires_grad_() for x in leaves]
        scores = (leaves[0] @ leaves[1].T / query.shape[3] ** 0.5).masked_fill(token > row[:, None], float("-inf"))
        found = torch.autograd.grad(scores.softmax(-1) @ leaves[2], leaves, grad_out[0, rows, h].float())
        grads[0][0, rows, h] = found[0]
        for grad, of_blocks in zip(grads[1:], found[1:]):
            grad[0, :, h // group].index_add_(0, token, of_blocks)
    return grads


@pytest.mark.one_table
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize(
    "sizes",
    (
        (80_000, 4, 2, 128),
        (40_000, 2, 2, 256),
        (140_000, 2, 1, 64),
        (16_384, 40, 8, 128),  # where the last key blocks of all heads may come last
        (8_192, 192, 1, 128),  # more than 32 parts
    ),
    ids=str,
)
def test_more_keys_than_sums_in_the_workspace(sizes, deterministic):
    """Walks in several parts, by heads and by query blocks, of columns that differ in density: sinks, empty ones."""
    seqlen, num_heads, num_heads_k, head_dim = sizes
    inputs = random_inputs(seqlen, seqlen, num_heads, num_heads_k, head_dim)
    blocks = -(-seqlen // 128)
    random = np.random.default_rng(0)
    density = 0.04 * random.random((1, num_heads, 1, blocks)) ** 2
    density[..., ::5], density[..., [0, blocks // 2]] = 0, 1
    mask = random.random((1, num_heads, blocks, blocks)) < density
    mask |= np.eye(blocks, dtype=bool) & (np.arange(blocks) % 7 < 5)
    mask[0, :, 0, 0] = True
    mask &= np.tri(blocks, dtype=bool)
    grad_out = torch.randn_like(inputs[0])
    grads = backward(inputs, words(mask), grad_out, deterministic=deterministic)
    for actual, expected in zip(grads, gathered_backward(*inputs, mask, grad_out)):
        assert (actual.float() - expected).norm() <= 0.01 * expected.norm()
    again = backward(inputs, words(mask), grad_out, deterministic=deterministic)
    assert all(map(torch.equal, again[0 if deterministic else 1 :], grads[0 if deterministic else 1 :]))


@pytest.mark.parametrize("deterministic", (False, True))
def test_documents_have_the_gradients_that_they_have_apart(deterministic):
    """Most parts of a key block's walk hold little: many heads, of which each sees one document of FlashMask's."""
    length, count = 2048, 4
    inputs = random_inputs(length * count, length * count, 32, 1, 128)
    mask, grad_out = random_mask(*inputs[:2], 0.5), torch.randn_like(inputs[0])
    document = np.arange(length * count // 128) // (length // 128)
    mask &= document[:, None] == document
    row = torch.arange(length * count, device="cuda", dtype=torch.int32)
    ends = (row // length + 1)[None, None, :, None] * length
    together = backward(inputs, words(mask), grad_out, deterministic=deterministic, startend_row_indices=ends)
    for first in range(0, length * count, length):
        rows, blocks = slice(first, first + length), slice(first // 128, (first + length) // 128)
        own = [x[:, rows] for x in (*inputs, grad_out)]
        apart = backward(own[:3], words(mask[:, :, blocks, blocks].copy()), own[3], deterministic=deterministic)
        for packed, alone in zip(together, apart):
            alone = alone.float()
            assert (packed[:, rows].float() - alone).norm() <= 0.005 * alone.norm()


@pytest.mark.parametrize("deterministic", (False, True))
def test_a_captured_graph_replays_with_other_inputs(deterministic):
    inputs = random_inputs(1024, 1024, 4, 2, 128)
    block_mask, grad_out = words(random_mask(*inputs[:2], 0.5)), torch.randn_like(inputs[0])
    out, lse = torch.empty_like(inputs[0]), torch.empty(1, 4, 1024, device="cuda")
    grads = [torch.empty_like(x) for x in inputs]
    workspace = torch.empty(1 << 27, dtype=torch.uint8, device="cuda")

    def run():
        options = {"causal": True, "workspace": workspace, "stream": torch.cuda.current_stream().cuda_stream}
        direct.block_sparse_attention(*inputs, block_mask, out=out, lse=lse, **options)
        options.update(zip(GRADS, grads), deterministic=deterministic)
        direct.block_sparse_attention_backward(*inputs, block_mask, out, lse, grad_out, **options)

    run()  # loads the kernels
    before = [x.clone() for x in grads]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for x in (*inputs, grad_out):
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [x.clone() for x in grads]
    run()
    first = 0 if deterministic else 1  # with the same bits on every run
    assert all(map(torch.equal, replayed[first:], grads[first:]))
    torch.testing.assert_close(replayed[0], grads[0], rtol=2.0**-7, atol=1e-3)
    assert not any(map(torch.equal, replayed, before))


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_a_workspace_that_is_too_small_is_refused(head_dim):
    inputs = random_inputs(256, 256, 4, 2, head_dim)
    grads = [torch.full_like(x, float("nan")) for x in inputs]
    arrays = *inputs, words(random_mask(*inputs[:2], 1.0)), inputs[0], torch.zeros(1, 4, 256, device="cuda"), inputs[0]
    outputs = dict(zip(GRADS, grads))
    size = direct.block_sparse_attention_backward(*arrays, **outputs, size_only=True)
    workspace = torch.empty(size - 1, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=f"workspace has {size - 1} bytes, but must have at least {size}"):
        direct.block_sparse_attention_backward(*arrays, **outputs, workspace=workspace)
    assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("sizes", ((131072, 32, 8, 128), (131072, 32, 1, 128), (16384, 32, 1, 32), (16384, 28, 4, 32)))
def test_the_workspace_stays_small(sizes, deterministic):
    """At most so many MB besides dQ in float32."""
    seqlen, num_heads, num_heads_k, megabytes = sizes
    heads = num_heads, num_heads_k, num_heads_k
    inputs = [torch.empty(1, seqlen, h, 128, device="cuda", dtype=torch.bfloat16) for h in heads]
    block_mask = torch.empty(1, num_heads, seqlen // 128, -(-seqlen // 4096), device="cuda", dtype=torch.int32)
    lse = torch.empty(1, num_heads, seqlen, device="cuda")
    outputs = dict(zip(GRADS, map(torch.empty_like, inputs)))
    options = {"causal": True, "deterministic": deterministic, "size_only": True, **outputs}
    size = direct.block_sparse_attention_backward(*inputs, block_mask, inputs[0], lse, inputs[0], **options)
    assert size <= 4 * inputs[0].numel() + (megabytes << 20)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
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
@pytest.mark.parametrize("head_dim", (64, 128, 192))
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
