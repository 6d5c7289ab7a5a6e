"""The CPU's threads: in forked children, in several callers at once, and how many there are by default."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import Case, make_inputs
from harness import Kernels, assert_identical

from rrattn import _direct, direct

ROOT = Path(__file__).resolve().parents[2]
NO_QUOTA = 2**31 - 1

FORK = """
import hashlib, multiprocessing, os, signal, sys, time
import numpy as np
{setup}

def digest(_=None):
    return hashlib.sha256(call().tobytes()).digest()

def digest_of_child():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, digest())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            sys.exit("the child never returned")
        time.sleep(0.01)
    return os.fdopen(reading, "rb").read()

own = digest()
assert digest_of_child() == own
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(digest, range(4)).get(timeout=60) == [own] * 4
assert digest() == own
print("all returned")
"""
ON_ARRAYS = """
from rrattn import direct
query = np.random.default_rng(0).standard_normal((1, 512, 4, 32), dtype=np.float32)
def call():
    out = np.zeros_like(query)
    direct.rr_attention(query, query, query, out=out, causal=True, num_threads=2)
    return out
"""
ON_TENSORS = """
import paddle, rrattn
query = paddle.randn([1, 512, 4, 32])
query.stop_gradient = False
def call():
    out = rrattn.rr_attention(query, query, query, causal=True)
    (gradient,) = paddle.grad(out.sum(), [query])
    return gradient.numpy()
"""


@pytest.mark.parametrize("setup", (ON_ARRAYS, ON_TENSORS), ids=("arrays", "tensors"))
def test_a_forked_child_runs_what_its_parent_has_run(setup):
    process = subprocess.run(
        [sys.executable, "-c", FORK.format(setup=setup)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "all returned"


def test_callers_at_once_do_not_disturb_each_other():
    """One has the pool, the others work alone; each gets what it would get by itself."""
    inputs = make_inputs(Case(700, 700, num_heads=4, num_heads_k=2, head_dim=32))

    def attend(num_threads):
        return Kernels(num_threads=num_threads).attend(*inputs.forward, inputs.block_mask, causal=True)

    with ThreadPoolExecutor(4) as callers:
        for result in callers.map(attend, [3] * 24):
            assert_identical(result, attend(1))


def test_default_number_of_threads_is_openmps_within_what_there_is():
    processors = min(len(os.sched_getaffinity(0)), _direct._cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup"))
    for asked, expected in (("1", 1), ("64", processors)):
        process = subprocess.run(
            [sys.executable, "-c", "import rrattn.direct; print(rrattn.direct.default_num_threads())"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": asked},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.stdout.split()[-1] == str(expected), process.stderr
    assert 1 <= direct.default_num_threads() <= processors


@pytest.mark.parametrize(
    "groups, files, quota",
    (
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, NO_QUOTA),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
        ("0::/a/b", {"a/b/cpu.max": "800000 100000", "a/cpu.max": "50000 100000"}, 1),
        ("0::/not/here", {"cpu.max": "300000 100000"}, 3),
        (
            "4:cpuset:/\n3:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            NO_QUOTA,
        ),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, NO_QUOTA),
        ("", {}, NO_QUOTA),
    ),
)
def test_cpu_quota_of_a_container(tmp_path, groups, files, quota):
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _direct._cpu_quota(str(tmp_path / "groups"), str(tmp_path / "mount")) == quota
