"""What the ranks of fleet's groups set up to run models: processes of their own, started by `processes.run_ranks`.

Fleet, its hybrid groups and the groups' collectives (gloo) are what the libraries use on a GPU. Paddle's CPU build
lacks the operators that wrap collectives, and gloo reduce-scatter; `prepare_fleet` puts other collectives in their
place.
"""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.base import topology
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils import sequence_parallel_utils
from processes import ForEachRank, OfEachRank, all_reduce, give_groups_their_own_store


def part_of(whole, shape, rank, ranks, name):
    """What tensor-parallel rank `rank` holds of the weight of this name, by the shape that it has there."""
    for axis, (size, part) in enumerate(zip(whole.shape, shape)):
        if part != size:
            assert part * ranks == size, name
            fused = np.split(whole, 2, axis) if "up_gate_proj" in name else [whole]
            whole = np.concatenate([np.split(one, ranks, axis)[rank] for one in fused], axis)
    return whole


def prepare_fleet(ports):
    """What goes before `start_fleet`, once; an iterator of the ports that `run_ranks` gives."""
    give_groups_their_own_store(ports)
    _lend_operators()


def start_fleet(**degrees):
    """Fleet's hybrid group, for degrees such as mp_degree=2, in place of an earlier one."""
    topology._HYBRID_PARALLEL_GROUP = None  # else fleet would keep what it has
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, **degrees}
    fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group()


def load_part(model, folder, model_type, rank, ranks):
    """Gives each parameter its weights of a whole model, those of this tensor-parallel rank where it is split."""
    weights = np.load(folder / f"{model_type}.npz")
    for name, parameter in model.named_parameters():
        parameter.set_value(part_of(weights[name], parameter.shape, rank, ranks, name))


def _lend_operators():
    """c_identity, c_concat, mp_allreduce_sum and reduce-scatter, by all_reduce and all_gather of the same group."""
    mp_ops._c_identity = collective._c_identity = lambda tensor, group=None, **options: ForEachRank.apply(tensor, group)
    mp_ops._mp_allreduce = collective._mp_allreduce = lambda tensor, group=None, **options: OfEachRank.apply(
        tensor, group
    )
    mp_ops._c_concat = collective._c_concat = lambda tensor, group=None: _Concat.apply(tensor, group)

    def reduce_scatter(tensor):
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        return sequence_parallel_utils.scatter(all_reduce(tensor, group))

    sequence_parallel_utils.reduce_scatter = reduce_scatter


class _Concat(PyLayer):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        parts = []
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return paddle.concat(parts, axis=-1)

    @staticmethod
    def backward(ctx, grad):
        return paddle.split(grad, ctx.group.nranks, axis=-1)[ctx.group.rank]
