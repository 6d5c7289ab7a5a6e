"""Benchmarks: HELMET, read from the user's copy of the data, and how samples are scored, also those of video_mme.py.

HELMET (arXiv 2410.02694) comes as JSON lines. Read are its kinds that are scored by finding an answer in the output:

    json_kv              context, question, answer
    RULER                context, query or question, answer or outputs (of which the share that is found counts)
    question answering   question, answers, ctxs: a list of {title, text}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from .methods import Method
from .model import Timer

HELMET_ANSWER_TOKENS = 64


@dataclass
class Sample:
    """A prompt; answers that count when they stand in the output, or letters of which the likeliest is the answer.

    `told` is what results say of it besides: strings by name.
    """

    name: str
    prompt: str
    answers: list
    letters: list | None = None
    count_each: bool = False
    told: dict = field(default_factory=dict)


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


def score(model, sample, longest):
    """(score 0 to 1, tokens of the prompt), of `longest` tokens at most; see the model's `prompt_of`."""
    prompt, num_tokens = model.prompt_of(sample, longest)
    if sample.letters is None:
        output = normalized(model.codec.decode(model.generate(prompt, HELMET_ANSWER_TOKENS)).decode("utf-8", "replace"))
        found = [normalized(answer) in output for answer in sample.answers]
        return float(np.mean(found) if sample.count_each else any(found)), num_tokens
    hidden, _ = model.prefill(prompt)
    first = [int(model.codec.encode(letter.encode())[0]) for letter in sample.letters]
    best = int(model.logits(hidden[-1:])[0, first].argmax())
    return float(sample.letters[best] == sample.answers[0]), num_tokens


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
            results.add(
                {**row, "score": share, "tokens": tokens, "density": density, "seconds": timer.seconds, **sample.told}
            )
