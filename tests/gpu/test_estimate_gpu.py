"""Stage 1 on a GPU: long sequences, graphs, and what a GPU does not take."""

import numpy as np
import pytest
import torch

from rrattn import direct, reference

pytestmark = pytest.mark.one_table


def long_inputs(seqlen_q, seqlen_k, num_heads=4, num_heads_k=2):
    torch.manual_seed(0)
    query = torch.randn(1, seqlen_q, num_heads, 128, device="cuda", dtype=torch.bfloat16)
    return query, torch.randn(1, seqlen_k, num_heads_k, 128, device="cuda", dtype=torch.bfloat16)


def estimate(query, key, **options):
    blocks = -(-query.shape[1] // 128), -(-key.shape[1] // 128)
    scores = torch.full((1, query.shape[2], *blocks), float("nan"), device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    options = {"block_scores": scores, "causal": True, "stream": stream, **options}
    size = direct.estimate_block_scores(query, key, size_only=True, **options)
    workspace = torch.full([size], 0xFF, dtype=torch.uint8, device="cuda")
    direct.estimate_block_scores(query, key, workspace=workspace, **options)
    return scores


def test_scores_that_outgrow_the_first_tile():
    """Scores that grow by 2^2000 along the sequence: the maximum of the first tile is no reference for the last."""
    query, key = long_inputs(512, 4096)
    steps = torch.arange(4096, device="cuda") // 32 / 8  # of four strides each, whose averages bfloat16 holds exactly
    query[:], key[:] = 4, steps[:, None, None]
    scores = estimate(query, key, softmax_scale=0.2)
    oracle = reference.estimate(*(x.float().cpu().numpy() for x in (query, key)), causal=True, softmax_scale=0.2)
    np.testing.assert_allclose(scores.cpu().numpy(), oracle, rtol=1e-4, atol=1e-4)


def test_a_hundred_runs_are_identical():
    query, key = long_inputs(2048, 6000)
    first = estimate(query, key)
    for _ in range(100):
        assert torch.equal(estimate(query, key), first)


def test_prefill_in_chunks_is_one_prefill():
    query, key = long_inputs(4096, 4096)
    whole = estimate(query, key)
    for first in range(0, 4096, 1024):
        chunk = estimate(query[:, first : first + 1024], key[:, : first + 1024])
        blocks = slice(first // 128, first // 128 + 8)
        assert torch.equal(chunk, whole[:, :, blocks, : first // 128 + 8])


def test_a_million_keys():
    """Key offsets pass 2^31 elements; the scores are those of the same keys, 16,384 at a time, by float32 torch."""
    query, key = long_inputs(128, 1 << 20, num_heads=32, num_heads_k=32)
    assert key.numel() > 1 << 31
    scores = estimate(query, key, head_offset=0, spread=0)[0, 31, 0]
    sampled = query[0, 31 % 8 :: 8, 31].float()
    pooled = key[0, :, 31].reshape(-1, 8, 128).float().mean(1).bfloat16().float()
    logits = sampled @ pooled.T / 128**0.5
    token = torch.arange(31 % 8, 128, 8, device="cuda")
    visible = torch.arange(1 << 17, device="cuda")[None] * 8 <= token[:, None] + (1 << 20) - 128
    expected = logits.where(visible, float("-inf")).softmax(-1).reshape(16, 8192, 16).sum((0, 2))
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-6)


def test_a_captured_graph_replays_with_other_inputs():
    query, key = long_inputs(1024, 1024)
    scores = torch.empty(1, 4, 8, 8, device="cuda")
    mask = torch.empty(1, 4, 8, 1, device="cuda", dtype=torch.int32)
    workspace = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")

    def prefill():
        options = {"causal": True, "workspace": workspace, "stream": torch.cuda.current_stream().cuda_stream}
        direct.estimate_block_scores(query, key, block_scores=scores, **options)
        direct.select_blocks(scores, 0.7, block_mask=mask, seqlen_q=1024, seqlen_k=1024, **options)

    prefill()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill()
    query.copy_(3 * torch.randn_like(query))
    graph.replay()
    replayed = scores.clone(), mask.clone()
    prefill()
    assert torch.equal(replayed[0], scores) and torch.equal(replayed[1], mask)


def test_a_workspace_is_required_and_on_the_device():
    query, key = long_inputs(256, 256)
    scores = torch.full((1, 4, 2, 2), -1.0, device="cuda")
    with pytest.raises(ValueError, match="workspace has 0 bytes, but must have at least"):
        direct.estimate_block_scores(query, key, block_scores=scores, causal=True)
    with pytest.raises(ValueError, match="workspace is on cpu, but must be on cuda:0"):
        workspace = np.zeros(1 << 26, np.uint8)
        direct.estimate_block_scores(query, key, block_scores=scores, causal=True, workspace=workspace)
    assert (scores == -1).all()


def test_float32_is_refused():
    query, key = (x.float() for x in long_inputs(256, 256))
    scores = torch.full((1, 4, 2, 2), -1.0, device="cuda")
    with pytest.raises(ValueError, match="dtype float32, but on a GPU must have float16 or bfloat16"):
        direct.estimate_block_scores(query, key, block_scores=scores, causal=True)
    assert (scores == -1).all()
