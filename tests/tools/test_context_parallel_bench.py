"""The benchmark of context parallelism over torch: its ranks over gloo on a CPU, where torch is, and its tables."""

import itertools
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_processes import run_in_parallel

from rrattn import reference
from tools.bench import context_parallel

ROOT = Path(__file__).resolve().parents[2]


# The ranks


def run_torch_ranks(ranks, folder):
    """tests/tools/torch_rank.py as the ranks of a group."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    common = {
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": 1,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, Path(__file__).with_name("torch_rank.py"), folder]
    run_in_parallel(command, [{**common, "RANK": rank} for rank in range(ranks)], folder)


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(request, tmp_path_factory):
    """({(layout, groups of heads, rank): arrays}, arrays of a group of one), of a number of ranks."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("ranks")
    run_torch_ranks(request.param, folder)
    places = list(itertools.product(("dual_chunk", "contiguous"), (1, 2), range(request.param)))
    return {place: dict(np.load(folder / "{}-{}-{}.npz".format(*place))) for place in places}, dict(
        np.load(folder / "one.npz")
    )


def test_ranks_select_what_one_does(of_ranks):
    for (layout, *_), found in of_ranks[0].items():
        for number in range(2 if layout == "dual_chunk" else 1):
            mask, expected = found[f"mask_{number}"], found[f"expected_mask_{number}"]
            words = mask.shape[-1]
            np.testing.assert_array_equal(mask, expected[..., :words])
            assert not expected[..., words:].any()


