"""What the Paddle operators add to the kernels on a GPU: its stream and allocator, and errors that Python can catch."""

import numpy as np
import paddle
import pytest
import reference
from cases import Case, make_inputs
from harness import assert_identical

import rrattn

CASE = Case(2048, 6000, num_heads=8, num_heads_k=2, head_dim=128, batch=2)
SMALL = Case(200, 300, num_heads=4, num_heads_k=2, head_dim=64)


@pytest.fixture
def small(paddle_kernels):
    """(query, key, block_scores) on the GPU."""
    inputs = make_inputs(SMALL, "bfloat16")
    query, key = (paddle_kernels.tensor(x, "bfloat16") for x in (inputs.query, inputs.key))
    return query, key, paddle_kernels.tensor(np.ones(SMALL.block_shape, np.float32), "float32")


def on_cpu(values):
    return paddle.to_tensor(values, place=paddle.CPUPlace())


def test_results_lie_beside_the_inputs(small):
    query, key, _ = small
    scores = rrattn.estimate_block_scores(query, key, causal=True)
    mask = rrattn.select_blocks(scores, 0.9, causal=True, seqlen_q=200, seqlen_k=300)
    assert scores.place.is_gpu_place() and mask.place.is_gpu_place()
    assert scores.dtype == paddle.float32 and mask.dtype == paddle.int32
    assert scores.stop_gradient and mask.stop_gradient


def test_calls_in_a_row_need_no_synchronisation(paddle_kernels, make_kernels):
    """Each stage may run in the workspace of the one before, and in memory that an earlier result gave back."""
    inputs = make_inputs(CASE, "bfloat16")
    lengths = {"causal": True, "seqlen_q": CASE.seqlen_q, "seqlen_k": CASE.seqlen_k}
    direct = make_kernels()
    scores = direct.estimate(inputs.query, inputs.key, dtype="bfloat16", causal=True)
    expected = scores, direct.select(scores, threshold=0.7, **lengths)

    query, key = (paddle_kernels.tensor(x, "bfloat16") for x in (inputs.query, inputs.key))
    results = []
    for i in range(50):
        scores = rrattn.estimate_block_scores(query, key, causal=True)
        mask = rrattn.select_blocks(scores, 0.7, **lengths)
        if i % 10 == 0:
            results.append((scores, mask))
    for scores, mask in results:
        selected = reference.unpack(paddle_kernels.values(mask), CASE.block_shape[-1])
        assert_identical((paddle_kernels.values(scores), selected), expected)


def test_bad_arguments_are_python_errors(paddle_kernels, small):
    query, key, scores = small
    single = paddle_kernels.tensor(make_inputs(SMALL).query, "float32")
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        rrattn.estimate_block_scores(single, single, causal=True)
    with pytest.raises(ValueError, match="stride is 3, but must be"):
        rrattn.estimate_block_scores(query, key, causal=True, stride=3)
    with pytest.raises(ValueError, match="threshold is 1.5, but must be in"):
        rrattn.select_blocks(scores, 1.5, causal=True, seqlen_q=200, seqlen_k=300)
    test_results_lie_beside_the_inputs(small)  # and nothing is the worse for it


def test_inputs_on_two_devices_are_refused(paddle_kernels, small):
    _, _, scores = small
    inputs = make_inputs(SMALL, "float16")
    query, key = (paddle_kernels.tensor(x, "float16") for x in (inputs.query, inputs.key))
    host_query, host_key = (on_cpu(x.astype(np.float16)) for x in (inputs.query, inputs.key))
    with pytest.raises(ValueError, match="key is on cpu, but query is on gpu:0"):
        rrattn.estimate_block_scores(query, host_key, causal=True)
    with pytest.raises(ValueError, match="key is on gpu:0, but query is on cpu"):
        rrattn.estimate_block_scores(host_query, key, causal=True)
    taus = on_cpu(np.full(4, 0.5, np.float32))
    with pytest.raises(ValueError, match="threshold is on cpu, but block_scores is on gpu:0"):
        rrattn.select_blocks(scores, taus, causal=True, seqlen_q=200, seqlen_k=300)


def test_stages_without_a_gpu_kernel_are_refused(paddle_kernels, small):
    query, key, _ = small
    mask = paddle_kernels.tensor(np.ones((1, 4, 2, 1), np.int32), "int32")
    for call in (
        lambda: rrattn.block_sparse_attention(query, key, key, mask, causal=True),
        lambda: rrattn.rr_attention(query, key, key, causal=True),
    ):
        with pytest.raises(ValueError, match="query is on gpu:0, but this build of rrattn runs attend on: CPU"):
            call()
