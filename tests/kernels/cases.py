"""The one list of shapes that every kernel test runs, on the CPU and on a GPU, and the data to run them with.

A `Case` says what to compute; `make_inputs` makes its arrays, the same on every call; `FLASHMASKS` names
the generators of startend_row_indices. Values come as float32 arrays that hold only what the dtype can hold.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np

from rrattn import reference

STRIDES = (2, 4, 8, 16, 32, 64)
KEY_STRIDES = (1, *STRIDES)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """Sizes, mask and sampling. `flashmask` names a generator, `flashmask_heads` is "1", "Hkv" or "Hq".

    Values have head size `head_dim_v`, by default that of queries and keys. With `sink` there is one, and with
    `grad_lse` the loss depends on the log-sum-exp too.
    """

    seqlen_q: int
    seqlen_k: int
    causal: bool = True
    num_heads: int = 2
    num_heads_k: int = 1
    head_dim: int = 64
    stride: int = 8
    batch: int = 1
    flashmask: str | None = None
    flashmask_heads: str = "1"
    head_dim_v: int | None = None
    sink: bool = False
    grad_lse: bool = False

    def __str__(self):
        text = f"{self.seqlen_q}x{self.seqlen_k}-{'causal' if self.causal else 'full'}"
        text += f"-h{self.num_heads}over{self.num_heads_k}-d{self.head_dim}-s{self.stride}-b{self.batch}"
        text += "" if self.head_dim_v is None else f"-v{self.head_dim_v}"
        text += "-sink" * self.sink + "-lse" * self.grad_lse
        return text if self.flashmask is None else f"{text}-{self.flashmask}-per{self.flashmask_heads}"

    @property
    def block_shape(self):
        """(B, Hq, Mq, Mk), the shape of the block scores and of the boolean block mask."""
        blocks = reference.num_blocks(self.seqlen_q), reference.num_blocks(self.seqlen_k)
        return self.batch, self.num_heads, *blocks

    @property
    def geometry(self):
        """What the reference's masks take besides startend_row_indices."""
        return {
            "causal": self.causal,
            "batch": self.batch,
            "num_heads": self.num_heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
        }


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case: float32 values, int32 bounds or None, and a random boolean block mask."""

    query: np.ndarray  # [B, Lq, Hq, D]
    key: np.ndarray  # [B, Lk, Hkv, D]
    value: np.ndarray  # [B, Lk, Hkv, Dv]
    grad_out: np.ndarray  # [B, Lq, Hq, Dv]
    startend: np.ndarray | None  # [B, 1 | Hkv | Hq, Lk, 1 | 2 | 4]
    block_mask: np.ndarray  # [B, Hq, Mq, Mk], hidden blocks among the selected ones
    sink: np.ndarray | None  # [Hq]
    grad_lse: np.ndarray | None  # [B, Hq, Lq]

    @property
    def forward(self):
        return self.query, self.key, self.value


@lru_cache(maxsize=8)
def make_inputs(case, dtype="float32", query_scale=2.0, density=0.6):
    """Random inputs of a case, seeded by the case alone: by all but its last fields, which change no query and no key.

    The keys of a block share a direction, so that each query block has blocks that draw most of its attention.
    """
    rng = np.random.default_rng(zlib.crc32(repr(astuple(case)[:-3]).encode()))

    def normal(seqlen, heads, head_dim=case.head_dim):
        return rng.standard_normal((case.batch, seqlen, heads, head_dim))

    head_dim_v = case.head_dim_v or case.head_dim
    query = query_scale * normal(case.seqlen_q, case.num_heads)
    key, value = normal(case.seqlen_k, case.num_heads_k), normal(case.seqlen_k, case.num_heads_k, head_dim_v)
    shared = normal(reference.num_blocks(case.seqlen_k), case.num_heads_k)
    key += np.repeat(shared, reference.BLOCK, axis=1)[:, : case.seqlen_k]
    grad_out = normal(case.seqlen_q, case.num_heads, head_dim_v)
    startend = make_flashmask(case, rng) if case.flashmask else None
    block_mask = rng.random(case.block_shape) < density
    arrays = [reference.cast(x, dtype).astype(np.float32) for x in (query, key, value, grad_out)]
    # About as large as the log-sum-exp of the keys, so that neither has all of the mass.
    sink = (8 + 3 * rng.standard_normal(case.num_heads)).astype(np.float32) if case.sink else None
    lse = case.batch, case.num_heads, case.seqlen_q
    grad_lse = rng.standard_normal(lse).astype(np.float32) if case.grad_lse else None
    return Inputs(*arrays, startend, block_mask, sink, grad_lse)


# FlashMask generators. Each takes the row that each key sits at (key - shift), the query length and a random
# generator, and returns its bounds, each [Lk].


def document(row, seqlen_q, rng):
    """Causal, 1 bound: packed documents of about 200 tokens; a key is hidden from its document's end on."""
    return (document_end(row, 200),)


