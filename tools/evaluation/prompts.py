"""What the models are asked: contexts with questions whose answers are decoded, and texts that are scored as they are.

    lookup         records `key: value`; each question asks for one value
    needle         facts at chosen depths of a text, with distractors; each question asks for one
    multi-needle   the same contexts; a prompt asks for four facts, of which three are answered in it, and scored is the
                   fourth: the question's own block has to look at four places
    hops           records that name one another; a question asks for three steps
    copy           a passage of the context stands in it again; scored are its bytes after the first 16
    inside         lookup, but questions with answers stand in the prompt: scored are answers inside the prefill
    text           a held-out document: its loss
    recall         records `word: 48213` between the lines of a text's first two thirds, of which some stand again
                   between those of the last third: scored are their numbers there, but for the first few, which show
                   what is asked. What a model that was trained on texts alone can do

The first four ask after the context: prefill chooses blocks, the answer's tokens are decoded, which is dense in rrattn
and in the methods that it is compared with. The others are scored inside the prefill, so each of their tokens depends
on the blocks chosen for it.

Prompts are made as bytes. `token_prompt` makes them of the tokens of a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..probe import tasks

# Which tasks share a context.
CONTEXTS = {
    "lookup": ("lookup",),
    "needle": ("needle", "multi-needle"),
    "hops": ("hops",),
    "copy": ("copy",),
    "inside": ("inside",),
    "text": ("text",),
    "recall": ("recall",),
}
TASKS = tuple(task for group in CONTEXTS.values() for task in group)
MULTI = 4  # facts that a multi-needle prompt asks for
LONGEST_COPY = 256
DEFAULT_DOCUMENTS = 12
MOST_SIZES = 12  # that are tried for a prompt of so many tokens
SHOTS = 4  # records of a recall prompt that stand again unscored, before the others
_SEED = 2_000_003  # other data than in training and in train.py's own measurement


@dataclass
class Question:
    """One question after a context; `depth` is where in the context its answer stands, 0 to 1 or NaN.

    question and answer are bytes, in a prompt of tokens int64 [tokens].
    """

    task: str
    question: bytes | np.ndarray
    answer: bytes | np.ndarray
    depth: float


@dataclass
class Prompt:
    """A context of bytes or of tokens, with questions to ask after it, or parts of its own to be scored.

    context is bytes, in a prompt of tokens int64 [n]; scored is bool [n]: whether the byte or token is to be predicted;
    spans are the (begin, end) of answers in it that have to be right as a whole, or none. dense is for whoever runs the
    prompt: what dense attention made of it, once that is known.
    """

    context: bytes | np.ndarray
    questions: list
    scored: np.ndarray | None = None
    spans: tuple = ()
    dense: Any = field(default=None, repr=False)


def documents(text):
    """The documents of a text that probe/corpus.py wrote, uint8 arrays; one where no zero byte divides it."""
    starts = np.flatnonzero(text == 0)
    return [part[1:] if part[:1] == 0 else part for part in np.split(text, starts) if len(part) > 1]


def default_text():
    """Python's own help topics (pydoc_data), which every installation has, as uint8 [bytes].

    They are divided into DEFAULT_DOCUMENTS of some 38 KB, each of about 9,000 tokens of a tokenizer for English. Models
    may have been trained on them.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    parts = []
    for part in range(DEFAULT_DOCUMENTS, 0, -1):  # cut at ends of lines, so that letters stay whole
        end = len(text) if part == 1 else text.index(b"\n", len(text) // part) + 1
        parts.append(text[:end])
        text = text[end:]
    return np.frombuffer(b"\0".join(parts), np.uint8)


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
        return Prompt(context.tobytes(), [], np.ones(length, bool))
    if kind == "recall":
        return _recall(generator, text, length, num_questions)
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
        return Prompt(tokens.tobytes(), [], kinds > 0, spans if kind == "inside" else ())
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


def in_tokens(prompt, codec):
    """A prompt of bytes as one of a codec's tokens.

    What is scored, and what is not, is encoded apart from what stands beside it, so that its tokens are whole: this
    fits tokenizers that put nothing before the pieces of a text. In place of the byte 0 that a context begins with
    stands the codec's `start`.
    """
    questions = [
        Question(one.task, codec.encode(one.question), codec.encode(one.answer), one.depth) for one in prompt.questions
    ]
    context = prompt.context
    scored = np.zeros(len(context), bool) if prompt.scored is None else prompt.scored
    edges = {len(context), *(np.flatnonzero(np.diff(scored)) + 1).tolist()}
    edges.update(edge for span in prompt.spans for edge in span)
    begin = len(tasks.SINK)
    pieces, of_token, at = [codec.start], [np.zeros(len(codec.start), bool)], {begin: len(codec.start)}
    for end in sorted(edge for edge in edges if edge > begin):
        pieces.append(codec.encode(context[begin:end]))
        of_token.append(np.full(len(pieces[-1]), scored[begin]))
        at[end] = at[begin] + len(pieces[-1])
        begin = end
    return Prompt(
        np.concatenate(pieces),
        questions,
        None if prompt.scored is None else np.concatenate(of_token),
        tuple((at[begin], at[end]) for begin, end in prompt.spans),
    )


def token_prompt(codec, kind, text, length, index, num_questions):
    """The prompt number `index` of a kind, in a codec's tokens: its context has at most `length` of them and, where it
    can be, not 1% fewer; a text exactly so many. See `make_prompt`.

    Raises
    ------
    ValueError
        Also where no prompt of at most so many tokens was found.
    """
    sample = text[:10_000].tobytes()
    size, best = length * len(sample) // len(codec.encode(sample)), None
    for _ in range(MOST_SIZES):
        of_bytes = make_prompt(kind, text, size, index, num_questions)
        prompt = in_tokens(of_bytes, codec)
        tokens = len(prompt.context)
        if kind == "text" and tokens >= length:
            return Prompt(prompt.context[:length], [], prompt.scored[:length])
        if kind != "text" and tokens <= length and (best is None or tokens > len(best.context)):
            best = prompt
            if tokens >= 0.99 * length:
                break
        size = int(size * length / tokens * (1.02 if kind == "text" else 0.995))
    if best is None:
        raise ValueError(f"none of at most {length:,} tokens was found in {MOST_SIZES} tries: the last has {tokens:,}")
    return best


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


def _recall(generator, text, length, num_questions):
    """The prompt of the kind recall: twice as many records as there are questions, and the first ones."""
    words = _words(generator, text, SHOTS + 2 * num_questions)
    lines = [
        word + b": " + number.tobytes() + b"\n" for word, number in zip(words, tasks.digits(generator, len(words)))
    ]
    asked = lines[: SHOTS + num_questions]
    size = sum(map(len, lines)) + sum(map(len, asked))
    tasks.check_room(length, 1 + 3 * size, f"{num_questions} questions")
    hay = tasks.stretch(generator, text, length - 1 - size)
    ends = np.flatnonzero(hay == ord("\n")) + 1
    early, late = (part.tolist() for part in np.split(ends, [np.searchsorted(ends, 2 * len(hay) // 3)]))
    if not early or not late:
        raise ValueError("a stretch of the text has no line ends to put records behind")
    places, order = np.sort(generator.choice(early, len(lines))), generator.permutation(len(lines))
    inserted = [(place, lines[index], False) for place, index in zip(places, order)]
    places = np.sort(generator.choice(late, len(asked)))
    inserted += [(place, line, index >= SHOTS) for index, (place, line) in enumerate(zip(places, asked))]
    context, spans, done = bytearray(tasks.SINK), [], 0
    for place, line, counts in inserted:
        context += hay[done:place].tobytes() + line
        done = place
        if counts:
            end = len(context) - len("\n")
            spans.append((end - tasks.VALUE_DIGITS, end))
    context += hay[done:].tobytes()
    scored = np.zeros(len(context), bool)
    for begin, end in spans:
        scored[begin:end] = True
    return Prompt(bytes(context), [], scored, tuple(spans))


def _words(generator, text, count):
    """`count` different words of a text, of 5 to 9 lower-case letters, in random order."""
    where = tasks.stretch(generator, text, min(len(text), 200_000)).tobytes()
    words = sorted(set(re.findall(rb"\b[a-z]{5,9}\b", where)))
    if len(words) < count:
        raise ValueError(f"the text has {len(words)} words of 5 to 9 letters, but {count} are needed")
    return [words[index] for index in generator.permutation(len(words))[:count]]


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
