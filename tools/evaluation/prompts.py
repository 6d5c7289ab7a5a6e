"""What the models are asked: contexts with questions whose answers are decoded, and texts that are scored as they are.

    lookup         records `key: value`; each question asks for one value
    needle         facts at chosen depths of a text, with distractors; each question asks for one
    multi-needle   the same contexts; a prompt asks for four facts, of which three are answered in it, and scored is the
                   fourth: the question's own block has to look at four places
    hops           records that name one another; a question asks for three steps
    copy           a passage of the context stands in it again; scored are its bytes after the first 16
    inside         lookup, but questions with answers stand in the prompt: scored are answers inside the prefill
    text           a held-out document: its loss

The first four ask after the context: prefill chooses blocks, the answer's tokens are decoded, which is dense in rrattn
and in the methods that it is compared with. Copy, inside and text are scored inside the prefill, so each of their
tokens depends on the blocks chosen for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..probe import tasks

SCORED_INSIDE = ("copy", "inside", "text")
# Which tasks share a context.
CONTEXTS = {
    "lookup": ("lookup",),
    "needle": ("needle", "multi-needle"),
    "hops": ("hops",),
    "copy": ("copy",),
    "inside": ("inside",),
    "text": ("text",),
}
TASKS = tuple(task for group in CONTEXTS.values() for task in group)
MULTI = 4  # facts that a multi-needle prompt asks for
LONGEST_COPY = 256
_SEED = 2_000_003  # other data than in training and in train.py's own measurement


@dataclass
class Question:
    """One question after a context, as bytes; `depth` is where in the context its answer stands, 0 to 1 or NaN."""

    task: str
    question: bytes
    answer: bytes
    depth: float


@dataclass
class Prompt:
    """A context of bytes, with questions to ask after it, or kinds of its own bytes to be scored.

    scored is uint8 [n]: 1 where a byte of the context is to be predicted; spans are the (begin, end) of answers in it
    that have to be right as a whole, or none.
    """

    context: bytes
    questions: list
    scored: np.ndarray | None = None
    spans: tuple = ()


def documents(text):
    """The documents of a text that probe/corpus.py wrote, uint8 arrays; one where no zero byte divides it."""
    starts = np.flatnonzero(text == 0)
    return [part[1:] if part[:1] == 0 else part for part in np.split(text, starts) if len(part) > 1]


def make_prompt(kind, text, length, index, num_questions):
    """The prompt number `index` of a kind.

    Parameters
    ----------
    kind : str
        Of CONTEXTS.
    text : uint8 [bytes]
        Held-out text: the hay, the passages to copy, the documents.
    length : int
        Bytes of the context.
    index, num_questions : int

    Raises
    ------
    ValueError
        Where the text or the length has no room for it.
    """
    generator = np.random.default_rng([_SEED, length, index, list(CONTEXTS).index(kind)])
    if kind == "text":
        long_enough = [document for document in documents(text) if len(document) >= length - 1]
        if not long_enough:
            raise ValueError(f"no document of the text is of {length - 1:,} bytes or more")
        order = np.random.default_rng(_SEED).permutation(len(long_enough))
        document = long_enough[order[index % len(order)]]
        begin = generator.integers(0, len(document) - length + 2)
        context = np.concatenate([tasks.SINK, document[begin : begin + length - 1]])
        return Prompt(context.tobytes(), [], np.ones(length, np.uint8))
    if kind in ("copy", "inside"):
        if kind == "copy":
            num_bytes = min(LONGEST_COPY, length // 8)
            task = tasks.copy(generator, text, length - 4 * (num_bytes + 8), 4, num_bytes)
        else:
            task = tasks.lookup(generator, length - num_questions * 14, num_questions)
        tokens, kinds = task.sequence()
        width = task.questions.shape[1] + task.answers.shape[1] + 1
        ends = len(task.context) + width * np.arange(1, len(task.questions) + 1) - 1
        spans = tuple((int(end) - task.answers.shape[1], int(end)) for end in ends)
        return Prompt(tokens.tobytes(), [], (kinds > 0).astype(np.uint8), spans if kind == "inside" else ())
    if kind == "lookup":
        task = tasks.lookup(generator, length, num_questions)
    elif kind == "hops":
        task = tasks.hops(generator, length, num_questions)
    else:
        depths = (np.arange(num_questions) + 0.5) / num_questions
        task = tasks.needle(generator, text, length, num_questions, num_questions * 2, depths)
    questions = [
        Question(kind, question.tobytes(), answer.tobytes(), float(depth))
        for question, answer, depth in zip(task.questions, task.answers, task.depths)
    ]
    if kind == "needle":
        questions += _asked_together(questions, generator)
    return Prompt(task.context.tobytes(), questions)


def check_prompts(make, text, kinds, lengths, contexts, num_questions):
    """Raises ValueError, with kind and length, where the text or the length has no room for a prompt.

    make(kind, text, length, index, num_questions) is `make_prompt` or another that takes the same.
    """
    for kind in kinds:
        for length in lengths:
            for index in range(contexts):
                try:
                    make(kind, text, length, index, num_questions)
                except ValueError as error:
                    raise ValueError(f"no prompt of the kind {kind} and the length {length:,}: {error}") from error


def _asked_together(questions, generator):
    """Groups of MULTI random questions as one, with the answers of all but the last."""
    order = generator.permutation(len(questions))
    groups = [order[i : i + MULTI] for i in range(0, len(order) - MULTI + 1, MULTI)]
    made = []
    for group in groups:
        *before, last = (questions[i] for i in group)
        lines = b"".join(one.question + one.answer + b"\n" for one in before)
        made.append(Question("multi-needle", lines + last.question, last.answer, last.depth))
    return made
