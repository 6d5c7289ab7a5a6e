"""GGUF files as tests write them, by the definition of the format, among them one of a LLaMA with a tokenizer."""

import struct

import numpy as np

# A byte is the letter of its number, or of the n-th number above 255 where that is none to print.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(byte) for byte in PRINTED] + [chr(256 + index) for index in range(256 - len(PRINTED))]
TOKENS = ["<end>", "<user>", *BYTES, "ab", "Ġc", "er", "in", "Ġt"]
MODEL = {
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": ["a b", "Ġ c", "e r", "i n", "Ġ t"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value):
    """(type, bytes) of a value of metadata."""
    if isinstance(value, str):
        return 8, string(value)
    if isinstance(value, list):
        parts = [typed(one) for one in value]
        return 9, struct.pack("<IQ", parts[0][0], len(parts)) + b"".join(part for _, part in parts)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    return (4, struct.pack("<I", value)) if isinstance(value, int) else (6, struct.pack("<f", value))


def written(metadata, tensors, alignment=32):
    """A GGUF of metadata and (name, shape, type, bytes) of tensors."""
    begin = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, content = typed(value)
        begin += string(key) + struct.pack("<I", kind) + content
    data = b""
    for name, shape, kind, content in tensors:
        begin += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        begin += struct.pack("<IQ", kind, len(data))
        data += content + b"\xff" * (-len(content) % alignment)
    return begin + b"\xff" * (-len(begin) % alignment) + data


def as_f32(rng, count):
    values = rng.standard_normal(count).astype(np.float32)
    return 0, values.tobytes(), values.tolist()


def as_q8_0(rng, count):
    content, values = b"", []
    for _ in range(count // 32):
        scale, codes = float(np.float16(rng.uniform(0.001, 0.01))), rng.integers(-128, 128, 32).tolist()
        content += struct.pack("<e32b", scale, *codes)
        values += [scale * code for code in codes]
    return 8, content, values


def as_q4_1(rng, count):
    content, values = b"", []
    for _ in range(count // 32):
        scale, least = float(np.float16(rng.uniform(0.01, 0.1))), float(np.float16(-rng.uniform(0.1, 1)))
        codes = rng.integers(0, 16, 32).tolist()
        content += struct.pack("<ee", scale, least)
        for i in range(16):  # byte i holds number i in its lower half and number i + 16 in its upper one
            content += bytes([codes[i] | codes[i + 16] << 4])
        values += [scale * code + least for code in codes]
    return 3, content, values


def tiny_llama(rng):
    """(a GGUF of a LLaMA of one layer, its weights by name as the file has them)."""
    shapes = {"token_embd": (len(TOKENS), 32), "output_norm": (32,)}
    shapes.update({f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")})
    shapes.update({"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)})
    shapes.update({"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)})
    shapes["blk.0.ffn_down"] = (32, 64)
    tensors, values = [], {}
    for name, shape in shapes.items():
        make = as_f32 if len(shape) == 1 else as_q8_0 if name == "token_embd" else as_q4_1
        kind, content, numbers = make(rng, int(np.prod(shape)))
        tensors.append((f"{name}.weight", shape, kind, content))
        values[name] = np.reshape(numbers, shape)
    return written(MODEL, tensors), values
