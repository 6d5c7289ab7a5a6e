"""Prefills a long document through a LLaMA twice, dense and with RRAttention, and compares.

    python examples/prefill_document.py [FILE] [--tokens 16384] [--threshold 0.95] [--stride 8] [--output blocks.png]

The model is the probe (examples/probe), which reads bytes and was trained to find things in its context. "Dense" is
this package's own attention with every block selected, because one that writes down the whole matrix of scores does not
fit in memory at this length.
"""

import argparse
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from byte_llama import MAX_TOKENS, choose_document, load_probe, read_document, use_all_cores
from tqdm import tqdm

import rrattn
from rrattn import visualize
from rrattn.command_line import check_picture


def parse_arguments():
    defaults = rrattn.RRAttentionConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--tokens", type=int, default=MAX_TOKENS, help="of the prompt (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=defaults.threshold, help="mass to keep (default: %(default)s)"
    )
    parser.add_argument("--stride", type=int, default=defaults.stride, help="sample stride (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("selected_blocks.png"), help="the picture (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not 2 <= arguments.tokens <= MAX_TOKENS:
        parser.error(f"--tokens must be from 2 to {MAX_TOKENS}, got {arguments.tokens}")
    arguments.file = choose_document(parser, arguments.file, arguments.tokens - 1, f"--tokens {arguments.tokens}")
    check_picture(parser, "--output", arguments.output)
    try:
        config = rrattn.RRAttentionConfig(threshold=arguments.threshold, stride=arguments.stride)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


class PeakMemory:
    """Peak resident memory of the process since the object was made (since the process began, if not on Linux)."""

    def __init__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            pass

    def gigabytes(self):
        try:
            status = Path("/proc/self/status").read_text()
            kilobytes = int(status.partition("VmHWM:")[2].split()[0])
        except (OSError, IndexError):
            scale = 1024 if sys.platform == "darwin" else 1
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
        return kilobytes / 2**20


@dataclass
class Prefill:
    """What one pass over the document took and gave."""

    seconds: float
    attention_seconds: float
    peak_gigabytes: float
    hidden: np.ndarray  # [L, hidden size], of the last layer
    guesses: np.ndarray  # [L], the next bytes
    selections: list
    densities: list


@paddle.no_grad()
def prefill(model, tokens, config, name=None):
    """One timed pass over the document; with a progress bar over the layers when it has a name."""
    rrattn.enable(model, config)
    layers = model.model.layers
    begins, ends = [], []
    peak = PeakMemory()
    with tqdm(total=len(layers), desc=name, unit="layer", disable=name is None) as bar:

        def count_layer(*_):
            bar.update()

        hooks = [layer.register_forward_post_hook(count_layer) for layer in layers]
        for layer in layers:
            hooks.append(layer.self_attn.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter())))
            hooks.append(layer.self_attn.register_forward_post_hook(lambda *_: ends.append(time.perf_counter())))
        begin = time.perf_counter()
        hidden = model.model(tokens, return_dict=True).last_hidden_state
        seconds = time.perf_counter() - begin
    peak_gigabytes = peak.gigabytes()
    for hook in hooks:
        hook.remove()
    return Prefill(
        seconds=seconds,
        attention_seconds=sum(ends) - sum(begins),
        peak_gigabytes=peak_gigabytes,
        hidden=hidden[0].numpy(),
        guesses=model.lm_head(hidden)[0].argmax(axis=-1).numpy(),
        selections=rrattn.layer_selections(model),
        densities=rrattn.layer_densities(model),
    )


def report(dense, sparse, tokens):
    following = tokens.numpy()[0, 1:]
    right = [(run.guesses[:-1] == following).mean() for run in (dense, sparse)]
    difference = np.linalg.norm(sparse.hidden - dense.hidden) / np.linalg.norm(dense.hidden)
    print()
    print(f"{'':28}{'dense':>12}{'RRAttention':>14}")
    for name, before, after in (
        ("time", dense.seconds, sparse.seconds),
        ("  in the attention layers", dense.attention_seconds, sparse.attention_seconds),
    ):
        print(f"{name:28}{before:10.2f} s{after:12.2f} s    {before / after:.2f}x")
    print(f"{'peak memory':28}{dense.peak_gigabytes:9.2f} GB{sparse.peak_gigabytes:11.2f} GB")
    print(f"{'next byte guessed right':28}{right[0]:11.1%} {right[1]:13.1%}")
    for layer, density in enumerate(sparse.densities):
        heads = " ".join(f"{100 * head:3.0f}" for head in density.numpy()[0])
        full = float(dense.densities[layer].mean())
        print(f"{f'density of layer {layer}':28}{full:11.1%} {float(density.mean()):13.1%}    heads {heads} %")
    print()
    print(f"output difference: {difference:.2e} of the norm; ", end="")
    print(f"the same next byte guessed at {(dense.guesses == sparse.guesses).mean():.1%} of the positions")


def main():
    arguments, config = parse_arguments()
    use_all_cores()
    tokens = read_document(arguments.file, arguments.tokens)
    model = load_probe()
    heads = model.config.num_attention_heads
    print(
        f"document: {arguments.tokens:,} tokens, from the beginning of {arguments.file}\n"
        f"model:    the probe, a byte-level LLaMA of {len(model.model.layers)} layers and {heads} heads\n"
        f"          (all scores of one layer at once would take {heads * arguments.tokens**2 * 4 / 2**30:,.1f} GB)",
        flush=True,
    )

    every_block = replace(config, threshold=1.0)
    prefill(model, tokens[:, :512], every_block)  # the first pass in a process starts threads and allocates
    dense = prefill(model, tokens, every_block, "dense      ")
    sparse = prefill(model, tokens, config, "RRAttention")
    report(dense, sparse, tokens)

    title = f"Blocks attended at threshold {config.threshold:g}, {arguments.tokens:,} tokens of {arguments.file.name}"
    visualize.plot_layers(sparse.selections, title=title, path=arguments.output)
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
