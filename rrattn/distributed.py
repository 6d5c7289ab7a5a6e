"""Attention over a sequence whose tokens are split over the ranks of a group: context parallelism.

Three layouts, as model libraries have them. The sequence has S tokens, the group n ranks:

- "dual_chunk": it is cut into 2 n chunks, and rank r holds chunks r and 2 n - 1 - r, in this order. Under a causal mask
  late tokens see more keys than early ones; this way each rank has of both.
- "contiguous": it is cut into n chunks, and rank r holds chunk r.
- "all_to_all": the same, but for attention each rank gets the whole sequence of its share of the heads (Ulysses).

In the first two a rank gathers the keys and values of all ranks and attends those that its chunks may see; it keeps
its own alone and gathers them again for the backward pass, whose gradients of keys and values are summed over the
ranks. Blocks are selected as one process selects them, bit for bit.

The ranks talk over `paddle.distributed` groups, those of fleet among them, with NCCL or gloo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from . import arguments
from .config import MAX_SEQLEN_K_ON_GPU, RRAttentionConfig, required_config
from .functional import (
    attention_inputs,
    block_sparse_attention,
    checked_sink,
    checked_tensor,
    estimate_block_scores,
    is_deterministic,
    refuse_inference_gradients,
    scale_of,
    select_blocks,
)
from .integrations.common import Place, make_core
from .layer import BlockSelection, RRAttention, every_block
from .operators import call
from .sequence_chunks import Chunk, chunk_places, chunks_here, chunks_of_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddle import Tensor

    from .config import KeepRules, Sampling

LAYOUTS = ("dual_chunk", "contiguous", "all_to_all")


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    group: Any,
    layout: str = "dual_chunk",
    causal: bool = True,
    config: RRAttentionConfig | None = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """RRAttention over a sequence that the ranks of a group share; every rank calls it.

    Gradients flow to query, key, value and sink, without second-order ones. Eager only.

    Parameters
    ----------
    query : Tensor
        [B, S / n, Hq, D] float32, bfloat16 or float16: this rank's tokens, S of all n ranks together.
    key, value : Tensor
        [B, S / n, Hkv, D] and [B, S / n, Hkv, Dv] of the query's dtype, of the same tokens.
    startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv|Hq, S, 1|2|4], FlashMask row bounds of the whole sequence, on every rank.
    group : paddle.distributed.communication.group.Group
        The ranks that share the sequence, in the order of their chunks.
    layout : str
        "dual_chunk", "contiguous" or "all_to_all", see above. In the first two a chunk is a multiple of 128 tokens. In
        the last, n divides Hq, and Hkv, or else Hkv divides n: then a key head is sent to each rank that needs it.
    causal : bool
    config : RRAttentionConfig, optional
        For one layer, with as many thresholds as Hq where they are per head. `head_offset` counts from the first of
        the Hq heads.
    softmax_scale : float, optional
        Used where the config sets none. Default: 1 / sqrt(D).
    sink : Tensor, optional
        [Hq], a logit for each query head that joins the softmax of each row. Its gradient is this rank's part: the sum
        over the ranks is the whole.

    Returns
    -------
    Tensor
        [B, S / n, Hq, Dv], for this rank's tokens.

    Raises
    ------
    ValueError, TypeError
        With the value and what is allowed.

    Examples
    --------
    >>> group = paddle.distributed.new_group(list(range(paddle.distributed.get_world_size())))
    >>> out = rrattn.distributed.context_parallel_attention(query, key, value, group=group)
    """
    config = RRAttentionConfig() if config is None else required_config(config)
    _check_layout(layout)
    num_heads = checked_tensor(query, "query").shape[2] if len(query.shape) == 4 else 1
    exchanged = layout == "all_to_all"
    if exchanged:
        _check_heads(num_heads, group)
    ranks, rank = (group.nranks, group.rank) if exchanged else (1, 0)
    core = make_core(config, Place(num_layers=1, num_heads=num_heads, ranks=ranks, rank=rank), 0)
    return attend_in_context(
        core,
        query,
        key,
        value,
        startend_row_indices,
        group=group,
        layout=layout,
        causal=causal,
        softmax_scale=softmax_scale,
        sink=sink,
    )


def attend_in_context(
    core: RRAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    group: Any,
    layout: str,
    causal: bool,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`context_parallel_attention` by the RRAttention of a model's layer, for the integrations.

    In the layout "all_to_all" its thresholds and `head_offset` are those of the heads that this rank attends. What the
    last call selected for this rank's last chunk stands in `core.last_selection`.

    Raises
    ------
    ValueError, TypeError
        As `context_parallel_attention`, and while `rrattn.collect_stats` or `rrattn.calibrate` observe the layer, which
        see no more than one process does.
    """
    _check_layout(layout)
    if not paddle.in_dynamic_mode():
        raise ValueError("attention over the ranks of a group runs eagerly, not in a static graph")
    if core._observer is not None:
        raise ValueError("statistics of attention over the ranks of a group cannot be collected: use one process")
    for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
        if len(checked_tensor(tensor, name).shape) != 4 or tensor.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but must have 4 dimensions, [batch, length / ranks, heads, "
                f"head size], and the first two of the query, whose shape is {list(query.shape)}"
            )
    rows, seqlen = startend_row_indices, query.shape[1] * group.nranks
    if rows is not None and (len(checked_tensor(rows, "startend_row_indices").shape) != 4 or rows.shape[2] != seqlen):
        raise ValueError(
            f"startend_row_indices has shape {list(rows.shape)}, but must have 4 dimensions, the third of the size "
            f"{seqlen}: bounds of all keys of the {group.nranks} ranks"
        )
    _check_length(seqlen, on_gpu=query.place.is_gpu_place())
    causal = arguments.flag(causal, "causal")
    scale = arguments.softmax_scale(softmax_scale)
    if layout == "all_to_all":
        return _attend_heads(core, query, key, value, rows, group, causal=causal, softmax_scale=scale, sink=sink)
    query, key, value = attention_inputs(query, key, value)
    sink = checked_sink(sink, query)
    dense = core.attends_densely(seqlen)
    compensate = core.config.compensate and not dense
    refuse_inference_gradients(compensate, core.config.quantization, query, key, value, sink)
    if core.config.softmax_scale is not None:
        scale = core.config.softmax_scale
    chunks = chunks_here(layout, group.nranks, group.rank, query.shape[1], causal=causal)
    gathered = _GatheredKeys(
        core=core,
        startend_row_indices=rows,
        group=group,
        layout=layout,
        chunks=chunks,
        seqlen=seqlen,
        causal=causal,
        softmax_scale=scale_of(scale, query),
        dense=dense,
        compensate=compensate,
    )
    out: Tensor = _AttendChunks.apply(query, key, value, sink, gathered)
    return out


