"""One rank of tests/test_tensor_parallel.py: a process of its own, whose models hold a part of the heads.

    python tensor_parallel_rank.py FOLDER PORT...

reads the weights of whole models from FOLDER and leaves there what this rank computed. Fleet, its hybrid group and the
group's collectives (gloo) are what the libraries use on a GPU. Paddle's CPU build lacks a few operators that wrap the
collectives; `lend_operators` puts the collectives themselves in their place.
"""

import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.layers.mpu import mp_ops


def give_groups_their_own_store(ports):
    """One store per process group, at the ports of this iterator.

    In a store that groups share, gloo finds the addresses of an earlier group where those of a later one are not there
    yet (Paddle 3.3.1), and every other start of four processes hangs.
    """
    create = collective._new_process_group_impl
    stores = []  # a group does not keep its store alive

    def create_with_store(backend, store, rank, size, *arguments, **options):
        stores.append(paddle.base.core.TCPStore("127.0.0.1", next(ports), rank == 0, size, 120))
        return create(backend, stores[-1], rank, size, *arguments, **options)

    collective._new_process_group_impl = create_with_store


def lend_operators():
    """c_identity, c_concat and mp_allreduce_sum, forward only, by all_reduce and all_gather of the same group."""

    def identity(tensor, group=None, **options):
        return tensor

    def all_reduce(tensor, group=None, **options):
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    def concat(tensor, group=None):
        parts = []
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return paddle.concat(parts, axis=-1)

    mp_ops._c_identity = collective._c_identity = identity
    mp_ops._mp_allreduce = collective._mp_allreduce = all_reduce
    mp_ops._c_concat = collective._c_concat = concat


def load_part(model, folder, model_type, rank, ranks):
    """Gives each parameter its weights, those of this rank where the layer split it."""
    whole = np.load(folder / f"{model_type}.npz")
    for name, parameter in model.named_parameters():
        weight = whole[name]
        for axis, (size, part) in enumerate(zip(weight.shape, parameter.shape)):
            if part != size:
                assert part * ranks == size, name
                fused = np.split(weight, 2, axis) if "up_gate_proj" in name else [weight]
                weight = np.concatenate([np.split(one, ranks, axis)[rank] for one in fused], axis)
        parameter.set_value(weight)


@paddle.no_grad()
def main(folder, ports):
    give_groups_their_own_store(ports)
    lend_operators()
    strategy = fleet.DistributedStrategy()
    ranks = dist.ParallelEnv().world_size
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": ranks, "pp_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()

    import tiny_models
    from test_tensor_parallel import CONFIG, make_wide_model, recorded

    import rrattn
    from rrattn.integrations import attention_cores

    parallel = {
        # the rank in the config stays 0 everywhere, as PaddleFormers' from_pretrained leaves it
        "paddleformers": {"tensor_model_parallel_size": ranks},
        "paddlenlp": {"tensor_parallel_degree": ranks, "tensor_parallel_rank": rank},
    }[tiny_models.LIBRARY]
    for model_type in tiny_models.MODELS:
        model = make_wide_model(model_type, **parallel, tensor_parallel_output=False)
        load_part(model, folder, model_type, rank, ranks)
        rrattn.enable(model, CONFIG)
        results = recorded(model)
        results["head_offsets"] = [core.config.head_offset for core in attention_cores(model)]
        np.savez(folder / f"{model_type}_{rank}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), map(int, sys.argv[2:]))
    os._exit(0)  # Paddle's stores abort in their destructors when another rank is gone before them
