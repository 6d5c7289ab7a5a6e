"""What the Paddle operators add to the kernels on a GPU: its stream and allocator, and errors that Python can catch."""

import numpy as np
import paddle
import pytest
from cases import Case, make_inputs
from harness import assert_identical, decode
from ragged_batch import Requests

import rrattn
from rrattn import reference, serving

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
    sparse = rrattn.block_sparse_attention(query, key, key, mask, causal=True, return_softmax_lse=True)
    whole = rrattn.rr_attention(query, key, key, causal=True, return_softmax_lse=True)
    for out, lse in (sparse, whole):
        assert out.place.is_gpu_place() and lse.place.is_gpu_place()
        assert out.dtype == paddle.bfloat16 and lse.dtype == paddle.float32
        assert out.shape == query.shape and lse.shape == [1, 4, 200]
        assert out.stop_gradient and lse.stop_gradient


@pytest.mark.parametrize("sink", (False, True))
def test_gradients_through_the_log_sum_exp_alone(paddle_kernels, make_kernels, sink):
    """Paddle has no gradient of the output for the operator then, which stands for zeros."""
    case = Case(200, 300, num_heads=4, num_heads_k=2, head_dim=64, head_dim_v=32, sink=sink, grad_lse=True)
    inputs = make_inputs(case, "bfloat16")
    leaves = [paddle_kernels.tensor(x, "bfloat16") for x in inputs.forward]
    if sink:
        leaves.append(paddle_kernels.tensor(inputs.sink, "float32"))
    for leaf in leaves:
        leaf.stop_gradient = False
    mask = paddle_kernels.tensor(reference.pack(inputs.block_mask), "int32")
    options = {"causal": True, "deterministic": True}
    _, lse = rrattn.block_sparse_attention(
        *leaves[:3], mask, sink=leaves[3] if sink else None, return_softmax_lse=True, **options
    )
    grads = [
        paddle_kernels.values(grad)
        for grad in paddle.grad([lse], leaves, [paddle_kernels.tensor(inputs.grad_lse, "float32")])
    ]
    nothing = np.zeros_like(inputs.grad_out)
    given = {"sink": inputs.sink, "grad_lse": inputs.grad_lse, "dtype": "bfloat16", **options}
    expected = make_kernels().backward(*inputs.forward, inputs.block_mask, nothing, **given)
    assert_identical((*(decode(grad, "bfloat16") for grad in grads[:3]), *grads[3:]), expected)
    assert not expected[2].any()


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


@pytest.mark.parametrize(
    "case",
    (
        CASE,
        Case(700, 900, num_heads=4, num_heads_k=2, flashmask="window_with_full_tail", flashmask_heads="Hkv"),
        Case(450, 700, causal=False, num_heads=4, num_heads_k=1, head_dim=72, stride=16),
    ),
    ids=str,
)
def test_rr_attention_is_the_three_stages(paddle_kernels, make_kernels, case):
    inputs = make_inputs(case, "bfloat16")
    options = {"causal": case.causal, "stride": case.stride, "threshold": 0.7, "head_offset": 5, "dtype": "bfloat16"}
    stages = make_kernels().prefill(*inputs.forward, inputs.startend, **options)
    assert_identical(paddle_kernels.rr_attention(*inputs.forward, inputs.startend, **options)[1:], stages[1:])


def test_calls_of_rr_attention_in_a_row_need_no_synchronisation(paddle_kernels, make_kernels):
    inputs = make_inputs(CASE, "bfloat16")
    expected = make_kernels().prefill(*inputs.forward, causal=True, threshold=0.7, dtype="bfloat16")[2]
    query, key, value = (paddle_kernels.tensor(x, "bfloat16") for x in inputs.forward)
    outs = [rrattn.rr_attention(query, key, value, causal=True, threshold=0.7) for _ in range(50)]
    for out in outs[::10]:
        assert_identical(decode(paddle_kernels.values(out), "bfloat16"), expected)


