"""Stage 3 on a GPU at sizes that are too large for the oracle, and what a GPU does not take.

Long sequences are held against torch in float32, by the same rule: at most twice the error of torch in the dtype.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import assert_as_good_as_naive

from rrattn import direct, reference

BLOCK = reference.BLOCK


def random_inputs(seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, dtype=torch.bfloat16):
    """(query, key, value), the same on every call; queries are large enough that a few keys draw most attention."""
    torch.manual_seed(0)

    def normal(length, heads):
        return torch.randn(1, length, heads, head_dim, device="cuda", dtype=dtype)

    return 2 * normal(seqlen_q, num_heads), normal(seqlen_k, num_heads_k), normal(seqlen_k, num_heads_k)


def random_mask(query, key, density):
    """bool [1, Hq, Mq, Mk] on the host: random blocks, and each row's own."""
    blocks_q, blocks_k = (reference.num_blocks(x.shape[1]) for x in (query, key))
    mask = np.random.default_rng(0).random((1, query.shape[2], blocks_q, blocks_k)) < density
    own = np.arange(blocks_q)
    mask[:, :, own, own + blocks_k - blocks_q] = True
    return mask


def words(mask):
    return torch.from_numpy(reference.pack(mask)).cuda()


def with_workspace(stage, *arrays, **options):
    """In a workspace of the size that it asks for, behind which nothing is written."""
    options = {"stream": torch.cuda.current_stream().cuda_stream, **options}
    size = stage(*arrays, size_only=True, **options)
    buffer = torch.full([size + 4096], 0xFF, dtype=torch.uint8, device="cuda")
    stage(*arrays, workspace=buffer[:size], **options)
    assert (buffer[size:] == 0xFF).all()


def attend(query, key, value, block_mask, causal=True, compensate=False):
    """(out, lse) given the words of the block mask."""
    out = torch.full_like(query, float("nan"))
    lse = torch.full((1, query.shape[2], query.shape[1]), float("nan"), device="cuda")
    options = {"out": out, "lse": lse, "causal": causal, "compensate": compensate}
    with_workspace(direct.block_sparse_attention, query, key, value, block_mask, **options)
    return out, lse


