"""tools.evaluate: methods, tasks, results and formats, on a tiny byte-level model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import paddle
import pytest

import rrattn

paddleformers = pytest.importorskip("paddleformers.transformers")
pytest.importorskip("matplotlib")

from gguf_files import tiny_llama  # noqa: E402

from rrattn.config import SETTINGS  # noqa: E402
from tools import evaluate, smollm2  # noqa: E402
from tools.evaluation import benchmarks, prompts, records, report, run  # noqa: E402
from tools.evaluation.methods import Method  # noqa: E402
from tools.evaluation.model import Model, length_of, log_softmax  # noqa: E402

KINDS = list(prompts.CONTEXTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A byte-level LLaMA of two layers, whose weights are large enough for attention to have preferences."""
    folder = tmp_path_factory.mktemp("byte-model")
    paddle.seed(0)
    config = paddleformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
        pad_token_id=255,
    )
    config.fuse_rms_norm = False
    paddleformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return Model(checkpoint)


@pytest.fixture(scope="module")
def text():
    """Two documents of lines of words."""
    rng = np.random.default_rng(1)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9), dtype=np.uint8)) for _ in range(3000)]
    lines = b"\n".join(b" ".join(words[i : i + 8]) for i in range(0, len(words), 8))
    return np.frombuffer(b"\0" + lines[:6000] + b"\0" + lines[6000:], np.uint8)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A LLaMA of one layer that has a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenized") / "model"
    smollm2.write_checkpoint(tiny_llama(np.random.default_rng(0))[0], folder)
    return Model(folder)


# The model


def test_prefills_do_what_the_enabled_model_does(model, checkpoint):
    tokens = np.random.default_rng(2).integers(0, 255, 900)
    plain = paddleformers.LlamaForCausalLM.from_pretrained(str(checkpoint), dtype="float32")
    plain.config.fuse_rms_norm = False
    plain.eval()
    for method, threshold in (("dense", 1.0), ("rrattn+last+near:0.5:16", 0.5)):
        rrattn.enable(plain, threshold=threshold, stride=16, spread=0, min_share=0)
        with paddle.no_grad():
            expected = plain(paddle.to_tensor(tokens[None]), return_dict=True).logits[0].numpy()
        model.method = Method(method)
        hidden, cache = model.prefill(tokens)
        np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-3)
        of_plain = [density.numpy()[0] for density in rrattn.layer_densities(plain)]
        np.testing.assert_allclose(model.densities, of_plain)
        assert length_of(cache) == 900
    assert 0 < np.mean(model.densities) < 1


@pytest.mark.parametrize("method", ["dense", "rrattn:0.5", "xattention:0.5"])
def test_answers_are_those_of_one_prefill_and_greedy_decoding(model, method):
    """`answer` prefills the context's whole blocks once and checks the answer in one go; generate does it plainly."""
    rng = np.random.default_rng(3)
    context, question = rng.integers(0, 255, 700), rng.integers(0, 255, 30)
    model.method = Method(method)
    expected = model.generate(np.concatenate([context, question]), 5)
    _, cache = model.prefill(context[:640])
    assert model.answer(context, cache, question, expected).all()
    assert length_of(cache) == 640
    wrong = expected.copy()
    wrong[3] = (wrong[3] + 1) % 255
    assert list(model.answer(context, cache, question, wrong)[:4]) == [True, True, True, False]


def test_log_softmax(rng):
    logits = 100 + rng.standard_normal((6, 50000)).astype(np.float32)
    exact = logits.astype(np.float64)
    expected = exact - 100 - np.log(np.exp(exact - 100).sum(1, keepdims=True))
    np.testing.assert_allclose(log_softmax(logits), expected, atol=2e-6)
    assert log_softmax(logits).dtype == np.float32


# Tasks and results


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_repeat_and_differ_by_index(text, kind):
    first, again, other = (prompts.make_prompt(kind, text, 2000, index, 6) for index in (0, 0, 1))
    assert first.context == again.context != other.context
    assert 1900 < len(first.context) <= 2000
    if kind == "needle":
        assert [one.task for one in first.questions] == ["needle"] * 6 + ["multi-needle"]
        multi = first.questions[-1]
        lines = multi.question.decode().splitlines()
        known = {one.question: one.answer for one in first.questions[:6]}
        assert len(lines) == 4 and known[lines[-1].encode()] == multi.answer
        assert all(known[line[:-5].encode()] == line[-5:].encode() for line in lines[:3])
    if kind == "inside":
        for begin, end in first.spans:
            key = first.context[begin - 7 : begin]
            assert first.context.count(key + first.context[begin:end]) == 2 and first.scored[begin:end].all()
        assert first.scored.sum() == 6 * 5