def _check_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, but must be one of {', '.join(map(repr, LAYOUTS))}")


def _check_length(seqlen: int, *, on_gpu: bool) -> None:
    """Refuses, on each rank, what only the ranks of late chunks would find too long, while the others wait for them."""
    if on_gpu and seqlen > MAX_SEQLEN_K_ON_GPU:
        raise ValueError(f"seqlen_k is {seqlen}, but must be at most {MAX_SEQLEN_K_ON_GPU} on a GPU")


# Chunks of the queries, over gathered keys


@dataclass
class _GatheredKeys:
    """One call of attention in a gathered layout: what of it is no tensor with a gradient."""

    core: RRAttention
    startend_row_indices: Tensor | None
    group: Any
    layout: str
    chunks: list[Chunk]
    seqlen: int
    causal: bool
    softmax_scale: float
    dense: bool
    compensate: bool
    block_masks: tuple[Tensor, ...] = ()
    """Of each chunk, once it is attended."""

    def gather(self, tensor: Tensor) -> _Gathering:
        return _Gathering(tensor, self.group, chunk_places(self.layout, self.group.nranks))

    def sum_of_ranks(self, of_chunks: list[Tensor]) -> Tensor:
        """This rank's tokens [B, S / n, H, D] of the sum, over chunks and ranks, of gradients of their first keys."""
        longest = max(of_chunks, key=lambda part: part.shape[1])
        total = paddle.zeros([longest.shape[0], self.seqlen, *longest.shape[2:]], dtype=longest.dtype)
        total[:, : longest.shape[1]] = longest
        for part in of_chunks:
            if part is not longest:  # in float32: for the CPU Paddle adds nothing else
                first = total[:, : part.shape[1]].astype("float32")
                total[:, : part.shape[1]] = (first + part.astype("float32")).astype(part.dtype)
        ranks = self.group.nranks
        held = [chunks_of_rank(self.layout, ranks, rank) for rank in range(ranks)]
        chunks = paddle.split(total, sum(map(len, held)), axis=1)
        parts = [paddle.concat([chunks[i] for i in of_rank], axis=1) for of_rank in held]
        return _reduce_scatter(paddle.stack(parts), self.group)

    def rows_of(self, chunk: Chunk) -> Tensor | None:
        """The row bounds of the keys that a chunk may see, which count its queries from 0."""
        rows = self.startend_row_indices
        return None if rows is None else (rows[:, :, : chunk.seqlen_k] - chunk.start).clip(0, chunk.length)

    def select(self, query: Tensor, key: Tensor, rows: Tensor | None, chunk: Chunk, sink: Tensor | None) -> Tensor:
        """The block mask of a chunk's queries over the keys that they may see, under `rows_of` the chunk."""
        config = self.core.config
        if self.dense:
            return every_block(query.shape[0], query.shape[2], chunk.length, chunk.seqlen_k)
        sampling: Sampling = {**config.sampling(), "softmax_scale": self.softmax_scale}
        rules: KeepRules = {**config.keep_rules(), "keep_last": config.keep_last and chunk.is_last}
        scores = estimate_block_scores(query[:, chunk.here], key, rows, causal=self.causal, sink=sink, **sampling)
        return select_blocks(
            scores,
            self.core.threshold_for(query),
            rows,
            causal=self.causal,
            seqlen_q=chunk.length,
            seqlen_k=chunk.seqlen_k,
            **rules,
        )


