"""Generates with a LLaMA behind the flag: the prompt is prefilled sparsely, then every new token attends densely.

    python examples/generate_llama.py [FILE] [--tokens 8192] [--new 100] [--threshold 0.9]

The prompt is the beginning of a text; the model, the probe of examples/probe, which reads bytes, goes on with it. It
does so twice, with every block attended and with the selected ones.
"""

if __name__ == "__main__":
    import quiet  # noqa: F401

import argparse
import time
from pathlib import Path

import paddle
from byte_llama import MAX_TOKENS, choose_document, load_probe, read_document, use_all_cores

import rrattn
from rrattn.command_line import check_at_least


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=100, help="bytes to generate (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="mass to keep (default: %(default)s)")
    arguments = parser.parse_args()
    check_at_least(parser, arguments, tokens=2, new=1)
    if arguments.tokens + arguments.new > MAX_TOKENS:
        parser.error(f"--tokens and --new must be at most {MAX_TOKENS} together")
    arguments.file = choose_document(parser, arguments.file, arguments.tokens - 1, f"--tokens {arguments.tokens}")
    try:
        config = rrattn.RRAttentionConfig(threshold=arguments.threshold)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


def generate(model, prompt, count):
    """`count` more bytes, and what the attention layers did; both are printed."""
    begin = time.perf_counter()
    with rrattn.collect_stats(model) as stats:
        new, _ = model.generate(
            prompt,
            attention_mask=paddle.ones_like(prompt),
            max_new_tokens=count,
            decode_strategy="greedy_search",
            eos_token_id=-1,
            use_cache=True,
        )
    text = bytes(new[0].tolist()).decode(errors="replace")
    threshold = model.config.rrattn_threshold
    print(f"\nthreshold {threshold}, {time.perf_counter() - begin:.1f} s: {text!r}\n{stats}")
    return new


def main():
    arguments, config = parse_arguments()
    use_all_cores()
    prompt = read_document(arguments.file, arguments.tokens)
    print(f"prompt: {arguments.tokens:,} tokens, from the beginning of {arguments.file}")

    model = load_probe()
    model.config._attn_implementation = "rrattn"  # the flag; settings stand in the config as well
    model.config.rrattn_threshold = 1.0
    dense = generate(model, prompt, arguments.new)
    model.config.rrattn_threshold = config.threshold
    sparse = generate(model, prompt, arguments.new)  # settings are read at every call
    print(f"\nthe same new bytes: {float((dense == sparse).astype('float32').mean()):.1%}")


if __name__ == "__main__":
    main()
