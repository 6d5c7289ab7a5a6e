"""Loss curves of a small byte-level LLaMA trained twice on real text, dense and with RRAttention.

    python -m tools.training_curves [FILE] [--steps 300] [--tokens 1536] [--threshold 0.7] [--stride 8] [--seed 0]

Both runs start from the same weights and see the same sequences in the same order. Dense is PaddleFormers' own "sdpa"
attention, with nothing of this package in it. A step trains on one sequence, and no sequence comes twice, so each loss
is of text that the model has not seen before. The curves go to --json and --picture; the exit status is 1 when the
mean losses over the last 20 steps differ by more than 2%.

A run takes about 15 minutes on one core, most of it in the dense attention. The model is too small to gain from more:
OMP_NUM_THREADS=1 is the faster way where other programs run as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
from paddleformers.transformers import LlamaConfig, LlamaForCausalLM
from tqdm import tqdm

import rrattn
from examples.byte_llama import NUM_BYTES, choose_document, read_tokens
from rrattn.command_line import check_at_least, check_output_file, check_picture

ROOT = Path(__file__).resolve().parents[1]

FINAL_STEPS = 20  # the final loss is the mean over these
TOLERANCE = 0.02  # how far the final losses may be apart, relative to dense

NUM_LAYERS, HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS = 4, 128, 336, 4, 2
LEARNING_RATE, WARMUP_STEPS, MAX_GRADIENT_NORM = 2e-3, 20, 1.0

INK, DENSE_COLOR, SPARSE_COLOR = "#2b2f36", "#9aa1ab", "#1c5aa0"


def parse_arguments():
    """The arguments, and the settings of RRAttention that they describe."""
    defaults = rrattn.RRAttentionConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1536, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.7, help="mass to keep (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=8, help="sample stride (default: %(default)s)")
    parser.add_argument("--keep-local", type=int, default=defaults.keep_local, help="blocks (default: %(default)s)")
    parser.add_argument("--no-keep-last", dest="keep_last", action="store_false", help="the last row is as the others")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "tools/bench/results/training_curves.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "examples/training_curves.png")
    arguments = parser.parse_args()
    check_at_least(parser, arguments, steps=FINAL_STEPS, tokens=2, seed=0)
    sizes = f"--steps {arguments.steps} of --tokens {arguments.tokens}"
    arguments.file = choose_document(parser, arguments.file, arguments.steps * arguments.tokens + 1, sizes)
    check_output_file(parser, "--json", arguments.json, (".json",))
    check_picture(parser, "--picture", arguments.picture)
    try:
        config = rrattn.RRAttentionConfig(
            threshold=arguments.threshold,
            stride=arguments.stride,
            keep_last=arguments.keep_last,
            keep_local=arguments.keep_local,
        )
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


def cut_sequences(text, steps, tokens, seed):
    """`steps` different stretches of a text, in random order.

    Parameters
    ----------
    text : Tensor
        int64 [1, number of bytes], at least steps * tokens + 1.
    steps, tokens, seed : int

    Returns
    -------
    list of Tensor
        int64 [1, tokens + 1] each: inputs, and the same shifted by one.
    """
    order = np.random.default_rng(seed).permutation((text.shape[1] - 1) // tokens)[:steps]
    return [text[:, i * tokens : (i + 1) * tokens + 1] for i in order]


def make_model(tokens, seed):
    """A LLaMA with dense attention in training mode, whose weights depend on the seed alone."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        pad_token_id=None,
        use_cache=False,
    )
    config.fuse_rms_norm = False  # the fused kernel is for GPUs
    config._attn_implementation = "sdpa"
    paddle.seed(seed)
    model = LlamaForCausalLM(config)
    model.train()
    return model