class _AttendChunks(PyLayer):
    """Attention of a rank's chunks. It keeps the rank's own tensors alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, gathered: _GatheredKeys
    ) -> Tensor:
        # The operator records gradients of what wants them here too, and would keep the keys and values of all ranks.
        inputs = query, key, value, sink
        query, key, value = query.detach(), key.detach(), value.detach()
        sink = None if sink is None else sink.detach()
        keys, values = gathered.gather(key), gathered.gather(value)
        rows_of_chunks = [gathered.rows_of(chunk) for chunk in gathered.chunks]
        whole_key = keys.wait()
        masks = [
            gathered.select(query, whole_key[:, : chunk.seqlen_k], rows, chunk, sink)
            for chunk, rows in zip(gathered.chunks, rows_of_chunks)
        ]  # while the values are on their way
        whole_value = values.wait()
        outs, lses = [], []
        for chunk, rows, block_mask in zip(gathered.chunks, rows_of_chunks, masks):
            out, lse = block_sparse_attention(
                query[:, chunk.here],
                whole_key[:, : chunk.seqlen_k],
                whole_value[:, : chunk.seqlen_k],
                block_mask,
                rows,
                causal=gathered.causal,
                softmax_scale=gathered.softmax_scale,
                compensate=gathered.compensate,
                quantization=gathered.core.config.quantization,
                sink=sink,
                return_softmax_lse=True,
            )
            outs.append(out)
            lses.append(lse)
        last = gathered.chunks[-1]
        gathered.core.last_selection = BlockSelection(
            masks[-1],
            rows_of_chunks[-1],
            causal=gathered.causal,
            seqlen_q=last.length,
            seqlen_k=last.seqlen_k,
        )
        gathered.block_masks = tuple(masks)
        whole_out = paddle.concat(outs, axis=1) if len(outs) > 1 else outs[0]
        ctx.gathered, ctx.has_sink = gathered, sink is not None
        ctx.wants_gradient = [x is not None and not x.stop_gradient for x in inputs]
        # The output would hold itself, were it saved as it is.
        ctx.save_for_backward(query, key, value, whole_out.detach(), *lses, *([] if sink is None else [sink]))
        return whole_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        gathered: _GatheredKeys = ctx.gathered
        query, key, value, out, *lses = ctx.saved_tensor()
        sink = lses.pop() if ctx.has_sink else None
        keys, values = gathered.gather(key), gathered.gather(value)
        whole_key, whole_value = keys.wait(), values.wait()
        grad_queries, grad_keys, grad_values, grad_sinks = [], [], [], []
        for chunk, block_mask, lse in zip(gathered.chunks, gathered.block_masks, lses):
            of_query, of_key, of_value, of_sink = call(
                "attend_gradients",
                query[:, chunk.here],
                whole_key[:, : chunk.seqlen_k],
                whole_value[:, : chunk.seqlen_k],
                block_mask,
                gathered.rows_of(chunk),
                sink,
                out[:, chunk.here],
                lse,
                grad_out[:, chunk.here],
                gathered.causal,
                gathered.softmax_scale,
                is_deterministic(gathered.core.config.deterministic),
                False,  # compensation has no gradients
                "",  # nor has quantization
            )
            grad_queries.append(of_query)
            grad_keys.append(of_key)
            grad_values.append(of_value)
            grad_sinks.append(of_sink)
        del whole_key, whole_value  # before their gradients are put together, which takes as much
        grads = [paddle.concat(grad_queries, axis=1), *map(gathered.sum_of_ranks, (grad_keys, grad_values))]
        if sink is not None:
            grads.append(sum(grad_sinks[1:], grad_sinks[0]))
        return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wants_gradient))


# Heads instead of tokens


def _check_heads(num_heads: int, group: Any) -> None:
    if num_heads % group.nranks:
        raise ValueError(
            f"{num_heads} query heads cannot be split over {group.nranks} ranks, as the layout 'all_to_all' does: "
            f"their number must be a multiple of {group.nranks}"
        )


def _attend_heads(
    core: RRAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    group: Any,
    *,
    causal: bool,
    softmax_scale: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Attention of this rank's share of the heads over the whole sequence, and the exchanges before and after."""
    _check_heads(query.shape[2], group)
    num_heads_k = key.shape[2]
    if num_heads_k % group.nranks and (not num_heads_k or group.nranks % num_heads_k):
        raise ValueError(
            f"{num_heads_k} key heads cannot be split over {group.nranks} ranks, as the layout 'all_to_all' does: "
            f"their number must be a multiple or a divisor of {group.nranks}"
        )
    key, value = (_repeated(tensor, 2, group) for tensor in (key, value))
    query, key, value = (exchange(tensor, group, split=2, join=1) for tensor in (query, key, value))
    if rows is not None and rows.shape[1] > 1:
        rows = paddle.split(_repeated(rows, 1, group), group.nranks, axis=1)[group.rank]
    if sink is not None:
        sink = paddle.split(sink, group.nranks)[group.rank]
    out = core(query, key, value, rows, causal=causal, softmax_scale=softmax_scale, sink=sink)
    return exchange(out, group, split=1, join=2)


