"""One rank of test_split_sequences.py: a process of its own, which has a part of each sequence.

    python split_sequences_rank.py FOLDER PORT...

reads the weights of a whole model and the numbers of ranks from FOLDER and leaves there what this rank computed.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from fleet_ranks import load_part, prepare_fleet, start_fleet
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients
from paddle.distributed.fleet.utils.sequence_parallel_utils import register_sequence_parallel_allreduce_hooks
from paddlenlp.transformers.segment_parallel_utils import split_inputs_sequence_dim
from test_split_sequences import (
    BY_CHUNKS,
    BY_HEADS,
    CONFIG,
    SPLITS,
    all_tokens,
    cases,
    inputs_of,
    make_split_model,
    trained,
)
from tiny_models import enable_recompute

import rrattn


def part_of_tokens(by):
    """This rank's tokens, as PaddleNLP's trainer gives them to a model."""
    if by == BY_CHUNKS:
        from paddlenlp.transformers.context_parallel_utils import split_inputs_sequence_dim_load_balance

        return split_inputs_sequence_dim_load_balance(all_tokens())
    return split_inputs_sequence_dim(all_tokens())


def run(groups, folder, name, by, **parallel):
    """Leaves what this rank computes with a model whose config says how sequences are split."""
    tensor_rank, tensor_ranks = groups.get_model_parallel_rank(), groups.get_model_parallel_world_size()
    parallel.update(tensor_parallel_degree=tensor_ranks, tensor_parallel_rank=tensor_rank, tensor_parallel_output=False)
    parallel[by] = sequence_ranks = groups.get_sep_parallel_world_size()
    for case in cases(**parallel):
        model = make_split_model(**parallel)
        load_part(model, folder, "llama", tensor_rank, tensor_ranks)
        if parallel.get("sequence_parallel"):
            register_sequence_parallel_allreduce_hooks(model, 1, False)
        rrattn.enable(model, CONFIG)
        if case in ("full", "core_attn"):
            enable_recompute(model, case)
        model.config.use_flash_attention = case == "core_attn"  # then PaddleNLP makes no mask and repeats no heads
        loss, _, found, masks = trained(model, part_of_tokens(by), **inputs_of(case))
        fused_allreduce_gradients(list(model.parameters()), groups)  # as the trainer does after the backward pass
        grads = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
        stored = {f"mask_{i}": mask for i, mask in enumerate(masks)}
        file = folder / f"{name}_{case}_{tensor_ranks}x{sequence_ranks}_{groups.global_rank}.npz"
        np.savez(file, loss=loss, logits=found, **grads, **stored)


def main(folder, ports):
    prepare_fleet(ports)
    for tensor_ranks, sequence_ranks in json.loads((folder / "ranks.json").read_text()):
        groups = start_fleet(mp_degree=tensor_ranks, sep_degree=sequence_ranks)
        for by in SPLITS:
            run(groups, folder, by, by)
        if tensor_ranks > 1:
            run(groups, folder, f"{BY_HEADS}_sequence_parallel", BY_HEADS, sequence_parallel=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), map(int, sys.argv[2:]))
    os._exit(0)  # Paddle's stores abort in their destructors when another rank is gone before them
