"""The pipeline on shapes that nobody chose: each stage on what the one before it gave, against the oracle."""

import numpy as np
from cases import CAUSAL_FLASHMASKS, DTYPES, FULL_FLASHMASKS, KEY_STRIDES, STRIDES, Case, make_inputs
from harness import assert_as_good_as_naive
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rrattn import reference


@st.composite
def shapes(draw):
    causal = draw(st.booleans())
    seqlen_k = draw(st.integers(1, 420))
    num_heads_k = draw(st.sampled_from((1, 2, 3)))
    generators = CAUSAL_FLASHMASKS if causal else FULL_FLASHMASKS
    return Case(
        seqlen_q=draw(st.integers(1, seqlen_k if causal else 420)),
        seqlen_k=seqlen_k,
        causal=causal,
        num_heads=num_heads_k * draw(st.sampled_from((1, 2, 5))),
        num_heads_k=num_heads_k,
        head_dim=8 * draw(st.integers(1, 12)),
        stride=draw(st.sampled_from(STRIDES)),
        batch=draw(st.sampled_from((1, 2))),
        flashmask=draw(st.sampled_from((None, *(generator.__name__ for generator in generators)))),
        flashmask_heads=draw(st.sampled_from(("1", "Hkv", "Hq"))),
    )


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=shapes(),
    dtype=st.sampled_from(DTYPES),
    taus=st.one_of(st.floats(0.01, 1.0), st.integers(0, 2**32)),
    head_offset=st.integers(0, 200),
    finer=st.tuples(st.sampled_from(KEY_STRIDES), st.sampled_from((0, 0.5, 1)), st.sampled_from((0, 0.3))),
    keep_sink=st.booleans(),
    keep_last=st.booleans(),
)
@example(  # one key: gradients of 0, which are differences of equal sums
    case=Case(15, 1, causal=False, num_heads=1, num_heads_k=1, head_dim=8, stride=2),
    dtype="float32",
    taus=1.0,
    head_offset=0,
    finer=(8, 0, 0),
    keep_sink=False,
    keep_last=False,
)
@example(  # the rounding of the result makes most of the error, and the naive way has a luckier one
    case=Case(1, 6, num_heads=1, num_heads_k=1, head_dim=32, stride=4, flashmask="share_question"),
    dtype="bfloat16",
    taus=1.0,
    head_offset=0,
    finer=(8, 0, 0),
    keep_sink=False,
    keep_last=False,
)
def test_pipeline(kernels, case, dtype, taus, head_offset, finer, keep_sink, keep_last):
    """`taus` is one threshold, or the seed of one for each head. A GPU does not take float32."""
    key_stride, spread, min_share = finer
    dtype = dtype if dtype in kernels.dtypes else kernels.dtypes[0]
    inputs = make_inputs(case, dtype)
    sampling = {"causal": case.causal, "stride": case.stride, "head_offset": head_offset}
    sampling |= {"key_stride": key_stride, "spread": spread}
    arguments = inputs.query, inputs.key, inputs.startend
    scores = kernels.estimate(*arguments, dtype=dtype, **sampling)
    assert_as_good_as_naive(scores, *kernels.estimate_reference(*arguments, dtype=dtype, **sampling))

    if isinstance(taus, int):
        taus = 1 - np.random.default_rng(taus).random(case.num_heads, np.float32)
    rules = {
        "causal": case.causal,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.seqlen_k,
        "keep_sink": keep_sink,
        "keep_last": keep_last,
        "min_share": min_share,
    }
    mask = kernels.select(scores, inputs.startend, threshold=taus, **rules)
    assert np.array_equal(mask, reference.select(scores, taus, inputs.startend, **rules))

    arguments = *inputs.forward, mask, inputs.startend
    results = kernels.attend(*arguments, causal=case.causal, dtype=dtype)
    oracle = reference.attend(*arguments, causal=case.causal)
    naive = reference.attend(*arguments, causal=case.causal, dtype=dtype)
    for actual, exact, same_dtype in zip(results, oracle, naive):
        assert_as_good_as_naive(actual, exact, same_dtype)

    arguments = *inputs.forward, mask, inputs.grad_out, inputs.startend
    grads = kernels.backward(*arguments, causal=case.causal, dtype=dtype)
    oracle = reference.backward(*arguments, causal=case.causal)
    naive = reference.backward(*arguments, causal=case.causal, dtype=dtype)
    terms = reference.backward(*arguments, causal=case.causal, terms=True)
    stored = reference.backward(*arguments, causal=case.causal, stored=dtype)
    for results in zip(grads, oracle, naive, terms, stored):
        assert_as_good_as_naive(*results)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=shapes(),
    seed=st.integers(0, 2**32),
    taus=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2).map(sorted),
    keep_sink=st.booleans(),
    keep_last=st.booleans(),
    keep_local=st.integers(0, 4),
    min_share=st.sampled_from((0, 0.1, 0.5, 1)),
)
def test_keep_rules_only_add(kernels, case, seed, taus, keep_sink, keep_last, keep_local, min_share):
    """On scores with many ties: rules add to the selection without them, and none takes from that of a lower tau."""
    scores = np.random.default_rng(seed).integers(0, 6, case.block_shape).astype(np.float32)
    startend = make_inputs(case).startend
    sizes = {"causal": case.causal, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    rules = {"keep_sink": keep_sink, "keep_last": keep_last, "keep_local": keep_local, "min_share": min_share}
    lower, higher = (kernels.select(scores, startend, threshold=tau, **sizes, **rules) for tau in taus)
    for mask, tau in zip((lower, higher), taus):
        assert np.array_equal(mask, reference.select(scores, tau, startend, **sizes, **rules))
    rules = {"keep_sink": False, "keep_last": False, "keep_local": 0, "min_share": min_share}
    plain = kernels.select(scores, startend, threshold=taus[0], **sizes, **rules)
    hidden, _ = reference.block_geometry(startend, **case.geometry)
    assert (plain <= lower).all() and (lower <= higher).all() and not (lower & hidden).any()
