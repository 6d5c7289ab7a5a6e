"""HELMET and Video-MME, read from the user's copy of the data.

HELMET (arXiv 2410.02694) comes as JSON lines. Read are its kinds that are scored by finding an answer in the output:

    json_kv              context, question, answer
    RULER                context, query or question, answer or outputs (of which the share that is found counts)
    question answering   question, answers, ctxs: a list of {title, text}

Video-MME (arXiv 2405.21075) comes as a folder: a table videomme/*.parquet (or *.json, *.jsonl, a list of the same
records) with videoID, question_id, question, options, answer (a letter), and subtitle/<videoID>.srt. The models here
read text, so what they see of a video are its subtitles: questions about videos without any are left out, and a score
compares with published ones of subtitles alone, not of frames.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .methods import Method
from .model import Timer

HELMET_ANSWER_TOKENS = 64


@dataclass
class Sample:
    """A prompt; answers that count when they stand in the output, or letters of which the likeliest is the answer."""

    name: str
    prompt: str
    answers: list
    letters: list | None = None
    count_each: bool = False


def read_helmet(path):
    """The samples of a HELMET file (.jsonl, or .json with the records under "data").

    Raises
    ------
    ValueError
        For a record of another kind, with its line and fields.
    """
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    else:
        records = json.loads(path.read_text())["data"]
    return [_helmet_sample(record, f"{path.name}:{i + 1}") for i, record in enumerate(records)]


def _helmet_sample(record, name):
    if "ctxs" in record and "answers" in record:
        passages = [f"[{i + 1}] {one.get('title', '')}\n{one['text']}" for i, one in enumerate(record["ctxs"])]
        text = "\n\n".join(passages)
        prompt = f"Documents:\n\n{text}\n\nA short answer from the documents.\nQuestion: {record['question']}\nAnswer:"
        return Sample(name, prompt, list(record["answers"]))
    question = record.get("query", record.get("question"))
    answers = record.get("answer", record.get("outputs"))
    if "context" not in record or question is None or answers is None:
        raise ValueError(
            f"{name} has the fields {', '.join(sorted(record))}, but must have context, question (or query) and "
            "answer (or outputs), or question, answers and ctxs"
        )
    several = isinstance(answers, list)
    answers = [str(one) for one in answers] if several else [str(answers)]
    prompt = f"{record['context']}\n\nWhat the text above says of the following.\nKey: {question}\nValue:"
    return Sample(name, prompt, answers, count_each="outputs" in record or several)


def read_video_mme(folder):
    """The samples of a Video-MME folder whose videos have subtitles.

    Raises
    ------
    ValueError
        When there is no table or no subtitles, or a record lacks a field.
    """
    files = sorted((folder / "videomme").glob("*"))
    tables = [path for path in files if path.suffix in (".parquet", ".json", ".jsonl")]
    if not tables:
        raise ValueError(f"{folder}/videomme holds no table: .parquet, .json or .jsonl")
    samples = []
    for path in tables:
        for i, record in enumerate(_records(path)):
            missing = [name for name in ("videoID", "question", "options", "answer") if name not in record]
            if missing:
                raise ValueError(f"{path.name}, record {i + 1} lacks {', '.join(missing)}")
            subtitles = folder / "subtitle" / f"{record['videoID']}.srt"
            if not subtitles.is_file():
                continue
            options = [str(option) for option in record["options"]]
            letters = [option[0] for option in options]
            if record["answer"] not in letters:
                raise ValueError(f"{path.name}, record {i + 1}: answer {record['answer']!r} is not among {letters}")
            text = subtitle_text(subtitles.read_text(encoding="utf-8", errors="replace"))
            prompt = (
                f"Subtitles of a video:\n{text}\n\n{record['question']}\n" + "\n".join(options) + "\nThe answer is "
            )
            samples.append(Sample(str(record.get("question_id", i)), prompt, [record["answer"]], letters))
    if not samples:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"{folder}/subtitle holds no .srt file of the videos in {names}")
    return samples


def _records(path):
    if path.suffix == ".parquet":
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]


def subtitle_text(srt):
    """What is said in an .srt file: its lines without numbers, times and tags."""
    said = []
    for line in srt.replace("\ufeff", "").splitlines():
        line = re.sub(r"<[^>]*>", "", line).strip()
        if line and not line.isdigit() and "-->" not in line:
            said.append(line)
    return "\n".join(said)


def score(model, sample, longest):
    """(score 0 to 1, tokens of the prompt); a prompt of more than `longest` tokens loses its middle."""
    tokens = model.codec.encode(sample.prompt.encode())
    if len(tokens) > longest:
        tokens = np.concatenate([tokens[: longest // 2], tokens[len(tokens) - (longest - longest // 2) :]])
    if sample.letters is None:
        output = normalized(model.codec.decode(model.generate(tokens, HELMET_ANSWER_TOKENS)).decode("utf-8", "replace"))
        found = [normalized(answer) in output for answer in sample.answers]
        return float(np.mean(found) if sample.count_each else any(found)), len(tokens)
    hidden, _ = model.prefill(tokens)
    first = [int(model.codec.encode(letter.encode())[0]) for letter in sample.letters]
    best = int(model.logits(hidden[-1:])[0, first].argmax())
    return float(sample.letters[best] == sample.answers[0]), len(tokens)


def normalized(text):
    """Lower case, words by single spaces, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def run_benchmark(model, results, name, samples, methods, longest):
    """Writes a result for each sample and method that `results` lacks."""
    digest = model.digest()
    for sample in tqdm(samples, unit="sample"):
        for method in methods:
            row = {"model": digest, "method": method, "task": name, "length": longest, "index": sample.name}
            if row in results:
                continue
            model.method = Method(method)
            with Timer() as timer:
                share, tokens = score(model, sample, longest)
            density = float(np.mean([of_layer.mean() for of_layer in model.densities]))
            results.add({**row, "score": share, "tokens": tokens, "density": density, "seconds": timer.seconds})
