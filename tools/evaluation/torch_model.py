"""A LLaMA in PyTorch, float32, whose attention chooses its blocks by a given method.

It does what `model.Model` does of examples/probe and its like, many times as fast on a GPU.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rrattn.tokens import MOST_BYTE_TOKENS, Bytes

from . import torch_rrattn
from .baselines import BLOCK
from .torch_attention import attention_for
from .torch_selection import block_mask, exact_mass, products, visible_blocks

PLAIN_LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
TOKENIZER = "tokenizer.json"


def read_config(folder):
    """The config of a checkpoint that `Model` computes.

    Raises
    ------
    ValueError
        For another.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    for name, value in PLAIN_LLAMA.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}: {name} is {config[name]!r}, but must be {value!r}")
    if config.get("rope_scaling"):
        raise ValueError(f"{folder}: rope_scaling is {config['rope_scaling']!r}, but must be null")
    if config["vocab_size"] > MOST_BYTE_TOKENS and not (Path(folder) / TOKENIZER).is_file():
        raise ValueError(f"{folder} has {config['vocab_size']} tokens, but no {TOKENIZER}")
    return config


def codec_of(folder):
    """The tokens of a checkpoint, as `rrattn.checkpoint.codec_of` gives them: of its tokenizer.json, or bytes."""
    path = Path(folder) / TOKENIZER
    return JsonTokenizer(path) if path.is_file() else Bytes()


