"""Call the stages of rrattn.direct with NumPy values and get NumPy values back, and compare them.

Values travel as float32 arrays plus the name of the dtype to compute in; block masks as booleans
[B, Hq, Mq, Mk]. Every output lies in fresh memory full of NaN (integers: 0x7f7f7f7f). Query, key, value,
their gradients, out and the FlashMask bounds come in one of four layouts:

    contiguous    as shaped
    heads_first   [B, H, L, D] in memory, seen as [B, L, H, D]
    padded        a slice of an array that is larger in every dimension
    unaligned     the same, off by one element, so that no row starts on a vector boundary

What surrounds a slice is poison, and must still be there after the call.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cases import DTYPES

from rrattn import direct, reference
from rrattn.reference import STORAGE, decode, encode

LAYOUTS = ("contiguous", "heads_first", "padded", "unaligned")
POISON = {"f4": np.nan, "f2": np.nan, "u2": 0x7FFF, "i4": 0x7F7F7F7F, "b1": True}  # 0x7fff is a bfloat16 NaN


def poisoned(shape, dtype):
    """An array of the storage type of `dtype`, filled with what no result looks like."""
    storage = np.dtype(STORAGE[dtype])
    return np.full(shape, POISON[storage.str[1:]], storage)


class Kernels:
    """The stages through rrattn.direct. gpu_harness.py overrides what another memory and other units change."""

    dtypes = DTYPES

    def __init__(self, layout="contiguous", num_threads=None):
        self.layout = layout
        self.num_threads = num_threads

    @property
    def options(self):
        """Keywords of every call."""
        return {} if self.num_threads is None else {"num_threads": self.num_threads}

    def allocate(self, storage):
        """A copy of a NumPy array in the memory of the kernels."""
        return storage

    def download(self, array):
        """The inverse of `allocate`."""
        return array

    def place(self, shape, dtype, strided=True):
        """(buffer, view): poisoned memory, and `shape` within it, as the layout says if it may be strided."""
        if strided and self.layout == "heads_first":
            buffer = self.allocate(poisoned((shape[0], shape[2], shape[1], *shape[3:]), dtype))
            return buffer, buffer.swapaxes(1, 2)
        if strided and self.layout in ("padded", "unaligned"):
            pads = 1, 1, 1, 8 if self.layout == "padded" else 1
            buffer = self.allocate(poisoned([n + 2 * pad for n, pad in zip(shape, pads)], dtype))
            return buffer, buffer[tuple(slice(pad, pad + n) for n, pad in zip(shape, pads))]
        buffer = self.allocate(poisoned(shape, dtype))
        return buffer, buffer

    def input(self, values, dtype, strided=True):
        """Values as a kernel's input, None as None."""
        if values is None:
            return None
        _, view = self.place(values.shape, dtype, strided)
        view[...] = self.allocate(encode(values, dtype))
        return view

    def read(self, output, dtype):
        """The values of an output (buffer, view), once it is clear that nothing else was written."""
        buffer, view = output
        storage = self.download(view).copy()
        view[...] = self.allocate(poisoned(storage.shape, dtype))
        left = self.download(buffer)
        assert left.tobytes() == poisoned(left.shape, dtype).tobytes(), "wrote outside the output"
        return decode(storage, dtype)

    def typed(self, dtype):
        """Keywords of a call on values of `dtype`: NumPy has no bfloat16 of its own."""
        return {"dtype": dtype, **self.options} if dtype == "bfloat16" else self.options

    def mean_dtype(self, dtype):
        """The type that compensated attention on values of `dtype` rounds means to; None: to none."""
        return None

    def estimate(self, query, key, startend=None, *, sink=None, dtype="float32", **options):
        """block_scores [B, Hq, Mq, Mk] float32."""
        blocks = reference.num_blocks(query.shape[1]), reference.num_blocks(key.shape[1])
        scores = self.place((query.shape[0], query.shape[2], *blocks), "float32", strided=False)
        direct.estimate_block_scores(
            self.input(query, dtype),
            self.input(key, dtype),
            self.input(startend, "int32"),
            sink=self.input(sink, "float32", strided=False),
            block_scores=scores[1],
            **self.typed(dtype),
            **options,
        )
        return self.read(scores, "float32")

    def estimate_reference(self, query, key, startend=None, *, dtype, **options):
        """(oracle, naive) block scores: as the definition says, and in float32."""
        arguments = query, key, startend
        return reference.estimate(*arguments, **options), reference.estimate(*arguments, **options, dtype="float32")

    def select(self, block_scores, startend=None, *, threshold, **options):
        """The selected blocks, bool [B, Hq, Mq, Mk]."""
        num_k_blocks = block_scores.shape[-1]
        mask = self.place(words_shape(block_scores.shape), "int32", strided=False)
        if isinstance(threshold, np.ndarray):
            threshold = self.allocate(threshold)
        direct.select_blocks(
            self.input(block_scores, "float32", strided=False),
            threshold,
            self.input(startend, "int32"),
            block_mask=mask[1],
            **self.options,
            **options,
        )
        return unpacked(self.read(mask, "int32"), num_k_blocks)

    def attend(self, query, key, value, block_mask, startend=None, *, sink=None, dtype="float32", **options):
        """(out [B, Lq, Hq, Dv], lse [B, Hq, Lq]). The block mask may come as packed words, int32."""
        out = self.place(out_shape(query, value), dtype)
        lse = self.place(lse_shape(query), "float32", strided=False)
        direct.block_sparse_attention(
            *(self.input(x, dtype) for x in (query, key, value)),
            self.input(packed(block_mask), "int32", strided=False),
            self.input(startend, "int32"),
            sink=self.input(sink, "float32", strided=False),
            out=out[1],
            lse=lse[1],
            **self.typed(dtype),
            **options,
        )
        return self.read(out, dtype), self.read(lse, "float32")

    def backward(
        self, query, key, value, block_mask, grad_out, startend=None, *,
        sink=None, grad_lse=None, dtype="float32", **options,
    ):  # fmt: skip
        """(grad_query, grad_key, grad_value) after a forward of its own, and with a sink grad_sink [Hq]."""
        forward = {name: option for name, option in options.items() if name != "deterministic"}
        out, lse = self.attend(query, key, value, block_mask, startend, sink=sink, dtype=dtype, **forward)
        grads = {
            name: self.place(x.shape, dtype)
            for name, x in (("grad_query", query), ("grad_key", key), ("grad_value", value))
        }
        if sink is not None:
            grads["grad_sink"] = self.place(sink.shape, "float32", strided=False)
        direct.block_sparse_attention_backward(
            *(self.input(x, dtype) for x in (query, key, value)),
            self.input(reference.pack(block_mask), "int32", strided=False),
            self.input(out, dtype),
            self.input(lse, "float32", strided=False),
            self.input(grad_out, dtype),
            self.input(startend, "int32"),
            sink=self.input(sink, "float32", strided=False),
            grad_lse=self.input(grad_lse, "float32"),
            **{name: view for name, (_, view) in grads.items()},
            **self.typed(dtype),
            **options,
        )
        return tuple(self.read(grad, "float32" if name == "grad_sink" else dtype) for name, grad in grads.items())

    def dense_mask(self, mask, *, dtype):
        """(bounds [B, H, Lk, 1], verdict) of a dense mask, bool or float32 values of `dtype`."""
        rows = self.place((*mask.shape[:2], mask.shape[3], 1), "int32", strided=False)
        verdict = self.place((2,), "int32", strided=False)
        outputs = {"start_rows": rows[1], "verdict": verdict[1]}
        direct.startend_rows_from_dense(self.input(mask, dtype), **outputs, **self.typed(dtype))
        return self.read(rows, "int32"), self.read(verdict, "int32").tolist()

    def prefill(
        self, query, key, value, startend=None, *, causal, threshold, dtype="float32", keep_last=True, keep_local=1,
        compensate=False, sink=None, **sampling,
    ):  # fmt: skip
        """All three stages: (block_scores, block_mask, out, lse)."""
        lengths = {"seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        rules = {"keep_last": keep_last, "keep_local": keep_local}
        scores = self.estimate(query, key, startend, causal=causal, sink=sink, dtype=dtype, **sampling)
        mask = self.select(scores, startend, causal=causal, threshold=threshold, **lengths, **rules)
        attention = {"causal": causal, "compensate": compensate, "sink": sink, "dtype": dtype}
        return scores, mask, *self.attend(query, key, value, mask, startend, **attention)

    def rr_attention(
        self, query, key, value, startend=None, *, threshold, sink=None, dtype="float32",
        outputs=("block_scores", "block_mask", "lse"), **options,
    ):  # fmt: skip
        """What `prefill` gives, of one call: None for what is not among the outputs. `out` is always."""
        num_k_blocks = reference.num_blocks(key.shape[1])
        scores = query.shape[0], query.shape[2], reference.num_blocks(query.shape[1]), num_k_blocks
        room = {
            "block_scores": self.place(scores, "float32", strided=False),
            "block_mask": self.place(words_shape(scores), "int32", strided=False),
            "lse": self.place(lse_shape(query), "float32", strided=False),
        }
        out = self.place(out_shape(query, value), dtype)
        if isinstance(threshold, np.ndarray):
            threshold = self.allocate(threshold)
        direct.rr_attention(
            *(self.input(x, dtype) for x in (query, key, value)),
            self.input(startend, "int32"),
            sink=self.input(sink, "float32", strided=False),
            out=out[1],
            threshold=threshold,
            **{name: room[name][1] for name in outputs},
            **self.typed(dtype),
            **options,
        )
        results = {name: self.read(room[name], "int32" if name == "block_mask" else "float32") for name in outputs}
        if "block_mask" in outputs:
            results["block_mask"] = unpacked(results["block_mask"], num_k_blocks)
        return results.get("block_scores"), results.get("block_mask"), self.read(out, dtype), results.get("lse")

    def assert_same(self, actual, expected, dtype):
        """Results of the same rows in two calls, where they lie at other places."""
        assert_identical(actual, np.ascontiguousarray(expected))


def packed(block_mask):
    """The words of a block mask, which may be bool."""
    return reference.pack(block_mask) if block_mask.dtype == bool else block_mask


def unpacked(words, num_k_blocks):
    """The blocks of a block mask, bool [B, Hq, Mq, Mk], once it is clear that there are no others."""
    selected = reference.unpack(words, num_k_blocks)
    assert np.array_equal(reference.pack(selected), words), "bits beyond the last block are set"
    return selected


def words_shape(scores):
    """The shape of the packed block mask of scores of a shape."""
    return (*scores[:3], -(-scores[3] // reference.WORD))


def out_shape(query, value):
    """[B, Lq, Hq, Dv] of a query [B, Lq, Hq, D] and a value [B, Lk, Hkv, Dv]."""
    return (*query.shape[:3], value.shape[3])


def lse_shape(query):
    """[B, Hq, Lq] of a query [B, Lq, Hq, D]."""
    return query.shape[0], query.shape[2], query.shape[1]


def assert_identical(actual, expected):
    """Bit for bit the same, NaN and the sign of zero included; arrays, or tuples of them."""
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected):
            assert_identical(*pair)
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.tobytes() != expected.tobytes():
        different = np.argwhere(~((actual == expected) | (np.isnan(actual) & np.isnan(expected))))
        raise AssertionError(f"{len(different)} of {actual.size} values differ, first at {different[:1]}")


def assert_all_given_are(expected, results):
    """Results of `rr_attention`: Paddle's operator does not give the scores, which are None then."""
    for result, stage in zip(results, expected):
        if result is not None:
            assert_identical(result, stage)


def assert_as_good_as_naive(actual, oracle, naive, terms=None, stored=None):
    """The errors against the oracle are what `reference.errors` allows."""
    assert actual.shape == oracle.shape
    for measure, error, allowed in reference.errors(actual, oracle, naive, terms, stored):
        assert np.isfinite(allowed)
        assert error <= allowed, f"{measure} error {error:.3g}, allowed {allowed:.3g}"


def assert_same_in_two_threads(*calls):
    """Each call gives in two threads at once, many times over, what it gives alone."""
    expected = [call() for call in calls]
    barrier = threading.Barrier(2)

    def work(order):
        barrier.wait()
        return [calls[i]() for i in order]

    orders = [list(range(len(calls))) * 4, list(reversed(range(len(calls)))) * 4]
    with ThreadPoolExecutor(2) as pool:
        for order, results in zip(orders, pool.map(work, orders)):
            for i, result in zip(order, results):
                assert_identical(result, expected[i])
