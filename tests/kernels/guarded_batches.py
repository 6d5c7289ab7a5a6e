"""Runs ragged batches on arrays that end where memory ends, so that whatever is read past one ends the process.

    python guarded_batches.py SEED BATCHES

Each batch runs in pages and in one piece, and then with lengths and tables of which an entry is wrong, which must be
refused or do no harm. Prints how many were refused.
"""

import ctypes
import mmap
import sys

import numpy as np

from rrattn import direct
from rrattn.reference import num_blocks

HERE = ctypes.CDLL(None, use_errno=True)
HERE.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
NO_ACCESS, ALL_ACCESS = 0, mmap.PROT_READ | mmap.PROT_WRITE
ENTRIES = (-1, 0, 1, 5, 64, 10**6, 2**31 - 1, -(2**31))


class Memory:
    """Arrays that each end at a page without access."""

    def __init__(self):
        self.closed = []

    def place(self, array):
        array = np.ascontiguousarray(array)
        room = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
        assert HERE.mprotect(guard, mmap.PAGESIZE, NO_ACCESS) == 0
        self.closed.append(guard)
        placed = np.frombuffer(memory, array.dtype, array.size, room - array.nbytes).reshape(array.shape)
        placed[...] = array
        return placed

    def open(self):
        for guard in self.closed:
            HERE.mprotect(guard, mmap.PAGESIZE, ALL_ACCESS)
        self.closed.clear()


def run_batch(rng, memory):
    """How many of the wrong calls were refused."""
    heads_k = int(rng.integers(1, 3))
    heads, size, size_v = heads_k * int(rng.integers(1, 4)), int(rng.choice([8, 24, 64])), int(rng.choice([8, 40]))
    queries = rng.choice([0, 1, 7, 64, 127, 128, 129, 200], rng.integers(1, 5))
    keys = queries + rng.choice([0, 1, 63, 64, 65, 300, 500], len(queries))
    page, heads_first = int(rng.choice([64, 128, 256])), bool(rng.integers(2))
    used = -(-keys // page)
    tables = np.full((len(keys), max(used.max(), 1)), -1, np.int32)
    pages = iter(rng.permutation(used.sum() + 1))
    for row, count in zip(tables, used):
        row[:count] = [next(pages) for _ in range(count)]

    def values(*shape):
        return memory.place(rng.standard_normal(shape, np.float32))

    def cache(last):
        count = used.sum() + 1
        return values(count, heads_k, page, last) if heads_first else values(count, page, heads_k, last)

    cu_seqlens_q = np.cumsum([0, *queries]).astype(np.int32)
    outputs = {"out": values(queries.sum(), heads, size_v), "lse": values(heads, queries.sum())}
    words = heads * num_blocks(queries) * -(-num_blocks(keys) // 32)
    outputs["block_mask"] = memory.place(np.zeros(words.sum(), np.int32))
    options = {
        "threshold": float(rng.choice([0.3, 0.9, 1.0])),
        "key_stride": int(rng.choice([1, 2, 8, 64])),
        "compensate": bool(rng.integers(2)),
        "keep_last": memory.place(rng.integers(0, 2, len(keys)).astype(bool)),
    }
    sizes = memory.place(cu_seqlens_q), memory.place(keys.astype(np.int32))
    query, in_pages = values(queries.sum(), heads, size), (cache(size), cache(size_v))
    pooled = values(used.sum() + 1, heads_k, page // options["key_stride"], size + 1) if rng.integers(2) else None
    paged = {"heads_first": heads_first, "pooled_keys": pooled, **outputs, **options}
    arrays = query, *in_pages, *sizes, memory.place(tables)
    workspace = memory.place(np.zeros(direct.ragged_attention(*arrays, **paged, size_only=True), np.uint8))
    direct.ragged_attention(*arrays, **paged, workspace=workspace)
    in_one_piece = values(keys.sum(), heads_k, size), values(keys.sum(), heads_k, size_v)
    direct.ragged_attention(query, *in_one_piece, *sizes, **outputs, **options)
    refused = 0
    for _ in range(6):
        wrong = [array.copy() for array in (*sizes, tables)]
        entries = wrong[rng.integers(3)].reshape(-1)
        entries[rng.integers(entries.size)] = rng.choice(ENTRIES)
        try:
            direct.ragged_attention(query, *in_pages, *map(memory.place, wrong), **paged)
        except ValueError:
            refused += 1
    return refused


if __name__ == "__main__":
    rng, memory = np.random.default_rng(int(sys.argv[1])), Memory()
    count = 0
    for _ in range(int(sys.argv[2])):
        count += run_batch(rng, memory)
        memory.open()
    print("refused", count)
