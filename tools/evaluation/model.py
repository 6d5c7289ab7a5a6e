"""A checkpoint of PaddleFormers or PaddleNLP whose attention chooses its blocks by a given method."""

from __future__ import annotations

import copy
import functools
import hashlib
import time

import numpy as np
import paddle

import rrattn
from rrattn.checkpoint import codec_of, load_model
from rrattn.integrations import attention_cores


class Model:
    """A model, its tokens, and the method by which its attention chooses blocks.

    Parameters
    ----------
    folder : path
        A checkpoint directory that AutoModelForCausalLM of the installed library loads; its tokens as in `codec_of`.

    Attributes
    ----------
    method : Method
        How prefills choose their blocks; may be set between calls.
    densities : list of float32 [Hq]
        Of the last prefill, per layer: the share of the visible blocks that were attended.
    """

    def __init__(self, folder):
        self.codec, self.model = self._load(folder)
        rrattn.enable(self.model, rrattn.RRAttentionConfig())
        self.cores = attention_cores(self.model)
        for layer, core in enumerate(self.cores):
            core._observer = functools.partial(self._attend, layer)
        self.method = None
        self.on_attend = None  # called with (layer, query, key, scale) before each prefill's attention
        self.densities = [None] * len(self.cores)
        self._every_block = False
        self._causal_bounds = {}

    def _load(self, folder):
        """(codec, model) of a checkpoint."""
        return codec_of(folder), load_model(folder, "float32")

    def prompt_of(self, sample, longest):
        """(what `prefill` takes, number of tokens) of a sample; one of more than `longest` tokens loses its middle."""
        tokens = self.codec.encode(sample.prompt.encode())
        if len(tokens) > longest:
            tokens = np.concatenate([tokens[: longest // 2], tokens[len(tokens) - (longest - longest // 2) :]])
        return tokens, len(tokens)

    @property
    def num_layers(self):
        return len(self.cores)

    def digest(self):
        """A few letters that tell the weights from others."""
        state = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            state.update(name.encode() + weight.numpy().tobytes())
        return state.hexdigest()[:12]

    def _attend(self, layer, query, key, value, startend_row_indices, *, causal, softmax_scale, sink):
        """What an RRAttention runs in place of its own: (out, block mask). Masks are plain causal here, so bounds that
        the library makes of them say nothing more."""
        if sink is not None:
            raise ValueError("the model has attention sinks, which the methods that are compared here do not know")
        sizes = {"causal": causal, "seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        if self._every_block or query.shape[1] == 1 < key.shape[1]:
            block_mask = rrattn.dense_block_mask(query.shape[0], query.shape[2], **sizes)
        else:
            if self.on_attend is not None:
                self.on_attend(layer, query, key, softmax_scale)
            if self.method.config is not None:
                core = self.method.core(layer, self.num_layers, query.shape[2])
                out = core(query, key, value, causal=causal, softmax_scale=softmax_scale)
                self.densities[layer] = core.last_density.numpy()[0]
                return out, core.last_selection.block_mask
            block_mask = self.method.block_mask(query, key, softmax_scale, layer, self.num_layers)
            self.densities[layer] = rrattn.block_density(block_mask, **sizes).numpy()[0]
        out = rrattn.block_sparse_attention(query, key, value, block_mask, causal=causal, softmax_scale=softmax_scale)
        return out, block_mask

    @paddle.no_grad()
    def prefill(self, tokens, cache=None):
        """(hidden, cache) of n tokens, int64 [n], after those of the cache, which stays; blocks chosen by the method.

        hidden is float32 [n, hidden size], the last layer's, of which `logits` makes logits: those of all rows at once
        would be gigabytes where the vocabulary is large.
        """
        return self._run(tokens, cache)

    @paddle.no_grad()
    def decode(self, tokens, cache):
        """What `prefill` returns, with every block attended: the same as decoding these tokens one by one."""
        self._every_block = True
        try:
            return self._run(tokens, cache)
        finally:
            self._every_block = False

    def _run(self, tokens, cache):
        begin, past = (0, None) if cache is None else (length_of(cache), copied(cache))
        end = begin + len(tokens)
        output = self.model.base_model(
            paddle.to_tensor(np.asarray(tokens, np.int64)[None]),
            position_ids=paddle.arange(begin, end).unsqueeze(0),
            attn_mask_startend_row_indices=paddle.full([1, 1, end, 1], end - begin, dtype="int32"),
            past_key_values=past,
            use_cache=True,
            return_dict=True,
        )
        return output.last_hidden_state[0], output.past_key_values

    @paddle.no_grad()
    def logits(self, hidden):
        """float32 NumPy array [rows, vocabulary], of rows of hidden."""
        return self.model.lm_head(hidden.unsqueeze(0))[0].astype("float32").numpy()

    def answer(self, context, cache, question, answer):
        """Whether greedy decoding answers a question, token by token: bool [answer tokens].

        Parameters
        ----------
        context : int64 [n]
        cache : of the context's first floor(n / 128) * 128 tokens
            What is left of the context, and the question, are prefilled after it, as one prefill of all would do them:
            its choice of blocks is the same.
        question, answer : int64 [tokens]
        """
        prompt = np.concatenate([context[length_of(cache) :], question])
        hidden, cache = self.prefill(prompt, cache)
        guesses = [self.logits(hidden[-1:])[0].argmax()]
        if len(answer) > 1:
            # Greedy decoding goes on with the answer as long as it is right, so this tells the same.
            guesses += list(self.logits(self.decode(answer[:-1], cache)[0]).argmax(-1))
        return np.asarray(guesses) == answer

    def generate(self, prompt, count):
        """`count` tokens after a prompt, int64 [count], greedily: the prefill by the method, decoding dense."""
        hidden, cache = self.prefill(prompt)
        made = [int(self.logits(hidden[-1:])[0].argmax())]
        while len(made) < count:
            hidden, cache = self.decode(np.asarray(made[-1:]), cache)
            made.append(int(self.logits(hidden)[0].argmax()))
        return np.asarray(made)


def length_of(cache):
    """Tokens in a cache."""
    if isinstance(cache, (list, tuple)):  # PaddleNLP: (key, value) [B, L, Hkv, D] per layer
        return cache[0][0].shape[1]
    return cache.get_seq_length()


def copied(cache):
    """A cache that may grow without the first one growing; tensors are shared, as neither changes them in place."""
    if isinstance(cache, (list, tuple)):
        return cache
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def log_softmax(logits):
    """float32 [n, vocabulary]: the logarithms of the probabilities of each row; their sums are taken in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


class Timer:
    """with Timer() as timer: ...; then timer.seconds."""

    def __enter__(self):
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._begin
