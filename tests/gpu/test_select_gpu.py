"""Stage 2 on a GPU: the longest rows that it takes, of 1M tokens."""

import numpy as np
import pytest
from cases import Case
from harness import assert_identical
from test_select import SCORES, check

from rrattn import reference

pytestmark = pytest.mark.one_path


@pytest.mark.parametrize("num_k_blocks", (2049, 8192))  # the longest rows: 1M tokens
def test_long_rows(kernels, rng, num_k_blocks):
    case = Case(1, 128 * num_k_blocks, num_heads=3)
    scores = rng.random(case.block_shape, np.float32) ** 20
    scores[0, 1] = np.round(scores[0, 1], 2)  # many ties
    for tau, keep_local in ((0.3, 0), (0.95, 1), (0.3, 40), (0.3, 5000)):
        options = {"causal": True, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k, "keep_local": keep_local}
        expected = reference.select(scores, tau, **options)
        for _ in range(3):
            assert_identical(kernels.select(scores, threshold=tau, **options), expected)


@pytest.mark.parametrize("make_scores", SCORES)
def test_long_rows_of_every_kind(kernels, rng, make_scores):
    case = Case(1, 128 * 8192, num_heads=2)
    scores = make_scores(rng, case.block_shape)
    for tau in (1e-30, 0.3, 0.9, 0.999):
        check(kernels, scores, threshold=tau, causal=True, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k)


def test_a_row_that_is_too_long_is_refused(kernels):
    scores = np.zeros((1, 1, 1, 8193), np.float32)
    with pytest.raises(ValueError, match="seqlen_k is 1048704.*at most 1048576"):
        kernels.select(scores, threshold=0.9, causal=True, seqlen_q=1, seqlen_k=128 * 8193)
