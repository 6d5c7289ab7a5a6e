"""Attention over a sequence whose tokens are split over the ranks of a group: context parallelism.

Three layouts, as model libraries have them. The sequence has S tokens, the group n ranks:

- "dual_chunk": it is cut into 2 n chunks, and rank r holds chunks r and 2 n - 1 - r, in this order. Under a causal mask
  late tokens see more keys than early ones; this way each rank has of both.
- "contiguous": it is cut into n chunks, and rank r holds chunk r.
- "all_to_all": the same, but for attention each rank gets the whole sequence of its share of the heads (Ulysses).

In the first two a rank gathers the keys and values of all ranks and attends those that its chunks may see; it keeps
its own alone and gathers them again for the backward pass, whose gradients of keys and values are summed over the
ranks. It does so for a group of heads at a time (`rrattn.sequence_chunks.head_groups`): while one is attended, the keys
and values of the next are on their way, and the sums of the gradients of the one before. Blocks are selected as one
process selects them, bit for bit.

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
from .sequence_chunks import (
    BACKWARD_GROUPS,
    FORWARD_GROUPS,
    Chunk,
    HeadGroup,
    chunk_places,
    chunks_here,
    groups_arriving,
    head_groups,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    _check_head_counts(query, key, value, rows, sink)
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
        num_heads=query.shape[2],
        num_heads_k=key.shape[2],
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


def _check_head_counts(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, sink: Tensor | None) -> None:
    """Refuses what the operators, which see a group of heads, would take for fewer heads or not know."""
    heads, heads_k = query.shape[2], key.shape[2]
    if value.shape[2] != heads_k:
        raise ValueError(f"value has {value.shape[2]} heads, but must have those of key, {heads_k}")
    if heads % heads_k if heads_k else heads:
        raise ValueError(
            f"query has {heads} heads and key has {heads_k}, but the number of query heads must be a multiple of the "
            "number of key heads"
        )
    if rows is not None and rows.shape[1] not in (1, heads_k, heads):
        raise ValueError(
            f"startend_row_indices has {rows.shape[1]} heads, but must have 1, num_heads_k ({heads_k}) or num_heads "
            f"({heads})"
        )
    if sink is not None and list(sink.shape) != [heads]:
        raise ValueError(f"sink has shape {list(sink.shape)}, but must have [{heads}], one for each query head")


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
    num_heads: int
    num_heads_k: int
    block_masks: tuple[Tensor, ...] = ()
    """Of each chunk, once it is attended."""

    def arriving(
        self, key: Tensor, value: Tensor, most: int
    ) -> Iterator[tuple[HeadGroup, _Gathering, _Gathering, Callable[[], None]]]:
        """Up to `most` groups of heads with their keys and values, as `groups_arriving` yields them."""
        groups = head_groups(self.num_heads, self.num_heads_k, key[:, :, 0].size * key.element_size(), most)
        order = chunk_places(self.layout, self.group.nranks)

        def gather(heads: HeadGroup) -> tuple[_Gathering, _Gathering]:
            keys, values = (_Gathering(tensor[:, :, heads.keys], self.group, order) for tensor in (key, value))
            return keys, values

        return groups_arriving(groups, gather)

    def sum_of_ranks(self, of_chunks: list[Tensor]) -> _Summing:
        """This rank's tokens [B, S / n, H, D] of the sum, over chunks and ranks, of gradients of their first keys."""
        like, ranks, length = of_chunks[0], self.group.nranks, self.chunks[0].length
        parts = paddle.zeros([ranks, like.shape[0], self.seqlen // ranks, *like.shape[2:]], dtype=like.dtype)
        for number, (rank, i) in enumerate(chunk_places(self.layout, ranks)):
            seen = [part[:, number * length :][:, :length] for part in of_chunks if part.shape[1] > number * length]
            if len(seen) > 1:  # in float32: for the CPU Paddle adds nothing else
                first, *others = (part.astype("float32") for part in seen)
                seen = [sum(others, first).astype(like.dtype)]
            for total in seen:
                parts[rank, :, i * length : (i + 1) * length] = total
        return _Summing(parts, self.group)

    def rows_of(self, chunk: Chunk, heads: HeadGroup | None = None) -> Tensor | None:
        """The row bounds of the keys that a chunk may see, which count its queries from 0; of all heads or a group."""
        rows = self.startend_row_indices
        if rows is None:
            return None
        if heads is not None and rows.shape[1] > 1:
            rows = rows[:, heads.keys if rows.shape[1] == self.num_heads_k else heads.queries]
        return (rows[:, :, : chunk.seqlen_k] - chunk.start).clip(0, chunk.length)

    def select(
        self, query: Tensor, key: Tensor, rows: Tensor | None, chunk: Chunk, heads: HeadGroup, sink: Tensor | None
    ) -> Tensor:
        """The block mask of a group's queries of a chunk over the keys that they may see, under `rows_of` these."""
        config = self.core.config
        if self.dense:
            return every_block(query.shape[0], query.shape[2], chunk.length, chunk.seqlen_k)
        threshold = self.core.threshold_for(query)
        if not isinstance(threshold, float):
            threshold = threshold[heads.queries]
        head_offset = (config.head_offset + heads.queries.start) % config.stride  # of which only the phase counts
        sampling: Sampling = {
            **config.sampling(),
            "softmax_scale": self.softmax_scale,
            "head_offset": head_offset,
        }
        rules: KeepRules = {**config.keep_rules(), "keep_last": config.keep_last and chunk.is_last}
        scores = estimate_block_scores(query, key, rows, causal=self.causal, sink=sink, **sampling)
        return select_blocks(
            scores,
            threshold,
            rows,
            causal=self.causal,
            seqlen_q=chunk.length,
            seqlen_k=chunk.seqlen_k,
            **rules,
        )

    def attend(
        self,
        heads: HeadGroup,
        keys: _Gathering,
        values: _Gathering,
        send_for_next: Callable[[], None],
        query: Tensor,
        sink: Tensor | None,
        out: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Writes a group's part of `out`, as `arriving` has it; its log-sum-exp and block mask of each chunk."""
        rows_of_chunks = [self.rows_of(chunk, heads) for chunk in self.chunks]
        sink = None if sink is None else sink[heads.queries]
        key = keys.wait()
        masks = [
            self.select(query[:, chunk.here, heads.queries], key[:, : chunk.seqlen_k], rows, chunk, heads, sink)
            for chunk, rows in zip(self.chunks, rows_of_chunks)
        ]  # while the values are on their way
        value = values.wait()
        send_for_next()
        lses = []
        for chunk, rows, block_mask in zip(self.chunks, rows_of_chunks, masks):
            of_chunk, lse = block_sparse_attention(
                query[:, chunk.here, heads.queries],
                key[:, : chunk.seqlen_k],
                value[:, : chunk.seqlen_k],
                block_mask,
                rows,
                causal=self.causal,
                softmax_scale=self.softmax_scale,
                compensate=self.compensate,
                quantization=self.core.config.quantization,
                sink=sink,
                return_softmax_lse=True,
            )
            out[:, chunk.here, heads.queries] = of_chunk
            lses.append(lse)
        return lses, masks


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
        out = paddle.empty([*query.shape[:3], value.shape[3]], dtype=query.dtype)
        of_groups = [
            gathered.attend(*of_group, query, sink, out) for of_group in gathered.arriving(key, value, FORWARD_GROUPS)
        ]
        lses, masks = ([paddle.concat(of_chunk, axis=1) for of_chunk in zip(*parts)] for parts in zip(*of_groups))
        last = gathered.chunks[-1]
        gathered.core.last_selection = BlockSelection(
            masks[-1],
            gathered.rows_of(last),
            causal=gathered.causal,
            seqlen_q=last.length,
            seqlen_k=last.seqlen_k,
        )
        gathered.block_masks = tuple(masks)
        ctx.gathered, ctx.has_sink = gathered, sink is not None
        ctx.wants_gradient = [x is not None and not x.stop_gradient for x in inputs]
        # The output would hold itself, were it saved as it is.
        ctx.save_for_backward(query, key, value, out.detach(), *lses, *([] if sink is None else [sink]))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        gathered: _GatheredKeys = ctx.gathered
        query, key, value, out, *lses = ctx.saved_tensor()
        sink = lses.pop() if ctx.has_sink else None
        grad_query, grad_key, grad_value = (paddle.empty_like(x) for x in (query, key, value))
        grad_sinks = []
        sums: tuple[HeadGroup, _Summing, _Summing] | None = None  # of the group before

        def finish(heads: HeadGroup, of_keys: _Summing, of_values: _Summing) -> None:
            grad_key[:, :, heads.keys] = of_keys.wait()
            grad_value[:, :, heads.keys] = of_values.wait()

        for heads, keys, values, send_for_next in gathered.arriving(key, value, BACKWARD_GROUPS):
            whole_key, whole_value = keys.wait(), values.wait()
            send_for_next()
            grad_keys, grad_values, of_sinks = [], [], []
            for chunk, block_mask, lse in zip(gathered.chunks, gathered.block_masks, lses):
                place = slice(None), chunk.here, heads.queries
                grad_query[place], of_key, of_value, of_sink = call(
                    "attend_gradients",
                    query[place],
                    whole_key[:, : chunk.seqlen_k],
                    whole_value[:, : chunk.seqlen_k],
                    block_mask[:, heads.queries],
                    gathered.rows_of(chunk, heads),
                    None if sink is None else sink[heads.queries],
                    out[place],
                    lse[:, heads.queries],
                    grad_out[place],
                    gathered.causal,
                    gathered.softmax_scale,
                    is_deterministic(gathered.core.config.deterministic),
                    False,  # compensation has no gradients
                    "",  # nor has quantization
                )
                grad_keys.append(of_key)
                grad_values.append(of_value)
                of_sinks.append(of_sink)
                if sums:  # which had a chunk's time to arrive: before the next chunk, which takes the memory
                    finish(*sums)
                    sums = None
            del whole_key, whole_value, of_key, of_value  # before what else is held is put together
            sums = heads, gathered.sum_of_ranks(grad_keys), gathered.sum_of_ranks(grad_values)
            del grad_keys, grad_values
            if sink is not None:
                grad_sinks.append(sum(of_sinks[1:], of_sinks[0]))
        assert sums
        finish(*sums)
        grads = [grad_query, grad_key, grad_value, *([] if sink is None else [paddle.concat(grad_sinks)])]
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
        self.ranks = group.nranks
        self.sent = tensor.contiguous()
        self.received: Tensor = paddle.empty([self.ranks * tensor.shape[0], *tensor.shape[1:]], dtype=tensor.dtype)
        self.task: Any = dist.stream.all_gather(self.received, self.sent, group=group, sync_op=False)

    def wait(self) -> Tensor:
        """[B, S, H, D], in the order of the sequence; what was sent and received is given up."""
        self.task.wait()
        batch_size, tokens, *others = self.sent.shape
        length = tokens * self.ranks // len(self.order)
        whole: Tensor = paddle.empty([batch_size, tokens * self.ranks, *others], dtype=self.sent.dtype)
        for number, (rank, i) in enumerate(self.order):
            of_rank = self.received[rank * batch_size : (rank + 1) * batch_size]
            whole[:, number * length : (number + 1) * length] = of_rank[:, i * length : (i + 1) * length]
        del self.sent, self.received, self.task  # which holds them too
        return whole


class _Summing:
    """The sum over the ranks of their parts [n, ...] for this one, on its way."""

    def __init__(self, parts: Tensor, group: Any) -> None:
        self.dtype, self.rank = parts.dtype, group.rank
        self.over_gloo = _is_gloo(group)
        if self.over_gloo:
            self.sent = self.received = parts.astype("float32")
            self.task: Any = dist.stream.all_reduce(self.received, group=group, sync_op=False)
        else:
            self.sent = parts.reshape([-1, *parts.shape[2:]])
            self.received = paddle.empty(parts.shape[1:], dtype=parts.dtype)
            self.task = dist.stream.reduce_scatter(self.received, self.sent, group=group, sync_op=False)

    def wait(self) -> Tensor:
        """It, in the dtype of the parts; what was sent and received is given up."""
        self.task.wait()
        total = self.received[self.rank].astype(self.dtype) if self.over_gloo else self.received
        del self.sent, self.received, self.task
        return total


def _is_gloo(group: Any) -> bool:
    return bool(group.process_group.name() == "GLOO")


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
