"""Ragged batches where the host does not know the lengths: graphs, maxima, and what only a GPU refuses."""

import numpy as np
import pytest
import torch
from harness import assert_identical, poisoned
from ragged_batch import Requests

from rrattn import direct
from rrattn.reference import decode, num_blocks, unpack

TOKENS, PAGES, WIDTH = 700, 48, 20  # what there is room for
PAGE = 64


class Buffers:
    """The arrays of a batch of up to four requests, at fixed places."""

    def __init__(self, kernels, dtype, num_heads=4, num_heads_k=2, size=64):
        def place(shape, dtype):
            return kernels.allocate(poisoned(shape, dtype))

        self.kernels, self.dtype = kernels, dtype
        self.query = place((TOKENS, num_heads, size), dtype)
        self.key, self.value = (place((PAGES, num_heads_k, PAGE, size), dtype) for _ in range(2))
        self.cu_seqlens_q, self.seqlens_k = place((5,), "int32"), place((4,), "int32")
        self.tables = place((4, WIDTH), "int32")
        self.keep_last = kernels.allocate(np.zeros(4, bool))
        self.out, self.lse = place((TOKENS, num_heads, size), dtype), place((num_heads, TOKENS), "float32")
        # A word has the bits of 4,096 keys.
        self.words = place((num_heads * ((TOKENS + 127 * 4) // 128) * -(-WIDTH * PAGE // 4096),), "int32")

    def call(self, **options):
        direct.ragged_attention(
            self.query, self.key, self.value, self.cu_seqlens_q, self.seqlens_k, self.tables,
            out=self.out, lse=self.lse, block_mask=self.words, keep_last=self.keep_last,
            **self.kernels.typed(self.dtype), **options,
        )  # fmt: skip

    def fill(self, requests, keep_last):
        """Brings a batch there, poison behind it and to the outputs."""
        key, value, tables = requests.in_pages(PAGE)
        wide = np.full((4, WIDTH), 0x7F7F7F7F, np.int32)
        wide[:, : tables.shape[1]] = tables
        arrays = {
            "query": requests.query, "key": key, "value": value, "tables": wide, "keep_last": keep_last,
            "cu_seqlens_q": requests.cu_seqlens_q, "seqlens_k": requests.seqlens_k,
            "out": requests.query[:0], "lse": np.zeros((0, TOKENS), np.float32), "words": wide[0, :0],
        }  # fmt: skip
        for name, array in arrays.items():
            to = getattr(self, name)
            if name != "keep_last":
                to.copy_(self.kernels.allocate(poisoned(tuple(to.shape), self.dtype_of(name))))
            to[: len(array)] = self.kernels.allocate(np.ascontiguousarray(array))

    def dtype_of(self, name):
        numbers = dict.fromkeys(("words", "tables", "cu_seqlens_q", "seqlens_k"), "int32")
        return {"lse": "float32", **numbers}.get(name, self.dtype)

    def check(self, requests, keep_last, **options):
        """Each request as alone, and nothing past the last one."""
        out, lse, words = map(self.kernels.download, (self.out, self.lse, self.words))
        first_word = 0
        for b, (_, seqlen_k) in enumerate(requests.lengths):
            rows = slice(*requests.cu_seqlens_q[b : b + 2])
            shape = requests.mask_shape(b)
            end_word = first_word + int(np.prod(shape))
            mask = unpack(words[first_word:end_word].reshape(1, *shape), num_blocks(seqlen_k))[0]
            own = decode(out[rows], self.dtype), np.ascontiguousarray(lse[:, rows]), mask
            if len(own[0]) > 0:
                assert_identical(own, requests.alone(b, keep_last=bool(keep_last[b]), **options))
            first_word = end_word
        used = len(requests.query)
        for left, dtype in ((out[used:], self.dtype), (lse[:, used:], "float32"), (words[first_word:], "int32")):
            assert np.ascontiguousarray(left).tobytes() == poisoned(left.shape, dtype).tobytes()


BATCHES = (
    [(300, 300), (1, 500), (0, 0), (129, 640)],
    [(0, 0), (700, 900), (0, 0), (0, 0)],
    [(127, 1200), (1, 1), (1, 1200), (128, 128)],
    [(0, 0), (0, 0), (0, 0), (0, 0)],
    [(20, 20), (200, 300), (300, 700), (5, 5)],
)


def requests_of(kernels, dtype, lengths, seed):
    return Requests(lengths, head_dim=64, head_dim_v=64, dtype=dtype, seed=seed, kernels=kernels)


def test_one_graph_serves_changing_lengths(kernels, dtype):
    buffers, options = Buffers(kernels, dtype), {"threshold": 0.4}
    keep_last = np.array([True, False, True, False])
    buffers.fill(requests_of(kernels, dtype, BATCHES[0], 0), keep_last)
    buffers.call(**options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.call(**options)
    for seed, lengths in enumerate(BATCHES):
        keep_last = np.roll(keep_last, 1)
        requests = requests_of(kernels, dtype, lengths, seed)
        buffers.fill(requests, keep_last)
        graph.replay()
        torch.cuda.synchronize()
        buffers.check(requests, keep_last, **options)


def test_results_do_not_depend_on_the_maxima(kernels, dtype):
    buffers, keep_last = Buffers(kernels, dtype), np.array([True, False, True, False])
    requests = requests_of(kernels, dtype, BATCHES[2], 0)
    buffers.fill(requests, keep_last)
    size = direct.ragged_attention(
        buffers.query, buffers.key, buffers.value, buffers.cu_seqlens_q, buffers.seqlens_k, buffers.tables,
        out=buffers.out, size_only=True,
    )  # fmt: skip
    smaller = direct.ragged_attention(
        buffers.query, buffers.key, buffers.value, buffers.cu_seqlens_q, buffers.seqlens_k, buffers.tables,
        out=buffers.out, max_num_keys=2600, size_only=True,
    )  # fmt: skip
    assert smaller < size
    buffers.call(threshold=0.4, max_num_keys=2600)
    buffers.check(requests, keep_last, threshold=0.4)


@pytest.mark.one_table
def test_a_request_that_does_not_fit_sees_nothing_and_the_others_what_they_do(kernels):
    requests = Requests([(100, 100), (50, 700), (129, 300)], dtype="float16", kernels=kernels)
    key, value, tables = requests.in_pages(128)
    out = requests.call(key, value, tables)[0]
    sizes = [kernels.allocate(x) for x in (requests.cu_seqlens_q, requests.seqlens_k, tables)]
    arrays = [kernels.allocate(x) for x in (requests.query, key, value)]
    few = torch.full((279, 4, 32), -1.0, device="cuda", dtype=torch.float16)
    few_lse = torch.zeros(4, 279, device="cuda")
    direct.ragged_attention(*arrays, *sizes, out=few, lse=few_lse, max_seqlen_k=640, **kernels.options)
    assert (few[100:150] == 0).all() and (few_lse[:, 100:150] == -torch.inf).all()
    for rows in (slice(0, 100), slice(150, 279)):
        assert_identical(decode(kernels.download(few[rows]), "float16"), out[rows])
    # Wrong lengths of queries: what cannot be rows of the batch is left out.
    sizes[0].copy_(torch.tensor([0, 100, 90, 10000]))
    few.fill_(-1)
    direct.ragged_attention(*arrays, *sizes, out=few, **kernels.options)
    assert_identical(decode(kernels.download(few[:100]), "float16"), out[:100])
    assert (few[100:] == -1).all()


LONG = [(3000, 9000), (1, 4097), (128, 128), (0, 3), (2049, 2049), (640, 12000), (1000, 1000)]


@pytest.mark.parametrize("page_size", (None, 64, 128))
@pytest.mark.parametrize("size", (64, 72, 96, 128))
def test_long_requests(kernels, page_size, size):
    requests = Requests(LONG, 8, 2, size, size, dtype="bfloat16", kernels=kernels)
    arrays = requests.in_one_piece if page_size is None else requests.in_pages(page_size)
    options = {"threshold": 0.5, "keep_last": False, "max_num_keys": sum(k for _, k in LONG)}
    if page_size is not None:
        options["max_seqlen_k"] = 12000
    out, lse, masks = requests.call(*arrays, **options)
    for b, (seqlen_q, _) in enumerate(LONG):
        if seqlen_q == 0:
            continue
        rows = slice(*requests.cu_seqlens_q[b : b + 2])
        own = out[rows], np.ascontiguousarray(lse[:, rows]), masks[b]
        assert_identical(own, requests.alone(b, threshold=0.5, keep_last=False))


def test_what_a_gpu_does_not_take_is_refused(kernels):
    requests = Requests([(3, 200), (2, 70)], dtype="float16", kernels=kernels)
    key, value, tables = requests.in_pages(64)
    pooled = np.zeros((len(key), 2, 8, 33), np.float32)
    with pytest.raises(ValueError, match="pooled_keys is given, but must be None on a GPU"):
        requests.call(key, value, tables, pooled_keys=pooled)
    with pytest.raises(ValueError, match="compensate is True, but ragged batches on a GPU are not compensated"):
        requests.call(key, value, tables, compensate=True)
    wide = np.zeros((2, 20000), np.int32)
    with pytest.raises(ValueError, match="max_seqlen_k is 1280000, but must be at most 1048576 on a GPU"):
        requests.call(key, value, wide)
    requests = Requests([(3, 200), (2, 70)], kernels=kernels)
    with pytest.raises(ValueError, match="query has dtype float32, but on a GPU must have float16 or bfloat16"):
        requests.call(*requests.in_pages(64))
