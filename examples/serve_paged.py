"""Serves several requests at once: chunks of prompts and tokens to decode in one batch, keys and values in pages.

    python examples/serve_paged.py [FILE] [--requests 4] [--tokens 2000] [--new 24] [--threshold 0.9]

A minimal loop of continuous batching on a CPU. A step takes what each running request has next, a chunk of its prompt
or the one token that it has just generated, packed without padding, through the probe of examples/probe. Attention is
`rrattn.serving.ragged_attention` over the pages of a cache, which requests take when they need one and give back at
their end; then the next waiting one joins. The prompts are parts of a text, of different lengths. All is generated
dense and sparse, and then once more with each request alone.
"""

if __name__ == "__main__":
    import quiet  # noqa: F401

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from byte_llama import MAX_TOKENS, choose_document, load_probe, read_document, use_all_cores

from rrattn.command_line import check_at_least
from rrattn.serving import ragged_attention

PAGE_SIZE = 64
KEY_STRIDE = 8
CHUNK = 512  # tokens of a prompt that a step takes of a request, a multiple of the block size
MOST_RUNNING = 3  # requests at once


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: one that the installation brings")
    parser.add_argument("--requests", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=24, help="bytes to generate for each (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="mass to keep (default: %(default)s)")
    arguments = parser.parse_args()
    check_at_least(parser, arguments, requests=1, tokens=2, new=1)
    if arguments.tokens + arguments.new > MAX_TOKENS:
        parser.error(f"--tokens and --new must be at most {MAX_TOKENS} together")
    arguments.file = choose_document(parser, arguments.file, arguments.tokens - 1, f"--tokens {arguments.tokens}")
    return arguments


@dataclass
class Request:
    """A prompt, and what has become of it."""

    prompt: np.ndarray  # int64
    count: int  # of tokens to generate
    new: list = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values are in the pages
    pages: list = field(default_factory=list)

    @property
    def is_done(self):
        return len(self.new) == self.count

    def next_tokens(self):
        """The tokens of its next step, and whether the last of them tells a new one."""
        if self.new:
            return np.array(self.new[-1:]), True
        end = self.num_cached + CHUNK
        return self.prompt[self.num_cached : end], end >= len(self.prompt)


class PagedCache:
    """Keys, values and the estimate's sums of keys of all layers, and which pages are free."""

    def __init__(self, config, num_pages):
        heads, size = config.num_key_value_heads, config.head_dim
        rows, sums = [num_pages, PAGE_SIZE, heads, size], [num_pages, heads, PAGE_SIZE // KEY_STRIDE, size + 1]
        layers = range(config.num_hidden_layers)
        self.keys, self.values = ([paddle.zeros(rows) for _ in layers] for _ in range(2))
        self.pooled_keys = [paddle.zeros(sums) for _ in layers]
        self.free = list(range(num_pages))

    def take_pages(self, request, num_tokens):
        while len(request.pages) * PAGE_SIZE < num_tokens:
            request.pages.append(self.free.pop())

    def give_back(self, request):
        self.free += request.pages
        request.pages = []

    def write(self, layer, places, key, value):
        """Puts rows [T, Hkv, D] at places [T], counted in tokens over all pages."""
        for pages, rows in ((self.keys[layer], key), (self.values[layer], value)):
            paddle.scatter_(pages.reshape([-1, *rows.shape[1:]]), places, rows)


@dataclass
class Batch:
    """A step's tokens of all requests, one after the other, and how they lie."""

    tokens: paddle.Tensor  # [T]
    positions: np.ndarray  # [T]
    places: paddle.Tensor  # [T], in the pages
    cu_seqlens_q: paddle.Tensor
    seqlens_k: paddle.Tensor
    block_tables: paddle.Tensor
    keep_last: paddle.Tensor


def make_batch(requests, cache):
    """The next step of these requests, with pages for its tokens."""
    tokens, positions, places, keep_last = [], [], [], []
    for request in requests:
        own, tells = request.next_tokens()
        at = np.arange(request.num_cached, request.num_cached + len(own))
        cache.take_pages(request, at[-1] + 1)
        request.num_cached += len(own)
        tokens.append(own)
        positions.append(at)
        places.append(np.array(request.pages)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
        keep_last.append(tells)
    tables = np.full((len(requests), max(len(request.pages) for request in requests)), -1, np.int32)
    for row, request in zip(tables, requests):
        row[: len(request.pages)] = request.pages
    return Batch(
        tokens=paddle.to_tensor(np.concatenate(tokens)),
        positions=np.concatenate(positions),
        places=paddle.to_tensor(np.concatenate(places)),
        cu_seqlens_q=paddle.to_tensor(np.cumsum([0, *map(len, tokens)]), "int32"),
        seqlens_k=paddle.to_tensor([request.num_cached for request in requests], "int32"),
        block_tables=paddle.to_tensor(tables),
        keep_last=paddle.to_tensor(keep_last),
    )


def rotate(rows, positions, theta):
    """[T, H, D] with rotary position embeddings."""
    half = rows.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (paddle.to_tensor(f(angles).astype("float32")).unsqueeze(1) for f in (np.cos, np.sin))
    first, second = rows[..., :half], rows[..., half:]
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


def next_tokens_of(model, batch, cache, threshold):
    """The most likely next token after each request's last row, [B]."""
    config = model.config
    rows = [-1, config.head_dim]
    hidden = model.model.embed_tokens(batch.tokens)
    for i, layer in enumerate(model.model.layers):
        attention, inputs = layer.self_attn, layer.input_layernorm(hidden)
        query = attention.q_proj(inputs).reshape([0, *rows])
        key = attention.k_proj(inputs).reshape([0, *rows])
        value = attention.v_proj(inputs).reshape([0, *rows])
        query, key = (rotate(x, batch.positions, config.rope_theta) for x in (query, key))
        cache.write(i, batch.places, key, value)
        out = ragged_attention(
            query,
            cache.keys[i],
            cache.values[i],
            batch.cu_seqlens_q,
            batch.seqlens_k,
            batch.block_tables,
            heads_first=False,
            pooled_keys=cache.pooled_keys[i],
            key_stride=KEY_STRIDE,
            threshold=threshold,
            keep_last=batch.keep_last,
        )
        hidden = hidden + attention.o_proj(out.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    last = hidden[batch.cu_seqlens_q[1:] - 1]
    return model.lm_head(model.model.norm(last)).argmax(-1).tolist()


@paddle.no_grad()
def serve(model, prompts, count, threshold):
    """(`count` new tokens after each prompt, the largest number of pages in use at once)."""
    waiting = [Request(prompt, count) for prompt in prompts]
    requests, running, most_pages = list(waiting), [], 0
    pages = [-(-(len(request.prompt) + count) // PAGE_SIZE) for request in requests]
    num_pages = sum(sorted(pages)[-MOST_RUNNING:])
    cache = PagedCache(model.config, num_pages)
    while waiting or running:
        while waiting and len(running) < MOST_RUNNING:
            running.append(waiting.pop(0))
        batch = make_batch(running, cache)
        most_pages = max(most_pages, num_pages - len(cache.free))
        tokens = next_tokens_of(model, batch, cache, threshold)
        for request, token, tells in zip(running, tokens, batch.keep_last.tolist()):
            if tells:
                request.new.append(token)
            if request.is_done:
                cache.give_back(request)
        running = [request for request in running if not request.is_done]
    return [request.new for request in requests], most_pages


def main():
    arguments = parse_arguments()
    use_all_cores()
    model = load_probe()
    document = read_document(arguments.file, arguments.tokens)[0].numpy()
    lengths = [max(arguments.tokens * (i + 1) // arguments.requests, 1) for i in range(arguments.requests)]
    prompts = [document[:length] for length in lengths]
    print(f"prompts of {', '.join(f'{length:,}' for length in lengths)} tokens of {arguments.file}")
    for threshold in (1.0, arguments.threshold):
        begin = time.perf_counter()
        new, pages = serve(model, prompts, arguments.new, threshold)
        seconds = time.perf_counter() - begin
        alone = [serve(model, [prompt], arguments.new, threshold)[0][0] for prompt in prompts]
        print(f"\nthreshold {threshold}, {seconds:.1f} s, at most {pages} pages of {PAGE_SIZE} tokens at once")
        for length, own, by_itself in zip(lengths, new, alone):
            same = "as alone" if own == by_itself else "NOT as alone"
            print(f"  after {length:,} tokens, {same}: {bytes(own).decode(errors='replace')!r}")


if __name__ == "__main__":
    main()
