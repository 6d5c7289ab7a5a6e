"""Tensors of [batch, heads, length, head size], the wrong way round: a warning where they run, otherwise a hint."""

import warnings

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import layout

HINT = r"rrattn takes \[batch, length, heads, head size\].*transpose\(\[0, 2, 1, 3\]\)"


@pytest.fixture(autouse=True)
def first_call(monkeypatch):
    monkeypatch.setattr(layout, "_warned", False)


def make(*shape):
    return paddle.ones([1, *shape, 8])


def stages(query, key, rows=None, causal=True):
    """Every function that takes a query and a key."""
    options = {"causal": causal}
    blocks = [1, query.shape[2], -(-query.shape[1] // 128), -(-key.shape[1] // 4096)]
    every_block = paddle.full(blocks, -1, dtype="int32")
    yield lambda: rrattn.rr_attention(query, key, key, rows, **options)
    yield lambda: rrattn.estimate_block_scores(query, key, rows, **options)
    yield lambda: rrattn.block_sparse_attention(query, key, key, every_block, rows, **options)
    yield lambda: rrattn.RRAttention()(query, key, key, rows, **options)


@pytest.mark.parametrize("causal", (True, False))
def test_what_runs_the_wrong_way_round_warns_once(causal, monkeypatch):
    query = make(8, 300)  # 8 heads of 300 tokens
    for stage in stages(query, query, causal=causal):
        monkeypatch.setattr(layout, "_warned", False)
        with pytest.warns(UserWarning, match=f"query has 8 tokens of 300 heads and key 8 of 300; {HINT}"):
            stage()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stage()
            rrattn.rr_attention(query, query, query, causal=causal)


def test_the_warning_is_of_the_callers_line():
    query = make(8, 300)
    with pytest.warns(UserWarning, match=HINT) as caught:
        rrattn.rr_attention(query, query, query, causal=True)
    assert [entry.filename for entry in caught] == [__file__]


def test_grouped_heads_without_causal_warn():
    """32 query heads over 8 key heads, of 2048 tokens: nothing else is wrong with the sizes."""
    with pytest.warns(UserWarning, match=HINT):
        rrattn.rr_attention(make(32, 2048), make(8, 2048), make(8, 2048))


@pytest.mark.parametrize(
    "query, key",
    (
        ((300, 8), (300, 8)),  # the right way round
        ((1, 128), (1, 128)),  # the first token of a model with as many heads as any
        ((1, 128), (5, 128)),  # a decoding step
        ((7, 128), (7, 16)),  # grouped
        ((33, 129), (33, 129)),  # one key more than the warning takes
        ((1, 1024), (1, 8)),  # with fewer key heads no tensors that are the wrong way round run
    ),
    ids=str,
)
def test_what_is_in_use_does_not_warn(query, key):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stage in stages(make(*query), make(*key)):
            stage()


def test_the_border_of_the_warning():
    with pytest.warns(UserWarning, match=HINT):
        rrattn.rr_attention(make(32, 129), make(32, 129), make(32, 129), causal=True)


SLIPS = {
    "grouped heads": (make(32, 256), make(8, 256), None, "seqlen_q is 32 and seqlen_k is 8"),
    "grouped heads, few tokens": (make(32, 9), make(8, 9), None, "seqlen_q is 32 and seqlen_k is 8"),
    "bounds": (make(4, 64), make(4, 64), paddle.zeros([1, 1, 64, 1], "int32"), "startend_row_indices has length 64"),
    "decoding": (make(8, 1), make(8, 64), None, "query has 1 heads and key has 64"),
    "chunks": (make(8, 128), make(8, 256), None, "query has 128 heads and key has 256"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_ends_in_an_error_gets_a_hint(slip):
    query, key, rows, message = SLIPS[slip]
    for stage in stages(query, key, rows):
        with pytest.raises(ValueError, match=f"(?s){message}.*{HINT}"), warnings.catch_warnings():
            warnings.simplefilter("error")
            stage()


@pytest.mark.parametrize(
    "query, key, rows, message",
    (
        ((300, 8), (200, 8), None, "seqlen_q is 300"),  # heads are fewer than tokens
        ((200, 4), (200, 3), None, "query has 4 heads"),
        ((4, 6), (4, 5), None, "query has 6 heads"),  # no better the other way round
        ((8, 8), (4, 8), [1, 1, 5, 1], "seqlen_q is 8"),  # bounds for neither way
    ),
    ids=str,
)
def test_other_errors_get_none(query, key, rows, message):
    rows = None if rows is None else paddle.zeros(rows, "int32")
    for stage in stages(make(*query), make(*key), rows):
        with pytest.raises(ValueError, match=message) as caught:
            stage()
        assert "transpose" not in str(caught.value)


def test_a_traced_program_warns_by_known_sizes_alone():
    def attend(query):
        return rrattn.rr_attention(query, query, query, causal=True)

    def trace(*shape):
        spec = [paddle.static.InputSpec(list(shape), "float32")]
        assert paddle.jit.to_static(attend, full_graph=True, input_spec=spec).concrete_program is not None

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*transpose")
        trace(None, None, 300, 8)
        trace(1, 300, 8, 8)
    with pytest.warns(UserWarning, match=HINT):
        trace(1, 8, 300, 8)


def test_the_published_functions_transpose_and_say_so():
    """Theirs is the other layout, and a call in this one the slip."""
    paddle.seed(0)
    states = paddle.randn([1, 2, 300, 8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = rrattn.rrattn_prefill(states, states, states)
    assert np.isfinite(out.numpy()).all()
    other = states.transpose([0, 2, 1, 3])
    with pytest.warns(UserWarning, match="rrattn_prefill and rrattn_estimate, it is the other way round"):
        rrattn.rrattn_prefill(other, other, other)
