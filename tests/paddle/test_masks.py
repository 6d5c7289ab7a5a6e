"""Packed block masks and their density, as Paddle tensors, against the reference."""

import numpy as np
import paddle
import pytest
from cases import MASKED, Case, make_inputs

import rrattn
from rrattn import masks, reference
from rrattn.masks import document_startend_rows, padding_startend_rows

WIDTHS = (1, 31, 32, 33, 64, 1027)


@pytest.mark.parametrize("num_k_blocks", WIDTHS)
@pytest.mark.parametrize("lead", ((), (3,), (2, 3, 5)))
def test_pack_and_unpack(rng, num_k_blocks, lead):
    mask = rng.random((*lead, num_k_blocks)) < 0.5
    packed = rrattn.pack_block_mask(paddle.to_tensor(mask))
    assert packed.dtype == paddle.int32
    assert np.array_equal(packed.numpy(), reference.pack(mask))
    unpacked = rrattn.unpack_block_mask(packed, num_k_blocks)
    assert unpacked.dtype == paddle.bool
    assert np.array_equal(unpacked.numpy(), mask)


def test_the_top_bit_is_a_block_like_any_other():
    mask = np.zeros((1, 64), bool)
    mask[0, [31, 63]] = True
    packed = rrattn.pack_block_mask(paddle.to_tensor(mask))
    assert packed.numpy().tolist() == [[-(2**31)] * 2]
    assert np.array_equal(rrattn.unpack_block_mask(packed, 64).numpy(), mask)


def test_unpack_ignores_bits_beyond_the_last_block():
    words = paddle.full([1, 1, 1, 2], -1, dtype="int32")
    assert rrattn.unpack_block_mask(words, 33).shape == [1, 1, 1, 33]


def test_masks_that_are_not_contiguous(rng):
    mask = rng.random((4, 70)) < 0.5
    packed = rrattn.pack_block_mask(paddle.to_tensor(np.ascontiguousarray(mask.T)).T)
    assert np.array_equal(packed.numpy(), reference.pack(mask))
    words = paddle.to_tensor(np.ascontiguousarray(reference.pack(mask).T)).T
    assert np.array_equal(rrattn.unpack_block_mask(words, 70).numpy(), mask)


