"""The probe's tasks: every answer stands in the context, once, and is what the question asks for."""

import re

import numpy as np
import pytest

from tools.probe import tasks

LENGTHS = (512, 1024, 3000)


@pytest.fixture
def text(rng):
    """Lines of words, as text is."""
    words = [b"".join(bytes([c]) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(4000)]
    lines = [b" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    return np.frombuffer(b"\n".join(lines), np.uint8)


def joined(task):
    """(context, question and answer of each line) as text."""
    lines = [(q.tobytes().decode(), a.tobytes().decode()) for q, a in zip(task.questions, task.answers)]
    return task.context.tobytes().decode(), lines


@pytest.mark.parametrize("length", LENGTHS)
def test_lookup_records(rng, length):
    task = tasks.lookup(rng, length, 7)
    context, lines = joined(task)
    records = dict(re.findall(r"([a-z]{5}): ([0-9]{5})\n", context))
    assert context[0] == "\0" and length - 13 < len(context) <= length
    assert len(records) == context.count("\n") == (length - 1) // 13  # so all keys differ
    assert len({question for question, _ in lines}) == 7
    for (question, answer), depth in zip(lines, task.depths):
        key = re.fullmatch(r"\?([a-z]{5}): ", question).group(1)
        assert records[key] == answer
        assert depth == pytest.approx((context.index(f"{key}: ") + 6.5) / len(context), abs=0.02)


@pytest.mark.parametrize("length", LENGTHS)
def test_interleaved_lookup_asks_about_earlier_records_only(rng, length):
    tokens, kinds = tasks.interleaved_lookup(rng, length)
    known, asked = {}, 0
    for match in re.finditer(rb"(\??)([a-z]{5}): ([0-9]{5})\n", tokens.tobytes()):
        question, key, value = match.groups()
        if question:
            assert known[key] == value
            asked += 1
        else:
            assert key not in known
            known[key] = value
        is_answer = np.zeros(match.end() - match.start(), np.uint8)
        is_answer[-6:-1] = tasks.LOOKUP if question else 0
        assert np.array_equal(kinds[match.start() : match.end()], is_answer)
    assert asked > 0 and len(tokens) == len(kinds) > length


@pytest.mark.parametrize("length", LENGTHS)
def test_hops_follow_the_records(rng, length):
    task = tasks.hops(rng, length, 5)
    context, lines = joined(task)
    after = dict(re.findall(r"([a-z]{5}) > ([a-z]{5})\n", context))
    assert set(after) == set(after.values())
    for question, answer in lines:
        word = question[1:6]
        for step in answer.split(" > "):
            assert after[word] == step
            word = step
        assert answer.count(" > ") == tasks.STEPS - 1


@pytest.mark.parametrize("length, questions, facts", [(1000, 3, 8), (3000, 10, 10), (900, 1, 1)])
def test_needles_stand_in_the_text_at_their_depths(rng, text, length, questions, facts):
    depths = np.linspace(0, 1, questions)
    task = tasks.needle(rng, text, length, questions, facts, depths)
    context, lines = joined(task)
    found = re.findall(r"The (code|port|seed|rank) of ([A-Z][a-z]{5}) is ([0-9]{5})\.\n", context)
    assert len(found) == len(set(found)) == facts and len(context) == length
    values = {f"? The {attribute} of {name} is ": value for attribute, name, value in found}
    assert len(values) == facts
    for (question, answer), depth, wanted in zip(lines, task.depths, depths):
        assert values[question] == answer
        assert depth == pytest.approx(wanted, abs=0.15)  # at the next line
    names = [name for _, name, _ in found]
    assert (len(set(names)) < facts) == (facts - questions >= 2)  # distractors share names


@pytest.mark.parametrize("of_text", [True, False])
def test_copy_passages_stand_in_the_context(rng, text, of_text):
    task = tasks.copy(rng, text if of_text else None, 2000, 9, 100)
    context, lines = joined(task)
    for question, answer in lines:
        assert question.startswith("@copy ") and question[6:] + answer in context
        assert len(question[6:]) == 16 and len(answer) == 84


@pytest.mark.parametrize("kind", list(tasks.MIXTURE))
@pytest.mark.parametrize("length", LENGTHS)
def test_training_sequences(rng, text, length, kind):
    for _ in range(20):
        tokens, kinds = tasks.training_sequence(rng, text, length, kind)
        assert tokens.shape == kinds.shape == (length + 1,) and tokens[0] == 0
        assert (kinds == kind).sum() >= 5
        assert set(np.unique(kinds)) <= {0, kind} | ({tasks.TEXT} if kind == tasks.NEEDLE else set())


def test_random_digits_of_a_fact_do_not_count_as_text(rng, text):
    tokens, kinds = tasks.needle(rng, text, 2000, 4, 8).sequence()
    for match in re.finditer(rb"The \w{4} of \w{6} is \d{5}\.\n", tokens.tobytes()):
        assert not kinds[match.start() : match.end()].any()
    assert (kinds == tasks.TEXT).sum() > 1500 and (kinds == tasks.NEEDLE).sum() == 4 * 5


def test_batches_mix_all_kinds_and_repeat_with_their_seed(text):
    first, second = (tasks.training_batch(np.random.default_rng(3), text, 64, 512) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert first[0].shape == (64, 513) and first[0].dtype == np.uint8
    assert set(np.unique(first[1])) == set(range(len(tasks.KINDS)))
    assert not np.array_equal(first[0], tasks.training_batch(np.random.default_rng(4), text, 64, 512)[0])


def test_bad_sizes_are_named(rng, text):
    with pytest.raises(ValueError, match="context is of 50 bytes, but 7 questions takes at least 92"):
        tasks.lookup(rng, 50, 7)
    with pytest.raises(ValueError, match="num_questions is 3, but must be in 1 ... num_facts=2"):
        tasks.needle(rng, text, 2000, 3, 2)
    with pytest.raises(ValueError, match="num_bytes is 16, but must be above 16"):
        tasks.copy(rng, text, 2000, 3, 16)
    with pytest.raises(ValueError, match="count is 9, but must be at most 6"):
        tasks.distinct_words(rng, 9, 1)
