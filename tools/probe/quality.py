"""What the probe does with dense attention: answers that are right to the last byte, and its loss on held-out text."""

from __future__ import annotations

import numpy as np
import torch

from .tasks import CUE, KINDS, TEXT, copy, hops, lookup, needle, padded, training_sequence

LENGTHS = (2048, 4096, 8192, 16384)
QUESTIONS = 24  # a sequence
LEAST_QUESTIONS = 384  # for each task and length
TEXT_BATCHES = 16
SEED = 1_000_003  # training takes its data from other seeds


def make_task(kind, generator, text, length):
    """A task whose context and questions fill `length` bytes at most."""
    if kind == "lookup":
        return lookup(generator, length - QUESTIONS * 14, QUESTIONS)
    if kind == "hops":
        return hops(generator, length - QUESTIONS // 2 * 31, QUESTIONS // 2)
    if kind == "needle":
        return needle(generator, text, length - QUESTIONS // 3 * 30, QUESTIONS // 3, QUESTIONS // 2)
    return copy(generator, text, length - QUESTIONS // 3 * (7 + CUE + 48), QUESTIONS // 3, CUE + 48)


def run(probe, sequences):
    """right bool and losses float32 [sequences, L], of (tokens, kinds) uint8 [L + 1] each."""
    tokens, kinds = (torch.from_numpy(np.stack(part)).to(probe.device) for part in zip(*sequences))
    _, _, right, losses = probe(tokens, kinds)
    shape = (tokens.shape[0], -1)
    return right.reshape(shape).cpu().numpy(), losses.float().reshape(shape).cpu().numpy()


def exact_answers(probe, kind, text, length, tokens_of_batch):
    """(share of the questions whose answer is right to the last byte, number of questions)."""
    generator = np.random.default_rng([SEED, length, KINDS.index(kind)])
    correct = []
    while len(correct) < LEAST_QUESTIONS:
        tasks = [make_task(kind, generator, text, length) for _ in range(tokens_of_batch // length)]
        right, _ = run(probe, [padded(*task.sequence(), length + 1) for task in tasks])
        for row, task in zip(right, tasks):
            context, questions, answers = len(task.context), task.questions.shape, task.answers.shape
            lines = row[context - 1 :]  # row[i] is about byte i + 1
            lines = lines[: questions[0] * (questions[1] + answers[1] + 1)].reshape(questions[0], -1)
            correct += lines[:, questions[1] : questions[1] + answers[1]].all(1).tolist()
    return float(np.mean(correct)), len(correct)


def bigram_loss(train, heldout):
    """Nats a byte of a model that knows the byte before, counted on `train` with one added to every pair."""
    pairs = np.bincount(train[:-1].astype(np.int64) * 256 + train[1:], minlength=1 << 16).reshape(256, 256) + 1.0
    chance = pairs / pairs.sum(1, keepdims=True)
    return float(-np.log(chance[heldout[:-1], heldout[1:]]).mean())


def text_losses(probe, heldout, length, tokens_of_batch):
    """Mean loss in nats a byte over held-out text, and that of the last quarter of the positions."""
    generator = np.random.default_rng([SEED, length])
    losses = []
    for _ in range(TEXT_BATCHES):
        sequences = [training_sequence(generator, heldout, length, TEXT) for _ in range(tokens_of_batch // length)]
        losses.append(run(probe, sequences)[1])
    losses = np.concatenate(losses)
    return float(losses.mean()), float(losses[:, -length // 4 :].mean())


def measure(probe, train, heldout, tokens_of_batch, longest):
    """{"text": ..., "lookup": {length: share}, ...}; tokens_of_batch as in training, so that nothing compiles anew."""
    lengths = [length for length in LENGTHS if length <= longest] or [longest]
    quality = {"text": {}, "bigram_loss": bigram_loss(train, heldout), "questions": {}}
    for length in lengths:
        mean, last = text_losses(probe, heldout, length, tokens_of_batch)
        quality["text"][str(length)] = {"loss": mean, "last_quarter": last}
    for kind in KINDS[2:]:
        quality[kind] = {}
        for length in lengths:
            quality[kind][str(length)], count = exact_answers(probe, kind, heldout, length, tokens_of_batch)
        quality["questions"][kind] = count
    return quality


def table(quality):
    """The figures as a table, one column a length."""
    lengths = list(quality["text"])
    rows = ["answers right to the last byte, bytes of context: " + "".join(f"{int(length):>9,}" for length in lengths)]
    for kind in KINDS[2:]:
        shares = "".join(f"{quality[kind][length]:9.1%}" for length in lengths)
        rows.append(f"{kind:>20} ({quality['questions'][kind]:4} questions at {int(lengths[-1]):6,}): {shares}")
    for name, label in (("loss", "held-out text, nats a byte"), ("last_quarter", "its last quarter of positions")):
        rows.append(f"{label:>49}: " + "".join(f"{quality['text'][length][name]:9.3f}" for length in lengths))
    rows.append(f"{'a bigram model, nats a byte':>49}: {quality['bigram_loss']:9.3f}")
    return "\n".join(rows)
