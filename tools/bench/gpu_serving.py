"""The stage serving of gpu.py: inputs, calls and records of what serving.py lists."""

from __future__ import annotations

import torch

from rrattn import direct

from .gpu_attend import HALF, empty
from .gpu_inputs import NUM_HEADS, NUM_HEADS_K, normal
from .gpu_rivals import interleaved_ms
from .serving import (
    BATCHES,
    CHUNK_PAGE_SIZE,
    CHUNK_TOKENS,
    CHUNKED,
    CHUNKED_TOKENS,
    ONE_PIECE,
    PAGE_SIZES,
    PAGED_TOKENS,
    paged_case,
)

ROUNDS, SECONDS_BEFORE = 5, 0.2  # the stage is to take half a minute


class Captured:
    """Stages one after the other in a CUDA graph, so that the time to launch them does not count.

    It keeps what the graph reads and writes: the stages hold their arrays, and `out` is where their results lie.
    """

    def __init__(self, stages, out):
        self.stages, self.out = stages, out
        self.workspace = empty(torch.uint8, max(stage(size_only=True) for stage in stages))
        self.run()  # loads the kernels
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        out.fill_(float("nan"))  # so that the results that are compared are those of what is timed

    def run(self):
        for stage in self.stages:
            stage(workspace=self.workspace, stream=torch.cuda.current_stream().cuda_stream)

    def __call__(self):
        self.graph.replay()


def numbers(values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def in_pages(rows, order, page_size):
    """[tokens, Hkv, D] in pages [P, Hkv, page size, D], FastDeploy's layout, of which order[n] gets the nth."""
    pages = torch.empty_like(rows).reshape(len(order), rows.shape[1], page_size, rows.shape[2])
    pages[order] = rows.reshape(len(order), page_size, *rows.shape[1:]).swapaxes(1, 2)
    return pages


class Requests:
    """Queries, keys and values of requests, one after the other, and ways to compute their attention."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.first_rows = [sum(lengths[:number]) for number in range(len(lengths))]
        self.query, self.key, self.value = (
            normal(sum(lengths), heads)[0] for heads in (NUM_HEADS, NUM_HEADS_K, NUM_HEADS_K)
        )

    def usual(self, out, first, count=1):
        """The stage of a usual call for `count` requests of one length."""
        length, row = self.lengths[first], self.first_rows[first]

        def batch(rows):
            return rows[row : row + count * length].reshape(count, length, *rows.shape[1:])

        arrays, out = [batch(x) for x in (self.query, self.key, self.value)], batch(out)
        return lambda **options: direct.rr_attention(*arrays, out=out, causal=True, **HALF, **options)

    def own_calls(self):
        """A usual call for each request."""
        out = torch.empty_like(self.query)
        return Captured([self.usual(out, number) for number in range(len(self.lengths))], out)

    def padded_calls(self):
        """A usual call for each length, that of its requests as a batch: as lengths are equal, nothing is padded."""
        out = torch.empty_like(self.query)
        firsts = [self.lengths.index(length) for length in dict.fromkeys(self.lengths)]
        return Captured([self.usual(out, first, self.lengths.count(self.lengths[first])) for first in firsts], out)

    def one_of(self, length):
        """The usual call for the first request of this length."""
        out = torch.empty_like(self.query)
        return Captured([self.usual(out, self.lengths.index(length))], out)

    def ragged_call(self):
        """All requests in one call, keys in one piece."""
        out = torch.empty_like(self.query)
        begins = numbers([*self.first_rows, sum(self.lengths)])
        arrays = self.query, self.key, self.value, begins, numbers(self.lengths)
        options = {"max_seqlen_k": max(self.lengths), "max_num_keys": sum(self.lengths), **HALF}
        return Captured([lambda **more: direct.ragged_attention(*arrays, out=out, **options, **more)], out)

    def paged_calls(self, page_size, chunk_tokens):
        """Of a single request whose keys lie in pages: a call for each so many of its queries.

        All calls have room for all keys, as in an engine that captures one graph.
        """
        out, tokens = torch.empty_like(self.query), len(self.query)
        order = torch.randperm(tokens // page_size, device="cuda")
        pages = [in_pages(rows, order, page_size) for rows in (self.key, self.value)]
        tables = order.int()[None].contiguous()

        def chunk(end):
            rows = slice(end - chunk_tokens, end)
            arrays = self.query[rows], *pages, numbers([0, chunk_tokens]), numbers([end]), tables
            options = {"keep_last": end == tokens, "max_seqlen_k": tokens, **HALF}
            return lambda **more: direct.ragged_attention(*arrays, out=out[rows], **options, **more)

        return Captured([chunk(end) for end in range(chunk_tokens, tokens + 1, chunk_tokens)], out)


def record(case, requests, call, ms, baselines, same_bits):
    return {
        "stage": "serving",
        "shape": case,
        "seqlen_q": sum(requests.lengths),
        "seqlen_k": max(requests.lengths),
        "settings": HALF,
        "ms": ms,
        "workspace_bytes": call.workspace.numel(),
        "same_bits": same_bits,
        "baselines": baselines,
    }


def measure_batch(case):
    """The record of a batch: one ragged call for it, and usual calls."""
    batch = BATCHES[case]
    requests = Requests([length for length, count in batch.items() for _ in range(count)])
    calls = {
        "ragged": requests.ragged_call(),
        "own calls": requests.own_calls(),
        "padded calls": requests.padded_calls(),
        **{length: requests.one_of(length) for length in batch},
    }
    ms = interleaved_ms(calls, ROUNDS, SECONDS_BEFORE)
    baselines = {
        "own calls": ms["own calls"],
        "sum of own calls": sum(count * ms[length] for length, count in batch.items()),
        "padded calls": ms["padded calls"],
    }
    same_bits = all(torch.equal(calls[name].out, calls["own calls"].out) for name in ("ragged", "padded calls"))
    return record(case, requests, calls["ragged"], ms["ragged"], baselines, same_bits)


def measure_pages():
    """Records of one request, its keys in one piece and in pages."""
    requests = Requests([PAGED_TOKENS])
    calls = {
        "own calls": requests.own_calls(),
        ONE_PIECE: requests.ragged_call(),
        **{paged_case(size): requests.paged_calls(size, PAGED_TOKENS) for size in PAGE_SIZES},
    }
    ms = interleaved_ms(calls, ROUNDS, SECONDS_BEFORE)
    for case in list(calls)[1:]:
        baselines = {"own calls": ms["own calls"], **({} if case == ONE_PIECE else {"one piece": ms[ONE_PIECE]})}
        same_bits = torch.equal(calls[case].out, calls["own calls"].out)
        yield record(case, requests, calls[case], ms[case], baselines, same_bits)


def measure_chunks():
    """The record of one request that is prefilled by chunks."""
    requests = Requests([CHUNKED_TOKENS])
    calls = {"own calls": requests.own_calls(), "chunks": requests.paged_calls(CHUNK_PAGE_SIZE, CHUNK_TOKENS)}
    ms = interleaved_ms(calls, ROUNDS, SECONDS_BEFORE)
    same_bits = torch.equal(calls["chunks"].out, calls["own calls"].out)
    return record(CHUNKED, requests, calls["chunks"], ms["chunks"], {"own calls": ms["own calls"]}, same_bits)


def measure():
    """Records of all cases."""
    for case in BATCHES:
        yield measure_batch(case)
        torch.cuda.empty_cache()
    yield from measure_pages()
    torch.cuda.empty_cache()
    yield measure_chunks()