@pytest.mark.parametrize(
    "causal, seqlen_q, seqlen_k",
    [(c, *n) for c in (True, False) for n in ((1, 1), (128, 128), (129, 129), (1, 5000), (300, 5000), (1000, 1000))]
    + [(False, 500, 200)],
)
def test_density(rng, causal, seqlen_q, seqlen_k):
    """Blocks kept among those below the diagonal; bits above it do not count."""
    sizes = {"causal": causal, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    hidden, _ = reference.block_geometry(None, batch=2, num_heads=3, **sizes)
    mask = rng.random(hidden.shape) < np.linspace(0, 1, 6).reshape(2, 3, 1, 1)
    expected = (mask & ~hidden).sum((2, 3)) / (~hidden).sum((2, 3))
    density = rrattn.block_density(paddle.to_tensor(reference.pack(mask)), **sizes)
    assert density.shape == [2, 3]
    np.testing.assert_allclose(density.numpy(), expected, rtol=1e-6)
    assert density.numpy()[0, 0] == 0
    everything = rrattn.block_density(paddle.to_tensor(reference.pack(np.ones_like(mask))), **sizes)
    assert (everything.numpy() == 1).all()


def test_density_of_a_selection(rng):
    scores = paddle.to_tensor(rng.random((1, 2, 4, 6), np.float32))
    sizes = {"causal": True, "seqlen_q": 500, "seqlen_k": 700}
    mask = rrattn.select_blocks(scores, 0.5, **sizes)
    kept = rrattn.unpack_block_mask(mask, 6).numpy()
    hidden, _ = reference.block_geometry(None, batch=1, num_heads=2, **sizes)
    density = rrattn.block_density(mask, **sizes).numpy()
    np.testing.assert_allclose(density, kept.sum((2, 3)) / (~hidden).sum((2, 3)), rtol=1e-6)
    assert (density > 0).all() and (density < 1).all()


PADDED_CASES = [  # of whole key blocks per head, so that rows and blocks see nothing
    Case(600, 600, True, 4, 2, 32, batch=2, flashmask="document", flashmask_heads="Hq"),
    Case(1000, 1300, True, 4, 4, 32, batch=2, flashmask="no_row_after", flashmask_heads="Hkv"),
    Case(1000, 700, False, 4, 2, 32, batch=2, flashmask="full_document", flashmask_heads="Hkv"),
]


@pytest.mark.parametrize("case", MASKED + PADDED_CASES, ids=str)
def test_density_counts_what_flashmask_lets_a_row_see(case):
    inputs = make_inputs(case)
    sizes = {"causal": case.causal, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    hidden, _ = reference.block_geometry(inputs.startend, **case.geometry)
    rows = paddle.to_tensor(inputs.startend)
    visible = (~hidden).sum((2, 3))
    expected = (inputs.block_mask & ~hidden).sum((2, 3)) / np.maximum(visible, 1)
    density = rrattn.block_density(paddle.to_tensor(reference.pack(inputs.block_mask)), rows, **sizes)
    assert density.shape == [case.batch, case.num_heads]
    np.testing.assert_allclose(density.numpy(), expected, rtol=1e-6)
    everything = rrattn.block_density(paddle.to_tensor(reference.pack(np.ones_like(hidden))), rows, **sizes)
    np.testing.assert_array_equal(everything.numpy(), visible > 0)


def test_dense_attention_of_packed_documents_has_a_density_of_one():
    query, (key, value) = paddle.randn([2, 768, 4, 32]), paddle.randn([2, 2, 768, 2, 32])
    rows = document_startend_rows([[256, 256, 256], [100, 300, 200]])  # and 168 of padding
    sizes = {"causal": True, "seqlen_q": 768, "seqlen_k": 768}
    _, mask = rrattn.rr_attention(query, key, value, rows, causal=True, threshold=1.0, return_block_mask=True)
    assert (rrattn.block_density(mask, rows, **sizes) == 1).all()
    assert rrattn.block_density(mask, **sizes)[0].tolist() == pytest.approx([9 / 21] * 4)  # as if nothing hid the rest


def test_a_sequence_of_padding_has_no_density():
    rows = padding_startend_rows(paddle.to_tensor([[1] * 300, [0] * 300]))
    mask = rrattn.dense_block_mask(2, 3, causal=True, seqlen_q=300, seqlen_k=300)
    density = rrattn.block_density(mask, rows, causal=True, seqlen_q=300, seqlen_k=300)
    assert density.tolist() == [[1, 1, 1], [0, 0, 0]]
    nothing = paddle.zeros([1, 2, 3, 0], "int32"), paddle.zeros([1, 1, 0, 2], "int32")
    assert rrattn.block_density(*nothing, causal=False, seqlen_q=300, seqlen_k=0).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("rows", "causal", "error", "message"),
    [
        (np.zeros([1, 1, 300, 1], np.int32), True, TypeError, "startend_row_indices is a ndarray"),
        (paddle.zeros([1, 1, 300, 1]), True, ValueError, "startend_row_indices has dtype .*float32.*int32"),
        (paddle.zeros([1, 1, 300], "int32"), True, ValueError, r"shape \[1, 1, 300\], but must be \[2, a divisor of 6"),
        (paddle.zeros([1, 1, 300, 1], "int32"), True, ValueError, r"shape \[1, 1, 300, 1\]"),
        (paddle.zeros([2, 4, 300, 1], "int32"), True, ValueError, r"\[2, 4, 300, 1\].*a divisor of 6"),
        (paddle.zeros([2, 1, 299, 1], "int32"), True, ValueError, r"\[2, 1, 299, 1\].*300"),
        (paddle.zeros([2, 1, 300, 4], "int32"), True, ValueError, "1 or 2.* when causal is True"),
        (paddle.zeros([2, 1, 300, 1], "int32"), False, ValueError, "2 or 4.* when causal is False"),
    ],
)
def test_row_bounds_that_do_not_fit_the_mask_are_refused(rows, causal, error, message):
    mask = rrattn.dense_block_mask(2, 6, causal=True, seqlen_q=300, seqlen_k=300)
    with pytest.raises(error, match=message):
        rrattn.block_density(mask, rows, causal=causal, seqlen_q=300, seqlen_k=300)


def test_arrays_and_lists_are_masks_too(rng):
    mask = rng.random((2, 3, 4, 5)) < 0.5
    packed = rrattn.pack_block_mask(mask)
    assert packed.dtype == paddle.int32 and np.array_equal(packed.numpy(), reference.pack(mask))
    assert (rrattn.pack_block_mask(mask.tolist()) == packed).all()
    assert np.array_equal(rrattn.unpack_block_mask(packed.numpy(), np.int64(5)).numpy(), mask)
    sizes = {"causal": np.bool_(True), "seqlen_q": np.uint16(500), "seqlen_k": np.array(600)}
    expected = rrattn.block_density(packed, causal=True, seqlen_q=500, seqlen_k=600)
    assert (rrattn.block_density(packed.numpy(), **sizes) == expected).all()
    visible = masks.visible_blocks(**sizes)
    assert (visible == masks.visible_blocks(causal=True, seqlen_q=500, seqlen_k=600)).all()
    dense = rrattn.dense_block_mask(np.int32(2), np.int8(3), **sizes)
    assert (rrattn.unpack_block_mask(dense, 5) == visible).all() and dense.shape[:2] == [2, 3]


WORDS = np.zeros([1, 2, 3, 1], np.int32)


@pytest.mark.parametrize(
    "call, message",
    (
        (
            lambda: rrattn.pack_block_mask(None),
            "bool_mask is None, but must be a Tensor, a NumPy array or nested lists",
        ),
        (lambda: rrattn.pack_block_mask("10"), "bool_mask is '10', but must be a Tensor"),
        (lambda: rrattn.pack_block_mask(map(bool, [1])), "bool_mask is <map.*, but must be a Tensor"),
        (lambda: rrattn.pack_block_mask([[True], []]), r"bool_mask is \[\[True\], \[\]\], but must be a Tensor"),
        (lambda: rrattn.pack_block_mask([1, 0]), "bool_mask must be of dtype bool, got int64"),
        (lambda: rrattn.pack_block_mask(np.ones(3)), "bool_mask must be of dtype bool, got float64"),
        (
            lambda: rrattn.pack_block_mask(paddle.ones([3], "bfloat16")),
            "bool_mask must be of dtype bool, got .*bfloat16",
        ),
        (lambda: rrattn.pack_block_mask(True), "bool_mask must have at least one dimension"),
        (lambda: rrattn.unpack_block_mask(None, 3), "block_mask is None, but must be a Tensor"),
        (lambda: rrattn.unpack_block_mask(WORDS.astype(np.int64), 3), "block_mask must be of dtype int32, got int64"),
        (lambda: rrattn.unpack_block_mask(WORDS, 3.0), "num_k_blocks is 3.0, but must be an integer of at least 0"),
        (lambda: rrattn.unpack_block_mask(WORDS, True), "num_k_blocks is True, but must be an integer of at least 0"),
        (lambda: rrattn.unpack_block_mask(WORDS, -1), "num_k_blocks is -1, but must be an integer of at least 0"),
        (lambda: rrattn.dense_block_mask(1.0, 2, **SIZES), "batch_size is 1.0, but must be an integer of at least 0"),
        (lambda: rrattn.dense_block_mask(1, "2", **SIZES), "num_heads is '2', but must be an integer of at least 0"),
    ),
)
def test_masks_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SIZES = {"causal": True, "seqlen_q": 300, "seqlen_k": 300}


@pytest.mark.parametrize(
    "helper",
    (
        masks.visible_blocks,
        lambda **sizes: rrattn.dense_block_mask(1, 2, **sizes),
        lambda **sizes: rrattn.block_density(WORDS, **sizes),
    ),
)
@pytest.mark.parametrize(
    "change, message",
    (
        ({"causal": "False"}, "causal is 'False', but must be True or False"),
        ({"causal": 1}, "causal is 1, but must be True or False"),
        ({"seqlen_q": 300.0}, "seqlen_q is 300.0, but must be an integer from 0 to 1073741824"),
        ({"seqlen_k": None}, "seqlen_k is None, but must be an integer from 0 to 1073741824"),
        ({"seqlen_k": "300"}, "seqlen_k is '300', but must be an integer from 0 to 1073741824"),
        ({"seqlen_q": -1}, "seqlen_q is -1, but must be an integer from 0 to 1073741824"),
        ({"seqlen_q": 301}, "seqlen_q <= seqlen_k, got seqlen_q=301, seqlen_k=300"),
    ),
    ids=str,
)
def test_sizes_that_are_refused(helper, change, message):
    with pytest.raises(ValueError, match=message):
        helper(**{**SIZES, **change})


def test_a_traced_mask_is_refused_by_name():
    def density(words):
        return rrattn.block_density(words, **SIZES)

    spec = [paddle.static.InputSpec([1, 2, 3, 1], "int32")]
    with pytest.raises(TypeError, match="block_mask is part of a static graph"):
        _ = paddle.jit.to_static(density, full_graph=True, input_spec=spec).concrete_program


def test_bad_masks():
    words = paddle.zeros([1, 2, 3, 1], dtype="int32")
    with pytest.raises(ValueError, match="bool_mask must be .*bool, got .*int32"):
        rrattn.pack_block_mask(words)
    with pytest.raises(ValueError, match="block_mask must be .*int32, got .*bool"):
        rrattn.unpack_block_mask(words.astype("bool"), 3)
    with pytest.raises(ValueError, match=r"block_mask must have 2 words .*33.*\[1, 2, 3, 1\]"):
        rrattn.unpack_block_mask(words, 33)
    with pytest.raises(ValueError, match=r"block_mask must be \[B, Hq, 2, 1\] .*\[1, 2, 3, 1\]"):
        rrattn.block_density(words, causal=True, seqlen_q=200, seqlen_k=200)
    with pytest.raises(ValueError, match="seqlen_q=400, seqlen_k=300"):
        rrattn.block_density(words, causal=True, seqlen_q=400, seqlen_k=300)
