"""What the GPU benchmarks run on: the heads, random block masks, and queries and keys with structure."""

from __future__ import annotations

import math

import torch

NUM_HEADS, NUM_HEADS_K, HEAD_DIM, BLOCK = 32, 8, 128, 128


def normal(length, heads, head_dim=HEAD_DIM, batch=1):
    """[batch, length, heads, head_dim] bfloat16."""
    return torch.randn(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)


def random_blocks(seqlen_q, seqlen_k, density, heads=NUM_HEADS, batch=1):
    """bool [B, Hq, Mq, Mk]: each block before a row's own with this probability, that one always, none after it."""
    blocks_q, blocks_k = seqlen_q // BLOCK, seqlen_k // BLOCK
    chosen = torch.rand(batch, heads, blocks_q, blocks_k, device="cuda") < density
    own = torch.ones(blocks_q, blocks_k, device="cuda", dtype=torch.bool).tril(blocks_k - blocks_q)
    before = own.tril(blocks_k - blocks_q - 1)
    return chosen & before | own & ~before


def pack(mask):
    """bool [B, Hq, Mq, Mk] to the words of rrattn, [B, Hq, Mq, ceil(Mk / 32)] int32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32))
    powers = 1 << torch.arange(32, device="cuda")
    words = (padded.unflatten(-1, (-1, 32)) * powers).sum(-1)  # int64, below 2^32
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int().contiguous()


def selected_blocks(words):
    """The number of bits set."""
    return sum(((words >> bit) & 1).sum().item() for bit in range(32))


def visible_blocks(seqlen_q, seqlen_k):
    """Blocks that one head may see when causal, the rows' own among them."""
    blocks_q, blocks_k = seqlen_q // BLOCK, seqlen_k // BLOCK
    return sum(blocks_k - blocks_q + m + 1 for m in range(blocks_q))


def density_of(words, seqlen_q, seqlen_k):
    """The selected blocks of words [1, Hq, Mq, ceil(Mk / 32)] as a share of those that all heads see when causal."""
    return selected_blocks(words) / words.shape[1] / visible_blocks(seqlen_q, seqlen_k)


def attend_flops(num_selected, seqlen_q, heads=NUM_HEADS, head_dim=HEAD_DIM):
    """Two products a block, 4 * 128 * 128 * D; the row's own block, which is selected, counts half (causal).

    `heads` are those of all sequences of a batch.
    """
    own = heads * (seqlen_q // BLOCK)
    return 4 * BLOCK * BLOCK * head_dim * (num_selected - own / 2)


def structured(tokens, seed=0):
    """(query, key, value) [1, tokens, 32 | 8, D] bfloat16 whose attention has the patterns of a language model's heads.

    To noise (0.5 a component) are added, in query and key alike, parts that give chosen pairs the logit
    ln(tokens / n) + 3, where n is the number of keys that a query has in the pattern: each pattern of a head then draws
    about e^3 = 20 times what all the noise together draws, at every length.

    sink      the first 8 keys, for all queries of all heads
    local     logits fall as exp(-distance^2 / (2 * 96^2)): random Fourier features in the lower half of D; n = 40
    vertical  16 runs of 32 keys, for all queries of a head
    needle    each 512 queries look for their own 128 keys, at a random place before them

    Of each 4 query heads of a group one is local, one vertical, one looks for needles and one does all three.
    Directions are random, of norm 1 in the upper half of D, one for each key head (and needle).
    """
    generator = torch.Generator(device="cuda").manual_seed(seed)
    half = HEAD_DIM // 2

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    def directions(*shape):
        return torch.nn.functional.normalize(random(*shape, half), dim=-1)

    def places(count, end):
        return (torch.rand(count, device="cuda", generator=generator) * end).long()

    def amplitude(keys):
        return math.sqrt((math.log(tokens / keys) + 3) * math.sqrt(HEAD_DIM))

    query, key = 0.5 * random(tokens, NUM_HEADS, HEAD_DIM), 0.5 * random(tokens, NUM_HEADS_K, HEAD_DIM)
    value = random(1, tokens, NUM_HEADS_K, HEAD_DIM).bfloat16()
    position = torch.arange(tokens, device="cuda")
    phase = position[:, None] * random(half // 2) / 96
    local = torch.cat((phase.cos(), phase.sin()), -1) / math.sqrt(half // 2) * amplitude(40)  # [tokens, D / 2]
    needles = -(-tokens // 512)
    for head_k in range(NUM_HEADS_K):
        sink = directions() * amplitude(8)
        vertical = directions() * amplitude(16 * 32)
        needle = directions(needles) * amplitude(128)
        key[:, head_k, :half] += local
        key[:8, head_k, half:] += sink
        columns = (places(16, tokens - 32)[:, None] + torch.arange(32, device="cuda")).flatten().unique()
        key[columns, head_k, half:] += vertical
        first = places(needles, (torch.arange(needles, device="cuda") * 512 - 128).clamp(min=0))
        found = first[:, None] + torch.arange(128, device="cuda")  # where two fall together, keys answer to both
        key[:, head_k, half:].index_add_(0, found.flatten(), needle.repeat_interleave(128, 0))
        for i in range(4):
            head = head_k * (NUM_HEADS // NUM_HEADS_K) + i
            query[:, head, half:] += sink
            if i in (0, 3):
                query[:, head, :half] += local
            if i in (1, 3):
                query[:, head, half:] += vertical
            if i in (2, 3):
                query[:, head, half:] += needle[position // 512]
    return query[None].bfloat16(), key[None].bfloat16(), value
