"""`rrattn calibrate`: a threshold for each head or layer of a model, for a stated bound on lost attention mass."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _HAS_PADDLE
from .arguments import STRIDES
from .command_line import check_at_least, check_checkpoint, check_output_file, quiet_libraries, read_text
from .config import RRAttentionConfig, Sampling

if TYPE_CHECKING:
    import paddle
    from numpy.typing import NDArray

if _HAS_PADDLE:
    from . import checkpoint
    from .attention_mass import density_and_kept, exact_block_mass
    from .functional import block_sparse_attention, estimate_block_scores, select_blocks
    from .integrations import attention_cores, enable
    from .masks import dense_block_mask, unpack_block_mask

DESCRIPTION = """Finds a threshold for each head or layer of a model, for a stated bound on lost attention mass.

A threshold is a share of the estimated attention mass; the blocks that it chooses hold another share of the true one.
So one threshold for all heads spends blocks where they hardly matter: a head whose estimate is good could do with less
than one whose estimate is poor. Here the bound is on what is really lost: on prefills of sample text, the true
attention mass outside the chosen blocks, by the softmax of every row; what is printed as lost is this mass as well.
`--bound each` finds for each head (or layer) the smallest threshold whose loss is within the bound; `--bound mean`
spreads blocks over all of them so that the mean loss is within the bound and the blocks are as few as can be. Both are
then checked on held-out text, beside one threshold of the same loss.

Samples are of the checkpoint's own tokenizer's tokens, or of bytes where it has none and at most 512 tokens (they then
begin with a byte 0, as the texts of examples/probe do). The model runs on Paddle's device, in bfloat16 on a GPU and in
float32 on a CPU, through PaddleFormers or PaddleNLP, whichever is installed. All attention products are computed:
expect minutes for small models on a CPU, and take a GPU for large ones.

CONFIG holds an RRAttentionConfig: rrattn.enable(model, rrattn.RRAttentionConfig.from_json("CONFIG")).

Where the held-out text loses more than the bound, CONFIG is written as well, but the command says so on stderr and its
exit status is 1.
"""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99,
              0.995, 0.999, 1.0)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stride = RRAttentionConfig().stride
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a checkpoint directory of PaddleFormers or PaddleNLP"
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the file to write, JSON")
    for name, what in (("--text", "sample text"), ("--held-out", "text to check the result on")):
        parser.add_argument(
            name, metavar="FILE", nargs="+", type=Path, required=True, help=f"{what}: files of plain text"
        )
    parser.add_argument("--loss", type=float, default=0.05, help="true attention mass that may be lost (default: 0.05)")
    parser.add_argument("--per", choices=("layer", "head"), default="head", help="(default: head)")
    parser.add_argument("--bound", choices=("each", "mean"), default="mean", help="what the loss is of (default: mean)")
    parser.add_argument("--stride", type=int, choices=STRIDES, default=stride, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="of each file of text (default: %(default)s)")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program by `parser.error` for what cannot work, before any weights are read.

    In place of the texts' paths stand samples of them then, lists of int64 [length].
    """
    if not 0 < arguments.loss < 1:
        parser.error(f"--loss must be between 0 and 1, got {arguments.loss}")
    check_at_least(parser, arguments, samples=1, length=512)
    check_checkpoint(parser, "MODEL", arguments.model)
    check_output_file(parser, "CONFIG", arguments.config)
    texts = {name: [read_text(parser, name, path) for path in paths] for name, paths in _texts(arguments)}
    with quiet_libraries():
        try:
            codec = checkpoint.codec_of(arguments.model)
        except (ValueError, OSError) as error:
            parser.error(f"MODEL {arguments.model}: {error}")
    found: dict[str, list[NDArray[np.int64]]] = {}
    for name, paths in _texts(arguments):
        found[name] = []
        for path, text in zip(paths, texts[name]):
            try:
                found[name] += checkpoint.samples(codec, text, arguments.length, arguments.samples)
            except ValueError as error:
                parser.error(f"{name} {path}: {error}")
    arguments.text, arguments.held_out = found.values()


