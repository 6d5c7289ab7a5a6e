"""The examples run, at small sizes, and what they print holds."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import paddle
import pytest

import rrattn

pytest.importorskip("paddleformers")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, folder):
    """Output of an example, run as a user does, in `folder`."""
    return run_with_errors(name, *arguments, folder=folder)[0]


def run_with_errors(name, *arguments, folder):
    """(stdout, stderr) of an example, without progress bars."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, [line for line in re.split(r"[\r\n]+", result.stderr) if line and "|" not in line]


def test_prefill_of_the_default_document(tmp_path):
    output, errors = run_with_errors(
        "prefill_document.py", "--tokens", 2000, "--own-tokens", 600, "--threshold", 0.8, folder=tmp_path
    )
    assert errors == []  # nothing of what the libraries tell
    document = re.search(r"from the beginning of (.+)", output).group(1)
    assert Path(document).stat().st_size >= 2000
    densities = re.findall(r"density of layer (\d) +100\.0% +([\d.]+)% +heads((?: +\d+){6}) %", output)
    assert [layer for layer, _, _ in densities] == list("012345")
    for _, mean, heads in densities:
        heads = [float(head) for head in heads.split()]
        assert 0 < min(heads) and max(heads) <= 100 and float(mean) == pytest.approx(np.mean(heads), abs=0.6)
    total = float(re.search(r"^density +100\.0% +([\d.]+)% +of all layers and heads$", output, re.MULTILINE).group(1))
    assert total == pytest.approx(np.mean([float(mean) for _, mean, _ in densities]), abs=0.06)
    dense, sparse = map(float, re.search(r"guessed right +([\d.]+)% +([\d.]+)%", output).groups())
    assert dense > 30 and abs(dense - sparse) < 10
    assert float(re.search(r"own and dense differ by (\S+) at 600 tokens", output).group(1)) < 1e-4
    assert 1e-4 < float(re.search(r"output difference: ([^ ,]+),", output).group(1)) < 0.5
    times = re.findall(r"^time, ([\d,]+) tokens +(not run|[\d.]+ s) +[\d.]+ s +[\d.]+ s +(.+)", output, re.MULTILINE)
    assert [(tokens, own != "not run") for tokens, own, _ in times] == [("600", True), ("2,000", False)]
    assert re.fullmatch(r"[\d.]+x as fast as own, [\d.]+x as fast as dense", times[0][2])
    assert re.fullmatch(r"[\d.]+x as fast as dense", times[1][2])
    for line in ("  in the attention layers", "  peak memory"):
        assert len(re.findall(rf"^{line} +(?:not run|[\d.]+ G?[sB]) +[\d.]+ ", output, re.MULTILINE)) == 2, output
    assert (tmp_path / "selected_blocks.png").read_bytes().startswith(b"\x89PNG")


def test_prefill_of_a_file_with_every_block(tmp_path):
    (tmp_path / "text").write_text("One line and then another. " * 40)
    output = run("prefill_document.py", "text", "--tokens", 1000, "--threshold", 1, folder=tmp_path)
    assert "1,000 tokens, from the beginning of text" in output
    assert output.count("time, ") == 1 and "at 1,000 tokens: they compute the same" in output  # own runs on all of it
    assert "output difference: 0.00e+00" in output and "at 100.0% of the positions" in output
    output = run("prefill_document.py", "text", "--tokens", 300, "--own-tokens", 0, folder=tmp_path)
    assert output.count("time, 300 tokens") == 1 and "x as fast as own" not in output


def test_training_lowers_the_loss(tmp_path):
    output = run("train_step.py", "--steps", 6, "--batch", 1, "--tokens", 700, "--threshold", 0.5, folder=tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)", output, re.MULTILINE)]
    densities = [float(density) for density in re.findall(r"density +([\d.]+)%", output)]
    assert len(losses) == len(densities) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert all(0 < density < 100 for density in densities)


def test_generation_dense_and_sparse(tmp_path):
    output = run("generate_llama.py", "--tokens", 2000, "--new", 20, "--threshold", 0.8, folder=tmp_path)
    texts = re.findall(r"^threshold ([\d.]+), [\d.]+ s: (.+)", output, re.MULTILINE)
    assert [threshold for threshold, _ in texts] == ["1.0", "0.8"]
    assert all(len(text) >= 22 for _, text in texts)
    layers = re.findall(r"^ +[0-5] +([\d.]+)%, .* 1 x +[\d.]+ ms +19 x [\d.]+ ms", output, re.MULTILINE)
    densities = [float(density) for density in layers]
    assert len(densities) == 12 and densities[:6] == [100] * 6 and max(densities[6:]) < 100
    assert re.search(r"the same new bytes: [\d.]+%", output)
    (tmp_path / "text").write_text("One line and then another. " * 40)
    output = run("generate_llama.py", "text", "--tokens", 1000, "--new", 30, folder=tmp_path)
    assert output.count("ne line and then another. One") == 2  # it goes on with what it has read
    assert "the same new bytes: 100.0%" in output


def test_serving_gives_each_request_what_it_gets_alone(tmp_path):
    output = run("serve_paged.py", "--tokens", 700, "--new", 4, "--threshold", 0.6, folder=tmp_path)
    served = re.findall(r"^  after ([\d,]+) tokens, (.*): '", output, re.MULTILINE)
    assert served == [(tokens, "as alone") for tokens in ("175", "350", "525", "700")] * 2
    pages = re.findall(r"^threshold (\S+), [\d.]+ s, at most (\d+) pages of 64 tokens at once$", output, re.MULTILINE)
    # three requests at once: the last one comes when the first one's pages are free again
    assert [threshold for threshold, _ in pages] == ["1.0", "0.6"]
    assert all(11 <= int(most) <= 6 + 9 + 12 for _, most in pages)


