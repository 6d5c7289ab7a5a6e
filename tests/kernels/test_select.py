"""Stage 2 against the oracle, bit by bit: the block mask."""

from itertools import combinations

import numpy as np
import pytest
from cases import HEADS, LENGTHS, MASKED, UNEQUAL, Case, make_inputs
from harness import LAYOUTS, assert_identical, assert_same_in_two_threads

from rrattn import reference

pytestmark = pytest.mark.one_path
TAUS = (1e-30, 0.1, 0.5, 0.9, 0.95, 0.999, float(np.nextafter(np.float32(1), np.float32(0))), 1.0)


def attention_like(rng, shape):
    """Scores as estimate gives them: a few large ones, most near zero, rows of about the same sum."""
    weight = np.exp(3 * rng.standard_normal(shape))
    return (16 * weight / weight.sum(-1, keepdims=True)).astype(np.float32)


def tied(rng, shape):
    """Few distinct values, so that the order among equals decides."""
    return rng.integers(0, 4, shape).astype(np.float32) / 4


def tiny(rng, shape):
    """Multiples of 2^-33, half of them ties of the rounding to 2^-32, so that it decides."""
    return (rng.integers(0, 8, shape) * 2.0**-33).astype(np.float32)


def huge(rng, shape):
    """Up to the largest score that counts, 2^18, so that sums need more than a double's 53 bits."""
    return np.nextafter(np.float32(2**18), np.float32(0)) * (1 - rng.random(shape, np.float32) ** 8 / 2)


def clustered(rng, shape):
    """Within 40 steps of float32, but for a large one: sums of floats cannot tell on which side of the cut they are."""
    scores = (1 + rng.integers(0, 40, shape) * 2.0**-23).astype(np.float32) / 512
    scores[..., 0] = 8
    return scores


def equal(rng, shape):
    return np.full(shape, 0.1, np.float32)


def zero(rng, shape):
    return np.zeros(shape, np.float32)


SCORES = (attention_like, tied, tiny, huge, clustered, equal, zero)


def check(kernels, scores, startend=None, **options):
    """The mask of the kernel, found the same as the oracle's."""
    mask = kernels.select(scores, startend, **options)
    expected = reference.select(scores, startend=startend, **options)
    different = np.argwhere(mask != expected)
    assert not len(different), f"{len(different)} of {mask.size} differ, first at {different[0]}"
    return mask


def sizes(case):
    return {"causal": case.causal, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}


NO_RULES = {"keep_sink": False, "keep_last": False, "keep_local": 0}


def wide(num_k_blocks, num_q_blocks=3, causal=False):
    """Sizes of a call over so many whole blocks."""
    return {"causal": causal, "seqlen_q": num_q_blocks * 128, "seqlen_k": num_k_blocks * 128}


@pytest.mark.parametrize(
    "keep_sink, keep_last, keep_local", ((True, False, 0), (True, False, 1), (False, True, 0), (False, False, 2))
)
@pytest.mark.parametrize("case", LENGTHS + UNEQUAL + HEADS + MASKED, ids=str)
def test_masks(kernels, rng, case, keep_sink, keep_last, keep_local):
    startend = make_inputs(case).startend
    for make_scores in SCORES:
        scores = make_scores(rng, case.block_shape)
        for tau in (0.3, 0.95, 1.0):
            check(
                kernels,
                scores,
                startend,
                threshold=tau,
                keep_sink=keep_sink,
                keep_last=keep_last,
                keep_local=keep_local,
                **sizes(case),
            )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("make_scores", SCORES)
@pytest.mark.parametrize("num_k_blocks", (1, 31, 32, 33, 64, 1027))
def test_rows_of_many_blocks(kernels, rng, num_k_blocks, make_scores, tau):
    scores = make_scores(rng, (2, 3, 3, num_k_blocks))
    check(kernels, scores, threshold=tau, **NO_RULES, **wide(num_k_blocks))


