"""The tasks and the kept mass of many contexts, with the model in PyTorch.

Results are the lines that run.py writes, so that report.py tells of both, with 0 or 1 for an answer and without
times, which would not be the methods' own.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import torch_selection
from .baselines import BLOCK
from .methods import Method
from .prompts import CONTEXTS, make_prompt
from .records import MASS
from .torch_model import Model

AT_ONCE = 24  # questions


def chosen(text):
    """The Method that a text names.

    Raises
    ------
    ValueError
        Where it names none, or one that is not in torch_selection.
    """
    method = Method(text)
    if method.name not in torch_selection.NAMES or (method.name != "dense" and not hasattr(method, "knob")):
        names = ", ".join(torch_selection.NAMES)
        raise ValueError(f"method {text!r}: of many contexts only {names} are measured, each with a number")
    return method


def run_many(folder, results, text, kinds, methods, mass_methods, length, contexts, num_questions, device):
    """Runs every kind of context with every method, and measures kept mass, without what `results` has.

    Parameters
    ----------
    folder : path
        A checkpoint that `torch_model.Model` computes.
    results : Results
    text : uint8 [bytes]
    kinds, methods : sequences of str
        Of CONTEXTS; that `chosen` takes.
    mass_methods : sequence of str
        What to measure the kept mass of, on the queries and keys of a dense prefill.
    length, contexts, num_questions : int
        Bytes of a context; contexts of each kind; questions about each.
    device : str

    Raises
    ------
    ValueError
        For a method or a checkpoint that this does not compute.
    """
    methods, mass_methods = ([(name, chosen(name)) for name in names] for names in (methods, mass_methods))
    torch.backends.cuda.matmul.allow_tf32 = False
    model = Model(folder, torch.device(device), length + 1024)
    bar = tqdm([(index, kind) for index in range(contexts) for kind in kinds], unit="context")
    for index, kind in bar:
        bar.set_description(f"{kind} {index}")
        row = {"model": model.digest, "length": length, "index": index, "questions": num_questions}

        def missing(methods, tasks, row=row):
            return [
                (name, method)
                for name, method in methods
                if any({**row, "method": name, "task": task} not in results for task in tasks)
            ]

        todo, masses = missing(methods, CONTEXTS[kind]), missing(mass_methods, [f"{MASS} {kind}"])
        if not todo and not masses:
            continue
        prompt = make_prompt(kind, text, length, index, num_questions)
        with torch.no_grad():
            for name, method in todo:
                for scored in run_prompt(model, kind, prompt, method):
                    if {**row, "method": name, **scored} not in results:
                        results.add({**row, "method": name, **scored})
            if masses:
                kept = kept_mass(model, prompt, [method for _, method in masses])
                for (name, _), (density, share) in zip(masses, kept.tolist()):
                    line = {"method": name, "task": f"{MASS} {kind}"}
                    results.add({**row, **line, "density": round(density, 6), "kept": round(share, 6)})


def as_tokens(data, device):
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64)).to(device)


def run_prompt(model, kind, prompt, method):
    """Results of one prompt: a dict a task."""
    context = as_tokens(prompt.context, model.device)
    whole = len(context) if prompt.scored is not None else len(context) // BLOCK * BLOCK
    x, cache, densities = model.prefill(context[:whole], method)
    prefill = {"density": float(densities.mean())}
    if prompt.scored is not None:
        return [{"task": kind, **score_inside(model, prompt, context, x), **prefill}]
    rows = []
    for task in CONTEXTS[kind]:
        asked = [one for one in prompt.questions if one.task == task]
        questions = torch.stack([as_tokens(one.question, model.device) for one in asked])
        answers = torch.stack([as_tokens(one.answer, model.device) for one in asked])
        right = torch.cat(
            [
                model.answer(context[whole:], cache, questions[i : i + AT_ONCE], answers[i : i + AT_ONCE], method)
                for i in range(0, len(asked), AT_ONCE)
            ]
        )
        pairs = [
            [int(correct), None if np.isnan(one.depth) else round(one.depth, 4)]
            for correct, one in zip(right.tolist(), asked)
        ]
        rows.append({"task": task, "score": float(right.double().mean()), "right": pairs, **prefill})
    return rows


def score_inside(model, prompt, context, x):
    """What `run.score_inside` returns, of the residual stream x."""
    logits, targets = model.logits(x[:-1]), context[1:]
    scored = torch.from_numpy(prompt.scored.astype(bool)).to(model.device)[1:]
    nats = F.cross_entropy(logits, targets, reduction="none").double()
    guessed = logits.argmax(-1) == targets
    counted = {"nats": float(nats[scored].mean()), "guessed": float(guessed[scored].double().mean())}
    right = [bool(guessed[begin - 1 : end - 1].all()) for begin, end in prompt.spans]
    return {**counted, "score": float(np.mean(right)) if right else counted["guessed"]}


def kept_mass(model, prompt, methods):
    """float64 [methods, 2]: density and kept mass of the blocks that each Method chooses in a dense prefill."""
    layers = []

    def measure(query, key):
        length, device = query.shape[1], query.device
        visible, mass = torch_selection.visible_blocks(length, length, device), model.mass(query, key, model.scale)
        scores, found = {}, []
        for method in methods:
            estimate = method.name, method.stride
            if estimate not in scores:
                scores[estimate] = torch_selection.block_scores(*estimate, query, key, model.scale, lambda *_: mass)
            mask = torch_selection.top_tau(scores[estimate], [method.knob])[0] & visible
            mask |= torch_selection.always_kept(length, length, **method.keep, device=device)
            share, kept = mask.sum((2, 3)) / visible.sum(), (mass * mask).sum((2, 3)) / mass.sum((2, 3))
            found.append(torch.stack([share.mean(), kept.mean()]))
        layers.append(torch.stack(found))

    model.prefill(as_tokens(prompt.context, model.device), Method("dense"), measure)
    return torch.stack(layers).double().mean(0)
