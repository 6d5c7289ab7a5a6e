"""Trains a small byte-level Qwen2 with RRAttention on real text, from a checkpoint or from fresh weights, and saves it.

    python examples/finetune_qwen.py [FILE] [--model FOLDER] [--output FOLDER] [--steps 20] [--threshold 0.7]

A step accumulates the gradients of --accumulate sequences of --tokens bytes. A second run with --model FOLDER goes on
from what the first run has saved with --output FOLDER, on another text or on the same.
"""

if __name__ == "__main__":
    import quiet  # noqa: F401

import argparse
from pathlib import Path

import numpy as np
import paddle
from byte_llama import NUM_BYTES, choose_document, read_tokens, use_all_cores
from paddleformers.transformers import Qwen2Config, Qwen2ForCausalLM

import rrattn
from rrattn.command_line import check_at_least, check_checkpoint, check_output_folder


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--model", type=Path, help="a checkpoint to start from; default: fresh weights")
    parser.add_argument("--output", type=Path, help="folder for the checkpoint; default: none is saved")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="sequences per step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.7, help="mass to keep (default: %(default)s)")
    arguments = parser.parse_args()
    check_at_least(parser, arguments, steps=1, accumulate=1, tokens=2)
    arguments.file = choose_document(parser, arguments.file, arguments.tokens + 1, f"--tokens {arguments.tokens}")
    if arguments.model is not None:
        check_checkpoint(parser, "--model", arguments.model)
    if arguments.output is not None:
        check_output_folder(parser, "--output", arguments.output)
    try:
        config = rrattn.RRAttentionConfig(threshold=arguments.threshold)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


def make_model(folder, tokens):
    """The checkpoint's model, or a fresh one of 256 hidden units, 8 query heads and 2 key/value heads."""
    if folder is not None:
        return Qwen2ForCausalLM.from_pretrained(str(folder))
    config = Qwen2Config(
        vocab_size=NUM_BYTES,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        pad_token_id=None,
        use_cache=False,
    )
    config.fuse_rms_norm = False  # the fused kernel is for GPUs
    return Qwen2ForCausalLM(config)


def main():
    arguments, config = parse_arguments()
    use_all_cores()
    length = arguments.tokens + 1  # inputs, and the same shifted by one
    text = read_tokens(arguments.file)  # [1, bytes in the file]

    paddle.seed(0)
    model = rrattn.enable(make_model(arguments.model, arguments.tokens), config)
    model.train()
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters(), grad_clip=clip)
    generator = np.random.default_rng(0)
    for step in range(arguments.steps):
        losses, densities = [], []
        for begin in generator.integers(0, text.shape[1] - length + 1, arguments.accumulate):
            sequence = text[:, begin : begin + length]
            loss = model(sequence[:, :-1], labels=sequence[:, 1:], return_dict=True).loss
            (loss / arguments.accumulate).backward()
            losses.append(float(loss))
            densities += [float(density.mean()) for density in rrattn.layer_densities(model)]
        optimizer.step()
        optimizer.clear_grad()
        print(
            f"step {step + 1:3}   loss per byte {np.mean(losses):.3f}   density {np.mean(densities):6.1%}", flush=True
        )
    if arguments.output is not None:
        rrattn.disable(model).save_pretrained(str(arguments.output))
        print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
