"""Runs the tasks and writes a line of results for each model, method, task, length and context."""

from __future__ import annotations

import numpy as np
import paddle
from tqdm import tqdm

from rrattn.attention_mass import density_and_kept, exact_block_mass

from . import baselines
from .methods import Method
from .model import Timer, log_softmax
from .prompts import CONTEXTS, token_prompt
from .records import BEST, MASS

ROWS = 1024  # of logits at once


def run_tasks(model, results, text, kinds, methods, lengths, contexts, num_questions):
    """Runs every kind of context at every length with every method, without what `results` has.

    Parameters
    ----------
    model : Model
    results : Results
    text : uint8 [bytes]
        Held-out text.
    kinds, methods : sequences of str
        Of CONTEXTS; of methods.Method.
    lengths : sequence of int
        Bytes of the contexts, or tokens where the model has a tokenizer.
    contexts, num_questions : int
        Contexts of each kind and length, and questions about each.
    """
    digest = model.digest()
    todo = []
    for length in lengths:
        for index in range(contexts):
            for kind in kinds:
                row = {"model": digest, "length": length, "index": index, "questions": num_questions}
                missing = [
                    method
                    for method in methods
                    if any({**row, "method": method, "task": task} not in results for task in CONTEXTS[kind])
                ]
                if missing:
                    todo.append((kind, row, missing))
    with tqdm(total=sum(len(missing) for _, _, missing in todo), unit="prefill") as bar:
        for kind, row, missing in todo:
            prompt = token_prompt(model.codec, kind, text, row["length"], row["index"], num_questions)
            for method in missing:
                bar.set_description(f"{kind} {row['length']} {method}")
                model.method = Method(method)
                for scored in run_prompt(model, kind, prompt):
                    if {**row, "method": method, **scored} not in results:
                        results.add({**row, "method": method, **scored})
                bar.update()


