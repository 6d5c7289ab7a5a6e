"""What rrattn.distributed does over Paddle, over torch tensors: attention over a sequence that ranks share.

Heads are attended in groups (rrattn.sequence_chunks.head_groups), one after the other. What is on its way while what is
computed, on each rank:

    forward    gather of K, of the first group      nothing: the estimate needs all keys that a chunk sees
               gather of V                          putting K in order, estimate and select of this rank's chunks
               gather of the next group's K and V   all of this group: estimate, select, attend, chunk by chunk
    backward   gather of K and V, first group       nothing: the kernel needs both
               gather of the next group's K and V   all of this group: gradients, chunk by chunk, those of K and V added
                                                    up over the sequence
               sum over the ranks of dK and dV      the gradients of the next group; of the last one nothing
                                                    dQ stays where it is

So of gathered keys and values a rank holds those of two groups at most, of their gradients as well, and the workspace
is that of a group. Where there is one group, that is all.

A rank holds a little less than there, where operators get copies of the keys that a chunk sees and of the queries of a
group, and gradients of chunks are added up in memory of their own.

Collectives run on a stream of torch.distributed's own, which waits for the one that computes when they start, and it
for them at `wait`; the host waits for neither. Tensors are [1, tokens, heads, D], as `rrattn.direct` takes them, and a
rank's tokens those of its chunks, one after the other (rrattn.sequence_chunks). Causal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from rrattn import direct
from rrattn.config import BLOCK_SIZE, RRAttentionConfig
from rrattn.sequence_chunks import (
    BACKWARD_GROUPS,
    FORWARD_GROUPS,
    Chunk,
    HeadGroup,
    chunks_here,
    chunks_of_rank,
    groups_arriving,
    head_groups,
)


@dataclass(frozen=True)
class Share:
    """What a rank holds of a sequence, and how it selects blocks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    chunks: list[Chunk]
    forward_groups: list[HeadGroup]
    backward_groups: list[HeadGroup]
    config: RRAttentionConfig


def whole_share(query, key, value, config):
    """The share of a group of one, which attends all heads at once."""
    chunks = chunks_here("contiguous", 1, 0, query.shape[1], causal=True)
    all_heads = [HeadGroup(slice(0, key.shape[2]), slice(0, query.shape[2]))]
    return Share(query, key, value, chunks, all_heads, all_heads, config)


