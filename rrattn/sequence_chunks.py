"""Which tokens of a sequence each rank of a group holds, in the layouts of :mod:`rrattn.distributed`."""

from __future__ import annotations

from dataclasses import dataclass

from .config import BLOCK_SIZE


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