def run_prompt(model, kind, prompt):
    """Results of one prompt of tokens: a dict a task."""
    context = prompt.context
    if prompt.scored is not None:
        with Timer() as timer:
            hidden, _ = model.prefill(context)
        prefill = of_prefill(model, timer)
        if prompt.dense is None:
            prompt.dense = hidden if model.method.name == "dense" else dense_hidden(model, context)
        return [{"task": kind, **score_inside(model, prompt, hidden), **prefill}]
    with Timer() as timer:
        _, cache = model.prefill(context[: len(context) // baselines.BLOCK * baselines.BLOCK])
    prefill = of_prefill(model, timer)  # before the questions' own short prefills
    right = {task: [] for task in CONTEXTS[kind]}
    for one in prompt.questions:
        correct = bool(model.answer(context, cache, one.question, one.answer).all())
        right[one.task].append([correct, None if np.isnan(one.depth) else round(one.depth, 4)])
    return [
        {"task": task, "score": float(np.mean([correct for correct, _ in of_task])), "right": of_task, **prefill}
        for task, of_task in right.items()
    ]


def dense_hidden(model, tokens):
    """What a dense prefill makes of tokens; the model's method stays."""
    method, model.method = model.method, Method("dense")
    try:
        return model.prefill(tokens)[0]
    finally:
        model.method = method


def score_inside(model, prompt, hidden):
    """What a prefill gave where the prompt is scored itself.

    nats and guessed are the loss and the share of tokens guessed right; score is the share of right answers, of which
    there are `answers`, or guessed where there are none. divergence (of Kullback and Leibler, in nats, from dense to
    this) and agreement (the share of tokens where both guess the same) compare the prefill with prompt.dense.
    """
    scored = np.flatnonzero(prompt.scored[1:])  # what stands in row i of hidden foretells token i + 1
    nats, right, same, divergence = [], np.zeros(len(prompt.context), bool), [], []
    for part in np.split(scored, range(ROWS, len(scored), ROWS)):
        rows, targets = paddle.to_tensor(part), prompt.context[part + 1]
        chances = log_softmax(model.logits(hidden[rows]))
        of_dense = chances if hidden is prompt.dense else log_softmax(model.logits(prompt.dense[rows]))
        guesses = chances.argmax(-1)
        right[part + 1] = guesses == targets
        nats.append(-chances[np.arange(len(part)), targets])
        same.append(guesses == of_dense.argmax(-1))
        divergence.append((np.exp(of_dense) * (of_dense - chances)).sum(-1, dtype=np.float64))
    counted = {"nats": nats, "agreement": same, "divergence": divergence}
    counted = {name: float(np.concatenate(parts).mean(dtype=np.float64)) for name, parts in counted.items()}
    counted["guessed"] = counted["score"] = float(right[scored + 1].mean())
    if prompt.spans:
        counted["answers"] = len(prompt.spans)
        counted["score"] = float(np.mean([right[begin:end].all() for begin, end in prompt.spans]))
    return counted


def of_prefill(model, timer):
    """Density of the prefill just run, per layer and over all, and its time."""
    layers = [float(density.mean()) for density in model.densities]
    return {"density": float(np.mean(layers)), "layers": [round(x, 5) for x in layers], "seconds": timer.seconds}


def measure_mass(model, results, text, kinds, methods, lengths, contexts, num_questions):
    """The true attention mass that each method's blocks hold, on the queries and keys of a dense prefill.

    All methods choose from the same queries and keys, so nothing but the choice differs. A result has `kept` and
    `density`, means over layers, heads and queries, and `by_layer`, lists of [density, kept] of each head.
    """
    digest = model.digest()
    jobs = [(length, index, kind) for length in lengths for index in range(contexts) for kind in kinds]
    for length, index, kind in tqdm(jobs, desc="kept mass", unit="context"):
        row = {"model": digest, "task": f"{MASS} {kind}", "length": length, "index": index, "questions": num_questions}
        missing = [method for method in methods if {**row, "method": method} not in results]
        if not missing:
            continue
        prompt = token_prompt(model.codec, kind, text, length, index, num_questions)
        inputs, masses = capture(model, prompt.context)
        for method in tqdm(missing, desc=f"{kind} {length}", unit="method", leave=False):
            results.add({**row, "method": method, **kept_mass(model, inputs, masses, method)})


def capture(model, tokens):
    """([(query, key, scale)], [exact mass [Hq, Mq, Mk]]) of each layer in a dense prefill."""
    inputs = [None] * model.num_layers

    def keep(layer, query, key, scale):
        inputs[layer] = (query, key, scale)

    model.method, model.on_attend = Method("dense"), keep
    try:
        model.prefill(tokens)
    finally:
        model.on_attend = None
    masses = []
    for query, key, scale in tqdm(inputs, desc="exact mass", unit="layer", leave=False):
        masses.append(exact_block_mass(query, key, scale))
    return inputs, masses


def kept_mass(model, inputs, masses, method):
    """What `measure_mass` writes of one method."""
    if method.startswith(BEST):
        shares = best_shares(masses, float(method[len(BEST) :]))
        return {"density": shares[0], "kept": shares[1]}
    chosen = _ExactFrom(method, masses) if method.startswith("exact:") else Method(method)
    return mass_in_blocks(model, inputs, masses, chosen.block_mask)


def mass_in_blocks(model, inputs, masses, block_mask):
    """What `measure_mass` writes of the blocks that a function with the arguments of `Method.block_mask` chooses."""
    import rrattn

    by_layer = []
    for layer, ((query, key, scale), mass) in enumerate(zip(inputs, masses)):
        packed = block_mask(query, key, scale, layer, model.num_layers)
        mask = rrattn.unpack_block_mask(packed, mass.shape[2]).numpy()[0]
        by_layer.append([[round(float(d), 5), round(float(k), 5)] for d, k in zip(*density_and_kept(mask, mass))])
    density, kept = np.asarray(by_layer).mean((0, 1))
    return {"density": float(density), "kept": float(kept), "by_layer": by_layer}


def best_shares(masses, share):
    """(density, kept mass) of the blocks of greatest mass among all layers, heads and rows, `share` of the visible.

    Besides the first block and the diagonal, which every selection keeps. A threshold on the exact mass, in contrast,
    asks each row for the same share, whatever it costs.
    """
    visible = np.tril(np.ones(masses[0].shape[1:], bool))
    kept = np.eye(len(visible), dtype=bool) | (np.arange(len(visible)) == 0) & visible
    mass = np.stack(masses)  # [layers, Hq, M, M]
    always = mass[..., kept].sum()
    others = np.sort(mass[..., visible & ~kept].ravel())[::-1]
    total, num_always = mass.shape[0] * mass.shape[1] * visible.sum(), mass.shape[0] * mass.shape[1] * kept.sum()
    count = max(0, round(share * total) - num_always)
    return float((num_always + count) / total), float((always + others[:count].sum()) / mass.sum())


class _ExactFrom(Method):
    """Method("exact:...") with masses that are known."""

    def __init__(self, text, masses):
        super().__init__(text)
        self._masses = masses

    def _baseline(self, query, key, scale, layer):
        return self._masses[layer], None
