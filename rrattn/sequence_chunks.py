"""Which tokens each rank of a group holds, in the layouts of :mod:`rrattn.distributed`, and which heads go together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from .config import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

OnItsWay = TypeVar("OnItsWay")

MESSAGE_BYTES = 2 << 20
"""The least that a rank sends of the keys of a group of heads, where there is more than one group. With 4 query heads a
key head, D 128 and 16 bits it then has 256 blocks of queries or more in a group, for as many multiprocessors to work
on, and the ranks keep all groups up to 16 of them at 131072 tokens. What less would cost was not measured."""
FORWARD_GROUPS, BACKWARD_GROUPS = 4, 8
"""The most groups of a pass. With so many, what a rank holds of keys and values for two groups, and in the backward
pass of their gradients and of workspace too, is about as much as the keys and values of all heads. Each kernel waits
for its last blocks, so more groups cost time. Two H100, 262144 tokens, milliseconds: forward in 1, 4 and 8 groups 209,
212 and 222 over half of the blocks of random data, and 32, 36 and 40 over those of structured data, where a few keys
are seen by most queries and take long; backward in 8 groups 672 and 109, where one GPU takes 1236 and 171."""


@dataclass(frozen=True)
class Chunk:
    """Queries of a rank that follow each other in the sequence, and the keys that they may see: the first ones."""

    here: slice
    """Where they are among the rank's queries."""
    start: int
    """Which token of the sequence is the first."""
    length: int
    seqlen_k: int
    is_last: bool
    """Whether they are the last of the sequence."""


def chunks_of_rank(layout: str, ranks: int, rank: int) -> tuple[int, ...]:
    """Which chunks of the sequence a rank holds, in the order in which it holds them.

    Parameters
    ----------
    layout : str
        "dual_chunk", of 2 `ranks` chunks, or another, of `ranks` chunks.
    """
    return (rank, 2 * ranks - 1 - rank) if layout == "dual_chunk" else (rank,)


def chunk_places(layout: str, ranks: int) -> list[tuple[int, int]]:
    """Where each chunk of the sequence is, in its order: (rank, which of the rank's chunks)."""
    places = {}
    for rank in range(ranks):
        places.update({chunk: (rank, i) for i, chunk in enumerate(chunks_of_rank(layout, ranks, rank))})
    return [places[chunk] for chunk in range(len(places))]


def chunks_here(layout: str, ranks: int, rank: int, seqlen_here: int, *, causal: bool) -> list[Chunk]:
    """The chunks of a rank that holds `seqlen_here` tokens.

    Raises
    ------
    ValueError
        Where chunks are no multiples of a block, in which the selection could differ from that of one process.
    """
    indices = chunks_of_rank(layout, ranks, rank)
    length, remainder = divmod(seqlen_here, len(indices))
    if remainder or length % BLOCK_SIZE or not length:
        step = BLOCK_SIZE * len(indices)
        raise ValueError(
            f"each of {ranks} ranks has {seqlen_here} tokens, but with the layout {layout!r} must have a multiple of "
            f"{step}, at least one: sequences of a multiple of {step * ranks} tokens"
        )
    seqlen = seqlen_here * ranks
    return [
        Chunk(
            here=slice(place * length, (place + 1) * length),
            start=index * length,
            length=length,
            seqlen_k=(index + 1) * length if causal else seqlen,
            is_last=(index + 1) * length == seqlen,
        )
        for place, index in enumerate(indices)
    ]


@dataclass(frozen=True)
class HeadGroup:
    """Key heads that are gathered together, and the query heads that attend to them."""

    keys: slice
    queries: slice


def head_groups(num_heads: int, num_heads_k: int, head_bytes: int, most: int) -> list[HeadGroup]:
    """All heads, in the groups in which ranks gather and attend them, one after the other.

    Their number is the largest divisor of `num_heads_k` up to `most` with which a message has MESSAGE_BYTES, or 1.

    Parameters
    ----------
    head_bytes : int
        What a rank holds of the keys of one head.
    most : int
        FORWARD_GROUPS or BACKWARD_GROUPS.
    """
    most = min(most, num_heads_k * head_bytes // MESSAGE_BYTES)
    number = max((groups for groups in range(1, most + 1) if num_heads_k % groups == 0), default=1)
    heads, heads_k = num_heads // number, num_heads_k // number
    return [HeadGroup(slice(i * heads_k, (i + 1) * heads_k), slice(i * heads, (i + 1) * heads)) for i in range(number)]


def groups_arriving(
    groups: Sequence[HeadGroup], gather: Callable[[HeadGroup], tuple[OnItsWay, OnItsWay]]
) -> Iterator[tuple[HeadGroup, OnItsWay, OnItsWay, Callable[[], None]]]:
    """Yields each group, its keys and values on their way, and what is to be called once these have arrived: it sends
    for those of the next.

    Parameters
    ----------
    gather : callable
        Sends for the keys and values of a group.
    """
    not_sent_for = iter(groups)
    coming: list[tuple[OnItsWay, OnItsWay]] = []

    def send_for_next() -> None:
        coming.extend(gather(heads) for heads in islice(not_sent_for, 1))

    send_for_next()
    for heads in groups:
        yield heads, *coming.pop(0), send_for_next
