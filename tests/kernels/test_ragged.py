"""Requests of several lengths in one call, keys in one piece and in pages: each as in its own call, bit for bit."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import Kernels, assert_identical, poisoned
from ragged_batch import Requests

from rrattn import _direct, direct
from rrattn.reference import decode, encode

LENGTHS = [(300, 300), (1, 1), (0, 77), (1, 500), (127, 127), (129, 700), (256, 384), (0, 0), (600, 600)]
LAYOUTS = {
    "one piece": None,
    "64": (64, True),
    "64, tokens first": (64, False),
    "128": (128, True),
    "384": (384, False),
}
SETTINGS = {
    "plain": {"threshold": 0.6},
    "own strides": {"threshold": 0.6, "stride": 16, "key_stride": 2, "spread": 0.0, "head_offset": 3, "keep_local": 7},
    "compensated": {"threshold": 0.3, "compensate": True, "softmax_scale": 0.3, "keep_sink": False},
    "dense": {"threshold": 1.0},
    "by head": {
        "threshold": np.array([0.3, 1.0, 0.9, 0.5], np.float32),
        "sink": np.array([0.5, -np.inf, -1.0, 3.0], np.float32),
        "keep_last": False,
    },
}


def arrays_in(requests, layout):
    """(key, value, block_tables) and the option that tells the layout."""
    if LAYOUTS[layout] is None:
        return (*requests.in_one_piece, None), {}
    page_size, heads_first = LAYOUTS[layout]
    return requests.in_pages(page_size, heads_first), {"heads_first": heads_first}


def assert_each_as_alone(requests, results, flags=None, **options):
    out, lse, masks = results
    for b, (seqlen_q, _) in enumerate(requests.lengths):
        if seqlen_q == 0 and type(requests.kernels) is not Kernels:
            continue
        own = options if flags is None else {**options, "keep_last": bool(flags[b])}
        rows = slice(*requests.cu_seqlens_q[b : b + 2])
        expected = requests.alone(b, **own)
        assert_identical((out[rows], np.ascontiguousarray(lse[:, rows]), masks[b]), expected)


def runs_on(kernels, settings):
    """Whether the kernels serve these settings in a ragged batch: on a GPU they are not compensated."""
    return type(kernels) is Kernels or not settings.get("compensate")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_each_request_is_its_own_call(kernels, main_dtype, layout, settings):
    requests = Requests(LENGTHS, dtype=main_dtype, kernels=kernels)
    if not runs_on(kernels, SETTINGS[settings]):
        with pytest.raises(ValueError, match="compensate is True, but ragged batches on a GPU are not compensated"):
            requests.call(*requests.in_one_piece, **SETTINGS[settings])
        return
    arrays, options = arrays_in(requests, layout)
    assert_each_as_alone(requests, requests.call(*arrays, **options, **SETTINGS[settings]), **SETTINGS[settings])


@pytest.mark.parametrize("layout", ("one piece", "64"))
def test_in_every_dtype_with_its_own_head_size_of_values(kernels, layout, dtype):
    sizes = {"num_heads": 6, "num_heads_k": 1, "head_dim": 40, "head_dim_v": 72}
    requests = Requests(LENGTHS[:6], **sizes, dtype=dtype, kernels=kernels)
    arrays, options = arrays_in(requests, layout)
    assert_each_as_alone(requests, requests.call(*arrays, **options, threshold=0.5), threshold=0.5)


@pytest.mark.parametrize(
    "head_dim, head_dim_v", ((64, 64), (72, 72), (80, 96), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
)
@pytest.mark.parametrize("layout", ("one piece", "64", "384"))
def test_in_every_head_size(kernels, main_dtype, layout, head_dim, head_dim_v):
    sizes = {"num_heads": 3, "num_heads_k": 3, "head_dim": head_dim, "head_dim_v": head_dim_v}
    requests = Requests(LENGTHS, **sizes, dtype=main_dtype, kernels=kernels)
    arrays, options = arrays_in(requests, layout)
    settings = {"threshold": 0.5, "keep_last": False}
    assert_each_as_alone(requests, requests.call(*arrays, **options, **settings), **settings)


@pytest.mark.parametrize("key_stride", (1, 2, 4, 8, 16, 32, 64))
def test_with_every_stride_of_keys(kernels, main_dtype, key_stride):
    requests = Requests(LENGTHS, dtype=main_dtype, kernels=kernels)
    settings = {"threshold": 0.5, "keep_last": False, "key_stride": key_stride}
    assert_each_as_alone(requests, requests.call(*requests.in_pages(64), **settings), **settings)


@pytest.mark.parametrize("layout", ("one piece", "64", "384"))
def test_what_a_request_holds_shows_nowhere_else(kernels, main_dtype, layout):
    """One of NaN and one of huge numbers, which lie beside the others' rows, and past the ends of their last blocks."""
    requests = Requests([(300, 300), (100, 400), (129, 129), (65, 200), (1, 90)], dtype=main_dtype, kernels=kernels)
    for b, number in ((1, np.nan), (3, 60000.0)):
        requests.query[slice(*requests.cu_seqlens_q[b : b + 2])] = encode(np.float32(number), main_dtype)
        requests.keys[b][...] = requests.values[b][...] = encode(np.float32(number), main_dtype)
    arrays, options = arrays_in(requests, layout)
    results = requests.call(*arrays, **options, threshold=0.5, keep_last=False)
    for b in (0, 2, 4):
        rows = slice(*requests.cu_seqlens_q[b : b + 2])
        own = results[0][rows], np.ascontiguousarray(results[1][:, rows]), results[2][b]
        assert np.isfinite(own[0]).all()
        assert_identical(own, requests.alone(b, threshold=0.5, keep_last=False))