def test_ranks_compute_what_one_does(of_ranks):
    for found in of_ranks[0].values():
        for name in ("out", "grad_query", "grad_key", "grad_value", "all_blocks"):
            np.testing.assert_allclose(found[name], found[f"expected_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


def test_ranks_compute_the_same_when_nothing_is_sent(of_ranks):
    for found in of_ranks[0].values():
        for name in ("out", "grad_query"):
            np.testing.assert_array_equal(found[f"{name}_nothing_sent"], found[name])


def test_groups_of_heads_change_no_bit(of_ranks):
    for (layout, groups, rank), found in of_ranks[0].items():
        at_once = of_ranks[0][layout, 1, rank]
        for name in ("out", "grad_query", "mask_0") if groups > 1 else ():
            np.testing.assert_array_equal(found[name], at_once[name])


def test_the_one_is_the_oracle(of_ranks):
    one = of_ranks[1]
    words = one["mask_0"][:, :, -2:]  # of the last two rows of blocks: those of all would take gigabytes
    block_mask = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., : one["key"].shape[1] // 128]
    assert 0.2 < block_mask.mean() < 0.9
    out, _ = reference.attend(one["query"][:, -256:], one["key"], one["value"], block_mask.astype(bool), causal=True)
    np.testing.assert_allclose(one["out"][:, -256:], out, atol=1e-5)


# Text


def record(each="forward", layout="dual_chunk", tokens=262144, **others):
    given = {
        "stage": "context_parallel",
        "layout": layout,
        "pass": each,
        "data": "random",
        "blocks": "selected",
        "ranks": 2,
        "head_groups": 4,
        "seqlen_q": tokens,
        "seqlen_k": tokens,
        "density": 0.5,
        "ms": 250.0,
        "one_gpu_ms": [480.0, 475.0],
        "share_ms": [[240.0, 244.0], [252.0, 248.0]],
        "differing_blocks": 0,
        "errors": {"out": 0.001},
        "memory": {"peak": 3.25e9, "share": 4e9} if each == "forward" else {"peak": 5.75e9, "share": 6e9},
        "wire": {"gather_ms": 1.25, "gather_gbs": 214.0, "sum_ms": 1.5, "sum_gbs": 180.0},
        "baselines": {"cudnn dense": 1000.0},
    }
    run = {"gpu": "H100", "cuda": "13.0", "nccl": "2.28", "commit": "abc", "command": "torchrun x"}
    shape = {"num_heads": 32, "num_heads_k": 8, "head_dim": 128, "dtype": "bfloat16"}
    return {**given, **run, **shape, **others}


def test_what_a_record_says():
    assert context_parallel.speedup(record()) == 475 / 250  # of the faster GPU
    assert context_parallel.apart(record()) == pytest.approx(250 / 242 - 1)  # by the means over the GPUs
    own_alone = record(share_ms=[[240.0, None], [None, 248.0]])
    assert context_parallel.apart(own_alone) == pytest.approx(248 / 240 - 1)
    assert context_parallel.not_hidden_ms(record()) == 2
    assert context_parallel.is_exact(record())
    assert not context_parallel.is_exact(record(differing_blocks=1))
    for error in (0.01, float("nan")):
        assert not context_parallel.is_exact(record(errors={"out": 0.001, "other": error}))


def test_goals_are_judged_where_they_are_set():
    slow, others = {"ms": 260.0}, {"blocks": "all", "layout": "contiguous", "tokens": 131072}
    said = context_parallel.verdicts([record(), record("backward", **slow), record(data="structured", **slow)])
    assert said == [
        "reached  forward at 262144, random: 1.900x one GPU, to be 1.85x",
        "reached  forward at 262144, random: ranks 3.3% apart, to be within 5%",
        "reached  forward at 262144, random: a rank holds 3.250 GB, to be up to 4.000",
        "reached  backward at 262144, random: 1.827x one GPU, to be 1.8x",
        "reached  backward at 262144, random: ranks 3.3% apart, to be within 5%",
        "reached  backward at 262144, random: a rank holds 5.750 GB, to be up to 6.000",
        "reached  forward at 262144, structured: ranks 3.3% apart, to be within 15%",
        "reached  forward at 262144, structured: a rank holds 3.250 GB, to be up to 4.000",
        "reached  equality with one GPU: 3 of 3 passes",
    ]
    assert [context_parallel.verdicts([record(**{name: value})])[:-1] for name, value in others.items()] == [
        [],
        [],
        [
            "reached  forward at 131072, random: ranks 3.3% apart, to be within 5%",
            "reached  forward at 131072, random: a rank holds 3.250 GB, to be up to 4.000",
        ],
    ]
    over = {"peak": 4000000001, "share": 4000000000}
    missed = record(ms=270.0, share_ms=[[200.0, 201.0], [240.0, 239.0]], differing_blocks=3, memory=over)
    assert [text[:7] for text in context_parallel.verdicts([missed])] == ["MISSED "] * 4
    assert context_parallel.verdicts([record(ranks=4)]) == ["reached  equality with one GPU: 1 of 1 passes"]


def test_the_lines_that_are_printed():
    assert context_parallel.line(record()) == (
        " 262144 dual_chunk forward  random      50.0% | one GPU 480.00 / 475.00 ms | 2 GPUs 250.00 ms, with nothing"
        " sent 240.00 / 248.00 ms | 0 blocks differ, out 1.0e-03 | cudnn dense 1000.00 ms"
    )
    head, row, _, wire, *verdicts = context_parallel.short_table([record(blocks="all", baselines={})])
    assert (
        row.split() == "262144 dual_chunk forward all blocks 50.0% 475.00 250.00 1.90x 3.3% +2.00 3.25 4.00 yes".split()
    )
    assert wire.split() == (
        "262144 gather of K or of V 1.25 ms, 214 GB/s; sum of dK or of dV 1.50 ms, 180 GB/s".split()
    )
    assert verdicts == ["reached  equality with one GPU: 1 of 1 passes"]


def test_the_tables_of_the_page():
    text = context_parallel.measured_tables([record(), record("backward", baselines={})])
    assert text.startswith("2 H100 of one host, NCCL 2.28, CUDA 13.0, bfloat16")
    assert "(`torchrun x` at commit abc)" in text
    of_two = context_parallel.measured_tables([record(), record("backward", gpu="H200", commit="abd")])
    assert "(`torchrun x` at commit abc, `torchrun x` at commit abd on H200)" in of_two
    for row in (
        "| 262,144 | dual_chunk | forward | random | 50.0% | 4 | 475.0 ms | 250.0 ms | 1.90 x | 3.3% | 2.00 ms |"
        " 1000.0 ms |",
        "| 262,144 | dual_chunk | backward | random | 50.0% | 4 | 475.0 ms | 250.0 ms | 1.90 x | 3.3% | 2.00 ms |"
        " not measured |",
        "| 262,144 | 1.25 ms, 214 GB/s | 1.50 ms, 180 GB/s |",
        "| 262,144 | dual_chunk | 3.25 | 4.00 | 5.75 | 6.00 |",
    ):
        assert row in text.splitlines()