@pytest.mark.parametrize("min_share", (1e-3, 0.3, 1.0))
@pytest.mark.parametrize("make_scores", SCORES)
@pytest.mark.parametrize("num_k_blocks", (1, 33, 64, 200, 1027))
def test_min_share(kernels, rng, num_k_blocks, make_scores, min_share):
    scores = make_scores(rng, (2, 3, 3, num_k_blocks))
    options = {**NO_RULES, **wide(num_k_blocks, causal=num_k_blocks > 3)}
    for tau in TAUS:
        mask = check(kernels, scores, threshold=tau, min_share=min_share, **options)
        every = kernels.select(scores, threshold=tau, min_share=0, **options)
        assert (mask <= every).all() and (tau < 1 or (mask == every).all())
        assert_identical(mask.any(-1), every.any(-1))  # the largest has at least an average share


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_min_share_counts_visible_blocks(kernels, rng, case):
    scores = attention_like(rng, case.block_shape)
    for min_share in (0.2, 0.5, 1.0):
        check(
            kernels, scores, make_inputs(case).startend, threshold=0.99, min_share=min_share, **NO_RULES, **sizes(case)
        )


def test_a_block_below_the_least_share_is_not_kept_for_its_mass(kernels):
    scores = np.array([4, 2, 1, 1, 0, 0, 0, 0], np.float32).reshape(1, 1, 1, 8)  # an average share is 1
    for min_share, kept in ((0, 4), (1.0, 4), (0.5, 4)):
        assert check(kernels, scores, threshold=0.99, min_share=min_share, **NO_RULES, **wide(8, 1)).sum() == kept
    scores[..., 4:] = 0.25  # now it is 9 / 8
    for min_share, kept in ((0, 8), (0.2, 8), (0.23, 4), (0.88, 4), (0.89, 2), (1.0, 2)):
        assert check(kernels, scores, threshold=0.999, min_share=min_share, **NO_RULES, **wide(8, 1)).sum() == kept


@pytest.mark.parametrize("mass", (1, 2, 3, 2**23 - 1, 2**23, 2**24 - 1, 2**24 + 2, 2**31 + 2**8, 2**45))
def test_the_least_share_is_compared_with_the_rounded_mass(kernels, mass):
    """A row of two blocks, one just at an average share and steps of float32 around it."""
    at = np.float32(mass * 2.0**-32)
    around = [at]
    for direction in (0, np.inf):
        step = at
        for _ in range(3):
            step = np.nextafter(step, np.float32(direction))
            around.append(step)
    halves = [np.float32((mass + half) * 2.0**-32) for half in (-0.5, 0.5)]
    for score in (*around, *halves):
        scores = np.array([at, score, at, at], np.float32).reshape(1, 1, 1, 4)
        check(kernels, scores, threshold=0.9999, min_share=1.0, **NO_RULES, **wide(4, 1))


@pytest.mark.cpu_only
@pytest.mark.parametrize("make_scores", SCORES)
def test_every_simd_level(kernels, simd, rng, make_scores):
    for num_k_blocks in (5, 33, 200):
        scores = make_scores(rng, (1, 4, 3, num_k_blocks))
        for tau in TAUS:
            check(kernels, scores, threshold=tau, **NO_RULES, **wide(num_k_blocks, causal=True))


def test_equal_scores_go_to_the_lower_block(kernels):
    scores = np.full((1, 1, 1, 40), 0.25, np.float32)
    scores[..., 33] = 0.5
    mask = check(kernels, scores, threshold=0.24, **NO_RULES, **wide(40, 1))
    # 0.24 of 10.25 is 2.46: block 33 brings 0.5, and eight of 0.25 reach it
    assert np.flatnonzero(mask).tolist() == [*range(8), 33]


