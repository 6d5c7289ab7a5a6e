"""Prefills a long document through a LLaMA, dense, with RRAttention and as its library does, and compares.

    python examples/prefill_document.py [FILE] [--model smollm2] [--tokens 16384] [--own-tokens 4096]
        [--threshold 0.95] [--stride 8] [--output blocks.png]

The model is the probe (examples/probe), which reads bytes and was trained to find things in its context, or another
checkpoint; `smollm2` is SmolLM2-135M-Instruct, which tools.smollm2 fetches (93 MB) on first use.

It runs in three ways: "own" is the attention that PaddleFormers brings ("sdpa"); "dense" and "RRAttention" are this
package's, with every block attended and with the selected ones. The library's own attention writes down the whole
matrix of scores, so that on a CPU 16K tokens take many minutes and GB: it reads the first --own-tokens alone, which the
other two then read by themselves as well, to compare like with like.
"""

if __name__ == "__main__":
    import quiet  # noqa: F401

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from byte_llama import MAX_TOKENS, PROBE, choose_document, use_all_cores
from tqdm import tqdm

import rrattn
from rrattn import checkpoint, visualize
from rrattn.command_line import check_checkpoint, check_picture
from rrattn.tokens import Bytes

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "build" / "smollm2"
BYTES_OF_A_TOKEN = 5  # so many hold one for sure, as a tokenizer reads English
ROWS = 1024  # of logits at once, which a large vocabulary makes long