@paddle.no_grad()
def test_dense_serving_gives_what_the_library_generates():
    byte_llama, serve_paged = import_module("byte_llama"), import_module("serve_paged")
    model = byte_llama.load_probe()
    document = byte_llama.read_document(Path(serve_paged.__file__), 700)
    new, _ = serve_paged.serve(model, [document[0, :n].numpy() for n in (700, 130)], 8, 1.0)
    for own, length in zip(new, (700, 130)):
        prompt = document[:, :length]
        expected, _ = model.generate(
            prompt,
            attention_mask=paddle.ones_like(prompt),
            max_new_tokens=8,
            decode_strategy="greedy_search",
            eos_token_id=-1,
            use_cache=True,
        )
        assert own == expected[0].tolist()


def losses_of(output):
    """Loss and density of each step that finetune_qwen.py printed."""
    steps = re.findall(r"^step +\d+ +loss per byte ([\d.]+) +density +([\d.]+)%", output, re.MULTILINE)
    return np.array(steps, dtype=float).T


def test_finetuning_lowers_the_loss_and_goes_on_from_its_checkpoint(tmp_path):
    sizes = ("--tokens", 768, "--accumulate", 2, "--threshold", 0.5)
    output = run("finetune_qwen.py", "--steps", 8, *sizes, "--output", "first", folder=tmp_path)
    losses, densities = losses_of(output)
    assert len(losses) == 8 and losses[-3:].mean() < 0.8 * losses[:3].mean()
    assert (0 < densities).all() and (densities < 100).all()
    assert (tmp_path / "first" / "config.json").is_file() and "saved to first" in output
    again, _ = losses_of(run("finetune_qwen.py", "--steps", 1, *sizes, "--model", "first", folder=tmp_path))
    assert again[0] < 0.8 * losses[0]  # of the same sequences


@paddle.no_grad()
def test_the_probe_completes_what_it_has_seen():
    text = np.random.default_rng(0).integers(97, 123, 500)  # nothing to guess in the first copy
    tokens = paddle.to_tensor(np.concatenate([[0], np.tile(text, 3)])[None])
    model = rrattn.enable(import_module("byte_llama").load_probe(), rrattn.RRAttentionConfig())
    guesses = model(tokens, return_dict=True).logits[0, :-1].argmax(-1).numpy()
    right = guesses == tokens.numpy()[0, 1:]
    assert right[:499].mean() < 0.1
    assert right[510:999].mean() > 0.9 and right[1010:].mean() > 0.9


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prefill_document", ["--tokens", "1"], "--tokens.*1"),
        ("prefill_document", ["--own-tokens", "1"], "--own-tokens.*1"),
        ("prefill_document", ["--tokens", "900", "--own-tokens", "901"], "--own-tokens.*900.*901"),
        ("prefill_document", ["--threshold", "0"], r"threshold.*0\.0"),
        ("prefill_document", ["--stride", "7"], "stride.*7.*16"),
        ("prefill_document", ["no/such/file"], "no/such/file"),
        ("prefill_document", ["--output", "no/such/folder.png"], "no/such"),
        ("prefill_document", ["--output", "picture"], "picture"),
        ("train_step", ["--steps", "0"], "--steps.*0"),
        ("train_step", ["--tokens", "1"], "--tokens.*1"),
        ("train_step", ["--batch", "0"], "--batch.*0"),
        ("train_step", ["--threshold", "2"], r"threshold.*2\.0"),
        ("generate_llama", ["--tokens", "1"], "--tokens.*1"),
        ("generate_llama", ["--new", "0"], "--new.*0"),
        ("generate_llama", ["--threshold", "0"], r"threshold.*0\.0"),
        ("generate_llama", ["no/such/file"], "no/such/file"),
        ("finetune_qwen", ["--accumulate", "0"], "--accumulate.*0"),
        ("finetune_qwen", ["--model", "no/such/folder"], "no checkpoint in no/such/folder"),
        ("finetune_qwen", ["--threshold", "2"], r"threshold.*2\.0"),
        ("finetune_qwen", ["--output", __file__], "--output must be a folder, but .*test_examples.py is none"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, name, arguments, message):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        import_module(name).main()
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["prefill_document", "train_step", "generate_llama", "finetune_qwen"])
def test_a_text_that_is_too_short_is_named(monkeypatch, capsys, tmp_path, name):
    short = tmp_path / "short"
    short.write_text("a few words")
    monkeypatch.setattr(sys, "argv", [name, str(short), "--tokens", "1000"])
    with pytest.raises(SystemExit) as stop:
        import_module(name).main()
    assert stop.value.code == 2
    assert re.search(r"FILE .*short holds 11 bytes, fewer than .* for --tokens 1000", capsys.readouterr().err)


def test_an_installation_without_such_a_text_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step", "--tokens", "1000000000000"])
    with pytest.raises(SystemExit) as stop:
        import_module("train_step").main()
    assert stop.value.code == 2
    assert "no text of the 1,000,000,000,001 bytes for --tokens" in capsys.readouterr().err
