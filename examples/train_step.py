"""Trains a small byte-level LLaMA for a few steps from fresh weights with RRAttention, forward and backward, on text.

    python examples/train_step.py [FILE] [--steps 15] [--tokens 1024] [--batch 1] [--threshold 0.7] [--stride 8]

The backward pass visits the blocks that the forward pass selected; the selection itself carries no gradient.
"""

if __name__ == "__main__":
    import quiet  # noqa: F401

import argparse
import time
from pathlib import Path

import numpy as np
import paddle
from byte_llama import NUM_BYTES, choose_document, read_tokens, use_all_cores
from paddleformers.transformers import LlamaConfig, LlamaForCausalLM
from tqdm import tqdm

import rrattn
from rrattn.command_line import check_at_least


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--steps", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.7, help="mass to keep (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=8, help="sample stride (default: %(default)s)")
    arguments = parser.parse_args()
    check_at_least(parser, arguments, steps=1, tokens=2, batch=1)
    arguments.file = choose_document(parser, arguments.file, arguments.tokens + 1, f"--tokens {arguments.tokens}")
    try:
        config = rrattn.RRAttentionConfig(threshold=arguments.threshold, stride=arguments.stride)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


def make_model(max_tokens):
    """Two layers of 512 hidden units, 8 query heads and 2 key/value heads."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=False,
        pad_token_id=None,
        use_cache=False,
    )
    config.fuse_rms_norm = False  # the fused kernel is for GPUs
    return LlamaForCausalLM(config)


def main():
    arguments, config = parse_arguments()
    use_all_cores()
    length = arguments.tokens + 1  # inputs, and the same shifted by one
    text = read_tokens(arguments.file)  # [1, bytes in the file]

    paddle.seed(0)
    model = make_model(arguments.tokens)
    model.train()
    rrattn.enable(model, config)
    optimizer = paddle.optimizer.AdamW(
        5e-4, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    print(f"text:  {arguments.file}, {text.shape[1]:,} bytes")
    print(f"model: byte-level LLaMA, 2 layers, {sum(p.size for p in model.parameters()) / 1e6:.1f} M parameters")

    generator = np.random.default_rng(0)
    losses = []
    bar = tqdm(range(arguments.steps), unit="step")
    for step in bar:
        begins = generator.integers(0, text.shape[1] - length + 1, arguments.batch)
        sequences = paddle.concat([text[:, begin : begin + length] for begin in begins])  # [batch, tokens + 1]
        start = time.perf_counter()
        loss = model(sequences[:, :-1], labels=sequences[:, 1:], return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
        seconds = time.perf_counter() - start
        density = np.mean([layer.numpy() for layer in rrattn.layer_densities(model)])
        bar.write(f"step {step + 1:3}   loss {losses[-1]:.3f}   density {density:6.1%}   {seconds:.2f} s")
    print(f"loss per byte: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")


if __name__ == "__main__":
    main()
