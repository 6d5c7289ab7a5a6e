"""Dense masks as FlashMask bounds, against the mask that the bounds mean."""

import numpy as np
import pytest
from harness import LAYOUTS, assert_identical, encode

from rrattn import direct, reference

pytestmark = pytest.mark.one_path
DTYPES = ("bool", "float32", "float16", "bfloat16")
SIZES = ((1, 1), (1, 300), (37, 37), (130, 700), (300, 300), (600, 600))


def causal_mask(seqlen_q, seqlen_k, rng, batch=2, heads=3):
    """bool [B, H, Lq, Lk]: causal, each key hidden from some row on (from the first: padding)."""
    start = rng.integers(0, seqlen_q + 1, (batch, heads, seqlen_k, 1)).astype(np.int32)
    start[rng.random(start.shape) < 0.3] = seqlen_q
    return np.concatenate(
        [
            reference.token_mask(
                start[:, h : h + 1], causal=True, batch=batch, num_heads=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k
            )
            for h in range(heads)
        ],
        axis=1,
    )


def additive(mask, hidden=-1e4):
    return np.where(mask, np.float32(0), np.float32(hidden))


def values_of(mask, dtype):
    """A bool mask with the largest values that hide."""
    return mask if dtype == "bool" else additive(mask)


@pytest.mark.parametrize("mask_dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
def test_bounds_mean_what_the_mask_does(kernels, seqlen_q, seqlen_k, mask_dtype, rng):
    mask = causal_mask(seqlen_q, seqlen_k, rng)
    rows, verdict = kernels.dense_mask(values_of(mask, mask_dtype), dtype=mask_dtype)
    assert verdict[0] == 0
    geometry = {"causal": True, "batch": 2, "num_heads": 3, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    assert np.array_equal(reference.token_mask(rows, **geometry), mask)
    assert (rows >= 0).all() and (rows <= seqlen_q).all()


@pytest.mark.parametrize("mask_dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_read_in_place(kernels, make_kernels, layout, mask_dtype, rng):
    mask = values_of(causal_mask(100, 200, rng), mask_dtype)
    assert_identical(
        make_kernels(layout).dense_mask(mask, dtype=mask_dtype)[0], kernels.dense_mask(mask, dtype=mask_dtype)[0]
    )


@pytest.mark.parametrize("row, key", ((0, 1), (0, 599), (255, 256), (256, 300), (599, 17), (300, 299), (257, 0)))
def test_one_value_out_of_place_is_found(kernels, row, key):
    """Above the diagonal one that shows; below it one that hides before others that show."""
    mask = np.tril(np.ones((600, 600), bool))[None, None]
    mask[0, 0, row, key] ^= True
    hides_for_good = key < row == 599
    assert kernels.dense_mask(mask, dtype="bool")[1][0] == (0 if hides_for_good else 2)


@pytest.mark.parametrize("mask_dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("value", (-1.0, 0.5, -9000.0, 7.0, np.inf, np.nan))
def test_a_bias_is_found_with_its_value(kernels, mask_dtype, value):
    values = additive(np.tril(np.ones((300, 300), bool))[None, None])
    values[0, 0, 200, 100] = value
    faults, bits = kernels.dense_mask(values, dtype=mask_dtype)[1]
    assert faults & 1
    stored = encode(np.float32(value), mask_dtype)
    assert bits == stored.view(np.int32 if mask_dtype == "float32" else np.uint16)


def test_bad_arguments():
    mask, rows, verdict = np.ones((1, 2, 3, 3), bool), np.zeros((1, 2, 3, 1), np.int32), np.zeros(2, np.int32)
    for changes, message in (
        ({"mask": mask[0]}, r"mask has 3 dimensions.*must have 4: \[batch, 1 | num_heads, seqlen_q, seqlen_k\]"),
        ({"mask": mask.astype(np.int64)}, "mask has dtype int64.*bool, float32, float16 or bfloat16"),
        ({"mask": np.ones((1, 2, 4, 3), bool)}, "seqlen_q is 4 and seqlen_k is 3"),
        ({"start_rows": rows[..., 0]}, r"start_rows has shape \[1, 2, 3\].*\[1, 2, 3, 1\]"),
        ({"start_rows": rows.astype(np.int64)}, "start_rows has dtype int64.*int32"),
        ({"verdict": np.zeros(3, np.int32)}, r"verdict has shape \[3\].*\[2\]"),
        ({"verdict": rows[0, 0, :2, 0]}, "verdict shares memory with start_rows"),
    ):
        arguments = {"mask": mask, "start_rows": rows, "verdict": verdict, **changes}
        with pytest.raises(ValueError, match=message):
            direct.startend_rows_from_dense(**arguments)
