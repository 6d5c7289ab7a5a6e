"""Programs that run as the ranks of a group: processes of their own, over gloo."""

import os
import socket
import sys

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.distributed import collective
from parallel_processes import run_in_parallel

GROUPS = 128  # more than fleet numbers for four ranks, also those that a rank is not in


def run_ranks(program, ranks, folder):
    """Runs `program FOLDER PORT...` once per rank, with ports for `give_groups_their_own_store`."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks + GROUPS)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    endpoints = [f"127.0.0.1:{port}" for port in ports[:ranks]]
    settings = [
        {
            "PADDLE_TRAINER_ID": rank,
            "PADDLE_TRAINERS_NUM": ranks,
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_DISTRI_BACKEND": "gloo",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": 1,
        }
        for rank in range(ranks)
    ]
    run_in_parallel([sys.executable, program, folder, *ports[ranks:]], settings, folder)


def give_groups_their_own_store(ports):
    """One store per process group, at the port of its number, which all ranks count alike.

    In a store that groups share, gloo finds the addresses of an earlier group where those of a later one are not there
    yet (Paddle 3.3.1), and every other start of four processes hangs.
    """
    ports = list(ports)
    create = collective._new_process_group_impl
    stores = []  # a group does not keep its store alive

    def create_with_store(backend, store, rank, size, *arguments, group_id=0, **options):
        stores.append(paddle.base.core.TCPStore("127.0.0.1", ports[group_id], rank == 0, size, 120))
        return create(backend, stores[-1], rank, size, *arguments, group_id=group_id, **options)

    collective._new_process_group_impl = create_with_store


# What tensor parallelism does between its layers, whose operators Paddle's CPU build lacks


def all_reduce(tensor, group):
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


class ForEachRank(PyLayer):
    """Forward the same, backward the sum over the ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group)


class OfEachRank(PyLayer):
    """Forward the sum over the ranks, backward the same."""

    @staticmethod
    def forward(ctx, tensor, group):
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()
