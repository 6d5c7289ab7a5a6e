"""Run rrattn's functions on the arrays of a case as Paddle tensors, and compare what comes back."""

import contextlib
import itertools

import paddle
from cases import Case
from harness import assert_identical
from paddle.base.framework import _dygraph_tracer

import rrattn

CASE = Case(500, 700, num_heads=4, num_heads_k=2, head_dim=32, batch=2)
THRESHOLD = 0.6


def to_tensors(inputs, dtype="float32", requires_grad=False):
    """Query, key and value of a case."""
    tensors = [paddle.to_tensor(x).astype(dtype) for x in inputs.forward]
    for tensor in tensors:
        tensor.stop_gradient = not requires_grad
    return tensors


def bounds_of(inputs):
    return None if inputs.startend is None else paddle.to_tensor(inputs.startend)


def to_numpy(tensor):
    """The values, halves as float32: NumPy has no bfloat16."""
    return tensor.numpy() if tensor.dtype == paddle.int32 else tensor.astype("float32").numpy()


def run(tensors, *arguments, **options):
    """(out, lse, block_mask) of rr_attention."""
    options = {"causal": True, "threshold": THRESHOLD, **options}
    return rrattn.rr_attention(*tensors, *arguments, return_softmax_lse=True, return_block_mask=True, **options)


def attend(tensors, block_mask, **options):
    """(out, lse) of block_sparse_attention."""
    return rrattn.block_sparse_attention(*tensors, block_mask, causal=True, return_softmax_lse=True, **options)


def gradients(out, tensors, grad_out):
    return paddle.grad(out, tensors, paddle.to_tensor(grad_out).astype(out.dtype))


def assert_all_identical(actual, expected):
    for a, e in itertools.zip_longest(actual, expected):
        assert a.dtype == e.dtype
        assert_identical(to_numpy(a), to_numpy(e))


@contextlib.contextmanager
def eager_auto_cast(level, dtype="bfloat16"):
    """What `paddle.amp.auto_cast` sets on a GPU: eagerly on the CPU it warns and sets nothing."""
    tracer = _dygraph_tracer()
    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = getattr(paddle.base.core.AmpLevel, level), dtype
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before
