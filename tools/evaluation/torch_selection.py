"""What `Method.block_mask` does, in PyTorch, for the methods that many contexts are measured with.

query is [B, Lq, Hq, D] float32, the last positions of key [B, Lk, Hkv, D]; scores and masks are [B, Hq, Mq, Mk] over
blocks of 128 tokens. Estimates, order among equals and fixed point are rrattn's and those of baselines.py, so that
the choice differs only where a rounding of float32 tips it.
"""

from __future__ import annotations

import numpy as np
import torch

from .baselines import BLOCK, VARIANTS, num_blocks

NAMES = ("dense", "rrattn", "xattention", "exact", *VARIANTS)


def padded(x, size, dim):
    """x with zeros behind, to a multiple of `size` along dim."""
    shape = list(x.shape)
    shape[dim] = -x.shape[dim] % size
    return torch.cat([x, x.new_zeros(shape)], dim) if shape[dim] else x


def sums(x, size, dim):
    """Sums over groups of `size` along dim, the last group perhaps in part."""
    return padded(x, size, dim).unflatten(dim, (-1, size)).sum(dim + 1 if dim >= 0 else dim)


def products(query, key):
    """query [B, Hq, n, D] by key [B, Hkv, m, D]: [B, Hq, n, m]."""
    batch, heads, n, dim = query.shape
    return (query.reshape(batch, key.shape[1], -1, dim) @ key.transpose(-1, -2)).reshape(batch, heads, n, -1)


def sampled_scores(query, key, scale, stride, variant=None):
    """rrattn's estimate, or a variant of it: see `baselines.sampled_scores`."""
    seqlen_q, num_heads = query.shape[1:3]
    shift = key.shape[1] - seqlen_q
    index = torch.arange(-(-seqlen_q // stride), device=query.device)
    head = torch.arange(num_heads, device=query.device)[:, None]
    turn = {"rotated-blocks": index * stride // BLOCK, "rotated-strides": index}.get(variant, 0)
    token = index * stride + (head + turn) % stride  # [Hq, n]
    sampled = query.transpose(1, 2)[:, head, token.clamp(max=seqlen_q - 1)]  # [B, Hq, n, D]
    summed = sums(key, stride, 1).transpose(1, 2)  # [B, Hkv, m, D]
    score = products(sampled, summed) * (scale / stride)
    first_key = torch.arange(summed.shape[2], device=query.device) * stride
    score.masked_fill_(first_key > (token + shift)[..., None], -torch.inf)
    by_block = sums(torch.softmax(score, -1), BLOCK // stride, -1) * (token < seqlen_q)[..., None]  # [B, Hq, n, Mk]
    if variant == "row-maximum":
        return padded(by_block, BLOCK // stride, 2).unflatten(2, (-1, BLOCK // stride)).amax(3)
    scores = sums(by_block, BLOCK // stride, 2)
    if variant == "group-mean":
        grouped = scores.unflatten(1, (key.shape[2], -1))
        return (grouped + grouped.mean(2, keepdim=True)).flatten(1, 2)
    return scores


def antidiagonal_scores(query, key, scale, stride):
    """XAttention's estimate: see `baselines.antidiagonal_scores`."""
    shift = key.shape[1] - query.shape[1]
    q, k = (padded(x, stride, 1).unflatten(1, (-1, stride)) for x in (query, key))  # [B, squares, stride, heads, D]
    score = products(*(x.permute(0, 3, 1, 2, 4).flatten(3) for x in (q.flip(2), k))) * (scale / stride)
    row, col = (torch.arange(size, device=query.device) for size in score.shape[2:])
    score.masked_fill_(col > row[:, None] + shift // stride, -torch.inf)
    return sums(sums(torch.softmax(score, -1), BLOCK // stride, -1), BLOCK // stride, 2)


def exact_mass(query, key, scale, rows_at_once=256):
    """The true attention mass of each pair of blocks: see `rrattn.attention_mass.exact_block_mass`."""
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    mass = query.new_zeros(query.shape[0], query.shape[2], num_blocks(seqlen_q), num_blocks(seqlen_k))
    for begin in range(0, seqlen_q, rows_at_once):
        row = torch.arange(begin, min(begin + rows_at_once, seqlen_q), device=query.device)
        score = products(query[:, row].transpose(1, 2) * scale, key.transpose(1, 2))
        col = torch.arange(seqlen_k, device=query.device)
        score.masked_fill_(col > row[:, None] + seqlen_k - seqlen_q, -torch.inf)
        part = sums(sums(torch.softmax(score, -1), BLOCK, -1), BLOCK, 2)
        mass[:, :, begin // BLOCK : begin // BLOCK + part.shape[2]] = part
    return mass


def block_scores(name, stride, query, key, scale, mass_of=exact_mass):
    """What a method of NAMES but dense chooses by."""
    if name == "exact":
        return mass_of(query, key, scale)
    if name == "xattention":
        return antidiagonal_scores(query, key, scale, stride)
    return sampled_scores(query, key, scale, stride, name)


def visible_blocks(seqlen_q, seqlen_k, device):
    """bool [Mq, Mk]"""
    last = (torch.arange(num_blocks(seqlen_q), device=device) * BLOCK + BLOCK - 1).clamp(max=seqlen_q - 1)
    return torch.arange(num_blocks(seqlen_k), device=device) <= ((last + seqlen_k - seqlen_q) // BLOCK)[:, None]


def always_kept(seqlen_q, seqlen_k, keep_last, keep_local, device):
    """bool [Mq, Mk]: what the keep rules, the sink and the row's own positions keep."""
    first_own = (torch.arange(num_blocks(seqlen_q), device=device) * BLOCK + seqlen_k - seqlen_q) // BLOCK
    col = torch.arange(num_blocks(seqlen_k), device=device)
    kept = (col == 0) | (col >= first_own[:, None] - keep_local)
    if keep_last:
        kept[-1] = True
    return kept & visible_blocks(seqlen_q, seqlen_k, device)


def top_tau(scores, thresholds):
    """bool [thresholds, B, Hq, Mq, Mk]: the fewest blocks that hold a threshold of their row's score, as rrattn."""
    fixed = torch.round(scores.double() * 2.0**32).long()
    ordered, order = torch.sort(fixed, dim=-1, descending=True, stable=True)
    before = (ordered.cumsum(-1) - ordered).double()
    tau = torch.tensor(np.float32(thresholds).astype(np.float64), device=scores.device)[:, None, None, None, None]
    kept = before < tau * fixed.sum(-1, keepdim=True).double()
    return torch.zeros_like(kept).scatter_(-1, order.expand_as(kept), kept)


def block_mask(method, query, key, scale, mass_of=exact_mass):
    """The blocks that a Method attends, bool [B, Hq, Mq, Mk]."""
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    visible = visible_blocks(seqlen_q, seqlen_k, query.device)
    if method.name == "dense":
        return visible.expand(query.shape[0], query.shape[2], -1, -1)
    chosen = top_tau(block_scores(method.name, method.stride, query, key, scale, mass_of), [method.knob])[0]
    kept = always_kept(seqlen_q, seqlen_k, **method.keep, device=query.device)
    return (chosen & visible) | kept