def torch_attend(query, key, value, mask, causal, means=None):
    """(out, lse) of plain torch in the dtype of its arguments; compensated by `means`, (key, value) [1, Mk, Hkv, D]."""
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    group = query.shape[2] // key.shape[2]
    row = torch.arange(seqlen_q, device="cuda")[:, None] + seqlen_k - seqlen_q
    visible_tokens = torch.arange(seqlen_k, device="cuda") <= row if causal else row.new_ones(1, dtype=torch.bool)
    out = torch.empty_like(query)
    lse = torch.empty(1, query.shape[2], seqlen_q, device="cuda", dtype=query.dtype)
    if means is not None:
        stands_in = reference.stood_in_for(mask, None, causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        counts = np.diff([*range(0, seqlen_k, BLOCK), seqlen_k])
        logarithms = torch.from_numpy(np.log(counts)).cuda().to(query.dtype)
    for h in range(query.shape[2]):
        selected = torch.from_numpy(mask[0, h]).cuda()
        selected = selected.repeat_interleave(BLOCK, 0)[:seqlen_q].repeat_interleave(BLOCK, 1)[:, :seqlen_k]
        scores = query[0, :, h] @ key[0, :, h // group].T * query.shape[3] ** -0.5
        scores.masked_fill_(~(selected & visible_tokens), float("-inf"))
        values = value[0, :, h // group]
        if means is not None:
            mean_key, mean_value = (x[0, :, h // group].to(query.dtype) for x in means)
            of_means = query[0, :, h] @ mean_key.T * query.shape[3] ** -0.5 + logarithms
            counted = torch.from_numpy(stands_in[0, h]).cuda().repeat_interleave(BLOCK, 0)[:seqlen_q]
            scores = torch.cat([scores, of_means.masked_fill_(~counted, float("-inf"))], dim=1)
            values = torch.cat([values, mean_value])
        lse[0, h] = scores.logsumexp(-1)
        out[0, :, h] = scores.softmax(-1).nan_to_num_(0) @ values  # NaN: a row that sees nothing
    return out, lse


def block_means(x):
    """[1, Mk, Hkv, D]: means in float32, rounded to the dtype."""
    return torch.stack([part.float().mean(1) for part in x.split(BLOCK, dim=1)], dim=1).to(x.dtype)


def check(query, key, value, mask, causal=True, compensate=False):
    """(out, lse) of the kernel, found as good as torch's in the same dtype."""
    out, lse = attend(query, key, value, words(mask), causal, compensate)
    means = (block_means(key), block_means(value)) if compensate else None
    exact = torch_attend(query.float(), key.float(), value.float(), mask, causal, means)
    naive = torch_attend(query, key, value, mask, causal, means)
    assert_as_good_as_naive(*(x.float().cpu().numpy() for x in (out, exact[0], naive[0])))
    # float32 sums in another order may round a mean the other way.
    torch.testing.assert_close(lse, exact[1], rtol=2e-6, atol=1e-3 if compensate else 2e-5)
    return out, lse


@pytest.mark.parametrize("density", (0.1, 0.5, 1.0))
@pytest.mark.parametrize(
    "sizes",
    (
        (2048, 2048, 8, 2, 64),
        (2000, 4333, 8, 1, 64),
        (2000, 4333, 8, 1, 72),
        (8192, 8192, 4, 2, 96),
        (4096, 4096, 8, 8, 128),
        (8192, 8192, 4, 2, 128),
        (2000, 4333, 8, 1, 192),
        (1000, 8000, 4, 1, 256),
        (512, 32768, 6, 3, 128),  # two key heads in the first section of the work, one in the last
    ),
    ids=str,
)
def test_long_sequences(dtype, sizes, density):
    inputs = random_inputs(*sizes, dtype=getattr(torch, dtype))
    check(*inputs, random_mask(*inputs[:2], density))


@pytest.mark.parametrize(
    "sizes", ((3000, 5000, 4, 2, 64), (3000, 5000, 4, 2, 72), (5000, 3000, 4, 1, 96), (5000, 3000, 4, 1, 128)), ids=str
)
def test_long_sequences_that_are_not_causal(dtype, sizes):
    query, key, value = random_inputs(*sizes, dtype=getattr(torch, dtype))
    shape = 1, sizes[2], *(reference.num_blocks(x.shape[1]) for x in (query, key))
    check(query, key, value, np.random.default_rng(0).random(shape) < 0.3, causal=False)


@pytest.mark.parametrize("density", (0.0, 0.1, 0.5))
@pytest.mark.parametrize(
    "sizes",
    (
        (2000, 4333, 8, 1, 64),
        (2000, 4333, 8, 1, 80),
        (3000, 5000, 4, 2, 96),
        (4096, 4096, 8, 2, 128),
        (1000, 9000, 4, 1, 192),
        (300, 20000, 4, 1, 256),
        (512, 40000, 6, 3, 128),
    ),
    ids=str,
)
def test_compensation_of_long_sequences(dtype, sizes, density):
    query, key, value = random_inputs(*sizes, dtype=getattr(torch, dtype))
    mask = random_mask(query, key, density)
    check(query, key, value, mask, compensate=True)
    check(query, key, value, mask, causal=False, compensate=True)


def test_compensation_where_every_block_is_selected_changes_no_bit():
    query, key, value = random_inputs(2048, 20000, 8, 2, 128)
    every_block = words(np.ones((1, 8, 16, 157), bool))
    plain, compensated = (attend(query, key, value, every_block, compensate=each) for each in (False, True))
    assert all(map(torch.equal, plain, compensated))


@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256))
def test_scores_far_above_those_before_in_the_last_tile(dtype, head_dim):
    """Where its probabilities do not fit, a tile is computed again: its keys and the row's queries have to be there."""
    query, key, value = random_inputs(4096, 4096, 8, 2, head_dim, dtype=getattr(torch, dtype))
    key[:, :BLOCK] *= 16  # rows go from their last block to the first
    mask = random_mask(query, key, 0.3)
    mask[..., 0] = True
    check(query, key, value, mask)


@pytest.mark.parametrize("seqlen", (128, 1000, 2048))
def test_many_short_rows(dtype, seqlen):
    """Of one to 16 blocks, many for each multiprocessor, some of them without any between those that have some."""
    query, key, value = random_inputs(seqlen, seqlen, 192, 96, 64, dtype=getattr(torch, dtype))
    mask = random_mask(query, key, 0.3)
    mask[:, ::5, ::2] = False
    check(query, key, value, mask)


def test_rows_without_blocks_among_others():
    query, key, value = random_inputs(4096, 4096, 8, 2, 128)
    mask = random_mask(query, key, 0.3)
    mask[:, ::3, ::5] = False
    mask[:, 5] = False
    out, lse = check(query, key, value, mask)
    nothing = torch.from_numpy(np.repeat(~mask.any(-1), BLOCK, axis=2)).cuda()
    assert torch.equal(lse.isneginf(), nothing)
    assert not out.transpose(1, 2)[nothing].any()


@pytest.mark.parametrize("causal", (True, False))
def test_long_rows_among_short_ones(causal):
    """Where some rows have many times the blocks of others they are taken first, but none twice and none never.

    A row's bits are those that it has in a call of fewer heads, where rows are not sorted.
    """
    query, key, value = random_inputs(16384, 32768, 12, 3, 64)
    mask = random_mask(query, key, 0.01)
    mask[:, ::2, -1] = True  # as keep_last does
    mask[:, 5, 40:50] = True
    mask[:, 7, :, ::3] = True
    mask[:, 3, 17] = False
    mask = words(mask)
    out, lse = attend(query, key, value, mask, causal)
    assert not out.isnan().any() and not lse.isnan().any()
    for head in range(0, 12, 4):
        of_group, of_key = slice(head, head + 4), slice(head // 4, head // 4 + 1)
        some = query[:, :, of_group], key[:, :, of_key], value[:, :, of_key], mask[:, of_group].contiguous()
        own_out, own_lse = attend(*(x.contiguous() for x in some), causal)
        assert torch.equal(out[:, :, of_group], own_out) and torch.equal(lse[:, of_group], own_lse)


def empty_results(query, key):
    """(block_scores, block_mask, out, lse), poisoned."""
    heads, (blocks_q, blocks_k) = query.shape[2], (reference.num_blocks(x.shape[1]) for x in (query, key))
    return (
        torch.full((1, heads, blocks_q, blocks_k), float("nan"), device="cuda"),
        torch.full((1, heads, blocks_q, -(-blocks_k // 32)), 0x7F7F7F7F, device="cuda", dtype=torch.int32),
        torch.full_like(query, float("nan")),
        torch.full((1, heads, query.shape[1]), float("nan"), device="cuda"),
    )


def prefill(query, key, value, threshold):
    """(block_scores, block_mask, out, lse) of the three stages, without keep_last."""
    scores, mask, out, lse = empty_results(query, key)
    options = {"keep_last": False, "seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
    with_workspace(direct.estimate_block_scores, query, key, block_scores=scores, causal=True)
    with_workspace(direct.select_blocks, scores, threshold, block_mask=mask, causal=True, **options)
    with_workspace(direct.block_sparse_attention, query, key, value, mask, out=out, lse=lse, causal=True)
    return scores, mask, out, lse


def test_tau_of_one_is_dense_attention_of_a_long_sequence():
    query, key, value = random_inputs(3000, 4096, 8, 2, 128)
    _, mask, out, _ = prefill(query, key, value, threshold=1.0)
    hidden, _ = reference.block_geometry(None, causal=True, batch=1, num_heads=8, seqlen_q=3000, seqlen_k=4096)
    assert np.array_equal(reference.unpack(mask.cpu().numpy(), 32), ~hidden)
    visible = torch.ones(3000, 4096, device="cuda", dtype=torch.bool).tril(4096 - 3000)
    repeated = query, *(x.repeat_interleave(4, 2) for x in (key, value))
    exact = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in repeated), attn_mask=visible)
    naive = torch_attend(query, key, value, ~hidden, causal=True)[0]
    assert_as_good_as_naive(*(x.float().cpu().numpy() for x in (out, exact.transpose(1, 2), naive)))


def test_prefill_of_a_long_sequence_in_chunks():
    query, key, value = random_inputs(4096, 4096, 8, 2, 128)
    _, mask, out, lse = prefill(query, key, value, threshold=0.5)
    for first in range(0, 4096, 1024):
        end = first + 1024
        part = prefill(query[:, first:end], key[:, :end], value[:, :end], threshold=0.5)
        expected = mask[:, :, first // BLOCK : end // BLOCK, : part[1].shape[-1]]
        assert torch.equal(part[1], expected)
        torch.testing.assert_close(part[2], out[:, first:end], rtol=2.0**-6, atol=1e-3)
        torch.testing.assert_close(part[3], lse[:, :, first:end], rtol=2e-6, atol=2e-6)


def test_a_hundred_runs_are_identical():
    query, key, value = random_inputs(4096, 4096, 8, 2, 128)
    block_mask = words(random_mask(query, key, 0.5))
    for compensate in (False, True):
        first = attend(query, key, value, block_mask, compensate=compensate)
        for _ in range(100):
            assert all(map(torch.equal, attend(query, key, value, block_mask, compensate=compensate), first))


@pytest.mark.one_table
@pytest.mark.parametrize("compensate", (False, True))
def test_a_million_keys(compensate):
    """A few blocks among them, the first and the last too; offsets pass 2^31 elements, heads lie 20 * 128 apart."""
    seqlen_q, seqlen_k, heads = 256, 1 << 20, 4
    torch.manual_seed(0)
    query = 2 * torch.randn(1, seqlen_q, heads, 128, device="cuda", dtype=torch.bfloat16)
    buffer = torch.full((2, seqlen_k, 20, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    buffer[:, :, 19].normal_()
    key, value = (x[None, :, 19:] for x in buffer)
    mask = np.random.default_rng(0).random((1, heads, 2, seqlen_k // BLOCK)) < 0.003
    mask[..., 0] = mask[..., -1] = True
    out, lse = attend(query, key, value, words(mask), compensate=compensate)
    mean_key, mean_value = (x.unflatten(1, (-1, BLOCK)).float().mean(2).bfloat16().float() for x in (key, value))
    row = torch.arange(seqlen_k - seqlen_q, seqlen_k, device="cuda")
    for h, m in np.ndindex(heads, 2):
        rows = slice(m * BLOCK, (m + 1) * BLOCK)
        blocks = torch.from_numpy(np.flatnonzero(mask[0, h, m])).cuda()
        token = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
        scores = query[0, rows, h].float() @ key[0, token, 0].float().T / 128**0.5
        scores.masked_fill_(token > row[rows, None], float("-inf"))
        values = value[0, token, 0].float()
        if compensate:
            whole = ~mask[0, h, m]
            whole[seqlen_k // BLOCK - 2 + m :] = False
            whole = torch.from_numpy(whole).cuda()
            of_means = query[0, rows, h].float() @ mean_key[0, whole, 0].T / 128**0.5 + np.log(BLOCK)
            scores, values = torch.cat([scores, of_means], dim=1), torch.cat([values, mean_value[0, whole, 0]])
        expected = scores.softmax(-1) @ values
        torch.testing.assert_close(out[0, rows, h].float(), expected, rtol=2.0**-6, atol=5e-3)
        torch.testing.assert_close(lse[0, h, rows], scores.logsumexp(-1), rtol=2e-6, atol=1e-3 if compensate else 2e-5)


@pytest.mark.parametrize("compensate", (False, True))
def test_a_captured_graph_replays_with_other_inputs(compensate):
    query, key, value = random_inputs(1024, 1024, 4, 2, 128)
    scores, mask, out, lse = results = empty_results(query, key)
    workspace = torch.empty(1 << 27, dtype=torch.uint8, device="cuda")

    def run():
        options = {"causal": True, "workspace": workspace, "stream": torch.cuda.current_stream().cuda_stream}
        options["compensate"] = compensate
        outputs = {"block_scores": scores, "block_mask": mask, "out": out, "lse": lse}
        direct.rr_attention(query, key, value, **outputs, threshold=0.5, **options)

    run()  # loads the kernels
    before = [x.clone() for x in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for x in (query, key, value):
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [x.clone() for x in results]
    run()
    assert all(map(torch.equal, replayed, results))
    assert not any(map(torch.equal, replayed, before))


def test_a_workspace_is_required():
    query, key, value = random_inputs(256, 256, 4, 2, 128)
    _, mask, out, lse = empty_results(query, key)
    with pytest.raises(ValueError, match="workspace has 0 bytes, but must have at least"):
        direct.block_sparse_attention(query, key, value, mask, out=out, lse=lse, causal=True)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.one_path
def test_what_the_gpu_does_not_take_is_refused():
    query, key, value = random_inputs(256, 256, 4, 2, 128)
    _, mask, out, lse = empty_results(query, key)
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        with_workspace(
            direct.block_sparse_attention,
            *(x.float() for x in (query, key, value)), mask, out=out.float(), lse=lse, causal=True,
        )  # fmt: skip
    outputs = {"out": out, "lse": lse}
    with pytest.raises(ValueError, match="block_mask is on cpu, but query is on cuda:0"):
        with_workspace(direct.block_sparse_attention, query, key, value, mask.cpu(), **outputs, causal=True)
    with pytest.raises(ValueError, match="value has dtype float16, but must have bfloat16"):
        with_workspace(direct.block_sparse_attention, query, key, value.half(), mask, **outputs, causal=True)
    assert out.isnan().all() and lse.isnan().all()
