"""Dense masks on the GPU: the CPU's tests, and one that is longer than a thread block reads."""

import numpy as np
from test_dense_mask import (  # noqa: F401  (collected here with this folder's fixtures)
    additive,
    causal_mask,
    test_a_bias_is_found_with_its_value,
    test_bounds_mean_what_the_mask_does,
    test_masks_are_read_in_place,
    test_one_value_out_of_place_is_found,
)

from rrattn import reference


def test_a_long_mask(kernels, rng):
    mask = causal_mask(3000, 4097, rng, batch=1, heads=2)
    rows, verdict = kernels.dense_mask(additive(mask), dtype="bfloat16")
    assert verdict[0] == 0
    geometry = {"causal": True, "batch": 1, "num_heads": 2, "seqlen_q": 3000, "seqlen_k": 4097}
    assert np.array_equal(reference.token_mask(rows, **geometry), mask)
