"""Stage 2 on the GPU: the CPU's tests, bit by bit, with the GPU's arrays."""

import numpy as np
import pytest
from cases import Case
from harness import assert_identical
from test_select import (  # noqa: F401  (collected here with this folder's fixtures)
    SCORES,
    check,
    test_a_block_is_kept_while_the_mass_before_it_is_below_tau,
    test_a_row_with_bad_data_keeps_every_visible_block,
    test_an_array_of_one_threshold_holds_for_all_heads,
    test_bad_data_behind_flashmask_is_not_seen,
    test_bounds_are_read_in_place,
    test_equal_scores_go_to_the_lower_block,
    test_hidden_scores_count_for_nothing,
    test_intervals_that_end_at_block_edges,
    test_keep_local,
    test_keep_local_adds_to_what_the_threshold_keeps,
    test_keep_local_has_no_meaning_when_not_causal,
    test_keep_local_keeps_no_block_of_another_document,
    test_keep_rules,
    test_masks,
    test_masses_are_added_in_fixed_point,
    test_rows_of_many_blocks,
    test_sizes_of_zero_give_empty_masks,
    test_tau_of_one_keeps_scores_that_underflow,
    test_the_sink_under_flashmask_is_the_start_of_the_document,
    test_thresholds_per_head,
    test_touched_blocks_are_kept,
)

from rrattn import reference


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
