"""Batches of requests of several lengths: their arrays, in one piece and in pages, and each request's own call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from harness import poisoned

from rrattn import direct
from rrattn.reference import decode, encode, num_blocks, unpack


@dataclass
class Requests:
    """(queries, keys) of each request, and their values as float32 arrays."""

    lengths: list
    num_heads: int = 4
    num_heads_k: int = 2
    head_dim: int = 32
    head_dim_v: int = 32
    dtype: str = "float32"
    seed: int = 0

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
    def typed(self):
        return {"dtype": self.dtype} if self.dtype == "bfloat16" else {}

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

    def call(self, key, value, block_tables=None, **options):
        """(out [T, Hq, Dv], lse [Hq, T], block masks of each request) of one call for all."""
        out = poisoned((len(self.query), self.num_heads, self.head_dim_v), self.dtype)
        lse = poisoned((self.num_heads, len(self.query)), "float32")
        sizes = [int(np.prod(self.mask_shape(b))) for b in range(len(self.lengths))]
        words = poisoned((sum(sizes),), "int32")
        direct.ragged_attention(
            self.query, key, value, self.cu_seqlens_q, self.seqlens_k, block_tables,
            out=out, lse=lse, block_mask=words, **self.typed, **options,
        )  # fmt: skip
        parts = np.split(words, np.cumsum(sizes)[:-1])
        masks = [
            unpack(part.reshape(1, *self.mask_shape(b)), num_blocks(self.lengths[b][1]))[0]
            for b, part in enumerate(parts)
        ]
        return decode(out, self.dtype), lse, masks

    def alone(self, b, **options):
        """The same of one request by its own call."""
        seqlen_q, seqlen_k = self.lengths[b]
        query = self.query[self.cu_seqlens_q[b] : self.cu_seqlens_q[b + 1]]
        out = poisoned((1, seqlen_q, self.num_heads, self.head_dim_v), self.dtype)
        lse = poisoned((1, self.num_heads, seqlen_q), "float32")
        words = poisoned((1, *self.mask_shape(b)), "int32")
        direct.rr_attention(
            query[None], self.keys[b][None], self.values[b][None],
            out=out, lse=lse, block_mask=words, causal=True, **self.typed, **options,
        )  # fmt: skip
        return decode(out, self.dtype)[0], lse[0], unpack(words, num_blocks(seqlen_k))[0]
