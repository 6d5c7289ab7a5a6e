"""Dense masks on a GPU: one that is longer than a thread block reads."""

import numpy as np
import pytest
from test_dense_mask import additive, causal_mask

from rrattn import reference

pytestmark = pytest.mark.one_path


def test_a_long_mask(kernels, rng):
    mask = causal_mask(3000, 4097, rng, batch=1, heads=2)
    rows, verdict = kernels.dense_mask(additive(mask), dtype="bfloat16")
    assert verdict[0] == 0
    geometry = {"causal": True, "batch": 1, "num_heads": 2, "seqlen_q": 3000, "seqlen_k": 4097}
    assert np.array_equal(reference.token_mask(rows, **geometry), mask)