def share_of_rank(whole, layout, ranks, rank):
    """The share of a rank in a layout, of a `whole_share`."""
    chunks = chunks_here(layout, ranks, rank, whole.query.shape[1] // ranks, causal=True)
    query, key, value = (held(tensor, chunks) for tensor in (whole.query, whole.key, whole.value))
    heads = query.shape[2], key.shape[2], key[:, :, 0].numel() * key.element_size()
    groups = head_groups(*heads, FORWARD_GROUPS), head_groups(*heads, BACKWARD_GROUPS)
    return Share(query, key, value, chunks, *groups, whole.config)


def held(tensor, chunks):
    """The tokens of these chunks, of a tensor of the whole sequence."""
    return torch.cat([tensor[:, chunk.start : chunk.start + chunk.length] for chunk in chunks], 1)


class Wire:
    """What the ranks of torch's default group send each other in a layout."""

    def __init__(self, layout, ranks):
        self.ranks = ranks
        self.order_of_ranks = [chunk for rank in range(ranks) for chunk in chunks_of_rank(layout, ranks, rank)]
        self.order_of_sequence = [self.order_of_ranks.index(chunk) for chunk in range(len(self.order_of_ranks))]

    def gather(self, own):
        """Starts to gather what the ranks hold of a tensor: `wait` gives that of the whole sequence."""
        received = own.new_empty(1, self.ranks * own.shape[1], *own.shape[2:])
        return Arriving(dist.all_gather_into_tensor, received, own.contiguous(), self.order_of_sequence)

    def sum(self, whole):
        """Starts to add up the ranks' tensors of the whole sequence: `wait` gives the sum of this rank's tokens."""
        received = whole.new_empty(1, whole.shape[1] // self.ranks, *whole.shape[2:])
        return Arriving(dist.reduce_scatter_tensor, received, in_order(whole, self.order_of_ranks))


class Arriving:
    """The result of a collective that has started."""

    def __init__(self, collective, received, sent, order=None):
        self.received, self.sent, self.order = received, sent, order
        self.task = collective(received.view(-1), sent.view(-1), async_op=True)

    def wait(self):
        """It, with its chunks in this order; what was sent and received is given up."""
        self.task.wait()
        received = self.received
        del self.task, self.sent, self.received
        return received if self.order is None else in_order(received, self.order)


def in_order(tensor, order):
    """The chunks of a tensor, as many as there are in this order."""
    chunks = tensor.chunk(len(order), 1)
    return torch.cat([chunks[i] for i in order], 1)


class NoWire:
    """In place of a Wire, for a rank whose keys and values are those of the whole sequence: nothing is sent.

    So for a group of one, and to time what ranks compute. Keys and values of a group of heads lie in memory by
    themselves, as a Wire leaves them: they are copied when they are first asked for, and kept.
    """

    def __init__(self):
        self.gathered = {}

    def gather(self, whole):
        place = whole.data_ptr(), whole.shape
        if place not in self.gathered:
            self.gathered[place] = whole, whole.contiguous()  # the first so that nothing else comes to lie there
        return AtHand(self.gathered[place][1])

    def sum(self, whole):
        return AtHand(whole)


@dataclass(frozen=True)
class AtHand:
    """In place of Arriving."""

    tensor: torch.Tensor

    def wait(self):
        return self.tensor


class Attended(NamedTuple):
    """`out` for a rank's tokens, log-sum-exp [1, Hq, L] and the block mask of each chunk."""

    out: torch.Tensor
    lses: list[torch.Tensor]
    block_masks: list[torch.Tensor]


def arriving_groups(groups, share, wire):
    """These groups of heads with their keys and values, as `groups_arriving` yields them."""

    def gather(heads):
        return wire.gather(share.key[:, :, heads.keys]), wire.gather(share.value[:, :, heads.keys])

    return groups_arriving(groups, gather)


def attend(share, wire, block_masks=None):
    """Forward pass: over the blocks of these masks, by default over those that it selects."""
    query = share.query
    selects = block_masks is None
    if selects:
        block_masks = [query.new_empty(mask_shape(query, chunk), dtype=torch.int32) for chunk in share.chunks]
    lses = [query.new_empty(1, query.shape[2], chunk.length, dtype=torch.float32) for chunk in share.chunks]
    attended = Attended(torch.empty_like(query), lses, block_masks)
    for group in arriving_groups(share.forward_groups, share, wire):
        attend_group(share, *group, attended, selects)
    return attended


def attend_group(share, heads, arriving_key, arriving_value, send_for_next, attended, selects):
    """Writes what a group of heads attends, and where it selects its blocks too."""
    of_group = heads.queries
    key = arriving_key.wait()
    if selects:
        for chunk, block_mask in zip(share.chunks, attended.block_masks):
            select(share, heads, key, chunk, block_mask[:, of_group])
    value = arriving_value.wait()
    send_for_next()
    for chunk, block_mask, lse in zip(share.chunks, attended.block_masks, attended.lses):
        run(
            direct.block_sparse_attention,
            share.query[:, chunk.here, of_group],
            key[:, : chunk.seqlen_k],
            value[:, : chunk.seqlen_k],
            block_mask[:, of_group],
            out=attended.out[:, chunk.here, of_group],
            lse=lse[:, of_group],
            causal=True,
        )


def select(share, heads, key, chunk, block_mask):
    """Writes the block mask of a chunk, over the keys that it sees of all; of other chunks than the last no row is
    special."""
    query, config = share.query[:, chunk.here, heads.queries], share.config
    config = replace(config, head_offset=config.head_offset + heads.queries.start)
    scores = query.new_empty(score_shape(query, chunk), dtype=torch.float32)
    run(
        direct.estimate_block_scores,
        query,
        key[:, : chunk.seqlen_k],
        block_scores=scores,
        causal=True,
        **config.sampling(),
    )
    rules = {**config.keep_rules(), "keep_last": config.keep_last and chunk.is_last}
    run(
        direct.select_blocks,
        scores,
        config.threshold,
        block_mask=block_mask,
        causal=True,
        seqlen_q=chunk.length,
        seqlen_k=chunk.seqlen_k,
        **rules,
    )


def every_block(share):
    """Block masks of a share's chunks that leave out nothing."""
    return [
        share.query.new_full(mask_shape(share.query, chunk), -1, dtype=torch.int32) for chunk in share.chunks
    ]  # bits of absent blocks do no harm


def score_shape(query, chunk):
    return 1, query.shape[2], chunk.length // BLOCK_SIZE, chunk.seqlen_k // BLOCK_SIZE


def mask_shape(query, chunk):
    *others, blocks_k = score_shape(query, chunk)
    return *others, -(-blocks_k // 32)


def gradients(share, wire, attended, grad_out):
    """Backward pass: the gradients of this rank's query, key and value."""
    grad_query, *grads = (torch.empty_like(tensor) for tensor in (share.query, share.key, share.value))

    def finish(heads, arriving):
        for grad, total in zip(grads, arriving):
            grad[:, :, heads.keys] = total.wait()

    on_their_way = None
    for heads, *arriving in arriving_groups(share.backward_groups, share, wire):
        totals = gradients_of_group(share, heads, *arriving, attended, grad_out, grad_query)
        if on_their_way:
            finish(*on_their_way)
        on_their_way = heads, [wire.sum(totals.pop(0)) for _ in grads]
    finish(*on_their_way)
    return grad_query, *grads


def gradients_of_group(share, heads, arriving_key, arriving_value, send_for_next, attended, grad_out, grad_query):
    """Writes a group's part of `grad_query`; returns what this rank adds to the gradients of its keys and values."""
    of_group = heads.queries
    key, value = arriving_key.wait(), arriving_value.wait()
    send_for_next()
    totals = [torch.empty_like(key), torch.empty_like(value)]
    # The chunk that sees most keys comes first and writes the sums in place.
    *others, longest = zip(share.chunks, attended.block_masks, attended.lses)
    for chunk, block_mask, lse in (longest, *others):
        seen = [total[:, : chunk.seqlen_k] for total in totals]
        in_place = chunk is longest[0]
        grads = seen if in_place else [torch.empty_like(part) for part in seen]
        run(
            direct.block_sparse_attention_backward,
            share.query[:, chunk.here, of_group],
            key[:, : chunk.seqlen_k],
            value[:, : chunk.seqlen_k],
            block_mask[:, of_group],
            attended.out[:, chunk.here, of_group],
            lse[:, of_group],
            grad_out[:, chunk.here, of_group],
            grad_query=grad_query[:, chunk.here, of_group],
            grad_key=grads[0],
            grad_value=grads[1],
            causal=True,
        )
        if in_place:
            for total in totals:
                total[:, chunk.seqlen_k :].zero_()
        else:
            for part, grad in zip(seen, grads):
                part += grad  # by float32
    return totals


def run(stage, first, *others, **given):
    """A stage of rrattn.direct on the current stream, with a workspace that it allocates."""
    num_bytes = stage(first, *others, **given, size_only=True)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=first.device)
    stream = torch.cuda.current_stream().cuda_stream if first.is_cuda else 0
    stage(first, *others, **given, workspace=workspace, stream=stream)
