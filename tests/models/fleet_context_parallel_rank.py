"""One rank of test_fleet_context_parallel.py: a process of its own, with a part of the tokens and of the heads.

    python fleet_context_parallel_rank.py FOLDER PORT...

reads the weights of whole models from FOLDER and leaves there what this rank computed, with the stand-in of PaddleFleet
and gloo.
"""

import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import paddlefleet_stand_in as stand_in
import pytest
from context_parallel_rank import block_masks_of, part_of
from fleet_models import logits, make_tokens
from fleet_ranks import load_part
from paddle.distributed import fleet
from processes import give_groups_their_own_store

import rrattn


class Groups:
    """What fleet keeps of its groups, the tensor-parallel ranks beside each other.

    `fleet.init` of Paddle 3.3.1 has context-parallel groups only together with expert-parallel ones, a dozen in all,
    which take gloo 20 seconds.
    """

    def __init__(self, cp, tp):
        self.cp, self.tp = cp, tp

    def get_context_parallel_group(self):
        return self.cp


def make_groups(cp, tp):
    """Groups of `cp` context-parallel times `tp` tensor-parallel ranks, the latter None where there is one."""
    ranks = np.arange(cp * tp).reshape(cp, tp)
    found = []
    for members in (ranks.T, ranks):
        for group in members.tolist() if members.shape[1] > 1 else ():
            made = dist.new_group(group, backend="gloo")
            if dist.get_rank() in group:
                found.append(made)
    return Groups(*found, *([None] if tp == 1 else []))


def attention_recorded(function, *arguments):
    """What `function` returns, and what went into and came out of the first call of attention in each layer."""
    from test_fleet_context_parallel import LAYERS

    from rrattn.integrations import paddlefleet

    attend, results = paddlefleet.attend_in_context, {}

    def record(core, query, key, value, rows, **options):
        layer = sum(name.startswith("query") for name in results)
        out, masks = block_masks_of(lambda: attend(core, query, key, value, rows, **options))
        if layer < LAYERS:  # later calls recompute
            tensors = {"query": query, "key": key, "value": value, "out": out}
            results.update({f"{name}_{layer}": tensor.numpy() for name, tensor in tensors.items()})
            results.update({f"mask_{layer}_{i}": mask for i, mask in enumerate(masks)})
        return out

    paddlefleet.attend_in_context = record
    try:
        return function(*arguments), results
    finally:
        paddlefleet.attend_in_context = attend


def whole_gradients(gradients, model, weights, groups):
    """Sums what fleet sums: over the ranks that share tokens, of parameters that they all have."""
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=groups.cp)
        if model.config.sequence_parallel and list(weights[name].shape) == gradient.shape:
            dist.all_reduce(gradient, group=groups.tp)
    return {"grad " + name: gradient.numpy() for name, gradient in gradients.items()}


def compute(name, mode, groups, folder):
    from test_fleet_context_parallel import BATCH, CASES, CONFIG, LAYOUTS, LENGTH, labels_of, train

    case, tp = CASES[name], groups.tp
    model = case.make(cp_balance_mode=mode)
    load_part(model, folder, name, *((0, 1) if tp is None else (tp.rank, tp.world_size)))
    tokens = make_tokens(LENGTH, BATCH)
    tokens, labels = (
        paddle.to_tensor(part_of(x.numpy(), LAYOUTS[mode], groups.cp)) for x in (tokens, labels_of(tokens))
    )
    if model.config.sequence_parallel:
        labels = stand_in.scatter(labels, 1, "contiguous", tp)
    rrattn.enable(model, CONFIG)
    (out, loss, gradients), results = attention_recorded(train, model, tokens, labels, case.rows)
    dist.all_reduce(loss, group=groups.cp)
    if model.config.sequence_parallel:
        dist.all_reduce(loss, group=tp)
    results.update(logits=out.numpy(), loss=loss.numpy())
    results.update(whole_gradients(gradients, model, np.load(folder / f"{name}.npz"), groups))
    if mode in case.twin and groups.cp.world_size == 2 and tp is None:
        rows = case.rows_of_one_process if case.layout(mode) == "all_to_all" else case.rows
        with paddle.no_grad():
            rrattn.enable(model, threshold=1.0)
            results["every block"] = logits(model, tokens, attn_mask_startend_row_indices=rows).numpy()
            rrattn.disable(model)
            results["dense"] = logits(model, tokens, attn_mask_startend_row_indices=rows).numpy()
    return results


@paddle.no_grad()
def attend_two_bounds(problem, mode, groups):
    from test_fleet_context_parallel import LAYOUTS

    core = problem.core(cp_balance_mode=mode)
    parts = (paddle.to_tensor(part_of(x, LAYOUTS[mode], groups.cp)) for x in problem.inputs)
    return {"out": core(*parts, None, problem.rows, attn_mask_type=problem.mask_type(mode)).numpy()}


def main(folder, ports):
    give_groups_their_own_store(ports)
    dist.init_parallel_env()
    stand_in.install(pytest.MonkeyPatch())

    from test_fleet_context_parallel import LAYOUTS, RUNS, TOPOLOGIES, TWO_BOUNDS

    for cp, tp in TOPOLOGIES[dist.get_world_size()]:
        groups = make_groups(cp, tp)
        fleet.fleet._hcg = groups
        stand_in.ContextParallel.size = cp
        stand_in.ProcessGroupCollection.tp_group = groups.tp
        place = f"{cp}x{tp}-{groups.cp.rank}-{0 if groups.tp is None else groups.tp.rank}"
        for ranks, name, mode in RUNS:
            if ranks == (cp, tp):
                np.savez(folder / f"{name}-{mode}-{place}.npz", **compute(name, mode, groups, folder))
        for name, problem in TWO_BOUNDS.items() if tp == 1 else ():
            for mode in LAYOUTS:
                np.savez(folder / f"{name}-{mode}-{place}.npz", **attend_two_bounds(problem, mode, groups))


if __name__ == "__main__":
    main(Path(sys.argv[1]), map(int, sys.argv[2:]))
    os._exit(0)  # Paddle's stores abort in their destructors when another rank is gone before them