def _texts(arguments: argparse.Namespace) -> tuple[tuple[str, list[Path]], ...]:
    return ("--text", arguments.text), ("--held-out", arguments.held_out)


def run(arguments: argparse.Namespace) -> int:
    """Calibrates, and returns the exit status; the arguments are checked."""
    with quiet_libraries():
        model = checkpoint.load_model(arguments.model, checkpoint.usual_dtype())
        enable(model, config_of(1.0, arguments.stride))
    kept, density = measure(model, arguments.text, "sample text")
    chosen = choose(kept, density, arguments)
    thresholds = as_thresholds(chosen, kept.shape[1], arguments.per)
    config_of(thresholds, arguments.stride).to_json(arguments.config)
    held_kept, held_density = measure(model, arguments.held_out, "held-out text")
    print(f"{'':22} {'true mass lost':>14} {'density':>9} {'one threshold of that loss':>28} {'blocks saved':>13}")
    for name, k, d in (("sample text", kept, density), ("held-out text", held_kept, held_density)):
        k, d = grouped(k, arguments.per), grouped(d, arguments.per)
        of_global = global_density(k, d, at(k, chosen))
        saved = 1 - at(d, chosen) / of_global
        print(f"{name:22} {1 - at(k, chosen):14.2%} {at(d, chosen):9.1%} {of_global:28.1%} {saved:13.1%}")
    lost = 1 - np.take_along_axis(grouped(held_kept, arguments.per), chosen[None], 0)[0]  # [groups]
    print(
        f"worst {arguments.per} on held-out text: {lost.max():.2%} of the true mass lost; "
        f"bound on {arguments.bound}: {arguments.loss:.2%}"
    )
    print(f"written: {arguments.config}")
    of_bound, what = (lost.max(), f"the worst {arguments.per}") if arguments.bound == "each" else (lost.mean(), "it")
    if of_bound <= arguments.loss:
        return 0
    print(
        f"rrattn calibrate: the bound does not hold on the held-out text: {what} loses {of_bound:.3%} of the true "
        f"mass, more than --loss {arguments.loss:.3%}; {arguments.config} was written all the same",
        file=sys.stderr,
    )
    return 1


