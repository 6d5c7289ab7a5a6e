"""Finds a threshold for each layer or head of a model that loses no more attention mass than a stated bound.

    python tools/calibrate.py MODEL CONFIG.json --text FILE --held-out FILE [--loss 0.05] [--per head]

One threshold for all heads spends blocks where they hardly matter: a head whose estimate is good could do with less
than one whose estimate is poor. Here the bound is on what is really lost: on prefills of sample text, the true
attention mass outside the chosen blocks. `--bound each` finds for each head (or layer) the smallest threshold whose
loss is within the bound; `--bound mean` spreads blocks over all of them so that the mean loss is within the bound and
the blocks are as few as can be. Both are then checked on held-out text, beside one threshold of the same loss.

CONFIG.json holds an RRAttentionConfig: rrattn.enable(model, rrattn.RRAttentionConfig.from_json("CONFIG.json")).

Where the held-out text loses more than the bound, CONFIG.json is written as well, but the tool says so on stderr and
its exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from evaluate import prompts_of, read_text_for  # noqa: E402

from rrattn.command_line import check_at_least, check_checkpoint, check_output_file  # noqa: E402

QUESTIONS = 12  # about each context
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99,
              0.995, 0.999, 1.0)  # fmt: skip


def parse_arguments():
    """The arguments, checked; in place of the texts' paths stand the texts, uint8 [bytes]."""
    from evaluation.prompts import CONTEXTS

    from rrattn.arguments import STRIDES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint directory of PaddleFormers or PaddleNLP")
    parser.add_argument("config", type=Path, help="the file to write")
    parser.add_argument("--text", type=Path, required=True, help="sample text: a file, or what corpus.py wrote")
    parser.add_argument("--held-out", type=Path, required=True, help="text to check the result on")
    parser.add_argument("--loss", type=float, default=0.05, help="attention mass that may be lost (default: 0.05)")
    parser.add_argument("--per", choices=("layer", "head"), default="head", help="(default: head)")
    parser.add_argument("--bound", choices=("each", "mean"), default="mean", help="what the loss is of (default: mean)")
    parser.add_argument("--stride", type=int, choices=STRIDES, default=8, help="(default: 8)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sample (default: 8192)")
    parser.add_argument("--samples", type=int, default=2, help="of each kind, and as many held out (default: 2)")
    parser.add_argument("--tasks", nargs="+", choices=list(CONTEXTS), default=["text"], help="kinds (default: text)")
    arguments = parser.parse_args()
    if not 0 < arguments.loss < 1:
        parser.error(f"--loss must be between 0 and 1, got {arguments.loss}")
    check_at_least(parser, arguments, samples=1, length=512)
    check_checkpoint(parser, "MODEL", arguments.model)
    check_output_file(parser, "CONFIG", arguments.config)
    make = prompts_of(parser, arguments.model)
    sizes = (arguments.tasks, [arguments.length], arguments.samples, QUESTIONS)
    arguments.text = read_text_for(parser, "--text", arguments.text, make, *sizes)
    arguments.held_out = read_text_for(parser, "--held-out", arguments.held_out, make, *sizes)
    return arguments


def measure(model, text, arguments):
    """(kept, density), float64 [thresholds, layers, heads]: means over samples of the true mass in the chosen blocks
    and of the share of blocks that they are."""
    from evaluation.methods import rrattn_block_mask
    from evaluation.run import capture, mass_in_blocks, sized_prompt

    choices = [partial(rrattn_block_mask, as_config(threshold, arguments)) for threshold in THRESHOLDS]
    total = []
    for index in range(arguments.samples):
        for kind in arguments.tasks:
            prompt = sized_prompt(model.codec, kind, text, arguments.length, index, QUESTIONS)
            inputs, masses = capture(model, model.codec.encode(prompt.context))
            total.append([mass_in_blocks(model, inputs, masses, choice)["by_layer"] for choice in choices])
    mean = np.mean(total, axis=0)  # [thresholds, layers, heads, 2]
    return mean[..., 1], mean[..., 0]


def smallest_each(kept, loss):
    """int [groups]: the first threshold of each group whose loss is within the bound; kept is [thresholds, groups]."""
    return (1 - kept <= loss).argmax(0)


