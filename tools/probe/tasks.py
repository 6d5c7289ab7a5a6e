"""The probe's tasks, as bytes: text, and questions that only attention over the context can answer. NumPy alone.

Each retrieval task is a :class:`Task`: a context, and questions with their answers, all made from a random generator:

    lookup   records `kqzvb: 48213`; `?kqzvb: ` asks for the number
    needle   text, and between its lines facts `The code of Kqzvbd is 48213.`; `? The code of Kqzvbd is ` asks for one.
             Other facts are about other names, or about the same name and another attribute
    hops     records `kqzvb > mnopq`, whose right side is another record's left; `?kqzvb > ` asks for three steps
    copy     text, or random letters; `@copy ` and the first 16 bytes of a passage ask for the rest of it

A context starts with a zero byte, which leads documents (see corpus.py), so it also is the place for an attention sink.
Training makes sequences of them: the context, then the questions with their answers. Each byte has a kind, which says
whether it is to be predicted, and what as.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("none", "text", "lookup", "needle", "hops", "copy")
NONE, TEXT, LOOKUP, NEEDLE, HOPS, COPY = range(len(KINDS))
# Share of the sequences that are of each kind in training.
MIXTURE = {TEXT: 0.48, LOOKUP: 0.26, NEEDLE: 0.12, HOPS: 0.07, COPY: 0.07}

KEY_LETTERS, VALUE_DIGITS, NAME_LETTERS, STEPS, CUE = 5, 5, 6, 3, 16
ATTRIBUTES = ("code", "port", "seed", "rank")
RECORD_BYTES = KEY_LETTERS + len(": ") + VALUE_DIGITS + len("\n")
SINK = np.zeros(1, np.uint8)


@dataclass
class Task:
    """Questions about a context.

    Attributes
    ----------
    kind : int
        Index into KINDS.
    context : uint8 [n]
    questions, answers : uint8 [Q, question bytes], uint8 [Q, answer bytes]
    depths : float [Q]
        Where in the context each answer stands: 0 at its start, 1 at its end. NaN where it stands in several places.
    context_kinds : uint8 [n], optional
        What the context's bytes count as. Default: none of them counts.
    """

    kind: int
    context: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    depths: np.ndarray
    context_kinds: np.ndarray | None = None

    def sequence(self):
        """(tokens, kinds), uint8: the context, then a line for each question with its answer."""
        num, width = len(self.questions), self.questions.shape[1] + self.answers.shape[1] + 1
        lines = np.concatenate([self.questions, self.answers, np.full((num, 1), ord("\n"), np.uint8)], axis=1)
        kinds = np.zeros((num, width), np.uint8)
        kinds[:, self.questions.shape[1] : -1] = self.kind
        context_kinds = np.zeros_like(self.context) if self.context_kinds is None else self.context_kinds
        return np.concatenate([self.context, lines.ravel()]), np.concatenate([context_kinds, kinds.ravel()])


def load_text(path):
    """A text that corpus.py wrote, uint8 [bytes]; ValueError for a file that it did not."""
    try:
        return np.frombuffer(lzma.decompress(Path(path).read_bytes()), np.uint8)
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is no .xz file: {error}") from error


def letters(generator, rows, columns, first="a"):
    """Random lower-case letters, uint8 [rows, columns]; upper-case with first="A"."""
    return generator.integers(ord(first), ord(first) + 26, (rows, columns), dtype=np.uint8)


def distinct_words(generator, count, length):
    """`count` different words of lower-case letters, uint8 [count, length], in random order."""
    if count > 26**length // 4:
        raise ValueError(f"count is {count}, but must be at most {26**length // 4} for words of {length} letters")
    numbers = np.unique(generator.integers(0, 26**length, 2 * count + 8))
    while len(numbers) < count:
        numbers = np.union1d(numbers, generator.integers(0, 26**length, 2 * count))
    numbers = generator.permutation(numbers)[:count]
    return (numbers[:, None] // 26 ** np.arange(length) % 26 + ord("a")).astype(np.uint8)


def digits(generator, rows):
    """Random numbers of five digits, uint8 [rows, 5]."""
    return generator.integers(ord("0"), ord("9") + 1, (rows, VALUE_DIGITS), dtype=np.uint8)


def columns(*parts):
    """Strings and uint8 [rows, width] arrays side by side: uint8 [rows, total width]."""
    rows = next(len(part) for part in parts if not isinstance(part, str))
    wide = [
        np.broadcast_to(np.frombuffer(part.encode(), np.uint8), (rows, len(part))) if isinstance(part, str) else part
        for part in parts
    ]
    return np.concatenate(wide, axis=1)


def check_room(length, least, what):
    if length < least:
        raise ValueError(f"the context is of {length} bytes, but {what} takes at least {least}")


def stretch(generator, text, length):
    """A random stretch of `length` bytes of a text."""
    if len(text) < length:
        raise ValueError(f"the text is of {len(text):,} bytes, but must be of at least {length:,}")
    begin = generator.integers(0, len(text) - length + 1)
    return text[begin : begin + length]


def lookup(generator, length, num_questions):
    """A lookup Task whose context is `length` bytes of records; the questions are about different records."""
    num = (length - 1) // RECORD_BYTES
    check_room(length, 1 + num_questions * RECORD_BYTES, f"{num_questions} questions")
    keys, values = distinct_words(generator, num, KEY_LETTERS), digits(generator, num)
    asked = generator.permutation(num)[:num_questions]
    return Task(
        LOOKUP,
        np.concatenate([SINK, columns(keys, ": ", values, "\n").ravel()]),
        columns("?", keys[asked], ": "),
        values[asked],
        (asked + 0.5) / num,
    )


def interleaved_lookup(generator, length):
    """(tokens, kinds) of at least `length` bytes: records, and between them questions about earlier ones."""
    num = -(-length // RECORD_BYTES)
    is_question = generator.random(num) < generator.uniform(0.2, 0.6)
    is_question[: generator.integers(1, 1 + max(1, num // 8))] = False
    records = np.cumsum(~is_question)  # up to and with each line
    about = np.where(is_question, (generator.random(num) * records).astype(np.int64), records - 1)
    keys, values = distinct_words(generator, records[-1], KEY_LETTERS), digits(generator, records[-1])
    lines = columns("?", keys[about], ": ", values[about], "\n")
    kinds = np.zeros_like(lines)
    kinds[is_question, -1 - VALUE_DIGITS : -1] = LOOKUP
    there = np.ones(lines.shape, bool)
    there[:, 0] = is_question  # a record has no question mark
    return np.concatenate([SINK, lines[there]]), np.concatenate([SINK, kinds[there]])


def hops(generator, length, num_questions):
    """A hops Task: each record names the next one of a random cycle through all of them."""
    width = KEY_LETTERS + len(" > ") + KEY_LETTERS + len("\n")
    num = (length - 1) // width
    check_room(length, 1 + max(num_questions, STEPS + 1) * width, f"{num_questions} questions")
    keys = distinct_words(generator, num, KEY_LETTERS)  # in the order of the cycle
    written = generator.permutation(num)
    context = columns(keys[written], " > ", keys[(written + 1) % num], "\n")
    asked = generator.permutation(num)[:num_questions]
    chain = [keys[(asked + step) % num] for step in range(1, STEPS + 1)]
    answers = columns(*[part for word in chain for part in (" > ", word)][1:])
    return Task(
        HOPS,
        np.concatenate([SINK, context.ravel()]),
        columns("?", keys[asked], " > "),
        answers,
        np.full(num_questions, np.nan),
    )


def needle(generator, text, length, num_questions, num_facts, depths=None):
    """A needle Task in a random stretch of `text`.

    Parameters
    ----------
    generator : numpy.random.Generator
    text : uint8 [bytes]
    length, num_questions, num_facts : int
        Bytes of the context; facts that are asked for, and facts in all.
    depths : sequence of float, optional
        Where the facts that are asked for stand, num_questions numbers from 0 to 1. Default: anywhere.
    """
    if not 1 <= num_questions <= num_facts:
        raise ValueError(f"num_questions is {num_questions}, but must be in 1 ... num_facts={num_facts}")
    names = letters(generator, num_facts, NAME_LETTERS)
    names[:, 0] -= ord("a") - ord("A")
    attributes = np.array([list(name.encode()) for name in ATTRIBUTES], np.uint8)
    of_fact = generator.integers(0, len(attributes), num_facts)
    # Half of the facts that are not asked for share the name of one that is, with another attribute.
    num_shared = (num_facts - num_questions) // 2
    if num_shared:
        twin = generator.integers(0, num_questions, num_shared)
        names[-num_shared:] = names[twin]
        of_fact[-num_shared:] = (of_fact[twin] + generator.integers(1, len(attributes), num_shared)) % len(attributes)
    values = digits(generator, num_facts)
    facts = columns("The ", attributes[of_fact], " of ", names, " is ", values, ".\n")
    room = length - 1 - facts.size
    check_room(length, 1 + 2 * facts.size, f"{num_facts} facts")
    hay = stretch(generator, text, room)

    where = generator.random(num_facts)
    if depths is not None:
        where[:num_questions] = depths
    ends = np.concatenate([[0], np.flatnonzero(hay == ord("\n")) + 1])  # of lines; facts stand there
    place = ends[np.clip(np.searchsorted(ends, where * room), 0, len(ends) - 1)]
    order = np.argsort(place, kind="stable")
    inserted = np.repeat(place[order], facts.shape[1])
    context = np.insert(hay, inserted, facts[order].ravel())
    kinds = np.insert(np.full(room, TEXT, np.uint8), inserted, NONE)
    context[-1], kinds[-1] = ord("\n"), NONE  # questions start on a line of their own
    asked = slice(0, num_questions)
    return Task(
        NEEDLE,
        np.concatenate([SINK, context]),
        columns("? The ", attributes[of_fact[asked]], " of ", names[asked], " is "),
        values[asked],
        place[asked] / max(room, 1),
        np.concatenate([SINK, kinds]),
    )


def copy(generator, text, length, num_questions, num_bytes):
    """A copy Task: passages of `num_bytes` bytes, of text, or of random letters where `text` is None."""
    if num_bytes <= CUE:
        raise ValueError(f"num_bytes is {num_bytes}, but must be above {CUE}, the bytes of the cue")
    check_room(length, 1 + num_bytes, f"a passage of {num_bytes} bytes")
    if text is None:
        context = letters(generator, 1, length - 1)[0]
        context[generator.random(length - 1) < 0.15] = ord(" ")
    else:
        context = stretch(generator, text, length - 1).copy()
    starts = generator.integers(0, length - num_bytes, num_questions)
    context[-1] = ord("\n")
    passages = context[starts[:, None] + np.arange(num_bytes)]
    return Task(
        COPY,
        np.concatenate([SINK, context]),
        columns("@copy ", passages[:, :CUE]),
        passages[:, CUE:],
        starts / length,
    )


def training_sequence(generator, text, length, kind):
    """(tokens, kinds), uint8 [length + 1] each: a sequence of one kind, and how each byte counts as a prediction."""
    total = length + 1
    if kind == TEXT:
        tokens = np.concatenate([SINK, stretch(generator, text, length)])
        return tokens, np.full(total, TEXT, np.uint8)
    share = generator.uniform(0.15, 0.4)  # of the sequence that are questions
    if kind == LOOKUP:
        if generator.random() < 0.5:
            tokens, kinds = interleaved_lookup(generator, length)
            return tokens[:total], kinds[:total]
        num = max(1, int(total * share) // (RECORD_BYTES + 1))
        made = lookup(generator, total - num * (RECORD_BYTES + 1), num)
    elif kind == HOPS:
        width = 1 + KEY_LETTERS + STEPS * (3 + KEY_LETTERS) + 1
        num = max(1, int(total * share) // width)
        made = hops(generator, total - num * width, num)
    elif kind == NEEDLE:
        width = len("? The code of Kqzvbd is 48213\n")
        num = int(generator.integers(2, max(3, total // 160)))
        made = needle(generator, text, total - num * width, num, num + int(generator.integers(0, num + 1)))
    else:
        num_bytes = int(generator.integers(2 * CUE, max(2 * CUE + 1, total // 8)))
        width = len("@copy ") + num_bytes + 1
        num = max(1, int(total * share) // width)
        made = copy(generator, text if generator.random() < 0.5 else None, total - num * width, num, num_bytes)
    return padded(*made.sequence(), total)


def padded(tokens, kinds, total):
    """Both cut or filled with newlines, which count for nothing, to `total` bytes."""
    missing = max(0, total - len(tokens))
    tokens = np.concatenate([tokens[:total], np.full(missing, ord("\n"), np.uint8)])
    return tokens, np.concatenate([kinds[:total], np.zeros(missing, np.uint8)])


def training_batch(generator, text, batch, length):
    """(tokens, kinds), uint8 [batch, length + 1] each, of kinds drawn by MIXTURE."""
    kinds = generator.choice(list(MIXTURE), batch, p=list(MIXTURE.values()))
    made = [training_sequence(generator, text, length, kind) for kind in kinds]
    return np.stack([tokens for tokens, _ in made]), np.stack([kinds for _, kinds in made])
