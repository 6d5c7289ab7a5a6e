"""The published release's names: what they return, what they warn of, what they refuse, and the migration page."""

import re
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import reference

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


@pytest.fixture
def states():
    """Query, key and value, [B, H, L, D], of 1000 tokens; the second block of keys is the one that they look for."""
    paddle.seed(0)
    query, (key, value) = paddle.randn([1, 4, 1000, 32]), paddle.randn([2, 1, 2, 1000, 32])
    key[:, :, 128:256] += 1
    return query + 1, key, value


def stages(states, threshold, keep_sink=False, keep_last=False):
    """(scores, mask, out) of the oracle, in Paddle's layout."""
    query, key, value = (tensor.numpy().transpose(0, 2, 1, 3).astype(np.float64) for tensor in states)
    scores = reference.estimate(query, key, causal=True, spread=0)  # the release has none
    mask = reference.select(
        scores.astype(np.float32),
        threshold,
        causal=True,
        seqlen_q=query.shape[1],
        seqlen_k=key.shape[1],
        keep_sink=keep_sink,
        keep_last=keep_last,
        keep_local=0,  # the release has no such rule
        min_share=0,
    )
    return scores, mask, reference.attend(query, key, value, mask, causal=True)[0]


@pytest.mark.parametrize(
    ("arguments", "threshold", "keep"),
    [
        ({}, 0.8, {}),  # the release's defaults
        ({"threshold": 0.3, "keep_sink": True, "keep_recent": True}, 0.3, {"keep_sink": True, "keep_last": True}),
    ],
)
def test_prefill_and_its_sparse_ratio(states, arguments, threshold, keep):
    out, sparse_ratio = rrattn.rrattn_prefill(*states, **arguments)
    _, mask, expected = stages(states, threshold, **keep)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-3)
    assert sparse_ratio.shape == [] and float(sparse_ratio) == pytest.approx(1 - mask.sum() / (4 * 36))
    assert 0 < float(sparse_ratio) < 1


def test_the_sparse_ratio_is_of_what_the_masks_let_see():
    """Of the visible blocks of all heads and sequences, whose numbers differ; one sequence is nothing but padding."""
    paddle.seed(0)
    query, (key, value) = paddle.randn([3, 4, 1000, 32]), paddle.randn([2, 3, 2, 1000, 32])
    rows = rrattn.masks.document_startend_rows([[500, 400], [0], [1000]])
    _, of_dense = rrattn.rrattn_prefill(query, key, value, threshold=1.0, startend_row_indices=rows)
    assert float(of_dense) == 0
    _, ratio = rrattn.rrattn_prefill(query, key, value, threshold=0.5, startend_row_indices=rows)
    arrays = [tensor.transpose([0, 2, 1, 3]).numpy().astype(np.float64) for tensor in (query, key)]
    scores = reference.estimate(*arrays, rows.numpy(), causal=True, spread=0).astype(np.float32)
    sizes = {"causal": True, "seqlen_q": 1000, "seqlen_k": 1000}
    keep = {"keep_sink": False, "keep_last": False, "keep_local": 0, "min_share": 0}
    mask = reference.select(scores, 0.5, rows.numpy(), **sizes, **keep)
    hidden, _ = reference.block_geometry(rows.numpy(), batch=3, num_heads=4, **sizes)
    assert float(ratio) == pytest.approx(1 - mask.sum() / (~hidden).sum()) and 0 < float(ratio) < 1


def test_estimate(states):
    block_scores, block_mask = rrattn.rrattn_estimate(*states[:2], threshold=0.5, stride=8)
    scores, mask, _ = stages(states, 0.5)
    np.testing.assert_allclose(block_scores.numpy(), scores, atol=1e-3)
    assert block_mask.dtype == paddle.bool
    np.testing.assert_array_equal(block_mask.numpy(), mask)