def fewest_blocks(kept, density, loss):
    """int [groups]: thresholds whose mean loss is within the bound, with as few blocks as can be.

    Each group's losses and densities form a curve. At the optimum all groups trade at one price, the blocks that a
    little mass costs: with a price, each group takes the threshold that is cheapest in density + price * loss, and a
    bisection finds the least price that meets the bound.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        price = (low + high) / 2
        chosen = (density + price * (1 - kept)).argmin(0)
        mean_loss = np.take_along_axis(1 - kept, chosen[None], 0).mean()
        low, high = (low, price) if mean_loss <= loss else (price, high)
    return (density + high * (1 - kept)).argmin(0)


def grouped(values, per):
    """[thresholds, groups] of [thresholds, layers, heads]: a group is a head, or the mean of a layer's heads."""
    return values.reshape(len(values), -1) if per == "head" else values.mean(2)


def at(values, chosen):
    """Mean over groups of values [thresholds, groups] at each group's threshold."""
    return float(np.take_along_axis(values, np.asarray(chosen)[None], 0).mean())


def global_density(kept, density, kept_wanted):
    """Density of one threshold for all that keeps a given mass: between the measured thresholds, linear."""
    return float(np.interp(kept_wanted, kept.mean(1), density.mean(1)))


def calibrate(kept, density, arguments):
    """The chosen thresholds, int [groups], from [thresholds, layers, heads] of sample text."""
    kept, density = grouped(kept, arguments.per), grouped(density, arguments.per)
    if arguments.bound == "each":
        return smallest_each(kept, arguments.loss)
    return fewest_blocks(kept, density, arguments.loss)


def as_thresholds(chosen, num_layers, arguments):
    """The chosen thresholds as RRAttentionConfig takes them: of each layer, or of each head of each layer."""
    thresholds = [THRESHOLDS[i] for i in chosen]
    if arguments.per == "layer":
        return thresholds
    heads = len(thresholds) // num_layers
    return [thresholds[i * heads : (i + 1) * heads] for i in range(num_layers)]


def as_config(threshold, arguments):
    """The RRAttentionConfig to measure a threshold with, and to write: the defaults in all but these two."""
    import rrattn

    return rrattn.RRAttentionConfig(threshold=threshold, stride=arguments.stride)


def main():
    arguments = parse_arguments()
    import paddle
    from evaluation.model import Model

    paddle.base.core.set_num_threads(os.cpu_count())
    model = Model(arguments.model)
    kept, density = measure(model, arguments.text, arguments)
    chosen = calibrate(kept, density, arguments)
    config = as_config(as_thresholds(chosen, model.num_layers, arguments), arguments)
    config.to_json(arguments.config)
    held_kept, held_density = measure(model, arguments.held_out, arguments)
    print(f"{'':22} {'mass lost':>10} {'density':>9} {'one threshold of that loss':>28} {'blocks saved':>13}")
    for name, k, d in (("sample text", kept, density), ("held-out text", held_kept, held_density)):
        k, d = grouped(k, arguments.per), grouped(d, arguments.per)
        of_global = global_density(k, d, at(k, chosen))
        saved = 1 - at(d, chosen) / of_global
        print(f"{name:22} {1 - at(k, chosen):10.2%} {at(d, chosen):9.1%} {of_global:28.1%} {saved:13.1%}")
    lost = 1 - np.take_along_axis(grouped(held_kept, arguments.per), chosen[None], 0)[0]  # [groups]
    print(
        f"worst {arguments.per} on held-out text: {lost.max():.2%} lost; "
        f"bound on {arguments.bound}: {arguments.loss:.2%}"
    )
    print(f"written: {arguments.config}")
    of_bound, what = (lost.max(), f"the worst {arguments.per}") if arguments.bound == "each" else (lost.mean(), "it")
    if of_bound <= arguments.loss:
        return 0
    print(
        f"calibrate.py: the bound does not hold on the held-out text: {what} loses {of_bound:.3%} of the mass, more "
        f"than --loss {arguments.loss:.3%}; {arguments.config} was written all the same",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
