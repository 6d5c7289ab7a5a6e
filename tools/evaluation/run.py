"""Runs the tasks and writes a line of results for each model, method, task, length and context."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from rrattn.attention_mass import density_and_kept, exact_block_mass

from . import baselines
from .methods import Method
from .model import Timer, log_probabilities
from .prompts import CONTEXTS, make_prompt
from .records import BEST, MASS


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
                for method in methods:
                    tasks = CONTEXTS[kind]
                    row = {
                        "model": digest,
                        "method": method,
                        "length": length,
                        "index": index,
                        "questions": num_questions,
                    }
                    if any({**row, "task": task} not in results for task in tasks):
                        todo.append((kind, row))
    bar = tqdm(todo, unit="context")
    for kind, row in bar:
        bar.set_description(f"{kind} {row['length']} {row['method']}")
        prompt = sized_prompt(model.codec, kind, text, row["length"], row["index"], num_questions)
        model.method = Method(row["method"])
        for scored in run_prompt(model, kind, prompt):
            if {**row, **scored} not in results:
                results.add({**row, **scored})


def sized_prompt(codec, kind, text, length, index, num_questions):
    """A prompt whose context is of about `length` tokens: exactly so many bytes where bytes are the tokens."""
    prompt = make_prompt(kind, text, length, index, num_questions)
    tokens = len(codec.encode(prompt.context))
    if tokens == len(prompt.context):
        return prompt
    return make_prompt(kind, text, int(length * len(prompt.context) / tokens), index, num_questions)


def run_prompt(model, kind, prompt):
    """Results of one prompt: a dict a task."""
    context = model.codec.encode(prompt.context)
    if prompt.scored is not None:
        with Timer() as timer:
            logits, _ = model.prefill(context)
        return [{"task": kind, **score_inside(model, prompt, context, logits), **of_prefill(model, timer)}]
    with Timer() as timer:
        _, cache = model.prefill(context[: len(context) // baselines.BLOCK * baselines.BLOCK])
    prefill = of_prefill(model, timer)  # before the questions' own short prefills
    right = {task: [] for task in CONTEXTS[kind]}
    for one in prompt.questions:
        question, answer = model.codec.encode(one.question), model.codec.encode(one.answer)
        correct = bool(model.answer(context, cache, question, answer).all())
        right[one.task].append([correct, None if np.isnan(one.depth) else round(one.depth, 4)])
    return [
        {"task": task, "score": float(np.mean([correct for correct, _ in of_task])), "right": of_task, **prefill}
        for task, of_task in right.items()
    ]


def score_inside(model, prompt, context, logits):
    """Loss, share of tokens guessed right and share of right answers where the prompt is scored itself."""
    if len(context) != len(prompt.context):
        if not prompt.scored.all():
            raise ValueError("copy and inside are scored byte by byte: they take a byte-level model")
        scored = np.ones(len(context), bool)
    else:
        scored = prompt.scored.astype(bool)
    nats = -log_probabilities(logits[:-1], context[1:])
    guessed = logits[:-1].argmax(-1) == context[1:]
    counted = {"nats": float(nats[scored[1:]].mean()), "guessed": float(guessed[scored[1:]].mean())}
    if prompt.spans:
        counted["score"] = float(np.mean([guessed[begin - 1 : end - 1].all() for begin, end in prompt.spans]))
    else:
        counted["score"] = counted["guessed"]
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
        prompt = sized_prompt(model.codec, kind, text, length, index, num_questions)
        inputs, masses = capture(model, model.codec.encode(prompt.context))
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
