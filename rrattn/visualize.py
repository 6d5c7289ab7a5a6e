"""Pictures of block masks and block scores, one panel per head and layer.

A panel spans the keys from left to right and the queries from top to bottom, in tokens. What no query there may see
(above the causal diagonal, or by FlashMask) is grey. Up to CELLS_PER_PANEL blocks a side, one cell is one block; above
that a cell is a square of blocks and shows their mean, so that a picture of 1,024 blocks is as legible as one of 8.

Every function returns a `matplotlib.figure.Figure`, and writes it when given a path. They need matplotlib, which is
imported when they are called, and touch no global state of it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

import numpy as np
import paddle

from . import arguments
from .arrays import array_of
from .config import BLOCK_SIZE
from .layer import BlockSelection
from .masks import unpack_block_array
from .stats import ModelStats
from .visibility import BlockVisibility, Sizes, checked_sizes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from types import ModuleType

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Formatter
    from numpy.typing import NDArray

    from .arrays import ArrayLike

    Panel = tuple[str, NDArray[np.float64]]  # title and cells
    Style = tuple[Colormap, Normalize, Optional[Formatter], str]  # the last two of the colour bar: how, and of what

ThingT = TypeVar("ThingT")

CELLS_PER_PANEL = 128  # a side
MAX_PANELS = 256
QUICK_PANELS = 64  # drawn in a few seconds, and legible on a screen

_HIDDEN_COLOR = "#d5d7db"
_INK = "#2b2f36"
_GRID_COLOR = "#ffffff"
_MASK_COLORS = ["#f3f6fb", "#bcd3ee", "#5b93cf", "#1c5aa0", "#0a2a5e"]
_SCORE_COLORS = ["#fbf7f0", "#f6d9a8", "#ee9c5a", "#c44e52", "#6b1f5c", "#22103a"]
_GRID_UP_TO_CELLS = 24  # a side; finer grids would cover what they divide
_BAR_INCHES = 0.2  # width of the colour bar
_LOWEST_SHARE_SHOWN = 0.03  # of what each block would hold if all held the same


def plot_block_mask(
    block_mask: ArrayLike,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 0,
    heads: Iterable[int] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    layer: int | None = None,
) -> Figure:
    """Draws which blocks each head attends.

    A panel's title says what part of the visible blocks they are.

    Parameters
    ----------
    block_mask : Tensor
        int32 [B, Hq, Mq, ceil(Mk / 32)], as `select_blocks` returns it.
    startend_row_indices : Tensor, optional
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], FlashMask row bounds, as in the call that selected the blocks.
    causal : bool
    seqlen_q, seqlen_k : int
        Lq and Lk, in tokens.
    batch : int
        Which sequence of the batch.
    heads : sequence or iterator of int, optional
        Which query heads. Default: all.
    title : str, optional
    path : str or path, optional
        Where to write the picture; its suffix says the format.
    layer : int, optional
        Named in the panels' titles.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError, TypeError
        For arguments of another kind, shapes that do not fit, an absent batch index or head, or more than MAX_PANELS
        panels.
    """
    sizes = checked_sizes(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    layer = None if layer is None else arguments.count(layer, "layer")
    selected, visible_to = _selected_of_batch(block_mask, startend_row_indices, batch, sizes)
    panels = [_mask_panel(selected[head], visible_to(head), head, layer) for head in _pick_heads(heads, len(selected))]
    columns = _columns(len(panels))
    return _draw(panels, columns, _mask_style(), **sizes, title=title, path=path)


def layers_to_draw(num_layers: int, num_heads: int) -> list[int]:
    """The numbers of layers, spread evenly, of which so many heads each make QUICK_PANELS at most; one at least."""
    drawn = max(1, min(num_layers, QUICK_PANELS // num_heads))
    return [index * num_layers // drawn for index in range(drawn)]


def plot_layers(
    selections: Iterable[BlockSelection | None],
    *,
    batch: int = 0,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws which blocks each head of each layer attends: a row of panels per layer.

    Parameters
    ----------
    selections : sequence or iterator of BlockSelection
        One per layer, as `rrattn.layer_selections(model)` returns them, of one forward pass.
    layers, heads : sequence or iterator of int, optional
        Which layers and query heads. Default: all.
    batch, title, path
        As for `plot_block_mask`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    selections = _one_per_layer(selections, "selections", BlockSelection)
    layers = range(len(selections)) if layers is None else arguments.counts(layers, "layers")
    heads = None if heads is None else arguments.counts(heads, "heads")  # read once, for every layer
    panels: list[Panel] = []
    columns = 0
    for layer in layers:
        if not 0 <= layer < len(selections):
            raise ValueError(f"there is no layer {layer}; the selections are of {len(selections)} layers")
        selection = selections[layer]
        if selection is None or selection.block_mask is None:
            raise ValueError(f"layer {layer} has no block mask: it has not run, or its mask was too large to keep")
        sizes: Sizes = {"causal": selection.causal, "seqlen_q": selection.seqlen_q, "seqlen_k": selection.seqlen_k}
        rows = selection.startend_row_indices
        selected, visible_to = _selected_of_batch(selection.block_mask, rows, batch, sizes)
        picked = _pick_heads(heads, len(selected))
        columns = max(columns, len(picked))
        panels += [_mask_panel(selected[head], visible_to(head), head, layer) for head in picked]
    if not panels:
        raise ValueError("there is no layer to draw: selections is empty")
    if len(layers) == 1:
        columns = _columns(columns)
    return _draw(panels, columns, _mask_style(), **sizes, title=title, path=path)


def plot_block_scores(
    block_scores: ArrayLike,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 0,
    heads: Iterable[int] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    layer: int | None = None,
) -> Figure:
    """Draws the estimated share of attention that each block has in its row of blocks, on a logarithmic scale.

    A panel's title says what part of the visible blocks it takes to hold 95% of every row.

    Parameters
    ----------
    block_scores : Tensor
        float32 [B, Hq, Mq, Mk], as `estimate_block_scores` returns it.
    startend_row_indices, causal, seqlen_q, seqlen_k, batch, heads, title, path, layer
        As for `plot_block_mask`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    sizes = checked_sizes(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    layer = None if layer is None else arguments.count(layer, "layer")
    scores, visible_to = _of_batch(array_of(block_scores, "block_scores")[0], startend_row_indices, batch, sizes)
    panels = []
    for head in _pick_heads(heads, len(scores)):
        visible = visible_to(head)
        shares = np.where(visible, scores[head].astype(np.float64), 0.0)
        row_sums = shares.sum(axis=-1, keepdims=True)
        shares /= np.where(row_sums > 0, row_sums, 1.0)
        largest = np.sort(shares, axis=-1)[:, ::-1]
        needed = (np.cumsum(largest, axis=-1) < 0.95).sum(axis=-1) + 1
        share = np.minimum(needed, visible.sum(axis=-1)).sum() / max(visible.sum(), 1)
        panels.append((f"{_panel_name(head, layer)}  ·  95% in {share:.0%} of blocks", _mean_cells(shares, visible)))
    return _draw(panels, _columns(len(panels)), _score_style(scores.shape[2]), **sizes, title=title, path=path)


def plot_densities(
    densities: Iterable[paddle.Tensor | None],
    *,
    batch: int = 0,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws the density of every head of every layer as one table of colours.

    Parameters
    ----------
    densities : sequence or iterator of Tensor
        float32 [B, Hq] per layer, as `rrattn.layer_densities(model)` returns them.
    batch, title, path
        As for `plot_block_mask`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    found = _one_per_layer(densities, "densities", paddle.Tensor)
    present = [density for density in found if density is not None]
    if len(present) < len(found) or not present:
        raise ValueError("there is a layer that has not run yet, or no layer at all")
    shapes = sorted({tuple(density.shape) for density in present})
    if len(shapes) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"densities has tensors of the shapes {shapes}, but all must be of one shape [B, Hq]")
    batch = _checked_batch(batch, present[0])
    table = np.stack([density.numpy()[batch] for density in present])  # [layers, Hq]
    num_layers, num_heads = table.shape
    figure = Figure(figsize=(2.2 + 0.42 * num_heads, 1.4 + 0.36 * num_layers), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = _draw_table(axes, table)
    axes.set(xlabel="query head", ylabel="layer", title=title)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), label="visible blocks attended")
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib has it typed as a mapping
    return _finish(figure, path)