def test_recall_asks_in_the_last_third_for_records_of_the_others(text):
    prompt = prompts.make_prompt("recall", text, 6000, 0, 6)
    lines = re.findall(rb"^([a-z]{5,9}): (\d{5})$", prompt.context, re.MULTILINE)
    places = [match.start() for match in re.finditer(rb"^[a-z]{5,9}: \d{5}$", prompt.context, re.MULTILINE)]
    records, asked = lines[:16], lines[16:]
    assert len(set(records)) == len({word for word, _ in records}) == 16 and len(set(asked)) == 10
    assert set(asked) < set(records) and asked != [line for line in records if line in asked]
    assert places[15] < 4200 and places[16] > 3800
    answers = [prompt.context[begin:end] for begin, end in prompt.spans]
    assert answers == [number for _, number in asked[prompts.SHOTS :]]
    assert prompt.scored.sum() == 5 * 6 and all(prompt.scored[begin:end].all() for begin, end in prompt.spans)
    for bad, message in ((b"x" * 9000, "0 words"), (text.tobytes().replace(b"\n", b" "), "no line ends")):
        with pytest.raises(ValueError, match=message):
            prompts.make_prompt("recall", np.frombuffer(bad, np.uint8), 6000, 0, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_tokens(tokenized, model, text, kind):
    """Of the length asked for; what is scored is what is scored of the bytes, whose prompts stay as they are."""
    of_bytes = prompts.make_prompt(kind, text, 1500, 0, 4)
    same = prompts.token_prompt(model.codec, kind, text, 1500, 0, 4)
    assert bytes(same.context.tolist()) == of_bytes.context and same.spans == of_bytes.spans
    for ours, theirs in zip(same.questions, of_bytes.questions):
        assert bytes(ours.question.tolist()) == theirs.question and bytes(ours.answer.tolist()) == theirs.answer

    codec = tokenized.codec
    prompt = prompts.in_tokens(of_bytes, codec)
    assert len(prompt.context) < 1499 and codec.decode(prompt.context) == of_bytes.context[1:]
    assert (prompt.scored is None) == (of_bytes.scored is None)
    if prompt.scored is not None and kind != "text":
        scored = bytes(byte for byte, counts in zip(of_bytes.context, of_bytes.scored) if counts)
        assert codec.decode(prompt.context[prompt.scored]) == scored and len(prompt.spans) == len(of_bytes.spans)
    for ours, theirs in zip(prompt.spans, of_bytes.spans):
        assert codec.decode(prompt.context[slice(*ours)]) == of_bytes.context[slice(*theirs)]
    sized = prompts.token_prompt(codec, kind, text, 1400, 0, 4)
    assert 1340 <= len(sized.context) <= 1400 and (kind != "text" or len(sized.context) == len(sized.scored) == 1400)


def test_a_codecs_start_stands_for_the_byte_0(tokenized, text):
    class WithStart:
        start, encode = np.array([1]), staticmethod(tokenized.codec.encode)

    of_bytes = prompts.make_prompt("inside", text, 1500, 0, 4)
    with_start, without = (prompts.in_tokens(of_bytes, codec) for codec in (WithStart, tokenized.codec))
    assert with_start.context.tolist() == [1, *without.context]
    assert with_start.scored.tolist() == [False, *without.scored]
    assert with_start.spans == tuple((begin + 1, end + 1) for begin, end in without.spans)


def test_what_is_scored_inside_is_that_of_all_logits(tokenized, text, monkeypatch):
    """Losses, and agreement and divergence from dense, of rows of logits that are made a few at a time."""
    prompt = prompts.token_prompt(tokenized.codec, "recall", text, 1200, 0, 4)
    monkeypatch.setattr(run, "ROWS", 7)
    found, chances = {}, {}
    for method in ("rrattn:0.3", "dense"):
        tokenized.method = Method(method)
        (found[method],) = run.run_prompt(tokenized, "recall", prompt)
        logits = tokenized.logits(tokenized.prefill(prompt.context)[0])[:-1][prompt.scored[1:]].astype(np.float64)
        chances[method] = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = prompt.context[prompt.scored]
    dense = chances["dense"]
    assert found["dense"]["agreement"] == 1 and found["dense"]["divergence"] == pytest.approx(0, abs=1e-6)
    for method, one in found.items():
        expected = -np.log(chances[method][np.arange(len(targets)), targets]).mean()
        assert one["nats"] == pytest.approx(expected, rel=1e-5)
        assert one["guessed"] == (chances[method].argmax(-1) == targets).mean()
        assert one["agreement"] == (chances[method].argmax(-1) == dense.argmax(-1)).mean()
        divergence = (dense * np.log(dense / chances[method])).sum(-1).mean()
        assert one["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert found["rrattn:0.3"]["divergence"] > 1e-4 and found["rrattn:0.3"]["density"] < 1
    assert tokenized.method.name == "dense"


def test_a_run_in_tokens(tokenized, text, tmp_path):
    results = records.Results(tmp_path / "results.jsonl")
    run.run_tasks(tokenized, results, text, ["needle", "text"], ["rrattn:0.3", "dense"], [700], 2, 4)
    rows = {(row["method"], row["task"], row["index"]): row for row in results.rows}
    assert len(rows) == 2 * 3 * 2 and len(rows["dense", "needle", 0]["right"]) == 4
    assert all((row["divergence"] < 1e-9) == (row["method"] == "dense") for row in results.rows if "nats" in row)
    (table,) = report.dense_tables(results.rows)
    nats = [[rows[method, "text", index]["nats"] for index in (0, 1)] for method in ("rrattn:0.3", "dense")]
    over = np.divide(*nats) - 1
    assert table.startswith("### Against dense, 700 tokens") and table.count("| text |") == 2
    assert "| text | dense | 100.0% |  | 100.0% | 0.0000 | +0.00% ± 0.00 | 2 |" in table
    assert f"| {over.mean():+.2%} ± {100 * np.abs(over[0] - over[1]) / 2:.2f} | 2 |" in table
    run.measure_mass(tokenized, results, text, ["recall"], ["rrattn:0.3"], [1200], 1, 4)
    assert 0 < results.rows[-1]["kept"] < 1


def test_answers_inside_are_counted_with_their_error(tokenized, text, tmp_path):
    results = records.Results(tmp_path / "results.jsonl")
    run.run_tasks(tokenized, results, text, ["recall"], ["dense", "rrattn:threshold=0.5"], [1200], 2, 4)
    assert [row["answers"] for row in results.rows] == [4] * 4
    for row in results.rows:
        row["score"] = [0.25, 0.75][row["index"]] if row["method"] == "dense" else [0.5, 0.25][row["index"]]
    (table,) = report.dense_tables(results.rows)
    dense, sparse = table.splitlines()[-2:]
    assert dense.startswith("| recall | dense | 100.0% | 50.0% ± 25.0 of 8 | 100.0% |")
    assert "| 37.5% ± 12.5 of 8 |" in sparse
    (table,) = report.dense_tables(results.rows[:2])  # one context
    assert "| 25.0% of 4 |" in table and table.endswith("% | 1 |")


def test_the_default_text_has_documents_for_8192_tokens(checkpoint, tmp_path, monkeypatch, capsys):
    def parse(*options):
        command = ["evaluate.py", "run", str(checkpoint), str(tmp_path / "out.jsonl"), "--methods", "dense", *options]
        monkeypatch.setattr(sys, "argv", command)
        return evaluate.parse_arguments()

    text = parse("--lengths", "30000", "--contexts", "12", "--tasks", "text", "recall", "--questions", "89").text
    documents = prompts.documents(text)
    assert len(documents) == 12 and min(map(len, documents)) > 35_000 and max(map(len, documents)) < 60_000
    joined = b"".join(document.tobytes() for document in documents).decode()
    assert joined.startswith("The") and all(document[-1] == ord("\n") for document in documents[:-1])
    assert topics["assignment"] in joined
    assert parse("--tasks", "lookup").lengths == [4096]  # of the defaults, what the model was made for
    contexts = {prompts.make_prompt("text", text, 30_000, index, 1).context[1:] for index in range(12)}
    assert len(contexts) == 12 and all(context.decode("utf-8", "ignore") in joined for context in contexts)
    with pytest.raises(SystemExit):
        parse("--lengths", "90000", "--tasks", "text")
    assert r"--text (default): no prompt of the kind text and the length 90,000" in capsys.readouterr().err


def test_a_run_writes_every_task_and_goes_on_where_it_stopped(model, text, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    arguments = (text, KINDS, ["dense", "rrattn:0.5"], [1500], 1, 4)
    run.run_tasks(model, records.Results(path), *arguments)
    rows = records.read_results(path)
    assert {(row["method"], row["task"]) for row in rows} == {
        (method, task) for method in ("dense", "rrattn:0.5") for task in prompts.TASKS
    }
    assert all(row["density"] == 1 for row in rows if row["method"] == "dense")
    assert all(0 < row["density"] < 1 for row in rows if row["method"] == "rrattn:0.5")
    loss = [row["nats"] for row in rows if row["task"] == "text"]
    assert loss[0] != loss[1] and min(loss) > 4

    path.write_text("\n".join(json.dumps(row) for row in rows[:-1]) + '\n{"model": "cut o')
    ran = []
    monkeypatch.setattr(run, "run_prompt", lambda model, kind, prompt: ran.append(kind) or [])
    run.run_tasks(model, records.Results(path), *arguments)
    assert ran == [kind for kind, tasks in prompts.CONTEXTS.items() if rows[-1]["task"] in tasks]


def test_kept_mass_is_what_the_masks_hold(model, text, tmp_path):
    results = records.Results(tmp_path / "results.jsonl")
    methods = ["dense", "rrattn:0.5", "exact:0.5", "exact:0.8", "random:0.3", "best:0.6", "best:1"]
    run.measure_mass(model, results, text, ["text"], methods, [1500], 1, 4)
    rows = {row["method"]: row for row in results.rows}
    assert rows["dense"]["kept"] == pytest.approx(1) and rows["dense"]["density"] == 1
    assert 0.5 <= rows["exact:0.5"]["kept"] < rows["exact:0.8"]["kept"] < 1
    assert rows["exact:0.5"]["density"] < rows["exact:0.8"]["density"] < 1
    assert np.shape(rows["rrattn:0.5"]["by_layer"]) == (2, 4, 2)
    assert rows["best:0.6"]["density"] == pytest.approx(0.6, abs=0.01) and rows["best:1"]["kept"] == pytest.approx(1)
    for row in list(results.rows):
        run.measure_mass(model, results, text, ["text"], [f"best:{row['density']}"], [1500], 1, 4)
        best = next(one for one in results.rows if one["method"] == f"best:{row['density']}")
        assert best["kept"] >= row["kept"] - 1e-4, row["method"]


def test_report(model, text, tmp_path):
    def row(method, task, **results):
        return {"model": "m", "method": method, "length": 1024, "index": 0, "questions": 2, "task": task, **results}

    def answers(right):
        return {"score": sum(right) / 2, "right": [[right[0], 0.1], [right[1], 0.9]], "density": 1.0, "seconds": 1.0}

    rows = [
        row("dense", "needle", **answers([True, True])),
        row("dense", "text", nats=1.0, score=0.5, density=1.0, seconds=1.0),
        row("rrattn:0.9:16", "needle", **{**answers([True, False]), "density": 0.4}),
        row("rrattn:0.9:16", "text", nats=1.25, score=0.5, density=0.2, seconds=1.0),
        row("rrattn:0.5", "mass text", density=0.1, kept=0.6),
        row("rrattn:0.9", "mass text", density=0.3, kept=0.8),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    written = report.write_report(path, tmp_path / "plots")
    assert "| rrattn:0.9:16 | 50.0% | 1.2500 | 65.0% | 30.0% |" in written  # (0.5 + 1 / 1.25) / 2
    assert "| rrattn, stride 8 | 60.0% | 70.0% | 80.0% |  |  |" in written
    assert {plot.name for plot in (tmp_path / "plots").iterdir()} == {"quality.png", "mass.png", "needles.png"}
    path.write_text(path.read_text() + json.dumps({**rows[0], "model": "other"}) + "\n")
    with pytest.raises(SystemExit, match="results of 2 models"):
        report.write_report(path)


def test_report_of_several_contexts():
    """The standard error of the mean share of dense, and differences in kept mass, over three whole contexts."""
    scores = {"dense": [0.8, 1.0, 0.9, 1.0], "rrattn+last:0.9:8": [0.6, 1.0, 0.8]}
    rows = [
        {"task": task, "method": method, "length": 512, "index": i, "score": score, "density": 0.5}
        for method, of_context in scores.items()
        for i, score in enumerate(of_context)
        for task in ("lookup", "hops")
    ]
    others = [2.4 / 2.7 - share for share in (1.8 / 1.9, 1.4 / 1.7, 1.6 / 1.8)]
    errors = report.standard_errors([row for row in rows if row["index"] < 3])[512, "rrattn+last:0.9:8"]
    mean = np.mean(others)
    assert errors[report.MEAN] == pytest.approx(np.sqrt(2 / 3 * sum((x - mean) ** 2 for x in others)))
    (table,) = report.quality_tables(rows)
    assert f"| 88.89% ± {100 * errors[report.MEAN]:.2f} | 50.0% |" in table  # the fourth context is not whole
    kept = {
        "rrattn:0.9:8": (0.3, 0.90),
        "rrattn:threshold=0.9": (0.3, 0.9),
        "xattention:0.8": (0.2, 0.86),
        "xattention:0.9": (0.4, 0.92),
    }
    masses = [
        {"task": "mass text", "method": method, "length": 512, "index": i, "density": density, "kept": share + i / 100}
        for method, (density, share) in kept.items()
        for i in range(2)
    ]
    (table,) = report.difference_tables(masses)
    assert table.endswith("| rrattn:0.9:8 | 30.0% | 90.50% | +1.00 ± 0.00 |  |")
    assert "\n| rrattn:threshold=0.9 | 30.0% | 90.50% | +1.00 ± 0.00 |  |\n" in table
    assert report.difference_tables(masses[::2]) == []


def test_no_two_methods_are_drawn_alike():
    names = [f"{name}{rules}" for name in "abcdefghijklmnopqr" for rules in ("", "+last", "+near", "+last+near")]
    names += ["rrattn, stride 8", "rrattn+last, stride 4"]
    drawn = {(style["color"], style["marker"]) for style in report.styles(names).values()}
    assert len(drawn) == len(names) == 74
    with pytest.raises(ValueError, match="21 methods"):
        report.styles([*names, "s"])


def test_command_line(checkpoint, text, tmp_path):
    (tmp_path / "text").write_bytes(text.tobytes())

    def evaluate(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "tools.evaluate", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)

    common = ("--text", "text", "--lengths", 1024, "--questions", 2)
    ran = evaluate(
        "run", checkpoint, "out.jsonl", *common, "--tasks", "lookup", "text", "--methods", "dense", "window:2"
    )
    assert ran.returncode == 0, ran.stderr
    shown = evaluate("report", "out.jsonl")
    assert "| window:2 |" in shown.stdout and "### 1,024 tokens" in shown.stdout
    bad = evaluate("run", checkpoint, "out.jsonl", *common, "--methods", "sparse:2")
    assert bad.returncode == 2 and "method 'sparse:2' is not one of dense" in bad.stderr


# Benchmarks


def test_helmet_formats(tmp_path):
    records = [
        {"context": "{'k1': 'v 7'}", "question": "k1", "answer": "v 7", "num_kvs": 1, "demos": []},
        {"context": "Long.", "query": "magic numbers", "outputs": ["12", "34"], "length": 9, "index": 0},
        {"question": "Who?", "answers": ["Ada"], "ctxs": [{"title": "T", "text": "Ada did."}]},
    ]
    path = tmp_path / "kv.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    kv, ruler, qa = benchmarks.read_helmet(path)
    assert kv.prompt.startswith("{'k1': 'v 7'}") and "k1" in kv.prompt[13:] and kv.answers == ["v 7"]
    assert ruler.answers == ["12", "34"] and ruler.count_each and "magic numbers" in ruler.prompt
    assert "Ada did." in qa.prompt and "Who?" in qa.prompt and not qa.count_each
    path.write_text(json.dumps({"text": "x"}))
    with pytest.raises(ValueError, match="kv.jsonl:1 has the fields text, but must have context, question"):
        benchmarks.read_helmet(path)


def test_benchmark_scores(model, tmp_path):
    """The model's own output and likeliest letter count as right, another as wrong."""
    model.method = Method("dense")
    prompt = "some words to go on with"
    output = model.codec.decode(model.generate(model.codec.encode(prompt.encode()), benchmarks.HELMET_ANSWER_TOKENS))
    said = benchmarks.normalized(output.decode("utf-8", "replace"))
    found = benchmarks.Sample("a", prompt, [said, "never said at all"])
    assert benchmarks.score(model, found, 100)[0] == 1
    found.count_each = True
    assert benchmarks.score(model, found, 100)[0] == 0.5
    logits = model.logits(model.prefill(model.codec.encode(prompt.encode()))[0])[-1]
    best = max("ABCD", key=lambda letter: logits[ord(letter)])
    samples = [benchmarks.Sample(letter, prompt, [letter], list("ABCD")) for letter in "ABCD"]
    results = records.Results(tmp_path / "results.jsonl")
    benchmarks.run_benchmark(model, results, "video-mme", samples, ["dense"], 10)
    assert all(row["tokens"] == 10 for row in results.rows) and len(results.rows) == 4
    assert [benchmarks.score(model, one, 100)[0] for one in samples] == [float(letter == best) for letter in "ABCD"]


# Calibration


def test_a_method_may_be_a_file_of_settings(model, tmp_path):
    path = tmp_path / "out.json"
    rrattn.RRAttentionConfig(threshold=[[0.2, 0.4, 0.6, 0.8], 1.0]).to_json(path)
    model.method = Method(f"rrattn:{path}")
    model.prefill(np.arange(1000) % 250)
    assert (model.densities[1] == 1).all() and (np.diff(model.densities[0]) >= 0).any() and model.densities[0][0] < 1
    for method in (f"rrattn:{path}:16", f"rrattn+near:{path}"):
        with pytest.raises(ValueError, match="stride and keep rules are in the file"):
            Method(method)


def test_a_method_may_name_its_settings(model, checkpoint):
    """All of RRAttentionConfig's, which reach the layers as `enable` hands them out; others are refused by name."""
    given = {"threshold": [0.3, 0.6], "stride": 16, "keep_last": False, "keep_local": 2, "dense_layers": [1]}
    text = "rrattn:" + ",".join(f"{name}={json.dumps(value)}" for name, value in given.items())
    model.method = Method(text)
    assert model.method.config == rrattn.RRAttentionConfig(**given)
    tokens = np.arange(1100) * 7 % 250
    hidden, _ = model.prefill(tokens)
    plain = paddleformers.LlamaForCausalLM.from_pretrained(str(checkpoint), dtype="float32")
    plain.eval()
    rrattn.enable(plain, **given)
    with paddle.no_grad():
        expected = plain(paddle.to_tensor(tokens[None]), return_dict=True).logits[0].numpy()
    np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-3)
    densities = [density.numpy()[0] for density in rrattn.layer_densities(plain)]
    np.testing.assert_array_equal(model.densities, densities)
    assert densities[0].max() < 1 and densities[1].min() == 1
    for bad, message in (
        ("rrattn:threshold=0.9,min_mass=1", f"sets 'min_mass', but the settings are {', '.join(SETTINGS)}"),
        ("rrattn:stride=8,stride=16", "sets stride more than once"),
        ("rrattn:threshold=high", "threshold is 'high', but must be JSON"),
        ("rrattn:threshold=1.5", "'rrattn:threshold=1.5': threshold"),
        ("rrattn+last:stride=8", "give stride and keep rules by name as well"),
        ("rrattn:stride=8:16", "give stride and keep rules by name as well"),
        ("pooling:stride=8", "must be written as pooling:NUMBER$"),
    ):
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\$", "$")):
            Method(bad)


def test_settings_by_name_in_a_run_and_its_report(model, text, tmp_path):
    results = records.Results(tmp_path / "results.jsonl")
    methods = ["dense", "rrattn:threshold=0.5", "rrattn:threshold=0.7", "rrattn:threshold=0.5,keep_local=3"]
    run.run_tasks(model, results, text, ["text"], methods, [1500], 1, 4)
    density = {row["method"]: row["density"] for row in results.rows}
    assert density[methods[1]] < density[methods[3]] < 1 and density[methods[1]] < density[methods[2]] < 1
    same = ["rrattn:threshold=0.5,spread=0,min_share=0", "rrattn+last+near:0.5"]
    run.measure_mass(model, results, text, ["text"], [*methods[1:], *same], [1500], 1, 4)
    kept = {row["method"]: row["kept"] for row in results.rows if "kept" in row}
    assert kept[same[0]] == kept[same[1]] and kept[methods[1]] < kept[methods[3]]
    written = report.write_report(tmp_path / "results.jsonl", tmp_path / "plots")
    assert all(f"| {name} |" in written for name in ("rrattn", "rrattn, keep_local=3", *methods))


# What is checked before anything is loaded or computed

RUN = "evaluate run MODEL out.jsonl --text long --lengths 1024 --methods dense --tasks lookup text"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{RUN} --text none", "there is no file none for --text"),
        (f"{RUN} --text bad.xz", r"--text bad\.xz: bad\.xz is no \.xz file"),
        (
            f"{RUN} --text short --lengths 2048 --tasks needle",
            "--text short: .* kind needle .* the text is of 13 bytes",
        ),
        (f"{RUN} --text short --tasks copy", "--text short: .* kind copy .* the text is of 13 bytes"),
        (RUN.replace("MODEL", "no"), "there is no checkpoint in no for MODEL"),
        (RUN.replace("out.jsonl", "no/out.jsonl"), "there is no folder no for RESULTS"),
        (RUN.replace("out.jsonl", "long"), "long is no file of results: line 1 is not JSON"),
        (f"{RUN} --text short", "--text short: .* kind text"),
        (f"{RUN} --lengths 1024 100000", "--text long: .* the length 100,000"),
        (f"{RUN} --questions 500", "--text long: .* 500 questions takes at least"),
        (f"{RUN} --lengths 511", "--lengths must be at least 512, got 511"),
        (f"{RUN} --contexts 0", "--contexts must be at least 1, got 0"),
        (RUN.replace(" run ", " mass ") + " --methods best:2", r"the density must be in \(0, 1\]"),
        ("evaluate report none", "there is no file none for RESULTS"),
        ("evaluate report results --plots long", "--plots must be a folder, but .*long is none"),
        ("evaluate helmet MODEL out.jsonl --data none --methods dense", "there is no file none for --data"),
        ("evaluate helmet MODEL out.jsonl --data long --methods dense", "--data long: "),
        ("evaluate helmet MODEL out.jsonl --data empty.jsonl --methods dense", "--data empty.jsonl holds no samples"),
        ("evaluate video-mme MODEL out.jsonl --data long --methods dense", "there is no folder long for --data"),
        ("evaluate video-mme MODEL out.jsonl --data . --methods dense", r"--data \.: .*holds no table"),
    ],
)
def test_everything_is_checked_first(checkpoint, text, tmp_path, monkeypatch, capsys, command, message):
    """With status 2, naming the option and the file; no weights are read, and no file is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "__init__", lambda *_: pytest.fail("the model was loaded"))
    for name, content in (
        ("long", text.tobytes()),
        ("short", b"a short text\n"),
        ("bad.xz", b"x"),
        ("empty.jsonl", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "results").write_text('{"model": 1}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    tool, *arguments = command.replace("MODEL", str(checkpoint)).split()
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{tool}.py: error: " in said and re.search(message, said), said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_files(tmp_path):
    path = tmp_path / "config.json"
    config = rrattn.RRAttentionConfig(threshold=[0.5, [0.6, 0.7]], stride=16, dense_layers=[1], keep_last=True)
    config.to_json(path)
    assert rrattn.RRAttentionConfig.from_json(path) == config
    path.write_text('{"threshold": 0.9, "keep_local": 0}')
    assert rrattn.RRAttentionConfig.from_json(path) == rrattn.RRAttentionConfig(threshold=0.9, keep_local=0)
    path.write_text('{"threshold": 0.9, "keep_last": true}')  # as one from before keep_local: the default
    assert rrattn.RRAttentionConfig.from_json(path).keep_local == 1
    for content, message in (
        ('{"threshold": 2}', "threshold is 2, but must be in"),
        ('{"keep_local": true}', "keep_local is True, but must be an integer of at least 0"),
        ('{"treshold": 0.5}', "sets treshold, but the settings are stride, key_stride, threshold, "),
        ("[1]", "holds a list, but must hold an object"),
        ("{", "is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            rrattn.RRAttentionConfig.from_json(path)


@pytest.mark.parametrize("label", ("dense", "rrattn, threshold=0.98, min_share=0.15, compensate=true, key_stride=1"))
def test_a_legend_stays_within_its_figure(label):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plt.subplots(2, 2, figsize=(8, 8), squeeze=False)
    for i in range(9):
        axes.flat[i % 4].plot([0, 1], [i, 1], label=f"{label} {i}")
    report.add_legend(figure, axes)
    figure.canvas.draw()
    extent = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1 and extent.y0 >= figure.bbox.y0
    plt.close(figure)