def share_question(row, seqlen_q, rng):
    """Causal, 1 bound: a question that every answer sees, and answers of 150 that see only themselves."""
    question_end = row[0] + 100 if len(row) else 0
    return (np.where(row < question_end, seqlen_q, document_end(row - question_end, 150) + question_end),)


def causal_sliding_window(row, seqlen_q, rng):
    """Causal, 1 bound: each row sees itself and the 140 positions before it."""
    return (row + 141,)


def no_row_after(row, seqlen_q, rng):
    """Causal, 1 bound: the last third of the rows sees nothing at all."""
    return (np.full_like(row, seqlen_q - seqlen_q // 3),)


def window_with_full_tail(row, seqlen_q, rng):
    """Causal, 2 bounds: a sliding window of 100, but the last 150 rows see everything before them."""
    return row + 100, np.full_like(row, seqlen_q - 150)


def no_row_between(row, seqlen_q, rng):
    """Causal, 2 bounds: the middle third of the rows sees nothing at all."""
    return np.full_like(row, seqlen_q // 3), np.full_like(row, 2 * seqlen_q // 3)


def random_intervals(row, seqlen_q, rng):
    """Causal, 2 bounds: any intervals, also empty and reversed ones and some out of range."""
    return tuple(rng.integers(-20, seqlen_q + 20, row.shape) for _ in range(2))


def full_document(row, seqlen_q, rng):
    """Not causal, 2 bounds: each document of about 200 tokens sees itself, both ways."""
    return document_end(row, 200), document_end(row, 200) - 200


def full_sliding_window(row, seqlen_q, rng):
    """Not causal, 2 bounds: each row sees the 130 positions on either side."""
    return row + 131, row - 130


def no_outer_rows(row, seqlen_q, rng):
    """Not causal, 2 bounds: only the middle third of the rows sees anything."""
    return np.full_like(row, 2 * seqlen_q // 3), np.full_like(row, seqlen_q // 3)


def window_with_global_rows(row, seqlen_q, rng):
    """Not causal, 4 bounds: a window of 130 either side, but the first and last 40 rows see everything."""
    return row + 131, np.full_like(row, seqlen_q - 40), np.full_like(row, 40), row - 130


def two_random_intervals(row, seqlen_q, rng):
    """Not causal, 4 bounds: any two intervals per key."""
    return tuple(rng.integers(-20, seqlen_q + 20, row.shape) for _ in range(4))


def document_end(row, length):
    return (row // length + 1) * length


CAUSAL_FLASHMASKS = (
    document,
    share_question,
    causal_sliding_window,
    no_row_after,
    window_with_full_tail,
    no_row_between,
    random_intervals,
)
FULL_FLASHMASKS = (
    full_document,
    full_sliding_window,
    no_outer_rows,
    window_with_global_rows,
    two_random_intervals,
)
FLASHMASKS = {generator.__name__: generator for generator in CAUSAL_FLASHMASKS + FULL_FLASHMASKS}


def make_flashmask(case, rng):
    """startend_row_indices of a case: each batch entry and head has its own, shifted by a few rows."""
    heads = {"1": 1, "Hkv": case.num_heads_k, "Hq": case.num_heads}[case.flashmask_heads]
    row = np.arange(case.seqlen_k) - (case.seqlen_k - case.seqlen_q)
    generator = FLASHMASKS[case.flashmask]
    bounds = [
        np.stack(generator(row, case.seqlen_q, rng), -1) + 3 * (b * heads + h) for b, h in np.ndindex(case.batch, heads)
    ]
    return np.stack(bounds).reshape(case.batch, heads, case.seqlen_k, -1).astype(np.int32)


# The list

LENGTHS = [Case(n, n, causal) for n in (1, 127, 128, 129, 1000) for causal in (True, False)]
UNEQUAL = [
    Case(1, 1000),
    Case(127, 129),
    Case(128, 1000, num_heads=4, num_heads_k=2),
    Case(129, 1000, batch=2),
    Case(200, 4300),
    Case(127, 1000, causal=False),
    Case(300, 129, causal=False),
]
HEADS = [
    Case(260, 260, num_heads=heads, num_heads_k=heads_k, head_dim=32, batch=1 + (heads == 8))
    for heads, heads_k in ((1, 1), (8, 1), (8, 2), (8, 8), (32, 1), (32, 2), (32, 8))
]
HEAD_DIMS = [Case(200, 330, head_dim=d) for d in (8, 64, 72, 80, 96, 128, 192, 256)] + [
    # Hopper has kernels of its own for these, with another layout in shared memory.
    Case(450, 700, True, 4, 2, 72, flashmask="document"),
    Case(450, 700, True, 4, 2, 80, batch=2, flashmask="window_with_full_tail", flashmask_heads="Hq"),
    Case(450, 700, False, 4, 2, 96, batch=2, flashmask="two_random_intervals", flashmask_heads="Hkv"),
]
SAMPLING = [Case(1000, 1000, stride=s) for s in STRIDES] + [Case(129, 331, stride=s) for s in STRIDES]
MASKED = [
    Case(sq, 600, causal, 4, 2, 32, batch=batch, flashmask=generator.__name__, flashmask_heads=heads)
    for causal, generators in ((True, CAUSAL_FLASHMASKS), (False, FULL_FLASHMASKS))
    for i, generator in enumerate(generators)
    for sq, batch, heads in ((600, 1, ("1", "Hkv", "Hq")[i % 3]), (400, 2, ("Hq", "1", "Hkv")[i % 3]))
]

VALUE_HEAD_DIMS = [
    Case(200, 330, num_heads=4, num_heads_k=2, head_dim=d, head_dim_v=dv)
    for d, dv in ((192, 128), (128, 64), (64, 128), (72, 8), (80, 96), (64, 88), (8, 256), (256, 8), (40, 120))
]
SINKS = [
    Case(1, 1, sink=True),
    Case(129, 1000, batch=2, sink=True, grad_lse=True),
    Case(300, 129, causal=False, num_heads=8, num_heads_k=2, head_dim=72, sink=True),
    Case(400, 600, num_heads=4, num_heads_k=2, head_dim=128, flashmask="no_row_between", sink=True, grad_lse=True),
    Case(400, 600, num_heads=4, num_heads_k=2, flashmask="document", head_dim_v=32, sink=True),
    Case(200, 600, False, 4, 2, 32, batch=2, flashmask="two_random_intervals", flashmask_heads="Hq", sink=True),
    Case(400, 600, False, 4, 2, 192, flashmask="two_random_intervals", head_dim_v=136, sink=True, grad_lse=True),
]
GRADIENTS_OF_LSE = [
    Case(127, 127, grad_lse=True),
    Case(400, 600, num_heads=4, num_heads_k=2, flashmask="no_row_after", head_dim_v=96, grad_lse=True),
    Case(300, 129, causal=False, num_heads=8, num_heads_k=2, grad_lse=True),
]

ATTENTION_CASES = LENGTHS + UNEQUAL + HEADS + HEAD_DIMS + MASKED + VALUE_HEAD_DIMS + SINKS + GRADIENTS_OF_LSE
ESTIMATE_CASES = ATTENTION_CASES + SAMPLING
# One of each kind, for the tests that repeat a case over layouts, threads or SIMD levels.
FEW_CASES = [
    Case(129, 1000, batch=2),
    Case(300, 129, causal=False, num_heads=8, num_heads_k=2, head_dim=72),
    Case(450, 700, True, 4, 2, 128, batch=2, flashmask="window_with_full_tail", flashmask_heads="Hq"),
    Case(450, 700, False, 4, 2, 8, batch=2, flashmask="two_random_intervals", flashmask_heads="Hkv"),
    Case(270, 400, num_heads=3, num_heads_k=1, head_dim=40, head_dim_v=120, sink=True, grad_lse=True),
]
