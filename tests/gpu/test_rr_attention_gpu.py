"""All stages in one call: what only a GPU refuses."""

import pytest
import torch

from rrattn import direct
from rrattn.config import MAX_SEQLEN_K_ON_GPU

pytestmark = pytest.mark.one_path


def call(query, key, **options):
    """Expects a ValueError, and outputs as they were."""
    scores = torch.full((1, 1, 1, -(-key.shape[1] // 128)), -1.0, device="cuda")
    out = torch.full_like(query, -1)
    try:
        direct.rr_attention(query, key, key, out=out, block_scores=scores, **options)
    finally:
        assert (scores == -1).all() and (out == -1).all()


def tokens(count, dtype=torch.bfloat16):
    return torch.zeros(1, count, 1, 64, device="cuda", dtype=dtype)


def test_what_a_gpu_does_not_take_is_refused_before_the_first_stage():
    with pytest.raises(ValueError, match="workspace has 0 bytes, but must have at least"):
        call(tokens(1), tokens(300))
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        call(tokens(1, torch.float32), tokens(300, torch.float32))
    workspace = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"seqlen_k is 1048577, but must be at most {MAX_SEQLEN_K_ON_GPU} on a GPU"):
        call(tokens(1), tokens((1 << 20) + 1), workspace=workspace)