def plot_stats(stats: ModelStats, *, title: str | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws density and kept mass of every head of every layer as tables of colours, and each layer's time as a bar.

    Kept mass is the estimated one, and beside it the true one where it was measured.

    Parameters
    ----------
    stats : ModelStats
        From `rrattn.collect_stats`, of a model that has run a prefill.
    title, path
        As for `plot_block_mask`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not isinstance(stats, ModelStats):
        raise arguments.refused(stats, "stats", "a ModelStats, from rrattn.collect_stats")
    found = {
        "visible blocks attended, %": [layer.density for layer in stats.layers],
        "estimated mass kept, %": [layer.estimated_mass for layer in stats.layers],
        "true mass kept, %": [layer.true_mass for layer in stats.layers],
    }
    tables = {}  # [layers, Hq]
    for name, of_layers in found.items():
        present = [one for one in of_layers if one is not None]
        if present and len(present) == len(of_layers):
            tables[name] = np.stack(present)
    if len(tables) < 2:
        raise ValueError("there is a layer that has not run a prefill, or no layer at all")
    num_layers, num_heads = tables["visible blocks attended, %"].shape
    table_width = 1.6 + 0.36 * num_heads
    size = len(tables) * table_width + 3.2, 1.5 + 0.36 * num_layers
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    widths = [*[table_width] * len(tables), 2.8]
    axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    for panel, (name, table) in zip(axes, tables.items()):
        _draw_table(panel, table)
        panel.set_title(name, fontsize=9, color=_INK)
        panel.set_xlabel("query head", fontsize=9, color=_INK)
    axes[0].set_ylabel("layer", fontsize=9, color=_INK)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))

    bars = axes[-1]
    left = np.zeros(num_layers)
    for name, color in (("prefill", _MASK_COLORS[3]), ("decode", _MASK_COLORS[1])):
        milliseconds = np.array([1e3 * getattr(layer, f"{name}_seconds") for layer in stats.layers])
        if milliseconds.any():
            bars.barh(np.arange(num_layers), milliseconds, left=left, height=0.7, color=color, label=name)
        left += milliseconds
    bars.set_title("attention, ms", fontsize=9, color=_INK)
    bars.set_xlim(0, None)
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, labelcolor=_INK, frameon=False)
    for panel in axes:
        panel.tick_params(labelsize=8, color=_INK, labelcolor=_INK, length=3)
        for spine in panel.spines.values():
            spine.set_color(_HIDDEN_COLOR)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return _finish(figure, path)