def test_ragged_batches(paddle_kernels, make_kernels):
    requests = Requests([(300, 300), (1, 500), (129, 700)], head_dim=64, head_dim_v=64, dtype="bfloat16")
    requests.kernels = make_kernels()
    key, value, tables = requests.in_pages(64)
    expected = requests.call(key, value, tables, threshold=0.5)
    rows = (paddle_kernels.tensor(decode(x, "bfloat16"), "bfloat16") for x in (requests.query, key, value))
    sizes = (paddle_kernels.tensor(x, "int32") for x in (requests.cu_seqlens_q, requests.seqlens_k, tables))
    out, lse = serving.ragged_attention(*rows, *sizes, threshold=0.5, return_softmax_lse=True)
    assert_identical((decode(paddle_kernels.values(out), "bfloat16"), paddle_kernels.values(lse)), expected[:2])


def test_bad_arguments_are_python_errors(paddle_kernels, small):
    query, key, scores = small
    single = paddle_kernels.tensor(make_inputs(SMALL).query, "float32")
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        rrattn.estimate_block_scores(single, single, causal=True)
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        rrattn.rr_attention(single, single, single, causal=True)
    mask = paddle_kernels.tensor(np.ones((1, 4, 2, 1), np.int32), "int32")
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        rrattn.block_sparse_attention(single, single, single, mask, causal=True)
    with pytest.raises(ValueError, match=r"value has shape \[1, 200, 4, 64\], but must have \[1, 300, 2, 64\]"):
        rrattn.block_sparse_attention(query, key, query, mask, causal=True)
    tall = paddle_kernels.tensor(np.ones((1, 4, 3, 1), np.int32), "int32")
    with pytest.raises(ValueError, match=r"block_mask has shape .* but must have \[1, 4, 2, 1\]"):
        rrattn.block_sparse_attention(query, key, key, tall, causal=True)
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
    mask = on_cpu(np.ones((1, 4, 2, 1), np.int32))
    with pytest.raises(ValueError, match="value is on cpu, but query is on gpu:0"):
        rrattn.rr_attention(query, key, host_key, causal=True)
    with pytest.raises(ValueError, match="block_mask is on cpu, but query is on gpu:0"):
        rrattn.block_sparse_attention(query, key, key, mask, causal=True)
    taus = on_cpu(np.full(4, 0.5, np.float32))
    with pytest.raises(ValueError, match="threshold is on cpu, but block_scores is on gpu:0"):
        rrattn.select_blocks(scores, taus, causal=True, seqlen_q=200, seqlen_k=300)


def test_deterministic_gradients(paddle_kernels, make_kernels):
    """As asked for, or by Paddle's flag, through both operators: the bits of the kernel's deterministic mode."""
    inputs = make_inputs(CASE, "bfloat16")
    forward = [paddle_kernels.tensor(x, "bfloat16") for x in inputs.forward]
    grad_out = paddle_kernels.tensor(inputs.grad_out, "bfloat16")
    mask = rrattn.rr_attention(*forward, causal=True, threshold=0.7, return_block_mask=True)[1]
    selected = reference.unpack(paddle_kernels.values(mask), CASE.block_shape[-1])

    def gradients(attention, **options):
        for tensor in forward:
            tensor.stop_gradient = False
        out = attention(causal=True, **options)
        return [decode(paddle_kernels.values(grad), "bfloat16") for grad in paddle.grad(out, forward, grad_out)]

    def whole(**options):
        return rrattn.rr_attention(*forward, threshold=0.7, **options)

    def stage(**options):
        return rrattn.block_sparse_attention(*forward, mask, **options)

    expected = make_kernels().backward(
        *inputs.forward, selected, inputs.grad_out, dtype="bfloat16", causal=True, deterministic=True
    )
    for attention in (whole, stage):
        assert_identical(gradients(attention, deterministic=True), expected)
    flag = "FLAGS_cudnn_deterministic"
    before = paddle.get_flags(flag)
    try:
        paddle.set_flags({flag: True})
        assert_identical(gradients(stage), expected)
        assert_identical(gradients(whole), expected)
        paddle.set_flags({flag: False})
        assert all(gradients(stage, deterministic=True)[i].tobytes() == expected[i].tobytes() for i in range(3))
    finally:
        paddle.set_flags(before)
