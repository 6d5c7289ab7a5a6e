"""One rank of test_tensor_parallel.py: a process of its own, whose models hold a part of the heads.

    python tensor_parallel_rank.py FOLDER PORT...

reads the weights of whole models from FOLDER and leaves there what this rank computed.
"""

import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from fleet_ranks import load_part, prepare_fleet, start_fleet


@paddle.no_grad()
def main(folder, ports):
    ranks = dist.ParallelEnv().world_size
    prepare_fleet(ports)
    rank = start_fleet(mp_degree=ranks).get_model_parallel_rank()

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