def _draw_table(axes: Axes, table: NDArray[Any]) -> AxesImage:
    """Shares [layers, heads] as colours from 0 to 1, with their percentages where these can be read."""
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(table, cmap=_colormap(_MASK_COLORS), vmin=0, vmax=1, aspect="auto")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if max(table.shape) <= 40:
        for layer, head in np.ndindex(table.shape):
            color = "white" if table[layer, head] > 0.55 else _INK
            percentage = f"{100 * table[layer, head]:.0f}"
            axes.text(head, layer, percentage, ha="center", va="center", fontsize=7, color=color)
    return image


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("rrattn.visualize needs matplotlib: pip install matplotlib") from error
    return matplotlib


def _colormap(colors: list[str]) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("rrattn", colors).with_extremes(bad=_HIDDEN_COLOR)


def _mask_style() -> Style:
    _matplotlib()
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    return _colormap(_MASK_COLORS), Normalize(0, 1), PercentFormatter(1.0), "blocks attended"


def _score_style(num_k_blocks: int) -> Style:
    _matplotlib()
    from matplotlib.colors import LogNorm

    return (
        _colormap(_SCORE_COLORS),
        LogNorm(_LOWEST_SHARE_SHOWN / max(num_k_blocks, 1), 1, clip=True),
        None,
        "share of the row's attention",
    )


