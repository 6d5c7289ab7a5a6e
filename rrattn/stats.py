"""What the attention layers of a model did: density, kept mass as estimated and in truth, and time, per layer and head.

with rrattn.collect_stats(model) as stats:
    model.generate(input_ids)
print(stats)
stats.plot("stats.png")
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import paddle

from . import arguments
from .attention_mass import row_mass, sampled_rows
from .config import BLOCK_SIZE
from .functional import estimate_block_scores
from .integrations import attention_cores
from .layer import RRAttention
from .masks import unpack_block_array
from .visibility import BlockVisibility, Sizes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from paddle import Tensor
    from paddle.nn import Layer

    from .config import Sampling

MASS_ROWS = 64
"""Queries of a call whose true attention mass is measured, unless `collect_stats` is told otherwise."""

_TABLE = "{:>5}  {:>24}  {:>25}  {:>20}  {:>16}  {:>16}"


@dataclass
class LayerStats:
    """What one attention layer did, over all its calls.

    Attributes
    ----------
    prefills, decodings : int
        Calls that select blocks, or attend all of them where the layer or the input is dense; and calls of one query
        over longer keys, which always attend all. Recompute calls a layer twice.
    prefill_seconds, decode_seconds : float
        Time in these calls, on the host and, on a GPU, with the device idle before and after. The time to collect is
        not in it.
    """

    prefills: int = 0
    decodings: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    # Sums over the prefills, and over their batches, [Hq] float64: blocks that were attended, visible blocks; estimated
    # mass in the former, and all of it; true mass of the sampled queries in the former, and all of it.
    _sums: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def density(self) -> NDArray[np.float64] | None:
        """float64 [Hq]: the share of the visible blocks that the prefills attended; None where there was none."""
        return None if self._sums is None else _ratio(self._sums[0], self._sums[1])

    @property
    def estimated_mass(self) -> NDArray[np.float64] | None:
        """float64 [Hq]: the share of the estimated mass in the blocks that the prefills attended; None likewise.

        The mass is that of the estimate: sums of block scores (see `rrattn.estimate_block_scores`), in which each
        sampled query that sees anything has a mass of 1, less what a sink takes. It says what the selection aimed at,
        so it is hardly below the threshold.
        """
        return None if self._sums is None else _ratio(self._sums[2], self._sums[3])

    @property
    def true_mass(self) -> NDArray[np.float64] | None:
        """float64 [Hq]: the share of the true attention mass in these blocks; None likewise, or where no queries are
        sampled for it.

        It is of queries spread over each call: the softmax probabilities of the keys in the attended blocks as a part
        of those of all keys, computed in float32. A sink joins these softmaxes, and is no key.
        """
        return None if self._sums is None or not self._sums[5].any() else _ratio(self._sums[4], self._sums[5])

    def _add(self, sums: NDArray[np.float64]) -> None:
        self._sums = sums if self._sums is None else self._sums + sums


@dataclass
class ModelStats:
    """What `collect_stats` collected.

    Its string is a table with a row per layer: over its heads the density, and the mass kept in the attended blocks, as
    estimated and in truth (see `LayerStats`); then calls and the mean time of one.

    Attributes
    ----------
    layers : list of LayerStats
        One per attention layer, in order.
    """

    layers: list[LayerStats]

    def __str__(self) -> str:
        names = "density: mean, min, max", "estimated mass: mean, min", "true mass: mean, min", "prefill", "decode"
        rows = [_TABLE.format("layer", *names)]
        for index, layer in enumerate(self.layers):
            density = "-"
            if layer.density is not None:
                density = f"{layer.density.mean():.1%}, {layer.density.min():.1%}, {layer.density.max():.1%}"
            masses = [
                "-" if mass is None else f"{mass.mean():.1%}, {mass.min():.1%}"
                for mass in (layer.estimated_mass, layer.true_mass)
            ]
            prefill = _calls(layer.prefills, layer.prefill_seconds)
            decode = _calls(layer.decodings, layer.decode_seconds)
            rows.append(_TABLE.format(index, density, *masses, prefill, decode))
        return "\n".join(rows)

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str | None = None) -> Figure:
        """Draws density, kept masses and time: see `rrattn.visualize.plot_stats`."""
        from .visualize import plot_stats

        return plot_stats(self, title=title, path=path)


@contextlib.contextmanager
def collect_stats(model: Layer, *, mass_rows: int = MASS_ROWS) -> Iterator[ModelStats]:
    """Collects what the attention layers of a model do inside a `with` block.

    The estimated mass takes an estimate of its own after every prefill call, whose scores go to the host: float32 [B,
    Hq, Mq, Mk], which is 134 MB for 32 heads at 128K tokens. The true mass takes the products of `mass_rows` queries
    with all keys. Outside of the block nothing is collected, at no cost.

    Parameters
    ----------
    model : paddle.nn.Layer
        A model that runs rrattn: by `rrattn.enable`, or by its flag in PaddleFormers.
    mass_rows : int
        So many queries of each prefill call and sequence, spread evenly over it, are sampled for the true mass; 0: it
        is not measured.

    Yields
    ------
    ModelStats
        Filled as the model runs; its string is a table, and its `plot` draws a picture.

    Raises
    ------
    ValueError
        When the model does not run rrattn, its statistics are being collected already, or mass_rows is no count.
    """
    mass_rows = arguments.count(mass_rows, "mass_rows")
    found = attention_cores(model)
    cores = [core for core in found if core is not None]
    if len(cores) < len(found):
        raise ValueError("rrattn is not enabled on this model")
    if any(core._observer is not None for core in cores):
        raise ValueError("statistics of this model are being collected already")
    stats = ModelStats([LayerStats() for _ in cores])
    for core, layer in zip(cores, stats.layers):
        core._observer = _Observer(core, layer, mass_rows)
    try:
        yield stats
    finally:
        for core in cores:
            core._observer = None


class _Observer:
    """Runs the attention calls of one layer in place of its `_attend`, and adds them to its statistics."""

    def __init__(self, core: RRAttention, stats: LayerStats, mass_rows: int) -> None:
        self.core = core
        self.stats = stats
        self.mass_rows = mass_rows

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        startend_row_indices: Tensor | None,
        *,
        causal: bool,
        softmax_scale: float | None,
        sink: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        _wait_for(query)
        begin = time.perf_counter()
        out, block_mask = self.core._attend(
            query, key, value, startend_row_indices, causal=causal, softmax_scale=softmax_scale, sink=sink
        )
        _wait_for(query)
        seconds = time.perf_counter() - begin
        if block_mask is None:
            self.stats.decodings += 1
            self.stats.decode_seconds += seconds
            return out, block_mask
        sampling: Sampling = {**self.core.config.sampling(), "softmax_scale": softmax_scale}  # the scale is the call's
        scores = estimate_block_scores(query, key, startend_row_indices, causal=causal, sink=sink, **sampling)
        self.stats.prefills += 1
        self.stats.prefill_seconds += seconds
        sizes: Sizes = {"causal": causal, "seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        rows = sampled_rows(query.shape[1], self.mass_rows)
        mass = row_mass(query, key, rows, startend_row_indices, causal=causal, softmax_scale=softmax_scale, sink=sink)
        self.stats._add(_sums(scores.numpy(), rows, mass, block_mask, startend_row_indices, sizes))
        return out, block_mask


def _sums(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    mass: NDArray[np.float32],
    block_mask: Tensor,
    startend_row_indices: Tensor | None,
    sizes: Sizes,
) -> NDArray[np.float64]:
    """float64 [6, Hq], over the batch, what `LayerStats` sums; mass is that of the rows, as `row_mass` returns it."""
    batch_size, num_heads, _, num_k_blocks = scores.shape
    visibility = BlockVisibility(startend_row_indices, **sizes, batch_size=batch_size, num_heads=num_heads)
    selected = unpack_block_array(block_mask, num_k_blocks)  # [B, Hq, Mq, Mk]
    sums = np.zeros([6, num_heads])
    for batch, head in np.ndindex(batch_size, num_heads):  # one at a time, so that the temporaries stay small
        visible, score = visibility.of(batch, head), scores[batch, head]
        kept = selected[batch, head] & visible
        counts = kept.sum(), visible.sum()
        estimated = score.sum(dtype=np.float64, where=kept), score.sum(dtype=np.float64)
        of_rows = mass[batch, head]
        true = of_rows.sum(dtype=np.float64, where=kept[rows // BLOCK_SIZE]), of_rows.sum(dtype=np.float64)
        sums[:, head] += (*counts, *estimated, *true)
    return sums


def _wait_for(tensor: Tensor) -> None:
    """Lets the tensor's device finish what it was given."""
    if tensor.place.is_gpu_place():
        paddle.device.synchronize()


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = part / np.where(whole > 0, whole, 1)
    return ratio


def _calls(count: int, seconds: float) -> str:
    """'3 x 12.5 ms': how many calls, and the mean time of one."""
    return f"{count} x {1e3 * seconds / count:.2f} ms" if count else "-"
