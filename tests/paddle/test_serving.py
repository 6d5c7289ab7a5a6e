"""rrattn.serving on Paddle's tensors: the bits of rrattn.direct, and what it refuses."""

import doctest

import numpy as np
import paddle
import pytest
from harness import assert_identical
from ragged_batch import Requests

import rrattn
from rrattn import serving

LENGTHS = [(300, 300), (1, 1), (0, 77), (1, 500), (129, 700)]
PAGE = 64


def tensors_of(requests, heads_first=True):
    """(query, key, value, cu_seqlens_q, seqlens_k, block_tables)."""
    key, value, tables = requests.in_pages(PAGE, heads_first)
    arrays = requests.query, key, value, requests.cu_seqlens_q, requests.seqlens_k, tables
    return [paddle.to_tensor(array) for array in arrays]


@pytest.mark.parametrize("heads_first", (True, False))
def test_tensors_give_what_arrays_give(heads_first):
    requests = Requests(LENGTHS)
    keep_last = np.array([True, False, True, True, False])
    options = {"threshold": 0.5, "stride": 16, "min_share": 0.1, "compensate": True, "heads_first": heads_first}
    expected = requests.call(*requests.in_pages(PAGE, heads_first), keep_last=keep_last, **options)
    out, lse, masks = serving.ragged_attention(
        *tensors_of(requests, heads_first),
        keep_last=paddle.to_tensor(keep_last),
        return_softmax_lse=True,
        return_block_masks=True,
        **options,
    )
    blocks = [-(-k // 128) for _, k in LENGTHS]
    unpacked = [
        rrattn.unpack_block_mask(mask.unsqueeze(0), n).numpy()[0] if 0 not in mask.shape else expected[2][b]
        for b, (mask, n) in enumerate(zip(masks, blocks))
    ]
    assert_identical((out.numpy(), lse.numpy(), unpacked), (*expected[:2], expected[2]))


def test_bfloat16_keys_in_one_piece_thresholds_and_sink():
    requests = Requests(LENGTHS, dtype="bfloat16")
    thresholds, sink = np.array([0.3, 0.6, 0.9, 1.0], np.float32), np.arange(4, dtype=np.float32)
    expected = requests.call(*requests.in_one_piece, threshold=thresholds, sink=sink)[0]
    rows = [paddle.to_tensor(x).view("bfloat16") for x in (requests.query, *requests.in_one_piece)]
    sizes = paddle.to_tensor(requests.cu_seqlens_q), paddle.to_tensor(requests.seqlens_k)
    out = serving.ragged_attention(
        *rows, *sizes, threshold=paddle.to_tensor(thresholds), sink=paddle.to_tensor(sink).astype("bfloat16")
    )
    assert out.dtype == paddle.bfloat16
    assert_identical(out.astype("float32").numpy(), expected)


def test_pooled_keys_are_written_in_place():
    requests = Requests(LENGTHS)
    key, value, tables = requests.in_pages(PAGE)
    pooled = np.zeros((len(key), 2, PAGE // 8, 33), np.float32)
    tensor = paddle.to_tensor(pooled)
    expected = requests.call(key, value, tables, pooled_keys=pooled, threshold=0.5)[0]
    out = serving.ragged_attention(*tensors_of(requests), pooled_keys=tensor, threshold=0.5)
    assert pooled.any()
    assert_identical((out.numpy(), tensor.numpy()), (expected, pooled))


def test_a_batch_without_queries():
    query, pages = paddle.zeros([0, 4, 32]), paddle.zeros([3, 2, PAGE, 32])
    sizes = paddle.zeros([3], "int32"), paddle.to_tensor([70, 0], "int32")
    tables = paddle.to_tensor([[0, 1], [-1, -1]], "int32")
    options = {"return_softmax_lse": True, "return_block_masks": True}
    out, lse, masks = serving.ragged_attention(query, pages, pages, *sizes, tables, **options)
    assert [x.shape for x in (out, lse, *masks)] == [[0, 4, 32], [4, 0], [4, 0, 1], [4, 0, 0]]


def test_examples_of_the_docstrings():
    failures, tests = doctest.testmod(serving, extraglobs={"paddle": paddle, "rrattn": rrattn})
    assert tests > 0 and failures == 0


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"cu_seqlens_q": np.arange(6, dtype=np.int32)}, TypeError, "cu_seqlens_q is a ndarray, but must be a paddle"),
        ({"block_tables": [[0]]}, TypeError, "block_tables is a list, but must be a paddle.Tensor"),
        ({"block_tables": paddle.zeros([0, 4], "int32")}, ValueError, r"block_tables has shape \[0, 4\]"),
        ({"keep_last": paddle.zeros([0], "bool")}, ValueError, r"keep_last has shape \[0\]"),
        ({"keep_last": "yes"}, ValueError, "keep_last is 'yes', but must be True or False"),
        ({"keep_last": paddle.ones([2], "bool")}, ValueError, r"keep_last has shape \[2\], but must have \[5\]"),
        ({"cu_seqlens_q": paddle.zeros([6], "int64")}, ValueError, "cu_seqlens_q has dtype int64, but must have int32"),
        ({"seqlens_k": paddle.zeros([5], "int32")}, ValueError, r"seqlens_k\[0\] is 0, but must be from 300 to"),
        ({"threshold": 0}, ValueError, "threshold is 0, but must be in"),
        ({"return_softmax_lse": 1}, ValueError, "return_softmax_lse is 1, but must be True or False"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    names = "query", "key", "value", "cu_seqlens_q", "seqlens_k", "block_tables"
    arguments = dict(zip(names, tensors_of(Requests(LENGTHS))))
    with pytest.raises(error, match=message):
        serving.ragged_attention(**{**arguments, **change})


@pytest.mark.parametrize("index", range(3))
def test_gradients_are_refused_by_name(index):
    tensors = tensors_of(Requests(LENGTHS))
    tensors[index].stop_gradient = False
    with pytest.raises(ValueError, match="asks for gradients .* but ragged batches have none"):
        serving.ragged_attention(*tensors)
    with paddle.no_grad():
        assert serving.ragged_attention(*tensors).stop_gradient


def test_programs_are_refused_by_name():
    tensors = tensors_of(Requests(LENGTHS))

    def attend(query, key, value, cu_seqlens_q, seqlens_k, block_tables):
        return serving.ragged_attention(query, key, value, cu_seqlens_q, seqlens_k, block_tables)

    with pytest.raises(ValueError, match="part of a static graph, but ragged batches run eagerly only"):
        paddle.jit.to_static(attend, full_graph=True)(*tensors)