def train(model, sequences, name):
    """Trains a model on sequences, one a step, under a progress bar.

    Parameters
    ----------
    model : LlamaForCausalLM
        Dense, or with RRAttention enabled.
    sequences : list of Tensor
        int64 [1, tokens + 1] each.
    name : str
        Shown beside the progress bar.

    Returns
    -------
    dict
        "loss": nats per byte of each step, before its update. "seconds": time of the whole run. With RRAttention also
        "density": share of the visible blocks attended in each step, the mean over layers and heads.
    """
    schedule = paddle.optimizer.lr.LinearWarmup(LEARNING_RATE, WARMUP_STEPS, start_lr=0.0, end_lr=LEARNING_RATE)
    schedule.step()  # or the first update would have a rate of zero
    clip = paddle.nn.ClipGradByGlobalNorm(MAX_GRADIENT_NORM)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), grad_clip=clip)
    sparse = model.config._attn_implementation == "rrattn"
    losses, densities = [], []
    start = time.perf_counter()
    bar = tqdm(sequences, desc=name, unit="step")
    for sequence in bar:
        loss = model(sequence[:, :-1], labels=sequence[:, 1:], return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        losses.append(float(loss))
        if sparse:
            densities.append(float(np.mean([layer.numpy() for layer in rrattn.layer_densities(model)])))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    curve = {"loss": losses, "seconds": time.perf_counter() - start}
    return curve | {"density": densities} if sparse else curve


def compare(dense, sparse):
    """{"dense": final loss, "rrattn": final loss, "difference": of the latter from the former, relative to it}."""
    final = [float(np.mean(curve["loss"][-FINAL_STEPS:])) for curve in (dense, sparse)]
    return {"dense": final[0], "rrattn": final[1], "difference": final[1] / final[0] - 1}


def report(dense, sparse, final):
    """Prints the final losses, and returns whether they are as close as TOLERANCE asks."""
    print(f"\n{'':14}{f'loss, last {FINAL_STEPS} steps':>22}{'density':>10}{'time':>10}")
    for name, loss, density, curve in (
        ("dense", final["dense"], 1.0, dense),
        ("RRAttention", final["rrattn"], np.mean(sparse["density"]), sparse),
    ):
        print(f"{name:14}{loss:22.4f}{density:10.1%}{curve['seconds']:8.0f} s")
    close = abs(final["difference"]) <= TOLERANCE
    print(f"{'difference':14}{final['difference']:+22.2%}   {'within' if close else 'NOT within'} {TOLERANCE:.0%}")
    return close


def running_mean(values):
    """Entry i is the mean over the FINAL_STEPS values that end with value i + FINAL_STEPS - 1."""
    return np.convolve(values, np.full(FINAL_STEPS, 1 / FINAL_STEPS), mode="valid")


def plot(dense, sparse, title, path):
    """Draws both losses, how far their running means are apart, and the density, over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    steps = np.arange(1, len(dense["loss"]) + 1)
    figure = Figure(figsize=(7.2, 5.4), dpi=110, layout="constrained")
    losses, difference, density = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    for name, curve, color, width in (
        ("dense", dense, DENSE_COLOR, 3.5),
        ("RRAttention", sparse, SPARSE_COLOR, 1.3),
    ):
        losses.plot(steps, curve["loss"], color=color, linewidth=0.7, alpha=0.5)
        mean = running_mean(curve["loss"])
        losses.plot(
            steps[FINAL_STEPS - 1 :], mean, color=color, linewidth=width, label=f"{name}, mean of {FINAL_STEPS}"
        )
    means = [running_mean(curve["loss"]) for curve in (dense, sparse)]
    difference.axhspan(-TOLERANCE, TOLERANCE, color=DENSE_COLOR, alpha=0.25, linewidth=0)
    difference.plot(steps[FINAL_STEPS - 1 :], means[1] / means[0] - 1, color=SPARSE_COLOR, linewidth=1.3)
    density.plot(steps, sparse["density"], color=SPARSE_COLOR, linewidth=1.3)

    losses.set_yscale("log", base=2)  # or the first steps leave no room for the others
    losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.set_ylabel("loss, nats per byte", fontsize=9, color=INK)
    losses.legend(fontsize=9, labelcolor=INK, frameon=False)
    difference.set_ylabel("difference\nof the means", fontsize=9, color=INK)
    difference.yaxis.set_major_formatter(PercentFormatter(1.0))
    density.set_ylabel("blocks\nattended", fontsize=9, color=INK)
    density.set_ylim(0, 1.05)
    density.yaxis.set_major_formatter(PercentFormatter(1.0))
    density.set_xlabel("step", fontsize=9, color=INK)
    for panel in (losses, difference, density):
        panel.tick_params(labelsize=8, labelcolor=INK, color=INK)
        panel.grid(color="#e6e8eb", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK)
    figure.savefig(path)


def describe_run():
    """What it takes to run this again."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "command": shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]]),
        "commit": revision.stdout.strip(),
        "paddle": paddle.__version__,
    }


def main():
    arguments, config = parse_arguments()
    text = read_tokens(arguments.file)  # [1, bytes in the file]
    sequences = cut_sequences(text, arguments.steps, arguments.tokens, arguments.seed)
    run = describe_run()  # before the training, during which the checkout may change

    model = make_model(arguments.tokens, arguments.seed)
    parameters = sum(p.size for p in model.parameters()) / 1e6
    print(f"text:  {arguments.file}, {text.shape[1]:,} bytes")
    print(f"model: byte-level LLaMA, {NUM_LAYERS} layers, {parameters:.2f} M parameters")
    dense = train(model, sequences, "dense      ")
    model = rrattn.enable(make_model(arguments.tokens, arguments.seed), config)
    sparse = train(model, sequences, "RRAttention")

    final = compare(dense, sparse)
    close = report(dense, sparse, final)
    named = ("steps", "tokens", "threshold", "stride", "keep_last", "keep_local", "seed")
    settings = {name: getattr(arguments, name) for name in named}
    results = {"run": run, "text": arguments.file.name, **settings, "final": final, "dense": dense, "rrattn": sparse}
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    title = (
        f"Byte-level LLaMA, {arguments.tokens:,} tokens a step, threshold {config.threshold:g}, stride {config.stride}"
    )
    plot(dense, sparse, title, arguments.picture)
    print(f"curves: {arguments.json}\npicture: {arguments.picture}")
    return 0 if close else 1


if __name__ == "__main__":
    sys.exit(main())