def test_a_block_is_kept_while_the_mass_before_it_is_below_tau(kernels):
    scores = np.array([0.25, 0.5, 0.125, 0.125], np.float32).reshape(1, 1, 1, 4)
    for tau, kept in ((0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (0.875, [0, 1, 2])):
        mask = check(kernels, scores, threshold=tau, **NO_RULES, **wide(4, 1))
        assert np.flatnonzero(mask).tolist() == kept, tau


def test_masses_are_added_in_fixed_point(kernels):
    """Sixteen masses of 2^49 and a thousand of 1: half of their sum is just above eight of the large ones.

    Added to 2^53 one by one in double precision, the small ones would vanish.
    """
    scores = np.full((1, 1, 1, 1016), 2.0**-32, np.float32)
    scores[..., :16] = 2.0**17
    mask = check(kernels, scores, threshold=0.5, **NO_RULES, **wide(1016, 1))
    assert np.flatnonzero(mask).tolist() == list(range(9))


def test_hidden_scores_count_for_nothing(kernels):
    """Poison above the diagonal and in a hidden document neither enters the sum nor is kept."""
    case = Case(512, 512, num_heads=1)
    startend = np.where(np.arange(512) < 256, 256, 512).astype(np.int32).reshape(1, 1, 512, 1)
    scores = np.full(case.block_shape, 1e6, np.float32)
    for row, blocks in ((0, [0]), (1, [0, 1]), (2, [2]), (3, [2, 3])):
        scores[0, 0, row, blocks] = 1
    clean = np.where(scores == 1, scores, 0)
    for tau in (0.4, 0.6, 1.0):
        mask = check(kernels, scores, startend, threshold=tau, **sizes(case))
        assert_identical(mask, kernels.select(clean, startend, threshold=tau, **sizes(case)))
        assert not mask[scores == 1e6].any()


@pytest.mark.parametrize("bad", (np.nan, -np.nan, np.inf, -np.inf, -1e-30, 2.0**18))
def test_a_row_with_bad_data_keeps_every_visible_block(kernels, rng, bad):
    scores = attention_like(rng, (1, 2, 4, 70))
    scores[0, 1, 2, 40] = bad
    mask = check(kernels, scores, threshold=0.2, **wide(70, 4, causal=True))
    assert mask[0, 1, 2, :69].all() and not mask[0, 1, 2, 69]
    others = np.delete(mask.reshape(8, 70), 6, axis=0)
    assert others.mean() < 0.5
    hidden = scores.copy()
    hidden[0, 1, 2] = scores[0, 0, 0]
    hidden[0, 1, 2, 69] = bad  # above the diagonal it is not seen
    assert check(kernels, hidden, threshold=0.2, **wide(70, 4, causal=True))[0, 1, 2].mean() < 0.5


def test_bad_data_behind_flashmask_is_not_seen(kernels):
    case = Case(256, 256, num_heads=1, causal=False)
    startend = np.stack([np.repeat([128, 256], 128), np.repeat([0, 128], 128)], -1).astype(np.int32)
    scores = np.array([[1, np.nan], [np.nan, 1]], np.float32)[None, None]
    mask = check(kernels, scores, startend[None, None], threshold=0.5, **sizes(case))
    assert np.array_equal(mask[0, 0], np.eye(2, dtype=bool))


def test_tau_of_one_keeps_scores_that_underflow(kernels):
    scores = np.zeros((1, 1, 2, 50), np.float32)
    scores[..., 7] = 1
    assert check(kernels, scores, threshold=1.0, **wide(50, 2)).all()
    assert check(kernels, scores, threshold=0.99999999, **wide(50, 2)).all()  # float32 rounds it to one
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert check(kernels, scores, threshold=below_one, **NO_RULES, **wide(50, 2)).sum() == 2


def test_thresholds_per_head(kernels, rng):
    scores = attention_like(rng, (2, 4, 3, 40))
    taus = np.array([0.2, 1.0, 0.9, 0.5], np.float32)
    mask = check(kernels, scores, threshold=taus, **wide(40))
    for h, tau in enumerate(taus):
        alone = kernels.select(scores[:, h : h + 1], threshold=float(tau), **wide(40))
        assert_identical(mask[:, h : h + 1], alone)
    assert mask[:, 1].all() and mask[:, 0].sum() < mask[:, 3].sum() < mask[:, 2].sum()


def test_an_array_of_one_threshold_holds_for_all_heads(kernels, rng):
    case = Case(300, 300, num_heads=4)
    options = {"causal": True, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    scores = rng.random(case.block_shape, np.float32)
    single = kernels.select(scores, threshold=np.array([0.6], np.float32), **options)
    assert np.array_equal(single, kernels.select(scores, threshold=0.6, **options))
    assert not single.all()


def test_keep_rules(kernels):
    """Without mass to select by, the sink, the row's own blocks, the one before and, if asked, the last row stay."""
    case = Case(300, 628, num_heads=1)  # rows 0..299 sit at keys 328..627
    scores = np.zeros(case.block_shape, np.float32)
    local = [[1, 2, 3], [2, 3, 4], [3, 4]]
    for keep_sink in (True, False):
        mask = check(kernels, scores, threshold=0.5, keep_sink=keep_sink, keep_last=False, **sizes(case))
        for row, blocks in enumerate(local):
            assert np.flatnonzero(mask[0, 0, row]).tolist() == [0] * keep_sink + blocks
    mask = check(kernels, scores, threshold=0.5, keep_last=True, **sizes(case))
    assert mask[0, 0, 2].all() and not mask[0, 0, 1].all()


@pytest.mark.parametrize("keep_local", (0, 1, 2, 3, 2**31, 2**63, 10**30))
def test_keep_local(kernels, keep_local):
    """Without mass to select by, the row's own blocks and so many before them are kept, none below the first."""
    case = Case(300, 820, num_heads=1)  # rows 0..299 sit at keys 520..819
    scores = np.zeros(case.block_shape, np.float32)
    rules = {**NO_RULES, "keep_local": keep_local}
    mask = check(kernels, scores, threshold=0.5, **rules, **sizes(case))
    for row, (first_own, last_own) in enumerate(((4, 5), (5, 6), (6, 6))):
        assert np.flatnonzero(mask[0, 0, row]).tolist() == list(range(max(first_own - keep_local, 0), last_own + 1))


@pytest.mark.parametrize("num_k_blocks", (40, 70, 1030))
def test_keep_local_adds_to_what_the_threshold_keeps(kernels, rng, num_k_blocks):
    """Over the edges of mask words: the blocks before a row's own, and no other."""
    scores = attention_like(rng, (1, 2, 35, num_k_blocks))
    options = {"threshold": 0.4, "keep_last": False, **wide(num_k_blocks, 35, causal=True)}
    plain, local = (check(kernels, scores, keep_local=k, **options) for k in (0, 3))
    distance = np.arange(num_k_blocks - 35, num_k_blocks)[:, None] - np.arange(num_k_blocks)
    near = (1 <= distance) & (distance <= 3)
    assert local[:, :, near].all() and not plain[:, :, near].all()
    assert np.array_equal(local[:, :, ~near], plain[:, :, ~near])


def test_keep_local_has_no_meaning_when_not_causal(kernels):
    scores = np.zeros((1, 1, 4, 6), np.float32)
    for seqlen_k in (6 * 128, 5 * 128 + 1):
        options = {"causal": False, "seqlen_q": 512, "seqlen_k": seqlen_k, "threshold": 0.5}
        assert not check(kernels, scores, keep_sink=False, keep_last=False, keep_local=2, **options).any()


def test_keep_local_keeps_no_block_of_another_document(kernels):
    """Documents of 384 and 640 tokens: near blocks are kept back to the start of the row's own."""
    case = Case(1024, 1024, num_heads=1)
    startend = np.where(np.arange(1024) < 384, 384, 1024).astype(np.int32).reshape(1, 1, 1024, 1)
    scores = np.zeros(case.block_shape, np.float32)
    rules = {**NO_RULES, "keep_local": 2}
    mask = check(kernels, scores, startend, threshold=0.5, **rules, **sizes(case))
    for row in range(8):
        assert np.flatnonzero(mask[0, 0, row]).tolist() == list(range(max(row - 2, 0 if row < 3 else 3), row + 1))


def test_the_sink_under_flashmask_is_the_start_of_the_document(kernels):
    case = Case(1024, 1024, num_heads=1)
    startend = np.where(np.arange(1024) < 512, 512, 1024).astype(np.int32).reshape(1, 1, 1024, 1)
    scores = np.zeros(case.block_shape, np.float32)
    mask = check(kernels, scores, startend, threshold=0.5, keep_last=False, **sizes(case))
    for row in range(8):
        first = 0 if row < 4 else 4
        assert np.flatnonzero(mask[0, 0, row]).tolist() == sorted({first, max(first, row - 1), row})


def test_touched_blocks_are_kept(kernels):
    """A window of 200: the two blocks that its edge cuts are kept without any mass, older ones are hidden."""
    case = Case(1024, 1024, num_heads=1)
    startend = (np.arange(1024) + 200).astype(np.int32).reshape(1, 1, 1024, 1)
    scores = np.zeros(case.block_shape, np.float32)
    mask = check(kernels, scores, startend, threshold=0.5, keep_sink=False, **sizes(case))
    for row in range(8):
        assert np.flatnonzero(mask[0, 0, row]).tolist() == [n for n in (row - 2, row - 1, row) if n >= 0]


@pytest.mark.parametrize("start, end", list(combinations((0, 1, 127, 128, 129, 255, 256, 257, 299, 300), 2)))
def test_intervals_that_end_at_block_edges(kernels, start, end):
    """All keys of a block alike: it is hidden when no row sees it, and touched when some rows do not."""
    case = Case(300, 384, num_heads=1, causal=False)
    startend = np.tile(np.array([start, end, 0, 0], np.int32), (1, 1, 384, 1))
    masked = (start <= np.arange(300)) & (np.arange(300) < end)
    rows = [masked[first : first + 128] for first in (0, 128, 256)]
    expected = [[row.any() and not row.all()] * 3 for row in rows]
    scores = np.zeros(case.block_shape, np.float32)
    mask = check(kernels, scores, startend, threshold=0.5, **NO_RULES, **sizes(case))
    assert mask[0, 0].tolist() == expected
    mask = check(kernels, scores, startend, threshold=1.0, **sizes(case))
    assert mask[0, 0].tolist() == [[not row.all()] * 3 for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", MASKED[::7], ids=str)
def test_bounds_are_read_in_place(kernels, make_kernels, rng, case, layout):
    scores, startend = attention_like(rng, case.block_shape), make_inputs(case).startend
    options = {"threshold": 0.7, **sizes(case)}
    expected = kernels.select(scores, startend, **options)
    assert_identical(make_kernels(layout).select(scores, startend, **options), expected)


@pytest.mark.cpu_only
def test_thread_count_and_repetition_change_nothing(kernels, make_kernels, rng):
    scores = attention_like(rng, (2, 3, 5, 300))
    options = {"threshold": 0.7, **wide(300, 5, causal=True)}
    expected = kernels.select(scores, **options)
    for num_threads in (1, 2, 3, 7):
        assert_identical(make_kernels(num_threads=num_threads).select(scores, **options), expected)
    assert_identical(kernels.select(scores, **options), expected)


def test_two_threads_at_once(kernels, rng):
    scores = [make_scores(rng, (1, 2, 4, 150)) for make_scores in SCORES]
    options = {"threshold": 0.7, **wide(150, 4)}
    assert_same_in_two_threads(*(lambda s=s: kernels.select(s, **options) for s in scores))


@pytest.mark.parametrize("case", (Case(0, 0), Case(0, 200), Case(200, 0, causal=False), Case(5, 5, batch=0)), ids=str)
def test_sizes_of_zero_give_empty_masks(kernels, case):
    mask = kernels.select(np.zeros(case.block_shape, np.float32), threshold=0.9, keep_last=True, **sizes(case))
    assert mask.size == 0
