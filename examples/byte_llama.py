"""A byte-level LLaMA (PaddleFormers) whose weights are written down instead of trained, and text to feed it.

Random weights attend to everything alike, which leaves nothing to select, and a minute of training changes little. So
`make_lookup_model` writes down a mechanism that trained transformers are known to learn, the induction head:

- Layer 0: heads 0-3 look 1, 2, 3 and 4 bytes back and note what stands there. Heads 4-7 average the bytes of the last
  10, 30, 100 and 300 or so: what the text around is like.
- Layers 1-3: every head looks for earlier places that follow the same few bytes, and copies the byte that stands there
  as a guess of the next one. Heads 0-3 prefer recent places, over ever longer reaches; heads 4-7 prefer places with
  similar surroundings, ever more strictly, and each layer compares wider surroundings.

Nothing in the weights is about any text: all that the model knows of a document, it finds by attention. The MLPs run,
but their output is multiplied by zero.
"""

import os
from importlib import metadata, util
from pathlib import Path

import numpy as np
import paddle
from paddleformers.transformers import LlamaConfig, LlamaForCausalLM

NUM_BYTES = 256
HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 512, 8, 2, 64

# What each dimension of the residual stream holds.
CONSTANT = 0  # always 1
PAST = np.arange(1, 321).reshape(5, 64)  # row i: code of the byte i places back
AROUND = np.arange(321, 385).reshape(4, 16)  # row i: mean code of the last 10, 30, 100, 300 bytes
GUESS = np.arange(385, 449)  # code of the next byte

# Rotary embedding turns pair i of a head's dimensions (i and i + 32) by position * 10^(-i/2). So pairs 0-9 tell
# positions apart, and the rest hardly turn over a whole document: these dimensions compare contents.
ROPE_THETA = 1e16
POSITION_PAIRS = np.arange(10)
CONTENT = np.concatenate([np.arange(10, 32), np.arange(42, 64)])

# Heads of layers 1-3: bytes compared, sharpness of the comparison, reach in bytes (None: anywhere), weight of the
# surroundings, weight of the guess.
LOOKUP_HEADS = [
    (2, 4, 100, 0, 0.02),
    (3, 5, 300, 0, 0.03),
    (4, 6, 1000, 0, 0.05),
    (4, 7, 10000, 0, 0.10),
    (3, 4, None, 12, 0.03),
    (3, 5, None, 20, 0.03),
    (4, 6, None, 40, 0.05),
    (4, 7, None, 80, 0.05),
]