def parse_arguments():
    defaults = rrattn.RRAttentionConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument(
        "--model", default=PROBE, help="a checkpoint directory, or smollm2, which is fetched (default: the probe)"
    )
    parser.add_argument(
        "--tokens", type=int, help=f"of the prompt (default: what the model knows, at most {MAX_TOKENS})"
    )
    parser.add_argument(
        "--own-tokens", type=int, help="of these, for the library's own attention; 0: it does not run (default: 4096)"
    )
    parser.add_argument(
        "--threshold", type=float, default=defaults.threshold, help="mass to keep (default: %(default)s)"
    )
    parser.add_argument("--stride", type=int, default=defaults.stride, help="sample stride (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("selected_blocks.png"), help="the picture (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.model = model_folder(parser, arguments.model)
    codec = checkpoint.codec_of(arguments.model)
    most = checkpoint.config_of(arguments.model).max_position_embeddings
    if arguments.tokens is None:
        arguments.tokens = min(most, MAX_TOKENS)
    if not 2 <= arguments.tokens <= most:
        parser.error(f"--tokens must be from 2 to {most}, got {arguments.tokens}")
    if arguments.own_tokens is None:
        arguments.own_tokens = min(4096, arguments.tokens)
    if arguments.own_tokens != 0 and not 2 <= arguments.own_tokens <= arguments.tokens:
        parser.error(f"--own-tokens must be 0, or from 2 to --tokens {arguments.tokens}, got {arguments.own_tokens}")
    if isinstance(codec, Bytes):
        num_bytes = arguments.tokens - 1
    else:
        num_bytes = 1 if arguments.file else BYTES_OF_A_TOKEN * arguments.tokens
    options = f"--tokens {arguments.tokens}"
    arguments.file = choose_document(parser, arguments.file, num_bytes, options)
    try:
        (tokens,) = checkpoint.samples(codec, arguments.file.read_bytes(), arguments.tokens, 1)
    except ValueError as error:
        parser.error(f"FILE {arguments.file} for {options}: {error}")
    check_picture(parser, "--output", arguments.output)
    try:
        config = rrattn.RRAttentionConfig(threshold=arguments.threshold, stride=arguments.stride)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config, paddle.to_tensor(tokens[None])


def model_folder(parser, name):
    """The checkpoint directory that --model names, which may have to be fetched."""
    if name == "smollm2":
        if not SMOLLM2.exists():
            fetched = subprocess.run([sys.executable, "-m", "tools.smollm2", str(SMOLLM2)], cwd=ROOT)
            if fetched.returncode:
                parser.error("--model smollm2 could not be fetched")
        return SMOLLM2
    check_checkpoint(parser, "--model", Path(name))
    return Path(name)


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
    guesses: np.ndarray  # [L], the next tokens
    selections: list  # these two are of rrattn's attention
    densities: list


@paddle.no_grad()
def prefill(model, tokens, config, name=None):
    """One timed pass over the document; with a progress bar over the layers when it has a name.

    With a config rrattn's attention runs, without one the library's own.
    """
    if config is not None:
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
    run = Prefill(
        seconds=seconds,
        attention_seconds=sum(ends) - sum(begins),
        peak_gigabytes=peak_gigabytes,
        hidden=hidden[0].numpy(),
        guesses=np.concatenate(
            [model.lm_head(hidden[:, i : i + ROWS])[0].argmax(axis=-1).numpy() for i in range(0, tokens.shape[1], ROWS)]
        ),
        selections=rrattn.layer_selections(model),
        densities=rrattn.layer_densities(model),
    )
    if config is not None:
        rrattn.disable(model)
    return run


@dataclass
class Comparison:
    """A stretch of the document in each way; own is None where the library's attention did not run."""

    num_tokens: int
    own: Prefill | None
    dense: Prefill
    sparse: Prefill


def compare(model, tokens, config, *, with_own):
    """Runs a stretch of the document in each way."""
    length = f"{tokens.shape[1]:,} tokens"
    own = prefill(model, tokens, None, f"{length}, own        ") if with_own else None
    dense = prefill(model, tokens, replace(config, threshold=1.0), f"{length}, dense      ")
    return Comparison(tokens.shape[1], own, dense, prefill(model, tokens, config, f"{length}, RRAttention"))


def difference(one, other):
    """The norm of the difference of the last layer's outputs, relative to the norm of the latter."""
    return np.linalg.norm(one.hidden - other.hidden) / np.linalg.norm(other.hidden)


def report_cost(comparison):
    """Prints what each way took, and how many times as fast RRAttention is."""
    own, dense, sparse = comparison.own, comparison.dense, comparison.sparse
    for name, of in (
        (f"time, {comparison.num_tokens:,} tokens", lambda run: run.seconds),
        ("  in the attention layers", lambda run: run.attention_seconds),
    ):
        faster = f"{of(dense) / of(sparse):.1f}x as fast as dense"
        if own is not None:
            faster = f"{of(own) / of(sparse):.1f}x as fast as own, {faster}"
        seconds = f"{of(own):10.2f} s" if own is not None else f"{'not run':>12}"
        print(f"{name:28}{seconds}{of(dense):10.2f} s{of(sparse):11.2f} s    {faster}")
    gigabytes = [f"{run.peak_gigabytes:.2f} GB" if run is not None else "not run" for run in (own, dense, sparse)]
    print(f"{'  peak memory':28}{gigabytes[0]:>12}{gigabytes[1]:>12}{gigabytes[2]:>13}")


def report(comparisons, tokens):
    """Prints the cost of all comparisons, and what the last one gave, which is of all tokens."""
    print(f"\n{'':28}{'own':>12}{'dense':>12}{'RRAttention':>13}")
    for comparison in comparisons:
        report_cost(comparison)
    dense, sparse = comparison.dense, comparison.sparse
    following = tokens.numpy()[0, 1:]
    right = [(run.guesses[:-1] == following).mean() for run in (dense, sparse)]
    print(f"{'next token guessed right':28}{'':12}{right[0]:>12.1%}{right[1]:>13.1%}")
    for layer, density in enumerate(sparse.densities):
        heads = " ".join(f"{100 * head:3.0f}" for head in density.numpy()[0])
        mean = float(density.mean())
        print(f"{f'density of layer {layer}':28}{'':12}{'100.0%':>12}{mean:>13.1%}    heads {heads} %")
    mean = np.mean([density.numpy() for density in sparse.densities])
    print(f"{'density':28}{'':12}{'100.0%':>12}{mean:>13.1%}    of all layers and heads")
    print(
        "\nown: PaddleFormers' attention (sdpa). dense: rrattn's with every block attended, which is exact as well.\n"
        "density: the share of the blocks of 128 x 128 that causality lets a head see which it attended.\n"
    )
    for comparison in comparisons:
        if comparison.own is not None:
            print(
                f"own and dense differ by {difference(comparison.dense, comparison.own):.1e} at "
                f"{comparison.num_tokens:,} tokens: they compute the same, up to rounding"
            )
    print(
        f"output difference: {difference(sparse, dense):.2e}, RRAttention's from dense: the norm of the difference of "
        "the last layer's\n  outputs, over the norm of dense's; the same next token guessed at "
        f"{(dense.guesses == sparse.guesses).mean():.1%} of the positions"
    )


def main():
    arguments, config, tokens = parse_arguments()
    use_all_cores()
    model = checkpoint.load_model(arguments.model, "float32")
    heads, layers = model.config.num_attention_heads, len(model.model.layers)
    name = "the probe, a byte-level LLaMA" if arguments.model == PROBE else f"{arguments.model.name}, a model"
    print(
        f"document: {arguments.tokens:,} tokens, from the beginning of {arguments.file}\n"
        f"model:    {name} of {layers} layers and {heads} heads\n"
        f"          (all scores of one layer at once would take {heads * arguments.tokens**2 * 4 / 2**30:,.1f} GB)",
        flush=True,
    )

    model.config._attn_implementation = "sdpa"
    warm_up = tokens[:, :512]  # the first pass in a process starts threads and allocates
    prefill(model, warm_up, config)
    comparisons = []
    if 0 < arguments.own_tokens < arguments.tokens:
        comparisons.append(compare(model, tokens[:, : arguments.own_tokens], config, with_own=True))
    whole = compare(model, tokens, config, with_own=arguments.own_tokens == arguments.tokens)
    report([*comparisons, whole], tokens)

    title = f"Blocks attended at threshold {config.threshold:g}, {arguments.tokens:,} tokens of {arguments.file.name}"
    drawn = visualize.layers_to_draw(layers, heads)
    visualize.plot_layers(whole.sparse.selections, layers=drawn, title=title, path=arguments.output)
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