def exchange(tensor: Tensor, group: Any, *, split: int, join: int) -> Tensor:
    """All-to-all, with gradients: axis `split` is split over the ranks, axis `join` put together from theirs."""
    exchanged: Tensor = _Exchange.apply(tensor, group, split, join)
    return exchanged


def _repeated(tensor: Tensor, axis: int, group: Any) -> Tensor:
    """The tensor with each head as often as there are ranks for it, where there are fewer heads than ranks."""
    heads = tensor.shape[axis]
    return tensor if heads % group.nranks == 0 else tensor.repeat_interleave(group.nranks // heads, axis=axis)


class _Exchange(PyLayer):
    """`exchange`, whose gradient is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, split: int, join: int) -> Tensor:
        ctx.exchange = group, split, join
        return _exchange(tensor, group, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        group, split, join = ctx.exchange
        return _exchange(grad, group, join, split)


# Collectives. Paddle's gloo has neither reduce_scatter nor all-to-all, and sums float16 to infinity.


class _Gathering:
    """The whole of a tensor that is split over the ranks by chunks of axis 1, on its way."""

    def __init__(self, tensor: Tensor, group: Any, order: Sequence[tuple[int, int]]) -> None:
        self.order = order
        self.num_chunks = len(order) // group.nranks
        self.sent = tensor.contiguous()
        self.received: Tensor = paddle.empty([group.nranks * tensor.shape[0], *tensor.shape[1:]], dtype=tensor.dtype)
        self.task: Any = dist.stream.all_gather(self.received, self.sent, group=group, sync_op=False)

    def wait(self) -> Tensor:
        """[B, S, H, D], in the order of the sequence; what was received is given up."""
        self.task.wait()
        batch_size = self.sent.shape[0]
        chunks = [
            paddle.split(x, self.num_chunks, axis=1) for x in self.received.split(len(self.received) // batch_size)
        ]
        del self.received, self.task  # which holds it too
        return paddle.concat([chunks[rank][i] for rank, i in self.order], axis=1)


def _is_gloo(group: Any) -> bool:
    return bool(group.process_group.name() == "GLOO")


def _reduce_scatter(parts: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of their parts [n, ...] for this one."""
    if _is_gloo(group):
        total = parts.astype("float32")
        dist.all_reduce(total, group=group)
        return total[group.rank].astype(parts.dtype)
    total = paddle.empty(parts.shape[1:], dtype=parts.dtype)
    dist.stream.reduce_scatter(total, parts.reshape([-1, *parts.shape[2:]]), group=group)
    return total


def _exchange(tensor: Tensor, group: Any, split: int, join: int) -> Tensor:
    parts = paddle.stack(paddle.split(tensor, group.nranks, axis=split))  # for each rank
    if _is_gloo(group):
        of_all: list[Tensor] = []
        dist.all_gather(of_all, parts, group=group)
        received = paddle.stack([parts_of_rank[group.rank] for parts_of_rank in of_all])
    else:
        received = paddle.empty_like(parts)
        dist.stream.alltoall_single(received, parts, group=group)
    return paddle.concat(list(received), axis=join)