def make_config(num_layers, max_tokens, rope_theta=ROPE_THETA):
    """A LLaMA of 512 hidden units, 8 query heads and 2 key/value heads of size 64."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_tokens,
        rope_theta=rope_theta,
        tie_word_embeddings=False,
        pad_token_id=None,
        use_cache=False,
    )
    config.fuse_rms_norm = False  # the fused kernel is for GPUs
    return config


def make_lookup_model(max_tokens):
    """The model described above, of four layers, in evaluation mode."""
    model = LlamaForCausalLM(make_config(num_layers=4, max_tokens=max_tokens))
    code = np.sign(np.random.default_rng(0).standard_normal([NUM_BYTES, HEAD_DIM])) / 8  # a unit vector per byte
    embedding = np.zeros([NUM_BYTES, HIDDEN])
    embedding[:, CONSTANT] = 1
    embedding[:, PAST[0]] = code
    unembedding = np.zeros([NUM_BYTES, HIDDEN])
    unembedding[:, GUESS] = 4 * code
    set_weight(model.model.embed_tokens.weight, embedding)
    set_weight(model.lm_head.weight, unembedding)

    squared_norm = 2.0  # of the residual stream before the layer: a constant and a unit vector
    for index, layer in enumerate(model.model.layers):
        query, key, value, output = lookback_weights() if index == 0 else lookup_weights(index)
        attention = layer.self_attn
        set_weight(attention.q_proj.weight, query.reshape([HIDDEN, -1]))
        set_weight(attention.k_proj.weight, key.reshape([HIDDEN, -1]))
        set_weight(attention.v_proj.weight, value.reshape([HIDDEN, -1]))
        set_weight(attention.o_proj.weight, output.reshape([-1, HIDDEN]))
        set_weight(layer.input_layernorm.weight, np.full([HIDDEN], (squared_norm / HIDDEN) ** 0.5))  # undoes the norm
        set_weight(layer.mlp.down_proj.weight, np.zeros(layer.mlp.down_proj.weight.shape))
        squared_norm += 4 if index == 0 else 0  # the four bytes before; averages and guesses hardly count
    model.eval()
    return model


def set_weight(parameter, value):
    parameter.set_value(value.astype(np.float32))


def empty_weights():
    """Projections of one layer: query [512, 8, 64], key and value [512, 2, 64], output [8, 64, 512]."""
    query, output = np.zeros([HIDDEN, NUM_HEADS, HEAD_DIM]), np.zeros([NUM_HEADS, HEAD_DIM, HIDDEN])
    key, value = np.zeros([2, HIDDEN, NUM_KV_HEADS, HEAD_DIM])
    key[CONSTANT][:, POSITION_PAIRS] = 1
    value[PAST[0], :, np.arange(HEAD_DIM)] = 1
    return query, key, value, output


def prefer_distance(query, head, distance, sharpness, reach):
    """Lets a head favour keys `distance` back; the score falls off within about `reach`, a power of sqrt(10)."""
    pairs = POSITION_PAIRS[round(2 * np.log10(reach)) :]
    turn = distance * ROPE_THETA ** (-pairs / 32)
    scale = sharpness * HEAD_DIM**0.5  # undoes the softmax scale
    query[CONSTANT, head, pairs] = scale * np.cos(turn)
    query[CONSTANT, head, pairs + 32] = -scale * np.sin(turn)


def lookback_weights():
    query, key, value, output = empty_weights()
    for i in range(4):
        prefer_distance(query, i, distance=i + 1, sharpness=30, reach=1)
        output[i, np.arange(64), PAST[i + 1]] = 1
        prefer_distance(query, 4 + i, distance=0, sharpness=6, reach=10 ** (1.5 + 0.5 * i))
        output[4 + i, np.arange(16), AROUND[i]] = 2
    return query, key, value, output


def lookup_weights(index):
    query, key, value, output = empty_weights()
    around, contrast = AROUND[index], 2 * 2**index  # the wider the average, the less it varies
    for head, (num_bytes, sharpness, reach, similarity, weight) in enumerate(LOOKUP_HEADS):
        kv_head = head // 4
        width = (11, 7)[kv_head]  # of the codes compared; key/value head 1 also holds the surroundings
        for i in range(4):
            dims, part = CONTENT[width * i : width * (i + 1)], np.arange(width * i, width * (i + 1))
            key[PAST[i + 1][part], kv_head, dims] = HEAD_DIM / width
            if i < num_bytes:
                query[PAST[i][part], head, dims] = sharpness * HEAD_DIM**0.5
        if reach is not None:
            prefer_distance(query, head, distance=0, sharpness=6, reach=reach)
        if similarity:
            key[around, kv_head, CONTENT[28:]] = 1
            query[around, head, CONTENT[28:]] = similarity * contrast * HEAD_DIM**0.5
        output[head, np.arange(HEAD_DIM), GUESS] = weight
    return query, key, value, output


def use_all_cores():
    """Paddle's own matrix products run on one CPU core unless told otherwise; rrattn's use all of them."""
    paddle.base.core.set_num_threads(os.cpu_count())


def default_document(num_bytes):
    """A long text file that an installation brings: NumPy's licences, or Python's language reference."""
    licences = [file.locate() for file in metadata.files("numpy") or () if file.name.startswith("LICENSE")]
    reference = util.find_spec("pydoc_data.topics")
    for path in map(Path, [*licences, *([reference.origin] if reference else [])]):
        if path.is_file() and path.stat().st_size >= num_bytes:
            return path
    raise SystemExit(f"this installation brings no text of {num_bytes:,} bytes: name a file, or use fewer --tokens")


def read_tokens(path):
    """The bytes of a file as tokens, int64 [1, number of bytes]."""
    data = Path(path).read_bytes()
    return paddle.to_tensor(np.frombuffer(data, dtype=np.uint8).astype(np.int64)[None])
