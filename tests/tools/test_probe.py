"""The trained probe in the repository is what its card says, in PaddleFormers, dense and sparse."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest

pytest.importorskip("paddleformers")
ROOT = Path(__file__).parents[2]

from tools.evaluation import prompts, run  # noqa: E402
from tools.evaluation.methods import Method  # noqa: E402
from tools.evaluation.model import Model  # noqa: E402

PROBE = ROOT / "examples" / "probe"
LENGTH, QUESTIONS = 2048, 10


@pytest.fixture(scope="module")
def probe():
    paddle.base.core.set_num_threads(2)
    return Model(PROBE)


@pytest.fixture(scope="module")
def text():
    """A file that the model has seen or not, of this repository, as one document, the licence among them."""
    source = (ROOT / "rrattn" / "reference.py").read_bytes() + (ROOT / "LICENSE").read_bytes()
    return np.frombuffer(b"\0" + source, np.uint8)


def test_size_and_card():
    assert (PROBE / "model.safetensors").stat().st_size <= 12e6
    quality = json.loads((PROBE / "training.json").read_text())["quality"]
    card = (PROBE / "README.md").read_text()
    for label, task in (
        ("key-value lookup", "lookup"),
        ("needle in text, with distractors", "needle"),
        ("three hops", "hops"),
    ):
        shares = " | ".join(f"{quality[task][length]:.1%}" for length in quality["text"])
        assert f"| {label} | {shares} |" in card
    losses = " | ".join(f"{quality['text'][length]['loss']:.3f}" for length in quality["text"])
    assert f"| held-out text, nats a byte | {losses} |" in card
    assert f"{quality['bigram_loss']:.3f} nats" in card


@pytest.mark.parametrize("method, least", [("dense", 0.9), ("rrattn+last:0.95", 0.8)])
@pytest.mark.parametrize("kind", ["lookup", "needle", "hops"])
def test_it_answers(probe, text, kind, method, least):
    probe.method = Method(method)
    results = run.run_prompt(probe, kind, prompts.token_prompt(probe.codec, kind, text, LENGTH, 0, QUESTIONS))
    scores = {row["task"]: row["score"] for row in results}
    assert scores[kind] >= least, scores
    assert (results[0]["density"] < 1) == (method != "dense")


def test_its_loss_on_text_is_far_below_a_bigrams(probe, text):
    probe.method = Method("dense")
    (row,) = run.run_prompt(probe, "text", prompts.token_prompt(probe.codec, "text", text, LENGTH, 0, 1))
    assert row["nats"] < 1.5  # of text that is not in its corpus


def test_only_the_place_that_is_asked_for_gives_the_answer(probe, text):
    """With the record of the answer wiped out, the answer is wrong: it was looked up."""
    probe.method = Method("dense")
    prompt = prompts.make_prompt("lookup", text, LENGTH, 0, QUESTIONS)
    one = prompt.questions[0]
    record = one.question[1:] + one.answer
    assert prompt.context.count(record) == 1
    for context, expected in ((prompt.context, True), (prompt.context.replace(one.answer, b"77777", 1), False)):
        tokens = probe.codec.encode(context)
        _, cache = probe.prefill(tokens[: len(tokens) // 128 * 128])
        right = probe.answer(tokens, cache, probe.codec.encode(one.question), probe.codec.encode(one.answer))
        assert right.all() == expected
