"""Packed block masks and their density, as Paddle tensors, against the reference."""

import numpy as np
import paddle
import pytest
import reference

import rrattn

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