def _selected_of_batch(
    block_mask: ArrayLike, startend_row_indices: paddle.Tensor | None, batch: int, sizes: Sizes
) -> tuple[NDArray[Any], Callable[[int], NDArray[np.bool_]]]:
    """`_of_batch` of a packed block mask, bool [Hq, Mq, Mk]."""
    selected = unpack_block_array(block_mask, -(-sizes["seqlen_k"] // BLOCK_SIZE))
    return _of_batch(selected, startend_row_indices, batch, sizes)


def _of_batch(
    array: NDArray[Any], startend_row_indices: paddle.Tensor | None, batch: int, sizes: Sizes
) -> tuple[NDArray[Any], Callable[[int], NDArray[np.bool_]]]:
    """(array [Hq, Mq, Mk] of one sequence, function from a head to its visible blocks [Mq, Mk]), checked.

    array is [B, Hq, Mq, Mk]; sizes are causal, seqlen_q and seqlen_k.
    """
    blocks = tuple(-(-length // BLOCK_SIZE) for length in (sizes["seqlen_q"], sizes["seqlen_k"]))
    if array.ndim != 4 or array.shape[2:] != blocks:
        raise ValueError(
            f"expected {blocks[0]} query blocks and {blocks[1]} key blocks for these lengths, "
            f"got shape {list(array.shape)}"
        )
    if 0 in blocks:
        raise ValueError("there are no blocks to draw")
    batch = _checked_batch(batch, array)
    visibility = BlockVisibility(startend_row_indices, **sizes, batch_size=array.shape[0], num_heads=array.shape[1])
    return array[batch], partial(visibility.of, batch)


def _checked_batch(batch: int, array: NDArray[Any] | paddle.Tensor) -> int:
    """The number of a sequence in the batch of array [B, ...]."""
    batch = arguments.count(batch, "batch")
    if batch >= array.shape[0]:
        raise ValueError(f"there is no sequence {batch} in a batch of {array.shape[0]}")
    return batch


def _one_per_layer(things: object, name: str, kind: type[ThingT]) -> list[ThingT | None]:
    """A sequence or an iterator of things of this kind, or None, as a list."""
    found = arguments.entries(things)
    if found is None or not all(thing is None or isinstance(thing, kind) for thing in found):
        raise arguments.refused(things if found is None else found, name, f"a sequence of {kind.__name__}, one a layer")
    return found


def _pick_heads(heads: Iterable[int] | None, num_heads: int) -> Sequence[int]:
    heads = range(num_heads) if heads is None else arguments.counts(heads, "heads")
    absent = [head for head in heads if head >= num_heads]
    if absent or not heads:
        raise ValueError(f"there is no head {absent} to draw among {num_heads} heads" if absent else "no head to draw")
    return heads


def _columns(num_panels: int) -> int:
    """Columns of a near-square grid, eight at most."""
    return min(num_panels, 4 if num_panels <= 8 else 8)


def _panel_name(head: int, layer: int | None) -> str:
    return f"head {head}" if layer is None else f"layer {layer}, head {head}"


def _mask_panel(selected: NDArray[np.bool_], visible: NDArray[np.bool_], head: int, layer: int | None) -> Panel:
    """(title, cells) of one head; selected and visible are bool [Mq, Mk]."""
    kept = selected & visible
    density = kept.sum() / max(visible.sum(), 1)
    return f"{_panel_name(head, layer)}  ·  {density:.1%}", _mean_cells(kept.astype(np.float64), visible)


def _mean_cells(values: NDArray[np.float64], visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Means over the visible blocks of each cell, NaN where there is none; values are 0 where nothing is visible.

    [Mq, Mk] -> [at most CELLS_PER_PANEL, at most CELLS_PER_PANEL].
    """
    side = -(-max(values.shape) // CELLS_PER_PANEL)
    padding = [(0, -size % side) for size in values.shape]

    def cell_sums(array: NDArray[Any]) -> NDArray[np.float64]:
        padded = np.pad(array.astype(np.float64), padding)
        rows, columns = padded.shape
        sums: NDArray[np.float64] = padded.reshape(rows // side, side, columns // side, side).sum(axis=(1, 3))
        return sums

    counts = cell_sums(visible)
    return np.where(counts > 0, cell_sums(values) / np.maximum(counts, 1), np.nan)


def _draw(
    panels: list[Panel],
    columns: int,
    style: Style,
    *,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int,
    title: str | None,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """A grid of (title, cells) panels of the same limits and one colour bar; ticks are at the left and below alone.

    matplotlib takes most of its time for ticks, and for shared axes, each of whose limits it looks up in all others.
    """
    _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

    if len(panels) > MAX_PANELS:
        raise ValueError(f"{len(panels)} panels are too many to draw, the most is {MAX_PANELS}: choose heads or layers")
    colormap, norm, bar_format, bar_label = style
    rows = -(-len(panels) // columns)
    width = 3.0 if columns <= 4 else 2.2
    height = width * min(max(seqlen_q / seqlen_k, 0.35), 1.5)
    figure = Figure(
        figsize=(columns * width + 1.3, rows * (height + 0.3) + (1.0 if title else 0.6)),
        dpi=150,
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    first_position = seqlen_k - seqlen_q if causal else 0
    label_tokens = FuncFormatter(lambda tokens, _: _token_label(tokens))
    for index, panel in enumerate(axes.flat):
        if index >= len(panels):
            panel.set_visible(False)
            continue
        name, cells = panels[index]
        side = BLOCK_SIZE * -(-max(-(-seqlen_q // BLOCK_SIZE), -(-seqlen_k // BLOCK_SIZE)) // CELLS_PER_PANEL)
        bottom, right = first_position + cells.shape[0] * side, cells.shape[1] * side
        image = panel.imshow(
            np.ma.masked_invalid(cells),
            cmap=colormap,
            norm=norm,
            extent=(0, right, bottom, first_position),
            aspect="auto",
            interpolation="nearest",
        )
        if max(cells.shape) <= _GRID_UP_TO_CELLS:
            panel.hlines(np.arange(first_position + side, bottom, side), 0, right, color=_GRID_COLOR, linewidth=0.8)
            panel.vlines(np.arange(side, right, side), first_position, bottom, color=_GRID_COLOR, linewidth=0.8)
        panel.set_xlim(0, seqlen_k)
        panel.set_ylim(first_position + seqlen_q, first_position)
        panel.set_title(name, fontsize=9 if width > 2.5 else 7.5, color=_INK)
        panel.tick_params(labelsize=8, color=_INK, labelcolor=_INK, length=3)
        has_ticks = index + columns >= len(panels), index % columns == 0
        for axis, length, ticks in zip((panel.xaxis, panel.yaxis), (seqlen_k, seqlen_q), has_ticks):
            axis.set_major_locator(
                MultipleLocator(2 ** max(length - 1, 1).bit_length() / 4) if ticks else NullLocator()
            )
            axis.set_major_formatter(label_tokens)
        for spine in panel.spines.values():
            spine.set_color(_HIDDEN_COLOR)
    figure.supxlabel("key token", fontsize=9, color=_INK)
    figure.supylabel("query token", fontsize=9, color=_INK)
    # Beside the last column alone: for each of its parents the layout looks at all others.
    aspect = max(20, figure.get_figheight() / _BAR_INCHES)
    bar = figure.colorbar(image, ax=axes[:, -1], format=bar_format, fraction=0.1, pad=0.03, aspect=aspect)
    bar.set_label(bar_label, fontsize=9, color=_INK)
    bar.ax.tick_params(labelsize=8, labelcolor=_INK, color=_INK)
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib has it typed as a mapping
    figure.legend(
        handles=[Patch(color=_HIDDEN_COLOR, label="not visible")],
        loc="outside lower right",
        fontsize=8,
        labelcolor=_INK,
        frameon=False,
    )
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return _finish(figure, path)


def _token_label(tokens: float) -> str:
    if tokens >= 1024 and tokens % 1024 == 0:
        return f"{tokens / 1024:.0f}K"
    return f"{tokens:.0f}"


def _finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