def test_on_every_instruction_set(simd):
    requests = Requests(LENGTHS)
    results = requests.call(*requests.in_pages(64), threshold=0.5, compensate=True)
    assert_each_as_alone(requests, results, threshold=0.5, compensate=True)


def test_each_request_says_whether_its_chunk_is_the_last(kernels, main_dtype):
    requests = Requests([(300, 900), (300, 900), (1, 300)], dtype=main_dtype, kernels=kernels)
    keep_last = np.array([True, False, True])
    results = requests.call(*requests.in_pages(128), threshold=0.3, keep_last=keep_last)
    assert_each_as_alone(requests, results, keep_last, threshold=0.3)
    assert results[2][0].mean() > results[2][1].mean()


def test_results_do_not_depend_on_the_number_of_threads():
    requests = Requests([(2000, 2000), *LENGTHS])
    one, several = (requests.call(*requests.in_pages(64), threshold=0.6, num_threads=n) for n in (1, 3))
    assert_identical(one, several)


def test_threads_take_the_longest_rows_of_all_requests_first():
    lengths = [(300, 300), (1, 5000), (2000, 2000), (0, 10), (128, 900)]
    order = _direct._work_order(lengths)
    rows = {(b, m): min(128, q - 128 * m) for b, (q, _) in enumerate(lengths) for m in range(-(-q // 128))}
    work = {(b, m): n * (lengths[b][1] - lengths[b][0] + 128 * m + n) for (b, m), n in rows.items()}
    assert sorted(order) == sorted(work)
    assert [work[row] for row in order] == sorted(work.values(), reverse=True)
    assert order[0] == (2, 14) and order[1:3] == [(2, 13), (2, 12)]  # the last of the prompt of 2,000 has fewer rows
    assert _direct._work_order([(384, 384)] * 2)[:2] == [(0, 2), (1, 2)]


def test_no_requests_and_requests_without_queries(kernels, main_dtype):
    for lengths in ([], [(0, 0)], [(0, 200), (0, 5)]):
        requests = Requests([*lengths, (5, 5)], dtype=main_dtype)
        requests.lengths, requests.query = lengths, requests.query[:0]
        requests.cu_seqlens_q, requests.seqlens_k = requests.cu_seqlens_q[:-1], requests.seqlens_k[:-1]
        pages = requests if lengths else Requests([(1, 1)], dtype=main_dtype)
        key, value, tables = pages.in_pages(64)
        out = poisoned((0, 4, 32), main_dtype)
        tables = tables if lengths else np.zeros((0, 3), np.int32)
        arrays = requests.query, key, value, requests.cu_seqlens_q, requests.seqlens_k, tables, out
        *placed, out = map(kernels.allocate, arrays)
        assert direct.ragged_attention(*placed, out=out, **kernels.typed(main_dtype)) > 0


def test_requests_without_heads(kernels, main_dtype):
    query, key = poisoned((5, 0, 32), main_dtype), poisoned((9, 0, 32), main_dtype)
    arrays = query, key, key, np.array([0, 5], np.int32), np.array([9], np.int32), query.copy()
    *placed, out = map(kernels.allocate, arrays)
    assert direct.ragged_attention(*placed, out=out, **kernels.typed(main_dtype)) > 0


@pytest.mark.parametrize("spare", (8, 1), ids=("", "unaligned"))
def test_strided_arrays_are_read_and_written_in_place(kernels, main_dtype, spare):
    """As engines have them: queries, keys and values side by side, and pages of keys and values in one array."""
    requests = Requests(LENGTHS, dtype=main_dtype, kernels=kernels)
    expected = requests.call(*requests.in_pages(64), threshold=0.6)
    key, value, tables = requests.in_pages(64)
    both = kernels.allocate(poisoned((len(key), 2, *key.shape[1:3], 32 + spare), main_dtype))[..., spare:]
    packed = kernels.allocate(poisoned((len(requests.query), 8, 32 + spare), main_dtype))[..., spare:]
    both[:, 0], both[:, 1] = kernels.allocate(key), kernels.allocate(value)
    packed[:, :4] = kernels.allocate(requests.query)
    sizes = [kernels.allocate(x) for x in (requests.cu_seqlens_q, requests.seqlens_k, tables)]
    options = {"threshold": 0.6, **kernels.typed(main_dtype)}

    def values(array):
        return decode(np.ascontiguousarray(kernels.download(array)), main_dtype)

    direct.ragged_attention(packed[:, :4], both[:, 0], both[:, 1], *sizes, out=packed[:, 4:], **options)
    assert_identical(values(packed[:, 4:]), expected[0])
    assert_identical(values(packed[:, :4]), decode(requests.query, main_dtype))
    query = kernels.allocate(requests.query.copy())
    direct.ragged_attention(query, *map(kernels.allocate, (key, value)), *sizes, out=query, **options)
    assert_identical(values(query), expected[0])


def pooled_of(requests, page_size, key_stride):
    pages = sum(-(-k // page_size) for _, k in requests.lengths) + 3
    shape = pages, requests.num_heads_k, page_size // key_stride, requests.head_dim + 1
    return poisoned(shape, "float32")


@pytest.mark.parametrize("page_size", (64, 128))
@pytest.mark.parametrize("sampling", ({}, {"key_stride": 1}, {"stride": 64}, {"spread": 0.0}), ids=str)
def test_chunks_with_pooled_keys_compute_what_they_do_without(page_size, sampling):
    """Of three prompts, by chunks of several lengths, and then a token at a time, which is dense."""
    whole = Requests([(700, 700), (300, 300), (65, 65)])
    key, value, tables = whole.in_pages(page_size)
    key_stride = sampling.get("key_stride", sampling.get("stride", 8))
    pooled = pooled_of(whole, page_size, key_stride)
    options = {"threshold": 0.5, **sampling}
    lengths = [(0, 0)] * 3
    for step in ((128, 300, 1), (171, 0, 63), (1, 0, 1), (400, 0, 0)):
        lengths = [(n, k + n) for n, (_, k) in zip(step, lengths)]
        part = Requests(lengths, seed=sum(step))
        part.keys, part.values = whole.keys, whole.values
        with_pooled = part.call(key, value, tables, pooled_keys=pooled, keep_last=True, **options)
        assert_identical(with_pooled, part.call(key, value, tables, keep_last=True, **options))
    at_once = pooled_of(whole, page_size, key_stride)
    whole.call(key, value, tables, pooled_keys=at_once, **options)
    assert_identical(pooled, at_once)


def test_pooled_keys_stand_for_the_prefix():
    """What was written for the tokens before is taken, so the keys there are not read for the estimate."""
    requests = Requests([(300, 1200)])
    arrays = requests.in_pages(128)
    options = {"threshold": 0.3, "keep_last": False}
    pooled = pooled_of(requests, 128, 8)
    before = Requests([(900, 900)])
    before.call(*arrays, pooled_keys=pooled, **options)
    own = requests.call(*arrays, **options)
    assert_identical(requests.call(*arrays, pooled_keys=pooled.copy(), **options), own)
    pooled[arrays[2][0, 3]] = 50
    assert not np.array_equal(requests.call(*arrays, pooled_keys=pooled, **options)[2][0], own[2][0])


def test_a_workspace_of_the_size_that_it_says_serves():
    requests = Requests(LENGTHS)
    key, value, tables = requests.in_pages(64)
    out = poisoned((len(requests.query), 4, 32), "float32")
    arrays = requests.query, key, value, requests.cu_seqlens_q, requests.seqlens_k, tables
    size = direct.ragged_attention(*arrays, out=out, size_only=True)
    assert np.isnan(out).all()
    workspace = np.full(size + 64, 0x7F, np.uint8)
    assert direct.ragged_attention(*arrays, out=out, workspace=workspace[:size]) == size
    assert (workspace[size:] == 0x7F).all()
    assert_identical(out, requests.call(key, value, tables)[0])
    with pytest.raises(ValueError, match=f"workspace has {size - 1} bytes, but must have at least {size}"):
        direct.ragged_attention(*arrays, out=out, workspace=workspace[: size - 1])


def with_entry(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


# What is changed of a call of requests of (3, 200) and (2, 70) tokens in pages of 64, and what the error says.
BAD = {
    "first": (
        lambda c: {"cu_seqlens_q": with_entry(c["cu_seqlens_q"], 0, 1)},
        r"cu_seqlens_q\[0\] is 1, but must be 0",
    ),
    "descending": (
        lambda c: {"cu_seqlens_q": with_entry(c["cu_seqlens_q"], 1, 6)},
        r"cu_seqlens_q\[2\] is 5, but must be at least 6",
    ),
    "negative": (lambda c: {"cu_seqlens_q": with_entry(c["cu_seqlens_q"], 1, -1)}, r"cu_seqlens_q\[1\] is -1"),
    "last": (
        lambda c: {"query": c["query"][:4], "out": c["out"][:4]},
        r"cu_seqlens_q\[2\] is 5, but must be 4, the number of tokens of query",
    ),
    "empty": (lambda c: {"cu_seqlens_q": c["cu_seqlens_q"][:0]}, "cu_seqlens_q is empty"),
    "wide lengths": (lambda c: {"cu_seqlens_q": c["cu_seqlens_q"].astype(np.int64)}, "must have int32"),
    "count": (lambda c: {"seqlens_k": c["seqlens_k"][:1]}, r"seqlens_k has shape \[1\], but must have \[2\]"),
    "few keys": (
        lambda c: {"seqlens_k": with_entry(c["seqlens_k"], 0, 2)},
        r"seqlens_k\[0\] is 2, but must be from 3 to 1073741824: the request has 3 queries",
    ),
    "negative keys": (lambda c: {"seqlens_k": with_entry(c["seqlens_k"], 1, -5)}, r"seqlens_k\[1\] is -5"),
    "past the table": (
        lambda c: {"seqlens_k": with_entry(c["seqlens_k"], 1, 400)},
        r"seqlens_k\[1\] is 400, but must be at most 320: block_tables has 5 pages of 64 tokens",
    ),
    "page": (
        lambda c: {"block_tables": with_entry(c["block_tables"], (1, 1), 9)},
        r"block_tables\[1, 1\] is 9, but must be from 0 to 8: key has 9 pages",
    ),
    "negative page": (lambda c: {"block_tables": with_entry(c["block_tables"], (0, 0), -1)}, r"\[0, 0\] is -1"),
    "rows of the table": (lambda c: {"block_tables": c["block_tables"][:1]}, "block_tables has shape"),
    "page size": (
        lambda c: {"key": c["key"][:, :, :32], "value": c["value"][:, :, :32]},
        "the page size is 32, but must be 64 or a multiple of 128",
    ),
    "192": (
        lambda c: {name: np.concatenate([c[name]] * 3, axis=2) for name in ("key", "value")},
        "the page size is 192, but must be 64 or a multiple of 128",
    ),
    "rank of query": (lambda c: {"query": c["query"][None]}, "query has 4 dimensions"),
    "no tables": (lambda c: {"block_tables": None}, "key has 4 dimensions"),
    "value's pages": (lambda c: {"value": c["value"][:-1]}, "value has shape .* but must have that of key"),
    "heads": (
        lambda c: {"query": c["query"][:, :3], "out": c["out"][:, :3]},
        "must be a multiple of the number of key",
    ),
    "dtype": (lambda c: {"key": c["key"].astype(np.float16)}, "key has dtype float16, but must have float32"),
    "eight bits": (lambda c: {"key": np.zeros(c["key"].shape, np.int8)}, "key has dtype int8, but must have float32"),
    "head size": (lambda c: {"key": c["key"][..., :24]}, "key has head_dim 24, but must have that of query, 32"),
    "out": (lambda c: {"out": c["out"][:4]}, r"out has shape \[4, 4, 32\], but must have \[5, 4, 32\]"),
    "lse": (lambda c: {"lse": np.empty((5, 4), np.float32)}, r"lse has shape \[5, 4\], but must have \[4, 5\]"),
    "mask": (lambda c: {"block_mask": np.empty(3, np.int32)}, r"block_mask has shape \[3\], but must have \[8\]"),
    "overlap": (lambda c: {"out": c["query"][::-1]}, "share memory|shares memory"),
    "keep_last": (lambda c: {"keep_last": np.ones(3, bool)}, r"keep_last has shape \[3\], but must have \[2\]"),
    "keep_last's type": (
        lambda c: {"keep_last": np.ones(2, np.int32)},
        "keep_last has dtype int32, but must have bool",
    ),
    "pooled": (
        lambda c: {"pooled_keys": np.empty((9, 2, 8, 32), np.float32)},
        r"pooled_keys has shape \[9, 2, 8, 32\], but must have \[9, 2, 8, 33\]",
    ),
    "most keys": (lambda c: {"max_seqlen_k": 199}, r"seqlens_k\[0\] is 200, but must be at most max_seqlen_k, 199"),
    "most of all": (lambda c: {"max_num_keys": 269}, "seqlens_k adds up to 270, but must to at most max_num_keys, 269"),
    "no keys": (lambda c: {"max_seqlen_k": 0}, "max_seqlen_k is 0, but must be an integer from 1"),
    "threshold": (lambda c: {"threshold": 1.5}, "threshold is 1.5"),
    "stride": (lambda c: {"stride": 5}, "stride is 5"),
    "sink": (lambda c: {"sink": np.zeros(3, np.float32)}, "sink has shape"),
    "layout": (lambda c: {"heads_first": "NHD"}, "heads_first is 'NHD'"),
}


def paged_call(requests):
    """The arguments that a call of five queries must have, by name."""
    key, value, tables = requests.in_pages(64)
    return {
        "query": requests.query,
        "key": key,
        "value": value,
        "cu_seqlens_q": requests.cu_seqlens_q,
        "seqlens_k": requests.seqlens_k,
        "block_tables": tables,
        "out": poisoned((5, 4, 32), "float32"),
    }


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named_before_anything_is_written(bad):
    call = paged_call(Requests([(3, 200), (2, 70)]))
    change, message = BAD[bad]
    changed = {**call, **change(call)}
    before = changed["out"].copy()
    with pytest.raises((ValueError, TypeError), match=message):
        direct.ragged_attention(**changed)
    assert_identical(changed["out"].copy(), before)


def test_keys_in_one_piece_must_be_those_of_all_requests():
    requests = Requests([(3, 200), (2, 70)])
    key, value = requests.in_one_piece
    sizes = requests.cu_seqlens_q, requests.seqlens_k
    out = poisoned((5, 4, 32), "float32")
    with pytest.raises(ValueError, match="seqlens_k adds up to 270, but must to 269"):
        direct.ragged_attention(requests.query, key[1:], value[1:], *sizes, out=out)
    pooled = np.empty((9, 2, 8, 33), np.float32)
    with pytest.raises(ValueError, match="pooled_keys is given, but must be None without block_tables"):
        direct.ragged_attention(requests.query, key, value, *sizes, out=out, pooled_keys=pooled)


class OnGpu:
    """An array that says that it lies on a GPU, where nothing may be read."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, stream):
        capsule = self.array.__dlpack__()
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        device_type = ctypes.c_int32.from_address(pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
        device_type.value = 2
        return capsule


@pytest.mark.parametrize("name", ("key", "cu_seqlens_q", "seqlens_k", "block_tables", "pooled_keys", "keep_last"))
def test_arrays_on_several_devices_are_refused(name):
    requests = Requests([(3, 200), (2, 70)])
    call = {**paged_call(requests), "pooled_keys": pooled_of(requests, 64, 8), "keep_last": np.ones(2, bool)}
    with pytest.raises(ValueError, match=f"{name} is on cuda:0, but query is on cpu; all tensors must be on the same"):
        direct.ragged_attention(**{**call, name: OnGpu(call[name])})


@pytest.mark.skipif(bool(direct.cuda_archs()), reason="this build has kernels for GPUs")
def test_a_gpu_that_there_are_no_kernels_for_is_refused():
    call = paged_call(Requests([(3, 200), (2, 70)]))
    with pytest.raises(ValueError, match="query is on cuda:0, but this build of rrattn runs ragged batches on: CPU"):
        direct.ragged_attention(**{**call, "query": OnGpu(call["query"])})


def test_nothing_is_read_or_written_past_an_array():
    program = Path(__file__).with_name("guarded_batches.py")
    process = subprocess.run([sys.executable, str(program), "0", "30"], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) > 60


def test_what_there_is_no_argument_for_is_named():
    requests = Requests([(3, 200), (2, 70)])
    arrays = requests.query, *requests.in_one_piece, requests.cu_seqlens_q, requests.seqlens_k
    with pytest.raises(TypeError, match="ragged_attention has no argument startend_row_indices, causal; by name it"):
        direct.ragged_attention(*arrays, out=None, startend_row_indices=None, causal=False)
