"""`rrattn check`: the kernels of this machine against the NumPy oracle, in seconds.

Every instruction set of the CPU through rrattn.direct, then Paddle's operators on CPU tensors and on each GPU that
this build has kernels for. Inputs come from NumPy and results are compared on the host, so that on a GPU no kernel of
Paddle's own is needed. What is selected must be the same bit for bit; scores, outputs and gradients may have twice the
error of a naive computation in their dtype (`reference.errors`).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Callable, Union

import numpy as np

from . import _HAS_PADDLE, direct, info, reference

if _HAS_PADDLE:
    import paddle

    from . import functional, serving

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .reference import Array

    Measured = tuple[str, float, float]  # what, its error, and how much of one is allowed
    Kernels = Union["DirectKernels", "OperatorKernels"]
    Outcome = tuple[list[str], str]  # failures and a note

THRESHOLD = 0.6
NO_RULES = (False, False, 0)
REPORT = (
    "Please report this in the project's issue tracker, with all that `rrattn info` and `rrattn check` print. "
    "Until it is mended, do not trust what the groups that FAILED compute on this machine."
)

# FlashMask bounds by their number and causal, of keys that sit at `row` among `seqlen_q` rows.
BOUNDS: dict[tuple[int, bool], Callable[[Array, int], tuple[Array, ...]]] = {
    (1, True): lambda row, seqlen_q: ((row // 300 + 1) * 300,),  # packed documents
    (2, True): lambda row, seqlen_q: (row + 100, np.full_like(row, seqlen_q - 50)),  # a window; last rows see all
    (2, False): lambda row, seqlen_q: (row + 131, row - 130),  # a window both ways
    (4, False): lambda row, seqlen_q: (row + 131, np.full_like(row, seqlen_q - 40), np.full_like(row, 40), row - 130),
}


@dataclass(frozen=True)
class Case:
    """What to compute. `bounds` is the number of FlashMask's, 0 for none; `head_dim_v` of None is `head_dim`.

    With `grad_lse` the gradients are those of a loss that depends on the log-sum-exp too.
    """

    seqlen_q: int
    seqlen_k: int
    causal: bool = True
    num_heads: int = 2
    num_heads_k: int = 1
    head_dim: int = 64
    stride: int = 8
    batch: int = 1
    bounds: int = 0
    keep: tuple[bool, bool, int] = (True, True, 1)  # sink, last, local
    head_dim_v: int | None = None
    sink: bool = False
    grad_lse: bool = False

    @property
    def lengths(self) -> dict[str, Any]:
        return {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}

    @property
    def rules(self) -> dict[str, Any]:
        return dict(zip(("keep_sink", "keep_last", "keep_local"), self.keep))


CASES = (
    Case(1, 129),
    Case(450, 450, head_dim=32, keep=(True, False, 0)),
    Case(140, 600, num_heads=4, num_heads_k=2, head_dim=128, stride=16, keep=NO_RULES),
    Case(20, 4300, keep=(True, False, 2)),  # more blocks than a word of the mask has bits
    Case(300, 129, False, head_dim=72, stride=16),
    Case(140, 500, False, num_heads=4, num_heads_k=4, head_dim=32, keep=NO_RULES),
    Case(330, 400, bounds=1, stride=16, keep=NO_RULES),
    Case(150, 300, batch=2, bounds=2),
    Case(200, 450, False, head_dim=40, bounds=2, keep=(False, True, 0)),
    Case(130, 500, False, num_heads=4, num_heads_k=2, bounds=4, stride=16, keep=(True, False, 0)),
)


# Those in which means stand in for some blocks: with more than a word of them, with a short last one, with FlashMask.
COMPENSATED_CASES = (CASES[2], CASES[3], CASES[5], CASES[9])

# Those in eight bits: both padded head sizes of Hopper, with FlashMask, with a sink.
QUANTIZATION = "qk_int8_pv_fp8"
QUANTIZED_CASES = (CASES[2], CASES[3], CASES[5], replace(CASES[7], sink=True), CASES[9])

REQUESTS = ((129, 300), (0, 70), (1, 200), (200, 200))  # (queries, keys) of each in a ragged batch
PAGE_SIZE = 64

# What the cases above do not have, by the name of its group.
FEATURES: dict[str, tuple[Case, ...]] = {
    "sinks": tuple(replace(case, sink=True) for case in (CASES[0], CASES[2], CASES[7])),
    "values' head size": (
        replace(CASES[2], head_dim_v=64),
        Case(140, 300, False, head_dim=40, head_dim_v=120),
        Case(130, 300, head_dim=192, head_dim_v=128, bounds=1),
    ),
    "gradient of log-sum-exp": tuple(replace(case, grad_lse=True) for case in (CASES[2], CASES[9])),
}


@dataclass(frozen=True)
class Expected:
    """A case in a dtype: its inputs, and what the oracle and the naive computation make of them."""

    query: Array  # [B, Lq, Hq, D]; float32 values of the dtype, as the next three
    key: Array  # [B, Lk, Hkv, D]
    value: Array  # [B, Lk, Hkv, Dv]
    grad_out: Array  # [B, Lq, Hq, Dv]
    sink: Array | None  # [Hq] float32
    grad_lse: Array | None  # [B, Hq, Lq] float32
    startend: Array | None  # [B, Hkv, Lk, bounds] int32
    scores: tuple[Array, Array]  # oracle and naive on a CPU, for `reference.errors`
    block_mask: Array  # [B, Hq, Mq, ceil(Mk / 32)] int32, selected by the oracle's scores in float32
    outputs: dict[str, tuple[Array, Array]]  # name: oracle and naive
    gradients: dict[str, tuple[Array, ...]]  # name: oracle, naive, terms and stored


@cache
def expected(case: Case, dtype: str) -> Expected:
    """What is `Expected` of a case in a dtype, the same on every call."""
    rng = np.random.default_rng(0)

    def normal(seqlen: int, heads: int, head_dim: int = case.head_dim) -> Array:
        return rng.standard_normal((case.batch, seqlen, heads, head_dim))

    head_dim_v = case.head_dim_v or case.head_dim
    query: Array = 2 * normal(case.seqlen_q, case.num_heads)
    key, value = normal(case.seqlen_k, case.num_heads_k), normal(case.seqlen_k, case.num_heads_k, head_dim_v)
    # The keys of a block share a direction, so that each query block has blocks that draw most of its attention.
    shared = normal(reference.num_blocks(case.seqlen_k), case.num_heads_k)
    key += np.repeat(shared, reference.BLOCK, axis=1)[:, : case.seqlen_k]
    arrays = query, key, value, normal(case.seqlen_q, case.num_heads, head_dim_v)
    query, key, value, grad_out = (reference.cast(x, dtype).astype(np.float32) for x in arrays)
    # About as large as the log-sum-exp of the keys, so that neither has all of the mass.
    sink = (8 + 3 * rng.standard_normal(case.num_heads)).astype(np.float32) if case.sink else None
    lse_shape = case.batch, case.num_heads, case.seqlen_q
    grad_lse = rng.standard_normal(lse_shape).astype(np.float32) if case.grad_lse else None
    startend = None
    if case.bounds:
        row: Array = np.arange(case.seqlen_k) - (case.seqlen_k - case.seqlen_q)
        one = np.stack(BOUNDS[case.bounds, case.causal](row, case.seqlen_q), -1)  # [Lk, bounds]
        later = 3 * np.arange(case.batch * case.num_heads_k).reshape(case.batch, case.num_heads_k, 1, 1)
        startend = (one + later).astype(np.int32)  # [B, Hkv, Lk, bounds], each a few rows after the one before

    scores, in_float32 = (
        reference.estimate(query, key, startend, causal=case.causal, stride=case.stride, sink=sink, dtype=d)
        for d in ("float64", "float32")
    )
    block_mask = reference.select(
        scores.astype(np.float32), THRESHOLD, startend, causal=case.causal, **case.lengths, **case.rules
    )
    forward = query, key, value, block_mask
    backward = *forward, grad_out
    options: dict[str, Any] = {"startend": startend, "causal": case.causal, "sink": sink}
    outputs = [reference.attend(*forward, **options, dtype=d) for d in ("float64", dtype)]
    options["grad_lse"] = grad_lse
    gradients = [
        reference.backward(*backward, **options),
        reference.backward(*backward, **options, dtype=dtype),
        reference.backward(*backward, **options, terms=True),
        reference.backward(*backward, **options, stored=dtype),
    ]
    return Expected(
        query,
        key,
        value,
        grad_out,
        sink,
        grad_lse,
        startend,
        (scores, in_float32),
        reference.pack(block_mask),
        dict(zip(("output", "log-sum-exp"), zip(*outputs))),
        dict(zip((f"gradient of {name}" for name in ("query", "key", "value", "sink")), zip(*gradients))),
    )


class DirectKernels:
    """The stages through rrattn.direct with an instruction set of the CPU, from NumPy values to NumPy values."""

    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    on_gpu = False
    has_eight_bits = True

    def __init__(self, simd: str) -> None:
        self.name, self.simd = f"rrattn.direct, {simd}", simd

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        before = direct.simd()
        direct.set_simd(self.simd)
        try:
            yield
        finally:
            direct.set_simd(before)

    def estimate(self, query: Array, key: Array, startend: Array | None, *, dtype: str, **options: Any) -> Array:
        """block_scores [B, Hq, Mq, Mk] float32."""
        blocks = reference.num_blocks(query.shape[1]), reference.num_blocks(key.shape[1])
        scores = np.full((query.shape[0], query.shape[2], *blocks), np.nan, np.float32)
        query, key = reference.encode(query, dtype), reference.encode(key, dtype)
        direct.estimate_block_scores(query, key, startend, block_scores=scores, dtype=dtype, **options)
        return scores

    def select(self, block_scores: Array, startend: Array | None, *, threshold: float, **options: Any) -> Array:
        """block_mask [B, Hq, Mq, ceil(Mk / 32)] int32."""
        block_mask = room_for_mask(*block_scores.shape)
        direct.select_blocks(block_scores, threshold, startend, block_mask=block_mask, **options)
        return block_mask

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        block_mask: Array,
        startend: Array | None,
        *,
        dtype: str,
        **options: Any,
    ) -> tuple[Array, Array]:
        """(out [B, Lq, Hq, Dv], lse [B, Hq, Lq])."""
        query, key, value = (reference.encode(x, dtype) for x in (query, key, value))
        out, lse = self._attend(query, key, value, block_mask, startend, dtype=dtype, **options)
        return reference.decode(out, dtype), lse

    def backward(
        self,
        query: Array,
        key: Array,
        value: Array,
        block_mask: Array,
        startend: Array | None,
        grad_out: Array,
        *,
        dtype: str,
        deterministic: bool,
        sink: Array | None,
        grad_lse: Array | None,
        **options: Any,
    ) -> tuple[Array, ...]:
        """(grad_query, grad_key, grad_value), after a forward of its own, and with a sink grad_sink."""
        query, key, value, grad_out = (reference.encode(x, dtype) for x in (query, key, value, grad_out))
        options["sink"] = sink
        results = self._attend(query, key, value, block_mask, startend, compensate=False, dtype=dtype, **options)
        grads = [np.zeros_like(x) for x in (query, key, value)]
        grad_sink = None if sink is None else np.full_like(sink, np.nan)
        direct.block_sparse_attention_backward(
            query,
            key,
            value,
            block_mask,
            *results,
            grad_out,
            startend,
            grad_query=grads[0],
            grad_key=grads[1],
            grad_value=grads[2],
            grad_sink=grad_sink,
            grad_lse=grad_lse,
            dtype=dtype,
            deterministic=deterministic,
            **options,
        )
        decoded = tuple(reference.decode(grad, dtype) for grad in grads)
        return decoded if grad_sink is None else (*decoded, grad_sink)

    def rr_attention(
        self, query: Array, key: Array, value: Array, startend: Array | None, *, dtype: str, **options: Any
    ) -> tuple[Array, ...]:
        """(out, lse, block_mask) of one call."""
        query, key, value = (reference.encode(x, dtype) for x in (query, key, value))
        (batch, seqlen_q, num_heads, _), seqlen_k = query.shape, key.shape[1]
        out, lse = room_for_attention(query, value)
        block_mask = room_for_mask(batch, num_heads, *map(reference.num_blocks, (seqlen_q, seqlen_k)))
        direct.rr_attention(
            query, key, value, startend, out=out, lse=lse, block_mask=block_mask, dtype=dtype, **options
        )
        return reference.decode(out, dtype), lse, block_mask

    def ragged(self, query: Array, key: Array, value: Array, *lengths: Array, dtype: str, **options: Any) -> Array:
        """out [T, Hq, Dv] of a ragged batch in pages; `lengths` are cu_seqlens_q, seqlens_k and block_tables."""
        query, key, value = (reference.encode(x, dtype) for x in (query, key, value))
        out = np.zeros((*query.shape[:2], value.shape[3]), query.dtype)
        direct.ragged_attention(query, key, value, *lengths, out=out, dtype=dtype, **options)
        return reference.decode(out, dtype)

    def _attend(
        self, query: Array, key: Array, value: Array, block_mask: Array, startend: Array | None, **options: Any
    ) -> tuple[Array, Array]:
        out, lse = room_for_attention(query, value)
        direct.block_sparse_attention(query, key, value, block_mask, startend, out=out, lse=lse, **options)
        return out, lse


def room_for_attention(query: Array, value: Array) -> tuple[Array, Array]:
    """(out, lse) for a stage to write."""
    batch, seqlen_q, num_heads, _ = query.shape
    out = np.zeros((batch, seqlen_q, num_heads, value.shape[3]), query.dtype)
    return out, np.full((batch, num_heads, seqlen_q), np.nan, np.float32)


def room_for_mask(batch: int, num_heads: int, blocks_q: int, blocks_k: int) -> Array:
    """A block mask for a stage to write."""
    return np.zeros((batch, num_heads, blocks_q, -(-blocks_k // reference.WORD)), np.int32)


class OperatorKernels:
    """The same through Paddle's operators on a device, by Paddle's name for it."""

    def __init__(self, device: str, has_eight_bits: bool = True) -> None:
        self.name, self.device = f"Paddle's operators, {device}", device
        self.on_gpu = device != "cpu"
        self.has_eight_bits = has_eight_bits
        self.dtypes = ("float16", "bfloat16") if self.on_gpu else DirectKernels.dtypes

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        before = paddle.get_device()
        paddle.set_device(self.device)
        try:
            yield
        finally:
            paddle.set_device(before)

    def estimate(self, query: Any, key: Any, startend: Any, *, dtype: str, sink: Any = None, **options: Any) -> Array:
        tensors = to_tensor(query, dtype), to_tensor(key, dtype), to_tensor(startend, "int32")
        return functional.estimate_block_scores(*tensors, sink=to_tensor(sink, "float32"), **options).numpy()

    def select(self, block_scores: Any, startend: Any, *, threshold: float, **options: Any) -> Array:
        scores, startend = to_tensor(block_scores, "float32"), to_tensor(startend, "int32")
        return functional.select_blocks(scores, threshold, startend, **options).numpy()

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        block_mask: Any,
        startend: Any,
        *,
        dtype: str,
        sink: Any = None,
        **options: Any,
    ) -> tuple[Array, Array]:
        query, key, value = (to_tensor(x, dtype) for x in (query, key, value))
        block_mask, startend = to_tensor(block_mask, "int32"), to_tensor(startend, "int32")
        out, lse = functional.block_sparse_attention(
            query,
            key,
            value,
            block_mask,
            startend,
            sink=to_tensor(sink, "float32"),
            return_softmax_lse=True,
            **options,
        )
        return reference.decode(out.numpy(), dtype), lse.numpy()

    def backward(
        self,
        query: Any,
        key: Any,
        value: Any,
        block_mask: Any,
        startend: Any,
        grad_out: Any,
        *,
        dtype: str,
        sink: Any,
        grad_lse: Any,
        **options: Any,
    ) -> tuple[Array, ...]:
        query, key, value = (to_tensor(x, dtype) for x in (query, key, value))
        sink = to_tensor(sink, "float32")
        leaves = [leaf for leaf in (query, key, value, sink) if leaf is not None]
        for leaf in leaves:
            leaf.stop_gradient = False
        results = functional.block_sparse_attention(
            query,
            key,
            value,
            to_tensor(block_mask, "int32"),
            to_tensor(startend, "int32"),
            compensate=False,
            sink=sink,
            return_softmax_lse=True,
            **options,
        )
        given = [to_tensor(grad_out, dtype)] + ([] if grad_lse is None else [to_tensor(grad_lse, "float32")])
        grads = [grad.numpy() for grad in paddle.grad(results[: len(given)], leaves, given)]
        return (*(reference.decode(grad, dtype) for grad in grads[:3]), *grads[3:])

    def rr_attention(
        self, query: Any, key: Any, value: Any, startend: Any, *, dtype: str, sink: Any = None, **options: Any
    ) -> tuple[Array, ...]:
        """(out, lse, block_mask) of one operator."""
        query, key, value = (to_tensor(x, dtype) for x in (query, key, value))
        out, lse, block_mask = functional.rr_attention(
            query,
            key,
            value,
            to_tensor(startend, "int32"),
            sink=to_tensor(sink, "float32"),
            return_softmax_lse=True,
            return_block_mask=True,
            **options,
        )
        return reference.decode(out.numpy(), dtype), lse.numpy(), block_mask.numpy()

    def ragged(self, query: Any, key: Any, value: Any, *lengths: Any, dtype: str, **options: Any) -> Array:
        """out [T, Hq, Dv] of a ragged batch in pages; `lengths` are cu_seqlens_q, seqlens_k and block_tables."""
        query, key, value = (to_tensor(x, dtype) for x in (query, key, value))
        out = serving.ragged_attention(query, key, value, *(to_tensor(x, "int32") for x in lengths), **options)
        return reference.decode(out.numpy(), dtype)


def to_tensor(values: Array | None, dtype: str) -> Any:
    """Values as a Paddle tensor on the current device, which takes uint16 for bfloat16; None as None."""
    return None if values is None else paddle.to_tensor(reference.encode(values, dtype))


def compare(kernels: Kernels, case: Case, dtype: str) -> Iterator[Measured]:
    """Yields (what, error, allowed) of all that is computed of a case; allowed is 0 where bits must be equal."""
    known = expected(case, dtype)
    forward = known.query, known.key, known.value
    options: dict[str, Any] = {"causal": case.causal, "sink": known.sink, "dtype": dtype}

    sampled = {"stride": case.stride, **options}
    scores = kernels.estimate(known.query, known.key, known.startend, **sampled)
    exact_and_naive = known.scores
    if kernels.on_gpu:
        exact_and_naive = reference.estimate_on_tensor_cores(known.query, known.key, known.startend, **sampled)
    yield from named("block scores", reference.errors(scores, *exact_and_naive))

    selection: dict[str, Any] = {"threshold": THRESHOLD, **case.rules}
    lengths: dict[str, Any] = {"causal": case.causal, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    by_oracle = known.scores[0].astype(np.float32)
    block_mask = kernels.select(by_oracle, known.startend, **lengths, **selection)
    yield "selection, in words that differ", words_that_differ(block_mask, known.block_mask), 0

    plain: dict[str, Any] = {"compensate": False, **options}
    results = kernels.attend(*forward, known.block_mask, known.startend, **plain)
    for (what, exact_and_naive), result in zip(known.outputs.items(), results):
        yield from named(what, reference.errors(result, *exact_and_naive))

    gradients = [
        kernels.backward(
            *forward,
            known.block_mask,
            known.startend,
            known.grad_out,
            grad_lse=known.grad_lse,
            deterministic=deterministic,
            **options,
        )
        for deterministic in (False, True, True)
    ]
    for i, (what, bounds) in enumerate(known.gradients.items()):
        usual, first, second = (three[i] for three in gradients)
        yield from named(what, reference.errors(usual, *bounds))
        yield from named(f"deterministic {what}", reference.errors(first, *bounds))
        yield f"deterministic {what}, in words that differ from run to run", words_that_differ(second, first), 0

    rows = known.startend
    whole = kernels.rr_attention(known.query, known.key, known.value, rows, compensate=False, **sampled, **selection)
    block_mask = kernels.select(scores, known.startend, **lengths, **selection)
    stages = *kernels.attend(*forward, block_mask, known.startend, **plain), block_mask
    for what, one, other in zip(("output", "log-sum-exp", "selection"), whole, stages):
        yield f"{what} of rr_attention, in words that differ from its stages", words_that_differ(one, other), 0


def compare_compensated(kernels: Kernels, case: Case, dtype: str) -> Iterator[Measured]:
    """The same of attention in which means stand in for blocks, which has no gradients."""
    known = expected(case, dtype)
    forward = known.query, known.key, known.value
    options: dict[str, Any] = {"causal": case.causal, "compensate": True}
    block_mask = reference.unpack(known.block_mask, reference.num_blocks(case.seqlen_k))
    oracle, naive = (
        reference.attend(*forward, block_mask, known.startend, **options, dtype=d) for d in ("float64", dtype)
    )
    results = kernels.attend(*forward, known.block_mask, known.startend, **options, dtype=dtype)
    for what, result, *exact_and_naive in zip(("output", "log-sum-exp"), results, oracle, naive):
        yield from named(what, reference.errors(result, *exact_and_naive))

    yield from compare_with_stage(kernels, case, dtype, **options)


def compare_with_stage(kernels: Kernels, case: Case, dtype: str, **options: Any) -> Iterator[Measured]:
    """What all stages in one call give against attention over the blocks that they select."""
    known = expected(case, dtype)
    settings: dict[str, Any] = {"stride": case.stride, "threshold": THRESHOLD, **case.rules, **options}
    out, lse, selected = kernels.rr_attention(
        known.query, known.key, known.value, known.startend, dtype=dtype, **settings
    )
    stage = kernels.attend(known.query, known.key, known.value, selected, known.startend, **options, dtype=dtype)
    for what, one, other in zip(("output", "log-sum-exp"), (out, lse), stage):
        yield f"{what} of rr_attention, in words that differ from its stage", words_that_differ(one, other), 0


def compare_quantized(kernels: Kernels, case: Case, dtype: str) -> Iterator[Measured]:
    """The same of attention in eight bits. In few rows float32 rounds a probability to the other neighbour, by 6%."""
    known = expected(case, dtype)
    forward = known.query, known.key, known.value
    block_mask = reference.unpack(known.block_mask, reference.num_blocks(case.seqlen_k))
    options: dict[str, Any] = {"causal": case.causal, "sink": known.sink}
    oracle = reference.quantized_attend(*forward, block_mask, known.startend, **options)
    options["quantization"] = QUANTIZATION
    results = kernels.attend(*forward, known.block_mask, known.startend, **options, dtype=dtype)
    for what, result, exact, allowed in zip(("output", "log-sum-exp"), results, oracle, (2.0**-7, 2.0**-9)):
        seen = np.isfinite(exact)
        error = reference.rms(result[seen] - exact[seen]) if np.array_equal(np.isfinite(result), seen) else np.inf
        yield f"{what}, root mean square error", error, allowed * reference.rms(exact[seen])
    yield from compare_with_stage(kernels, case, dtype, **options)


def compare_ragged(kernels: Kernels, dtype: str) -> Iterator[Measured]:
    """The same of a batch of REQUESTS in pages, which are to have the bits of their own calls."""
    rng = np.random.default_rng(0)
    num_queries, num_keys = zip(*REQUESTS)
    query = rng.standard_normal((sum(num_queries), 4, 64), np.float32)
    num_pages = [-(-keys // PAGE_SIZE) for keys in num_keys]
    tables = np.zeros((len(REQUESTS), max(num_pages)), np.int32)
    tables[np.arange(max(num_pages)) < np.array(num_pages)[:, None]] = rng.permutation(sum(num_pages))
    key, value = (rng.standard_normal((sum(num_pages), 2, PAGE_SIZE, 64), np.float32) for _ in range(2))
    query, key, value = (reference.cast(x, dtype).astype(np.float32) for x in (query, key, value))
    ends = np.cumsum((0, *num_queries), dtype=np.int32)
    settings: dict[str, Any] = {"stride": 8, "threshold": THRESHOLD, "compensate": False}
    out = kernels.ragged(query, key, value, ends, np.array(num_keys, np.int32), tables, dtype=dtype, **settings)
    for first, last, keys, pages in zip(ends, ends[1:], num_keys, tables):
        if first == last:
            continue
        own_key, own_value = (x[pages].swapaxes(1, 2).reshape(1, -1, 2, 64)[:, :keys] for x in (key, value))
        own = query[None, first:last], own_key, own_value, None
        alone, *_ = kernels.rr_attention(*own, causal=True, dtype=dtype, **settings)
        what = f"output of {last - first} queries in a batch, in words that differ"
        yield what, words_that_differ(out[None, first:last], alone), 0


def named(what: str, errors: Iterable[Measured]) -> list[Measured]:
    return [(f"{what}, {measure} error", error, allowed) for measure, error, allowed in errors]


def words_that_differ(actual: Array, other: Array) -> float:
    """Elements of two arrays of four bytes each that are not the same bit for bit; infinite where the shapes differ."""
    if actual.shape != other.shape:
        return np.inf
    return np.count_nonzero(np.ascontiguousarray(actual).view(np.int32) != np.ascontiguousarray(other).view(np.int32))


def check_dtype(kernels: Kernels, dtype: str) -> Outcome:
    """(failures, note) of all cases in a dtype."""
    return judge((f"{case}", partial(compare, kernels, case, dtype)) for case in CASES)


def check_compensation(kernels: Kernels) -> Outcome:
    """(failures, note) of the cases with compensation, in all dtypes."""
    return judge(
        (f"{dtype}, {case}", partial(compare_compensated, kernels, case, dtype))
        for dtype in kernels.dtypes
        for case in COMPENSATED_CASES
    )


def check_quantization(kernels: Kernels) -> Outcome:
    """(failures, note) of the cases in eight bits, in all dtypes."""
    return judge(
        (f"{dtype}, {case}", partial(compare_quantized, kernels, case, dtype))
        for dtype in kernels.dtypes
        for case in QUANTIZED_CASES
    )


def check_ragged(kernels: Kernels) -> Outcome:
    """(failures, note) of a ragged batch, in all dtypes."""
    failures, _ = judge((dtype, partial(compare_ragged, kernels, dtype)) for dtype in kernels.dtypes)
    return failures, "" if failures else "each request has the bits of its own call"


def check_feature(kernels: Kernels, feature: str) -> Outcome:
    """(failures, note) of the cases with one of FEATURES, in all dtypes."""
    return judge(
        (f"{dtype}, {case}", partial(compare, kernels, case, dtype))
        for dtype in kernels.dtypes
        for case in FEATURES[feature]
    )


def judge(computations: Iterable[tuple[str, Callable[[], Iterable[Measured]]]]) -> Outcome:
    """(failures, note) of named computations; the note tells the largest error by what is allowed of it."""
    failures: list[str] = []
    worst, note = -1.0, "nothing was computed"
    for name, measure in computations:
        try:
            for what, error, allowed in measure():
                if not error <= allowed < np.inf:
                    failures.append(f"{what}: {error:.3g}, allowed {allowed:.3g}; {name}")
                if allowed and error / allowed > worst:
                    worst, note = error / allowed, f"{what}: {error / allowed:.2f} of the allowed"
        except Exception as error:  # whatever it is, the others can still tell
            failures.append(f"{type(error).__name__}: {error}; {name}")
    return failures, note


def check_refusal(kernels: Kernels) -> Outcome:
    """(failures, note): a head size that no kernel has must be a ValueError."""
    array = np.zeros((1, 8, 1, 7), np.float32)
    try:
        kernels.estimate(array, array, None, causal=True, stride=8, dtype="float16")
    except ValueError as error:
        if "head_dim is 7," in str(error):
            return [], "a bad head size is a ValueError"
        return [f"a head size of 7 raised another ValueError: {error}"], ""
    return ["a head size of 7 raised nothing"], ""


def kernels_here() -> tuple[list[Kernels], list[str]]:
    """([kernels], [what of this machine is not checked, and why])."""
    found: list[Kernels] = [DirectKernels(simd) for simd in direct.available_simd()]
    left_out: list[str] = []
    if not _HAS_PADDLE:
        return found, ["Paddle's operators: Paddle is not installed"]
    found.append(OperatorKernels("cpu"))
    if not paddle.is_compiled_with_cuda():
        left_out.append("GPUs: this Paddle is a CPU build")
    for gpu in info.gpus():
        if gpu.kernels:
            found.append(OperatorKernels(f"gpu:{gpu.index}", gpu.kernels == info.HOPPER_KERNELS))
        else:
            left_out.append(str(gpu))
    return found, left_out


def run() -> int:
    """Prints a line for each group, and returns the exit status: 1 where one failed."""
    start = time.perf_counter()
    all_kernels, left_out = kernels_here()
    groups: list[tuple[str, Kernels, Callable[[], Outcome]]] = []
    for kernels in all_kernels:
        groups += [(f"{kernels.name}, {x}", kernels, partial(check_dtype, kernels, x)) for x in kernels.dtypes]
        groups += [(f"{kernels.name}, {x}", kernels, partial(check_feature, kernels, x)) for x in FEATURES]
        groups.append((f"{kernels.name}, compensation", kernels, partial(check_compensation, kernels)))
        if kernels.has_eight_bits:
            groups.append((f"{kernels.name}, eight bits", kernels, partial(check_quantization, kernels)))
        groups.append((f"{kernels.name}, ragged batches", kernels, partial(check_ragged, kernels)))
        groups.append((f"{kernels.name}, bad arguments", kernels, partial(check_refusal, kernels)))
    num_failed = 0
    if gpus := info.gpus():
        print(*(f"GPU: {gpu}" for gpu in gpus), f"operators: {info.built_for()}", sep="\n")
    for name, kernels, check in groups:
        print(f"{name:<50}", end=" ", flush=True)  # before it runs: should it end the process, this tells which
        try:
            with kernels.in_use():
                failures, note = check()
        except Exception as error:  # as a device that cannot be used may raise; the other groups can still tell
            failures, note = [f"{type(error).__name__}: {error}"], ""
        num_failed += bool(failures)
        print("FAILED" if failures else "ok    ", note)
        for failure in failures:
            print(f"    {failure}")
    for reason in left_out:
        print(f"not checked: {reason}")
    seconds = time.perf_counter() - start
    if num_failed:
        print(f"{num_failed} of {len(groups)} groups FAILED ({seconds:.0f} s). {REPORT}")
        return 1
    print(f"all {len(groups)} groups passed ({seconds:.0f} s)")
    return 0