def test_masks_and_not_causal(states):
    rows = paddle.concat([paddle.full([1, 1, 1000, 1], end, "int32") for end in (300, 450)], -1)
    out, _ = rrattn.rrattn_prefill(*states, causal=False, startend_row_indices=rows)
    query, key, value = (tensor.transpose([0, 2, 1, 3]) for tensor in states)
    off = {"keep_sink": False, "keep_last": False, "spread": 0, "min_share": 0}
    expected = rrattn.rr_attention(query, key, value, rows, threshold=0.8, **off)
    assert (out == expected).all() and (out[:, 300:450] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {"threshold": 1.0}),
        ({"threshold": 0.5, "stride": 16}, {"threshold": 0.5, "stride": 16, "keep_sink": True, "keep_last": True}),
        (
            {"threshold": 0.3, "keep_sink": False, "keep_last": False, "causal": True, "dropout": 0},
            {"threshold": 0.3, "keep_sink": False, "keep_last": False, "causal": True},
        ),
    ],
    ids=str,
)
def test_the_operator_for_training(states, arguments, settings):
    query, key, value = (tensor.transpose([0, 2, 1, 3]).contiguous() for tensor in states)
    query.stop_gradient = False
    off = {"keep_local": 0, "min_share": 0, "spread": 0}
    out = rrattn.published.rr_attention(query, key, value, **arguments)
    expected = rrattn.rr_attention(query, key, value, return_softmax_lse=True, **settings, **off)
    assert (out == expected[0]).all() and not out.stop_gradient
    arguments = {"dropout": 0.0, "return_seed_offset": False, **arguments}
    out, lse = rrattn.published.rr_attention(query, key, value, return_softmax_lse=True, **arguments)
    assert (out == expected[0]).all() and (lse == expected[1]).all()
    assert rrattn.published.rr_attention(query, key, value, **arguments, training=False).stop_gradient


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout": 0.1}, ValueError, "dropout is 0.1, but must be 0"),
        ({"dropout": False}, ValueError, "dropout is False, but must be 0"),
        ({"dropout": None}, ValueError, "dropout is None, but must be 0"),
        ({"return_seed_offset": True}, ValueError, "return_seed_offset is True, but must be False"),
        ({"return_seed_offset": 0}, ValueError, "return_seed_offset is 0, but must be True or False"),
        ({"keep_last": 1}, ValueError, "keep_last is 1, but must be True or False"),
        ({"keep_recent": True}, TypeError, "keep_recent"),
    ],
    ids=str,
)
def test_what_the_operator_for_training_refuses(states, arguments, error, message):
    with pytest.raises(error, match=message):
        rrattn.published.rr_attention(*(tensor.transpose([0, 2, 1, 3]) for tensor in states), **arguments)


CALLS = {
    "rrattn_prefill": lambda states, **arguments: rrattn.rrattn_prefill(*states, **arguments),
    "rrattn_estimate": lambda states, **arguments: rrattn.rrattn_estimate(*states[:2], **arguments),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_warning_names_what_means_nothing(states, name):
    with pytest.warns(DeprecationWarning) as caught:
        CALLS[name](states, use_triton=True, chunk_size=16384, rrattn_version="v1", config=None, layer_idx=3)
    (warning,) = (entry for entry in caught if "rrattn" in str(entry.message))
    assert re.match(f"use_triton, chunk_size, rrattn_version, config, layer_idx of {name}", str(warning.message))
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[name](states, block_size=np.int64(128), norm=1, kdb=1)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 64}, ValueError, "block_size is 64, but must be 128"),
        ({"norm": 2}, ValueError, "norm is 2, but must be 1"),
        ({"select_mode": "slash"}, ValueError, "select_mode is 'slash', but must be 'inverse'"),
        ({"stride": 7}, ValueError, "stride.*7"),
        ({"threshold": 0.0}, ValueError, "threshold.*0"),
        ({"norm": True}, ValueError, "norm is True, but must be 1"),
        ({"block_size": 128.0}, ValueError, "block_size is 128.0, but must be 128"),
        ({"keep_recent": 1}, ValueError, "keep_recent is 1, but must be True or False"),
        ({"causal": "False"}, ValueError, "causal is 'False', but must be True or False"),
        ({"treshold": 0.5}, TypeError, "no argument treshold"),
    ],
)
def test_bad_arguments_are_named(states, name, arguments, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](states, **arguments)


def test_other_layouts_are_refused(states):
    with pytest.raises(
        ValueError, match=r"query_states has 3 dimensions.*must have 4: \[batch, heads, length, head size\]"
    ):
        rrattn.rrattn_prefill(states[0][0], *states[1:])
    with pytest.raises(TypeError, match="key_states is a ndarray, but must be a paddle.Tensor"):
        rrattn.rrattn_estimate(states[0], states[1].numpy())


def test_the_migration_page_says_the_same_twice(states):
    """Old and new lines, in turns, on the tensors above and on a model where there is one."""
    names = {"rrattn": rrattn, **dict(zip(("query_states", "key_states", "value_states"), states))}
    pairs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    pairs = list(zip(pairs[::2], pairs[1::2]))
    assert len(pairs) == 4
    for old, new in pairs:
        if "model" in old:
            tiny_models = pytest.importorskip("tiny_models")
            names |= {"model": tiny_models.make_model(), "tokens": tiny_models.make_tokens()}
        before, after = dict(names), dict(names)
        exec(old, before)
        exec(new, after)
        results = [name for name in before if name in after and name not in names and name != "__builtins__"]
        assert results
        for name in results:
            np.testing.assert_array_equal(before[name].numpy(), after[name].numpy(), err_msg=name)