class _Measurement:
    """Attends every block in place of a layer's own attention, and measures what each threshold would choose there."""

    def __init__(self, config: RRAttentionConfig):
        self.config = config
        self.results: list[NDArray[np.float64]] = []  # of each prefill, [thresholds, heads, 2]: density and kept mass

    def __call__(
        self,
        query: paddle.Tensor,
        key: paddle.Tensor,
        value: paddle.Tensor,
        startend_row_indices: paddle.Tensor | None,
        *,
        causal: bool,
        softmax_scale: float | None,
        sink: paddle.Tensor | None,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(out, block mask). The prefills are plain causal, so bounds that the library makes of that say no more."""
        config, sizes = self.config, {"causal": causal, "seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        mass = exact_block_mass(query, key, softmax_scale, sink)
        sampling: Sampling = {**config.sampling(), "softmax_scale": softmax_scale}  # the scale is the call's
        scores = estimate_block_scores(query, key, causal=causal, sink=sink, **sampling)
        rules = config.keep_rules()
        measured = []
        for threshold in THRESHOLDS:
            block_mask = select_blocks(scores, threshold, **sizes, **rules)
            selected = unpack_block_mask(block_mask, mass.shape[2]).numpy()[0]
            measured.append(np.stack(density_and_kept(selected, mass), axis=-1))
        self.results.append(np.stack(measured))
        block_mask = dense_block_mask(1, query.shape[2], **sizes)
        out = block_sparse_attention(
            query, key, value, block_mask, causal=causal, softmax_scale=softmax_scale, sink=sink
        )
        return out, block_mask


def config_of(threshold: Any, stride: int) -> RRAttentionConfig:
    """What is calibrated. It has no least share, which might keep less than a bound allows at any threshold."""
    return RRAttentionConfig(threshold=threshold, stride=stride, min_share=0.0)


def measure(
    model: paddle.nn.Layer, samples: list[NDArray[np.int64]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(kept, density), float64 [thresholds, layers, heads]: means over samples of the true attention mass in the blocks
    that a threshold chooses, on the queries and keys of dense prefills, and of the share of the visible blocks that
    they are. The model is one that rrattn is enabled on, whose settings but for the threshold they are chosen by."""
    cores = [core for core in attention_cores(model) if core is not None]  # which is all
    measurements = [_Measurement(core.config) for core in cores]
    for core, measurement in zip(cores, measurements):
        core._observer = measurement
    try:
        for index, tokens in enumerate(samples):
            begin = time.perf_counter()
            checkpoint.prefill(model, tokens)
            seconds = time.perf_counter() - begin
            print(f"{name}: {index + 1} of {len(samples)} samples, {seconds:.1f} s", file=sys.stderr, flush=True)
    finally:
        for core in cores:
            core._observer = None
    mean = np.stack([np.mean(one.results, axis=0) for one in measurements], axis=1)  # [thresholds, layers, heads, 2]
    return mean[..., 1], mean[..., 0]


def smallest_each(kept: NDArray[np.float64], loss: float) -> NDArray[np.intp]:
    """int [groups]: the first threshold of each group whose loss is within the bound; kept is [thresholds, groups]."""
    first: NDArray[np.intp] = np.argmax(1 - kept <= loss, axis=0)
    return first


def fewest_blocks(kept: NDArray[np.float64], density: NDArray[np.float64], loss: float) -> NDArray[np.intp]:
    """int [groups]: thresholds whose mean loss is within the bound, with as few blocks as can be.

    Each group's losses and densities form a curve. At the optimum all groups trade at one price, the blocks that a
    little mass costs: with a price, each group takes the threshold that is cheapest in density + price * loss, and a
    bisection finds the least price that meets the bound.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        price = (low + high) / 2
        chosen = np.argmin(density + price * (1 - kept), axis=0)
        mean_loss = np.take_along_axis(1 - kept, chosen[None], 0).mean()
        low, high = (low, price) if mean_loss <= loss else (price, high)
    cheapest: NDArray[np.intp] = np.argmin(density + high * (1 - kept), axis=0)
    return cheapest


def grouped(values: NDArray[np.float64], per: str) -> NDArray[np.float64]:
    """[thresholds, groups] of [thresholds, layers, heads]: a group is a head, or the mean of a layer's heads."""
    return values.reshape(len(values), -1) if per == "head" else np.mean(values, axis=2)


def at(values: NDArray[np.float64], chosen: NDArray[np.intp]) -> float:
    """Mean over groups of values [thresholds, groups] at each group's threshold."""
    return float(np.take_along_axis(values, np.asarray(chosen)[None], 0).mean())


def global_density(kept: NDArray[np.float64], density: NDArray[np.float64], kept_wanted: float) -> float:
    """Density of one threshold for all that keeps a given mass: between the measured thresholds, linear."""
    return float(np.interp(kept_wanted, kept.mean(1), density.mean(1)))


def choose(kept: NDArray[np.float64], density: NDArray[np.float64], arguments: argparse.Namespace) -> NDArray[np.intp]:
    """The chosen thresholds, int [groups], from [thresholds, layers, heads] of sample text."""
    kept, density = grouped(kept, arguments.per), grouped(density, arguments.per)
    if arguments.bound == "each":
        return smallest_each(kept, arguments.loss)
    return fewest_blocks(kept, density, arguments.loss)


def as_thresholds(chosen: NDArray[np.intp], num_layers: int, per: str) -> list[Any]:
    """The chosen thresholds as RRAttentionConfig takes them: of each layer, or of each head of each layer."""
    thresholds = [THRESHOLDS[i] for i in chosen]
    if per == "layer":
        return thresholds
    heads = len(thresholds) // num_layers
    return [thresholds[i * heads : (i + 1) * heads] for i in range(num_layers)]
