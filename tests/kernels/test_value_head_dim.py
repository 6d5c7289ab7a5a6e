"""Values of another head size than queries and keys, strided as well: see also the cases of cases.py."""

from dataclasses import replace

import numpy as np
import pytest
import test_attend
import test_backward
import test_compensate
from cases import VALUE_HEAD_DIMS, Case, make_inputs
from harness import LAYOUTS, assert_identical, out_shape

from rrattn import direct

each_pair = pytest.mark.parametrize("case", VALUE_HEAD_DIMS, ids=str)


@each_pair
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_are_read_and_written_in_place(kernels, make_kernels, main_dtype, case, layout):
    strided = make_kernels(layout)
    for stage in (test_attend, test_compensate):
        assert_identical(stage.run(strided, case, main_dtype), stage.run(kernels, case, main_dtype))
    assert_identical(*(test_backward.run(x, case, main_dtype, deterministic=True) for x in (strided, kernels)))


@each_pair
@pytest.mark.cpu_only
def test_every_simd_level(kernels, simd, case):
    for stage in (test_attend, test_compensate, test_backward):
        stage.check(kernels, case)


@pytest.mark.parametrize("head_dim_v", (32, 96))
def test_columns_of_values_are_apart(kernels, main_dtype, head_dim_v):
    """The columns that larger values have in common with smaller ones, or with those of the queries' size, are the
    same: so are the log-sum-exp, and the gradients with no gradient of the other columns."""
    case = Case(300, 500, num_heads=4, num_heads_k=2, head_dim=64, sink=True, grad_lse=True)
    inputs = make_inputs(case, main_dtype)
    smaller = min(head_dim_v, 64)

    def resized(array):
        other = np.zeros((*array.shape[:3], head_dim_v), np.float32)
        other[..., :smaller] = array[..., :smaller]
        return other

    other = replace(inputs, value=resized(inputs.value), grad_out=resized(inputs.grad_out))
    grad_out = inputs.grad_out.copy()
    grad_out[..., smaller:] = 0
    inputs = replace(inputs, grad_out=grad_out)
    results = [test_attend.run(kernels, case, main_dtype, x) for x in (inputs, other)]
    kernels.assert_same(results[1][0][..., :smaller], results[0][0][..., :smaller], main_dtype)
    kernels.assert_same(results[1][1], results[0][1], "float32")
    assert not results[1][0][..., smaller:].any()
    grads = [test_backward.run(kernels, case, main_dtype, x) for x in (inputs, other)]
    for which in (0, 1, 3):
        kernels.assert_same(grads[1][which], grads[0][which], main_dtype)
    kernels.assert_same(grads[1][2][..., :smaller], grads[0][2][..., :smaller], main_dtype)


def test_the_output_may_be_the_query_where_it_has_its_shape(make_kernels, main_dtype):
    """And is refused where it only has its memory."""
    kernels = make_kernels()
    case = Case(130, 130, head_dim=64, head_dim_v=32)
    inputs = make_inputs(case, main_dtype)
    query, key, value = (kernels.input(x, main_dtype) for x in inputs.forward)
    with pytest.raises(ValueError, match="out shares memory with query"):
        direct.rr_attention(query, key, value, out=query[..., :32], causal=True, **kernels.typed(main_dtype))
    assert kernels.download(query).shape == inputs.query.shape and out_shape(inputs.query, inputs.value)[-1] == 32


@pytest.mark.parametrize(
    "which, shape, message",
    (
        ("value", (1, 130, 1, 12), "head_dim of value is 12, but must be a multiple of 8 from 8 to 256"),
        ("value", (1, 130, 1, 264), "head_dim of value is 264, but must be a multiple of 8 from 8 to 256"),
        ("value", (1, 130, 2, 32), r"value has shape \[1, 130, 2, 32\], but must have \[1, 130, 1, 32\]"),
        ("out", (1, 130, 2, 64), r"out has shape \[1, 130, 2, 64\], but must have \[1, 130, 2, 32\]"),
        ("grad_out", (1, 130, 2, 64), r"grad_out has shape \[1, 130, 2, 64\], but must have \[1, 130, 2, 32\]"),
        ("grad_value", (1, 130, 1, 64), r"grad_value has shape \[1, 130, 1, 64\], but must have \[1, 130, 1, 32\]"),
    ),
)
def test_other_shapes_are_refused(which, shape, message):
    arrays = {
        "query": np.zeros((1, 130, 2, 64), np.float32),
        "key": np.zeros((1, 130, 1, 64), np.float32),
        "value": np.zeros((1, 130, 1, 32), np.float32),
        "block_mask": np.zeros((1, 2, 2, 1), np.int32),
        "out": np.zeros((1, 130, 2, 32), np.float32),
        "lse": np.zeros((1, 2, 130), np.float32),
    }
    grads = {f"grad_{name}": np.zeros_like(arrays[name]) for name in ("out", "query", "key", "value")}
    (arrays if which in arrays else grads)[which] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        direct.block_sparse_attention_backward(**arrays, **grads)
    if which in arrays:
        with pytest.raises(ValueError, match=message):
            direct.block_sparse_attention(**arrays)