class JsonTokenizer:
    """What `rrattn.tokens.Tokenizer` is, for prompts, of a tokenizer.json and the package `tokenizers` alone."""

    def __init__(self, path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        first = self.encode(b"a")[0]
        whole = self._tokenizer.encode("a").ids
        self.start = np.asarray(whole[: whole.index(first)], np.int64)

    def encode(self, text):
        ids = self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
        return np.asarray(ids, np.int64)


class Model:
    """The weights on a device, and their attention.

    Parameters
    ----------
    folder : path
        A checkpoint directory as Hugging Face writes them: config.json and model.safetensors.
    device : torch.device
    longest : int
        Tokens of the longest sequence, its answer with it.

    Raises
    ------
    ValueError
        For a config that this does not compute.
    """

    def __init__(self, folder, device, longest):
        config = read_config(folder)
        self.codec = codec_of(folder)
        path = Path(folder) / "model.safetensors"
        self.device, self.digest = device, hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.weights = {name: weight.float().to(device) for name, weight in load_file(path).items()}
        tied = config.get("tie_word_embeddings", False)
        self.head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        self.num_layers, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        self.head_dim = config["head_dim"]
        self.scale = self.head_dim**-0.5
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angle = torch.arange(longest, dtype=torch.float64)[:, None] * config["rope_theta"] ** -pairs
        self.cos, self.sin = (wave(angle).float()[:, None].to(device) for wave in (torch.cos, torch.sin))
        self.attention = attention_for(device)

    def _normed(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.epsilon)

    def _run(self, tokens, attend, begin=0):
        """The residual stream [B, L, hidden] of tokens int64 [B, L] that stand at `begin`.

        attend(layer, query, key, value) of [B, L, heads, D], rotated, returns [B, L, Hq, D].
        """
        cos, sin = (wave[begin : begin + tokens.shape[1]] for wave in (self.cos, self.sin))

        def rotated(x):
            left, right = x.chunk(2, -1)
            return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        for i in range(self.num_layers):
            of_layer = f"model.layers.{i}."

            def project(x, name, of_layer=of_layer):
                return x @ self.weights[f"{of_layer}{name}_proj.weight"].T

            y = self._normed(x, f"{of_layer}input_layernorm")
            q, k, v = (project(y, f"self_attn.{name}").unflatten(-1, (-1, self.head_dim)) for name in "qkv")
            x = x + project(attend(i, rotated(q), rotated(k), v).flatten(2), "self_attn.o")
            y = self._normed(x, f"{of_layer}post_attention_layernorm")
            x = x + project(F.silu(project(y, "mlp.gate")) * project(y, "mlp.up"), "mlp.down")
        return x

    def logits(self, x):
        """[..., vocabulary] of the residual stream."""
        return self._normed(x, "model.norm") @ self.head.T

    def mass(self, query, key, scale):
        """What `exact_mass` returns; in a prefill of one sequence, by the attention's own way."""
        if query.shape[:2] != (1, key.shape[1]):
            return exact_mass(query, key, scale)
        return self.attention.mass(query[0], key[0], scale)[None]

    def choose(self, method, layer, query, key, value):
        """(mask bool [B, Hq, Mq, Mk], out) of what a Method attends in a layer; query is of the last positions.

        out, [B, Lq, Hq, D], is what rrattn's kernels make of these blocks, where a config says how; otherwise None.
        """
        if method.by_config:
            return torch_rrattn.attend(method.config, layer, self.num_layers, query, key, value, self.scale)
        return block_mask(method, query, key, self.scale, self.mass), None

    def prefill(self, tokens, method, on_attend=None):
        """(residual stream [L, hidden], cache, densities float32 [layers]) of int64 [L], blocks chosen by a Method.

        on_attend(layer, query, key) is called in each layer; the cache holds key and value [1, L, Hkv, D] of each.
        """
        cache, densities = [], []

        def attend(layer, query, key, value):
            if on_attend is not None:
                on_attend(layer, query, key)
            mask, out = self.choose(method, layer, query, key, value)
            densities.append(mask.sum() / (mask.shape[1] * visible_blocks(len(tokens), len(tokens), mask.device).sum()))
            cache.append((key, value))
            if out is None:
                out = self.attention.attend(query[0], key[0], value[0], mask[0], self.scale)[None]
            return out

        return self._run(tokens[None], attend)[0], cache, torch.stack(densities)

    def answer(self, rest, cache, questions, answers, method):
        """Whether greedy decoding answers each question, bool [B], as `model.Model.answer` does.

        Parameters
        ----------
        rest : int64 [n]
            The context behind the cache's tokens, which are a multiple of 128.
        questions, answers : int64 [B, tokens]
        """
        prompt = torch.cat([rest.expand(len(questions), -1), questions], 1)
        asked, context = prompt.shape[1], cache[0][0].shape[1]

        def attend(layer, query, key, value):
            past = (old.expand(len(query), -1, -1, -1) for old in cache[layer])
            key, value = (torch.cat(pair, 1) for pair in zip(past, (key, value)))
            prefilled = query[:, :asked], key[:, : context + asked], value[:, : context + asked]
            mask, of_asked = self.choose(method, layer, *prefilled)
            out = attend_after(query, key, value, mask, asked, self.scale)
            if of_asked is not None:
                out[:, :asked] = of_asked
            return out

        x = self._run(torch.cat([prompt, answers[:, :-1]], 1), attend, context)
        return (self.logits(x[:, asked - 1 :]).argmax(-1) == answers).all(1)


def attend_after(query, key, value, mask, asked, scale):
    """Attention of the last T keys' queries [B, T, Hq, D] to keys [B, C + T, Hkv, D], C a multiple of 128.

    The first `asked` see the blocks of mask [B, Hq, Mq, Mk]; those behind them, which are decoded, see everything.
    """
    length, context = query.shape[1], key.shape[1] - query.shape[1]
    score = products(query.transpose(1, 2) * scale, key.transpose(1, 2))  # [B, Hq, T, C + T]
    row, col = torch.arange(length, device=query.device), torch.arange(key.shape[1], device=query.device)
    seen = mask[:, :, (row // BLOCK).clamp(max=mask.shape[2] - 1)]  # [B, Hq, T, Mk]
    seen = seen[..., (col // BLOCK).clamp(max=mask.shape[3] - 1)] | (row >= asked)[:, None]
    chance = torch.softmax(score.masked_fill_(~(seen & (col <= row[:, None] + context)), -torch.inf), -1)
    out = chance.reshape(len(query), key.shape[2], -1, key.shape[1]) @ value.transpose(1, 2)
    return out.reshape(len(query), -1, length, query.shape[3]).transpose(1, 2)
