"""The tasks and the kept mass of many contexts, with the model in PyTorch.

Results are the lines that run.py writes, so that report.py tells of both, with 0 or 1 for an answer and without
times, which would not be the methods' own.

Methods that are written with a number are computed in PyTorch, in float32. rrattn with settings by name or in a file
runs its own kernels, which takes a build of the package for the device: see torch_rrattn.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import torch_selection
from .baselines import BLOCK
from .methods import Method
from .prompts import CONTEXTS, token_prompt
from .records import MASS
from .torch_model import Model

AT_ONCE = 24  # questions
ROWS = 1024  # of logits at once


def chosen(text):
    """The Method that a text names.

    Raises
    ------
    ValueError
        Where it names none, or one that is not in torch_selection.
    """
    method = Method(text)
    if method.name not in torch_selection.NAMES:
        names = ", ".join(torch_selection.NAMES)
        raise ValueError(f"method {text!r}: of many contexts only {names} are measured")
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
        Tokens of a context; contexts of each kind; questions about each.
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
        prompt = token_prompt(model.codec, kind, text, length, index, num_questions)
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


def run_prompt(model, kind, prompt, method):
    """Results of one prompt of tokens: a dict a task."""
    context = torch.from_numpy(prompt.context).to(model.device)
    whole = len(context) if prompt.scored is not None else len(context) // BLOCK * BLOCK
    x, cache, densities = model.prefill(context[:whole], method)
    prefill = {"density": float(densities.mean())}
    if prompt.scored is not None:
        if prompt.dense is None:
            prompt.dense = x if method.name == "dense" else model.prefill(context, Method("dense"))[0]
        return [{"task": kind, **score_inside(model, prompt, context, x), **prefill}]
    rows = []
    for task in CONTEXTS[kind]:
        asked = [one for one in prompt.questions if one.task == task]
        right = answered(model, context[whole:], cache, asked, method)
        pairs = [
            [int(correct), None if np.isnan(one.depth) else round(one.depth, 4)] for correct, one in zip(right, asked)
        ]
        rows.append({"task": task, "score": float(np.mean(right)), "right": pairs, **prefill})
    return rows


def answered(model, rest, cache, asked, method):
    """Whether each question is answered, bool [questions]: those at once whose questions and answers are as long."""
    right, alike = np.zeros(len(asked), bool), {}
    for index, one in enumerate(asked):
        alike.setdefault((len(one.question), len(one.answer)), []).append(index)
    for indices in alike.values():
        for begin in range(0, len(indices), AT_ONCE):
            part = indices[begin : begin + AT_ONCE]
            questions, answers = (
                torch.from_numpy(np.stack([getattr(asked[index], name) for index in part])).to(model.device)
                for name in ("question", "answer")
            )
            right[part] = model.answer(rest, cache, questions, answers, method).cpu().numpy()
    return right


def score_inside(model, prompt, context, x):
    """What `run.score_inside` returns, of the residual stream x and dense attention's in prompt.dense."""
    scored = torch.from_numpy(np.flatnonzero(prompt.scored[1:])).to(model.device)
    right, found = torch.zeros(len(context), dtype=torch.bool, device=model.device), []
    for rows in scored.split(ROWS):
        targets = context[rows + 1]
        chances, of_dense = (F.log_softmax(model.logits(stream[rows]), -1) for stream in (x, prompt.dense))
        guesses = chances.argmax(-1)
        right[rows + 1] = guesses == targets
        nats = F.nll_loss(chances, targets, reduction="none")
        same = (guesses == of_dense.argmax(-1)).float()
        found.append(torch.stack([nats, same, (of_dense.exp() * (of_dense - chances)).sum(-1)]).double())
    nats, agreement, divergence = torch.cat(found, 1).mean(1).tolist()
    counted = {"nats": nats, "agreement": agreement, "divergence": divergence}
    counted["guessed"] = counted["score"] = float(right[scored + 1].double().mean())
    if prompt.spans:
        counted["answers"] = len(prompt.spans)
        counted["score"] = float(np.mean([bool(right[begin:end].all()) for begin, end in prompt.spans]))
    return counted


def kept_mass(model, prompt, methods):
    """float64 [methods, 2]: density and kept mass of the blocks that each Method chooses in a dense prefill."""
    layers = []

    def measure(layer, query, key):
        length, device = query.shape[1], query.device
        visible, mass = torch_selection.visible_blocks(length, length, device), model.mass(query, key, model.scale)
        scores, found = {}, []
        for method in methods:
            if method.name == "dense" or method.by_config:
                mask, _ = model.choose(method, layer, query, key, key)
            else:
                estimate = method.name, method.stride
                if estimate not in scores:
                    scores[estimate] = torch_selection.block_scores(*estimate, query, key, model.scale, lambda *_: mass)
                mask = torch_selection.top_tau(scores[estimate], [method.knob])[0] & visible
                mask |= torch_selection.always_kept(length, length, **method.keep, device=device)
            share, kept = mask.sum((2, 3)) / visible.sum(), (mass * mask).sum((2, 3)) / mass.sum((2, 3))
            found.append(torch.stack([share.mean(), kept.mean()]))
        layers.append(torch.stack(found))

    model.prefill(torch.from_numpy(prompt.context).to(model.device), Method("dense"), measure)
    return torch.stack(layers).double().mean(0)
