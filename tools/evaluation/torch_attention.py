"""Attention over chosen blocks in PyTorch, float32: Triton kernels on a GPU, plain PyTorch otherwise.

An attention has two functions, for one sequence with query [L, Hq, D], key and value [L, Hkv, D]:

    attend(query, key, value, mask, scale)    mask bool [Hq, M, M] of blocks; the result is [L, Hq, D]
    mass(query, key, scale)                   the true mass of each pair of blocks, [Hq, M, M]
"""

from __future__ import annotations

import math

import torch

from .baselines import BLOCK, num_blocks
from .torch_selection import always_kept, exact_mass, products, visible_blocks

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class Plain:
    """In plain PyTorch."""

    def attend(self, query, key, value, mask, scale, rows_at_once=256):
        out = torch.empty_like(query)
        for begin in range(0, len(query), rows_at_once):
            end = min(begin + rows_at_once, len(query))
            blocks = slice(begin // BLOCK, num_blocks(end))
            score = products(query[None, begin:end].transpose(1, 2) * scale, key[None, :end].transpose(1, 2))[0]
            seen = mask[:, blocks].repeat_interleave(BLOCK, 1)[:, : end - begin]
            seen = seen.repeat_interleave(BLOCK, 2)[:, :, :end]
            row, col = torch.arange(begin, end, device=query.device), torch.arange(end, device=query.device)
            chance = torch.softmax(score.masked_fill_(~(seen & (col <= row[:, None])), -torch.inf), -1)
            made = chance.reshape(key.shape[1], -1, end) @ value[:end].transpose(0, 1)  # [Hkv, group * rows, D]
            out[begin:end] = made.reshape(query.shape[1], end - begin, -1).transpose(0, 1)
        return out

    def mass(self, query, key, scale):
        return exact_mass(query[None], key[None], scale)[0]


if triton is not None:

    @triton.jit
    def causal_scores(q, key, at, rows, cols, dims, length, scale):
        # Products of queries q, at rows, with the keys at cols, which lie at `at`; -1e30 where they are not seen.
        k = tl.load(key + at[None, :] + dims[:, None], mask=cols[None, :] < length, other=0.0)
        s = tl.dot(q, k, input_precision="tf32x3") * scale
        return tl.where((cols[None, :] <= rows[:, None]) & (cols[None, :] < length), s, -1e30)

    @triton.jit
    def chances(s, top):
        return tl.where(s > -1e29, tl.exp2(s - top[:, None]), 0.0)

    @triton.jit(do_not_specialize=["length"])
    def attend_kernel(
        query, key, value, out, counts, index, length, num_blocks, scale,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        # A program: a block of queries of a head, over the key blocks listed for it. Products of float32 as three of
        # TF32: 7e-6 from plain PyTorch, 1.5 ms for 16,384 tokens and 30% of the blocks (H200, 6 heads over 2, D = 64);
        # 64 rows a program took 1.7 ms, with 32 keys a step 2.0 ms.
        m = num_blocks - 1 - tl.program_id(0)
        h = tl.program_id(1)
        rows = m * SIZE + tl.arange(0, SIZE)
        dims = tl.arange(0, D)
        q = tl.load(query + (rows[:, None] * H + h) * D + dims[None, :], mask=rows[:, None] < length, other=0.0)
        top = tl.full([SIZE], -1e30, tl.float32)
        total = tl.zeros([SIZE], tl.float32)
        acc = tl.zeros([SIZE, D], tl.float32)
        for i in range(tl.load(counts + h * num_blocks + m) * (SIZE // STEP)):
            block = tl.load(index + (h * num_blocks + m) * num_blocks + i // (SIZE // STEP))
            cols = block * SIZE + (i % (SIZE // STEP)) * STEP + tl.arange(0, STEP)
            at = (cols * (H // GROUP) + h // GROUP) * D
            s = causal_scores(q, key, at, rows, cols, dims, length, scale)
            new = tl.maximum(top, tl.max(s, 1))
            p = chances(s, new)
            factor = tl.exp2(top - new)
            total = total * factor + tl.sum(p, 1)
            v = tl.load(value + at[:, None] + dims[None, :], mask=cols[:, None] < length, other=0.0)
            acc = acc * factor[:, None] + tl.dot(p, v, input_precision="tf32x3")
            top = new
        acc = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + (rows[:, None] * H + h) * D + dims[None, :], acc, mask=rows[:, None] < length)

    @triton.jit(do_not_specialize=["length"])
    def mass_kernel(
        query, key, mass, length, num_blocks, scale,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        # A program: a block of queries of a head; first the softmax of each row, then its sums over key blocks.
        m = num_blocks - 1 - tl.program_id(0)
        h = tl.program_id(1)
        rows = m * SIZE + tl.arange(0, SIZE)
        dims = tl.arange(0, D)
        q = tl.load(query + (rows[:, None] * H + h) * D + dims[None, :], mask=rows[:, None] < length, other=0.0)
        top = tl.full([SIZE], -1e30, tl.float32)
        total = tl.zeros([SIZE], tl.float32)
        for i in range((m + 1) * (SIZE // STEP)):
            cols = i * STEP + tl.arange(0, STEP)
            at = (cols * (H // GROUP) + h // GROUP) * D
            s = causal_scores(q, key, at, rows, cols, dims, length, scale)
            new = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - new) + tl.sum(chances(s, new), 1)
            top = new
        inverse = tl.where(rows < length, 1.0 / tl.maximum(total, 1e-30), 0.0)
        for n in range(m + 1):
            part = tl.zeros([SIZE], tl.float32)
            for j in range(SIZE // STEP):
                cols = n * SIZE + j * STEP + tl.arange(0, STEP)
                at = (cols * (H // GROUP) + h // GROUP) * D
                s = causal_scores(q, key, at, rows, cols, dims, length, scale)
                part += tl.sum(chances(s, top), 1)
            tl.store(mass + (h * num_blocks + m) * num_blocks + n, tl.sum(part * inverse, 0))


class Kernels:
    """By the Triton kernels; head sizes that are powers of two."""

    def attend(self, query, key, value, mask, scale):
        query, key, value = (x.contiguous() for x in (query, key, value))
        out = torch.empty_like(query)
        index = torch.argsort((~mask).int(), dim=-1, stable=True).int()  # the chosen blocks first
        self._launch(attend_kernel, query, key, scale, value, out, mask.sum(-1, dtype=torch.int32), index)
        return out

    def mass(self, query, key, scale):
        query, key = query.contiguous(), key.contiguous()
        mass = query.new_zeros(query.shape[1], num_blocks(len(query)), num_blocks(len(query)))
        self._launch(mass_kernel, query, key, scale, mass)
        return mass

    def _launch(self, kernel, query, key, scale, *others):
        length, num_heads, head_dim = query.shape
        blocks, group = num_blocks(length), num_heads // key.shape[1]
        kernel[(blocks, num_heads)](
            query, key, *others, length, blocks, scale * math.log2(math.e),
            H=num_heads, GROUP=group, D=head_dim, SIZE=BLOCK, STEP=64, num_warps=8, num_stages=2,
        )  # fmt: skip


def attention_for(device):
    """Kernels on a GPU with Triton, Plain otherwise.

    Raises
    ------
    RuntimeError
        When the kernels' results are not those of plain PyTorch, on random data.
    """
    if device.type != "cuda" or triton is None:
        return Plain()
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1533, n, 64, generator=generator).to(device) * 1.5 for n in (6, 2, 2))
    visible = visible_blocks(1533, 1533, device)
    mask = (torch.rand(6, *visible.shape, generator=generator).to(device) < 0.4) & visible
    mask |= always_kept(1533, 1533, False, 0, device)
    results = [(x.attend(query, key, value, mask, 0.125), x.mass(query, key, 0.125)) for x in (Kernels(), Plain())]
    (out, mass), (plain_out, plain_mass) = results
    error = max(float((out - plain_out).abs().max()), float((mass - plain_mass).abs().max()) / BLOCK)
    if not error < 2e-5:
        raise RuntimeError(f"the Triton kernels are {error:.1e} from plain PyTorch")
    return Kernels()
