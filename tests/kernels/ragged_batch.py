"""Batches of requests of several lengths: their arrays, in one piece and in pages, and each request's own call."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from harness import Kernels, poisoned

from rrattn import direct
from rrattn.reference import decode, encode, num_blocks, unpack


@dataclass
class Requests:
    """(queries, keys) of each request, their values as NumPy arrays, and the kernels that are called with them."""

    lengths: list
    num_heads: int = 4
    num_heads_k: int = 2
    head_dim: int = 32
    head_dim_v: int = 32
    dtype: str = "float32"
    seed: int = 0
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)

        def values(length, heads, size):
            return encode(rng.standard_normal((length, heads, size), np.float32), self.dtype)

        self.query = values(sum(q for q, _ in self.lengths), self.num_heads, self.head_dim)
        self.keys = [values(k, self.num_heads_k, self.head_dim) for _, k in self.lengths]
        self.values = [values(k, self.num_heads_k, self.head_dim_v) for _, k in self.lengths]
        self.cu_seqlens_q = np.cumsum([0, *(q for q, _ in self.lengths)]).astype(np.int32)
        self.seqlens_k = np.array([k for _, k in self.lengths], np.int32)

    @property
    def in_one_piece(self):
        """(key, value), one request after the other."""
        return np.concatenate(self.keys), np.concatenate(self.values)

    def in_pages(self, page_size, heads_first=True):
        """(key, value, block_tables): shuffled pages, poison where no token is, and in entries past the last one."""
        used = [-(-k // page_size) for _, k in self.lengths]
        pages = iter(np.random.default_rng(1).permutation(sum(used) + 3))
        tables = np.full((len(used), max(used) + 1), 0x7F7F7F7F, np.int32)
        shape = sum(used) + 3, page_size, self.num_heads_k
        caches = [poisoned((*shape, size), self.dtype) for size in (self.head_dim, self.head_dim_v)]
        for b, count in enumerate(used):
            tables[b, :count] = [next(pages) for _ in range(count)]
            for cache, rows in zip(caches, (self.keys[b], self.values[b])):
                for i, page in enumerate(tables[b, :count]):
                    part = rows[i * page_size : (i + 1) * page_size]
                    cache[page, : len(part)] = part
        if heads_first:
            caches = [np.ascontiguousarray(cache.swapaxes(1, 2)) for cache in caches]
        return (*caches, tables)

    def mask_shape(self, b):
        seqlen_q, seqlen_k = self.lengths[b]
        return self.num_heads, num_blocks(seqlen_q), -(-num_blocks(seqlen_k) // 32)

    def max_words(self, key, block_tables, max_seqlen_k=None):
        """How many words block_mask has: on a GPU as many as there may be, whatever the lengths are."""
        if type(self.kernels) is Kernels:
            return sum(int(np.prod(self.mask_shape(b))) for b in range(len(self.lengths)))
        tokens, batch = len(self.query), len(self.seqlens_k)
        if max_seqlen_k is None:
            page_size = None if block_tables is None else sum(key.shape[1:3]) - self.num_heads_k
            max_seqlen_k = len(key) if block_tables is None else block_tables.shape[1] * page_size
        return self.num_heads * ((tokens + 127 * min(batch, tokens)) // 128) * -(-max_seqlen_k // 4096)

    def place(self, value):
        """An array, or an option, as the kernels take it."""
        return self.kernels.allocate(value) if isinstance(value, np.ndarray) else value

    def call(self, key, value, block_tables=None, **options):
        """(out [T, Hq, Dv], lse [Hq, T], block masks of each request) of one call for all.

        Out lies between other rows, which must stay as they are.
        """
        kernels = self.kernels
        rows = kernels.allocate(poisoned((len(self.query) + 2, self.num_heads, self.head_dim_v), self.dtype))
        lse = kernels.allocate(poisoned((self.num_heads, len(self.query)), "float32"))
        num_words = self.max_words(key, block_tables, options.get("max_seqlen_k"))
        words = kernels.allocate(poisoned((num_words,), "int32"))
        arrays = self.query, key, value, self.cu_seqlens_q, self.seqlens_k, block_tables
        direct.ragged_attention(
            *map(self.place, arrays),
            **{"out": rows[1:-1], "lse": lse, "block_mask": words, **kernels.typed(self.dtype)},
            **{name: self.place(value) for name, value in options.items()},
        )
        return self.results(rows, lse, words)

    def results(self, rows, lse, words):
        """What a call wrote, once it is clear that it wrote nothing else."""
        rows, lse, words = map(self.kernels.download, (rows, lse, words))
        for row in (rows[0], rows[-1]):
            assert row.tobytes() == poisoned(row.shape, self.dtype).tobytes(), "wrote outside the output"
        ends = np.cumsum([int(np.prod(self.mask_shape(b))) for b in range(len(self.lengths))], dtype=int)
        if len(ends):
            left = words[ends[-1] :]
            assert left.tobytes() == poisoned(left.shape, "int32").tobytes(), "wrote past the last mask"
        masks = [
            unpack(part.reshape(1, *self.mask_shape(b)), num_blocks(self.lengths[b][1]))[0]
            for b, part in enumerate(np.split(words, ends)[: len(ends)])
        ]
        return decode(rows[1:-1], self.dtype), lse, masks

    def alone(self, b, **options):
        """The same of one request by its own call."""
        kernels = self.kernels
        seqlen_q, seqlen_k = self.lengths[b]
        query = self.query[self.cu_seqlens_q[b] : self.cu_seqlens_q[b + 1]]
        out = kernels.allocate(poisoned((1, seqlen_q, self.num_heads, self.head_dim_v), self.dtype))
        lse = kernels.allocate(poisoned((1, self.num_heads, seqlen_q), "float32"))
        words = kernels.allocate(poisoned((1, *self.mask_shape(b)), "int32"))
        direct.rr_attention(
            *(kernels.allocate(np.ascontiguousarray(x[None])) for x in (query, self.keys[b], self.values[b])),
            **{"out": out, "lse": lse, "block_mask": words, "causal": True, **kernels.typed(self.dtype)},
            **{name: self.place(value) for name, value in options.items()},
        )
        out, lse, words = map(kernels.download, (out, lse, words))
        return decode(out, self.dtype)[0], lse[0], unpack(words, num_blocks(seqlen_k))[0]
