"""tools.training_curves trains for real at a small size, and its figures, files and exit status hold."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import rrattn

pytest.importorskip("paddleformers")
pytest.importorskip("matplotlib")

from tools import training_curves as tool  # noqa: E402

ROOT = Path(__file__).parents[2]
LINE = "One line of text, and then the next one follows. "


def test_a_short_run(tmp_path):
    sizes = "--steps 20 --tokens 500 --threshold 0.3 --stride 16 --no-keep-last --keep-local 0 --seed 5".split()
    command = [
        sys.executable,
        "-m",
        "tools.training_curves",
        *sizes,
        "--json",
        "curves.json",
        "--picture",
        "curves.png",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    results = json.loads((tmp_path / "curves.json").read_text())
    settings = {"steps": 20, "tokens": 500, "threshold": 0.3, "stride": 16, "seed": 5}
    settings |= {"keep_last": False, "keep_local": 0}
    assert settings.items() <= results.items()
    assert results["run"]["command"].startswith("python -m tools.training_curves --steps 20")
    means = []
    for name in ("dense", "rrattn"):
        losses = np.array(results[name]["loss"])
        assert losses.shape == (20,) and losses[-3:].mean() < 0.6 * losses[:3].mean()
        assert results[name]["seconds"] > 0
        means.append(losses.mean())  # over 20 steps, so over all of them
        assert results["final"][name] == pytest.approx(means[-1])
    density = np.array(results["rrattn"]["density"])
    assert density.shape == (20,) and (0 < density).all() and (density < 1).all()
    assert results["final"]["difference"] == pytest.approx((means[1] - means[0]) / means[0])
    assert results["dense"]["loss"] != results["rrattn"]["loss"]
    assert process.returncode == int(abs(results["final"]["difference"]) > 0.02), process.stdout + process.stderr
    assert re.search(rf"^dense +{means[0]:.4f} +100.0% ", process.stdout, re.MULTILINE)
    assert re.search(rf"^RRAttention +{means[1]:.4f} +{100 * density.mean():.1f}% ", process.stdout, re.MULTILINE)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_dense_and_every_block_train_alike():
    text = paddle.to_tensor(np.frombuffer((LINE * 40).encode(), np.uint8).astype(np.int64)[None])
    sequences = tool.cut_sequences(text, steps=5, tokens=300, seed=0)
    config = rrattn.RRAttentionConfig(threshold=1.0)
    dense = tool.train(tool.make_model(300, seed=1), sequences, "dense")
    every_block = tool.train(rrattn.enable(tool.make_model(300, seed=1), config), sequences, "every block")
    np.testing.assert_allclose(every_block["loss"], dense["loss"], rtol=1e-4)
    assert every_block["density"] == [1.0] * 5 and "density" not in dense
    other = tool.train(tool.make_model(300, seed=2), sequences[:1], "another seed")
    assert abs(other["loss"][0] / dense["loss"][0] - 1) > 1e-3


def test_sequences_are_different_stretches_of_the_text():
    text = paddle.arange(1000).unsqueeze(0)
    sequences = [x.numpy()[0] for x in tool.cut_sequences(text, steps=9, tokens=111, seed=3)]
    assert sorted(x[0] for x in sequences) == list(range(0, 999, 111))
    assert all((x == np.arange(x[0], x[0] + 112)).all() for x in sequences)
    again, other = (tool.cut_sequences(text, steps=9, tokens=111, seed=seed) for seed in (3, 4))
    assert [int(x[0, 0]) for x in again] == [x[0] for x in sequences] != [int(x[0, 0]) for x in other]


@pytest.mark.parametrize(
    ("final_loss", "status"), [(2.039, 0), (1.961, 0), (2.041, 1), (1.959, 1), (float("nan"), 1), (float("inf"), 1)]
)
def test_the_exit_status_tells_whether_the_final_losses_agree(monkeypatch, tmp_path, capsys, final_loss, status):
    def train(model, sequences, name):
        """Made-up curves that are apart before the last 20 steps in any case."""
        assert len(sequences) == 25
        sparse = model.config._attn_implementation == "rrattn"
        curve = {"loss": [5.0] * 5 + [final_loss] * 20, "density": [0.5] * 25} if sparse else {"loss": [2.0] * 25}
        return curve | {"seconds": 1.0}

    monkeypatch.setattr(tool, "train", train)
    (tmp_path / "text").write_text(LINE * 20)
    files = ["--json", str(tmp_path / "curves.json"), "--picture", str(tmp_path / "curves.png")]
    arguments = [str(tmp_path / "text"), "--steps", "25", "--tokens", "30", *files]
    monkeypatch.setattr(sys, "argv", ["training_curves.py", *arguments])
    assert tool.main() == status
    assert ("NOT within 2%" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "19"], "--steps must be at least 20, got 19"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--threshold", "2"], r"threshold.*2\.0"),
        (["--stride", "7"], "stride is 7.*16"),
        (["--keep-local", "-1"], "keep_local is -1.*at least 0"),
        (["no/such/file"], "no file no/such/file"),
        (["--json", "no/such/curves.json"], "no folder no/such for --json"),
        (["--json", "curves.txt"], r"--json must end in \.json, got curves\.txt"),
        (["--picture", "no/such/curves.png"], "no folder no/such for --picture"),
        (["--picture", "curves"], r"--picture must end in \.png or .*, got curves"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["training_curves.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_text_that_is_too_short_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "short").write_text("x" * 600)
    monkeypatch.setattr(sys, "argv", ["training_curves.py", str(tmp_path / "short"), "--steps", "20", "--tokens", "30"])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 2
    assert "short holds 600 bytes, fewer than the 601 for --steps 20 of --tokens 30" in capsys.readouterr().err


def test_the_page_on_training_tells_what_was_recorded():
    def recorded(name):
        return json.loads((ROOT / "tools/bench/results" / name).read_text())

    def final(results, name):
        return np.mean(results[name]["loss"][-20:])

    results = recorded("training_curves.json")
    dense, sparse = final(results, "dense"), final(results, "rrattn")
    density = results["rrattn"]["density"]
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert f"{results['steps']} steps of {results['tokens']:,} bytes" in page
    assert f"threshold {results['threshold']:g}" in page
    assert f"{sparse:.3f} nats per byte with RRAttention, {dense:.3f} dense ({sparse / dense - 1:+.2%})" in page
    assert f"{np.mean(density):.0%} of the blocks on average, {np.mean(density[-20:]):.0%} in the end" in page
    floor = recorded("training_curves_floor.json")
    assert floor["dense"]["loss"] == results["dense"]["loss"]  # nothing but the threshold was another
    assert f"`--threshold {floor['threshold']:.4f}`" in page
    assert f"it came to {final(floor, 'rrattn'):.3f}, below dense" in page
    defaults = [recorded(f"training_curves_default_{seed}.json") for seed in range(3)]
    assert all(run["keep_last"] and run["keep_local"] == 1 and run["seed"] == i for i, run in enumerate(defaults))
    first, second, third = (final(run, "rrattn") / final(run, "dense") - 1 for run in defaults)
    assert f"differed from dense by {first:+.1%}, {second:+.1%} and {third:+.1%}, the first" in page
    assert f"came to {dense:.3f} on one CPU and {final(defaults[0], 'dense'):.3f} on another" in page
