"""`rrattn visualize`: draws the blocks that a model selects for a document."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from . import _HAS_PADDLE
from .arguments import STRIDES
from .command_line import check_at_least, check_checkpoint, check_picture, quiet_libraries, read_text
from .config import RRAttentionConfig

if _HAS_PADDLE:
    from . import checkpoint
    from .integrations import enable, layer_densities, layer_selections
    from .visualize import MAX_PANELS, layers_to_draw, plot_layers

DESCRIPTION = """Draws the blocks that each head of a model selects for a document, and prints what share of them it is.

The document is the beginning of a text, in tokens of the checkpoint's own tokenizer, or in bytes where it has none and
at most 512 tokens (they then begin with a byte 0, as the texts of examples/probe do). The model runs on Paddle's
device, in bfloat16 on a GPU and in float32 on a CPU, through PaddleFormers or PaddleNLP, whichever is installed. Of a
model of more than 64 heads, layers spread evenly over it are drawn, unless --layers says which: up to 256 heads.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = RRAttentionConfig()
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a checkpoint directory of PaddleFormers or PaddleNLP"
    )
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a file of plain text")
    parser.add_argument(
        "--output", metavar="PICTURE", type=Path, required=True, help="the file to write: .png, .pdf or .svg"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of the document (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help=f"mass to keep (default: {defaults.threshold})")
    parser.add_argument("--stride", type=int, choices=STRIDES, help=f"(default: {defaults.stride})")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="settings in place of these two, as `rrattn calibrate` writes them"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="numbers of layers to draw, from 0 (default: as many as make 64 panels)"
    )
    parser.add_argument("--heads", type=int, nargs="+", help="numbers of query heads to draw, from 0 (default: all)")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program by `parser.error` for what cannot work, before any weights are read.

    In place of the paths of text and config stand tokens, int64 [length], and an RRAttentionConfig then, and `layers`
    are those to draw.
    """
    check_at_least(parser, arguments, length=2)
    check_checkpoint(parser, "MODEL", arguments.model)
    check_picture(parser, "--output", arguments.output)
    arguments.config = _settings(parser, arguments)
    text = read_text(parser, "--text", arguments.text)
    with quiet_libraries():
        try:
            codec, config = checkpoint.codec_of(arguments.model), checkpoint.config_of(arguments.model)
        except (ValueError, OSError) as error:
            parser.error(f"MODEL {arguments.model}: {error}")
    arguments.file = arguments.text.name
    try:
        (arguments.text,) = checkpoint.samples(codec, text, arguments.length, 1)
    except ValueError as error:
        parser.error(f"--text {arguments.text}: {error}")
    counts = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    for name, count in counts.items():
        absent = [one for one in getattr(arguments, name) or () if not 0 <= one < count]
        if absent:
            parser.error(f"--{name} names {absent[0]}, but the model has {count} {name}, from 0 on")
    heads = len(arguments.heads or range(counts["heads"]))
    if arguments.layers is None:
        arguments.layers = layers_to_draw(counts["layers"], heads)
    if len(arguments.layers) * heads > MAX_PANELS:
        parser.error(
            f"{len(arguments.layers)} layers of {heads} heads are more than the {MAX_PANELS} panels of a picture: "
            "choose fewer by --layers and --heads"
        )


def _settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> RRAttentionConfig:
    """The RRAttentionConfig that the options describe."""
    given = {name: getattr(arguments, name) for name in ("threshold", "stride")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.config is not None and given:
        parser.error(f"--config sets --{' and --'.join(given)} as well: give one or the other")
    try:
        if arguments.config is None:
            return RRAttentionConfig(**given)
        return RRAttentionConfig.from_json(arguments.config)
    except (ValueError, OSError) as error:
        parser.error(str(error) if arguments.config is None else f"--config: {error}")


def run(arguments: argparse.Namespace) -> int:
    """Prefills, prints and draws, and returns the exit status; the arguments are checked."""
    with quiet_libraries():
        model = checkpoint.load_model(arguments.model, checkpoint.usual_dtype())
        enable(model, arguments.config)
    begin = time.perf_counter()
    checkpoint.prefill(model, arguments.text)
    seconds = time.perf_counter() - begin
    densities = [density.numpy()[0] for density in layer_densities(model) if density is not None]  # [Hq] of each layer
    for layer, density in enumerate(densities):
        print(f"layer {layer:3}  density {density.mean():6.1%}, of a head {density.min():6.1%} to {density.max():6.1%}")
    mean = sum(density.mean() for density in densities) / len(densities)
    title = f"{len(arguments.text):,} tokens of {arguments.file}, density {mean:.1%}"
    print(f"density {mean:.1%}: the share of the visible blocks that the prefill attended, in {seconds:.1f} s")
    plot_layers(
        layer_selections(model), layers=arguments.layers, heads=arguments.heads, title=title, path=arguments.output
    )
    print(f"picture: {arguments.output}, of {_drawn(arguments.layers, len(densities))}")
    return 0


def _drawn(layers: list[int], num_layers: int) -> str:
    """Which layers a picture has, and whether others are left out."""
    if len(set(layers)) == num_layers:
        return "all layers"
    names = ", ".join(map(str, layers))
    return f"layers {names}; the others of {num_layers} are not drawn: --layers chooses"
