"""The benchmark of serving: its calls on a CPU, over a stand-in for torch that is NumPy, and its tables."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from torch_stand_in import make_torch, modules_over, tensor

from rrattn import direct
from tools.bench import serving

MS = {"ragged": 10.0, "own calls": 9.0, "padded calls": 12.0, 1024: 5.0, 256: 2.0}


@pytest.fixture
def bench(monkeypatch):
    """The modules, on small cases: graphs hold nothing, what is captured runs."""
    torch, random = make_torch(), np.random.default_rng(0)
    torch.empty_like = lambda array: tensor(np.full_like(array, np.nan))
    torch.tensor = lambda values, dtype, **_: tensor(np.array(values, dtype))
    torch.randperm = lambda count, **_: tensor(random.permutation(count))
    torch.equal = np.array_equal
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
    torch.cuda.graph = lambda _: contextlib.nullcontext()
    with modules_over(torch, monkeypatch) as found:
        found.sizes, found.calls = [], []
        make_cases_small(found, random, monkeypatch)
        yield found


def make_cases_small(found, random, monkeypatch):
    """And times made up; sizes of ragged calls and all calls that take turns are noted."""
    stage = found.gpu_serving

    def normal(length, heads):
        return tensor(random.standard_normal((1, length, heads, 128), np.float32))

    monkeypatch.setattr(stage, "normal", normal)
    small = {name: {1024: 1, 256: 3} for name in serving.BATCHES}
    for name, value in {"BATCHES": small, "PAGED_TOKENS": 512, "CHUNKED_TOKENS": 1024, "CHUNK_TOKENS": 256}.items():
        monkeypatch.setattr(stage, name, value)

    def interleaved_ms(calls, rounds, seconds):
        found.calls.append(calls)
        for call in calls.values():
            call.run()  # what a replay would
        return {name: MS.get(name, 11.0) for name in calls}

    monkeypatch.setattr(stage, "interleaved_ms", interleaved_ms)
    ragged_attention = direct.ragged_attention

    def noted(*arrays, **options):
        found.sizes.append([array.shape for array in arrays[:3]])
        return ragged_attention(*arrays, **options)

    monkeypatch.setattr(direct, "ragged_attention", noted)


def test_all_ways_compute_the_same(bench):
    records = list(bench.gpu_serving.measure())
    assert [record["shape"] for record in records] == list(serving.CASES)
    assert all(record["same_bits"] for record in records)
    assert not any(np.isnan(calls[name].out).any() for calls in bench.calls for name in calls if isinstance(name, str))
    for record in records[:2]:
        assert (record["seqlen_q"], record["seqlen_k"], record["ms"]) == (1792, 1024, 10.0)
        assert record["baselines"] == {"own calls": 9.0, "sum of own calls": 11.0, "padded calls": 12.0}
    assert [sorted(record["baselines"]) for record in records[2:]] == [
        ["own calls"],
        *[["one piece", "own calls"]] * 3,
        ["own calls"],
    ]
    stages = [{name: len(call.stages) for name, call in calls.items()} for calls in bench.calls]
    assert stages[0] == {"ragged": 1, "own calls": 4, "padded calls": 2, 1024: 1, 256: 1}
    assert stages[-1] == {"own calls": 1, "chunks": 4}
    shapes = {tuple(map(tuple, shapes)) for shapes in bench.sizes}
    queries = {1792: (1792, 32, 128), 512: (512, 32, 128), 256: (256, 32, 128)}
    pages = {size: (512 // size, 8, size, 128) for size in serving.PAGE_SIZES}
    assert shapes == {
        (queries[1792], (1792, 8, 128), (1792, 8, 128)),
        (queries[512], (512, 8, 128), (512, 8, 128)),
        *((queries[512], pages[size], pages[size]) for size in pages),
        (queries[256], (8, 8, 128, 128), (8, 8, 128, 128)),
    }


def test_other_bits_are_noticed(bench, monkeypatch):
    noted = direct.ragged_attention

    def off(*arrays, out, **options):
        size = noted(*arrays, out=out, **options)
        out[-1] += 1
        return size

    monkeypatch.setattr(direct, "ragged_attention", off)
    records = list(bench.gpu_serving.measure())
    assert not any(record["same_bits"] for record in records)


def test_the_command_prints_and_keeps_each(bench, monkeypatch, capsys, tmp_path):
    path = tmp_path / "gpu.json"
    lengths = {"seqlen_q": 512, "seqlen_k": 512}
    other, replaced = {"stage": "attend", **lengths}, {"stage": "serving", **lengths, "shape": serving.ONE_PIECE}
    path.write_text(json.dumps([other, replaced]))
    monkeypatch.setattr(sys, "argv", ["gpu", "--stage", "serving", "--json", str(path)])
    bench.gpu.__spec__ = SimpleNamespace(name="tools.bench.gpu")
    bench.gpu.main()
    first, *records = json.loads(path.read_text())
    assert first == other and [record["shape"] for record in records] == list(serving.CASES)
    assert (records[0]["gpu"], records[0]["num_heads"], records[0]["settings"]["threshold"]) == ("a GPU", 32, 0.5)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == (
        "128K, 8 x 8K, 32 x 1K     ragged    10.000 ms | own calls 9.000 (0.900x)  sum of own calls 11.000 (1.100x)"
        "  padded calls 12.000 (1.200x) | same bits"
    )
    assert said[-1] == "reached  the same bits as own calls: all"


def record(case, ms, same_bits=True, **baselines):
    run = {"gpu": "H100", "cuda": "13.0", "commit": "abc", "command": "gpu --stage serving"}
    shape = {"num_heads": 32, "num_heads_k": 8, "head_dim": 128, "dtype": "bfloat16", "settings": {"threshold": 0.5}}
    given = {"stage": "serving", "shape": case, "ms": ms, "same_bits": same_bits}
    return {**given, **run, **shape, "baselines": {name.replace("_", " "): value for name, value in baselines.items()}}


def records():
    """Out of order."""
    return [
        record("128K by 8K, pages of 128", 110.0, own_calls=100.0),
        record("32K, pages of 64", 10.5, own_calls=9.0, one_piece=10.0),
        record("32K, pages of 128", 10.4, own_calls=9.0, one_piece=10.0),
        record("32K, pages of 256", 99.0, own_calls=9.0, one_piece=10.0),
        record("32K, one piece", 10.0, own_calls=9.0),
        record("2 x 32K", 20.0, own_calls=19.0, sum_of_own_calls=19.5, padded_calls=18.0),
        record("128K, 8 x 8K, 32 x 1K", 100.0, own_calls=100.0, sum_of_own_calls=94.0, padded_calls=100.0),
    ]


def test_goals_are_judged_where_they_are_set():
    assert serving.verdicts(records()) == [
        "MISSED   128K, 8 x 8K, 32 x 1K: 0.940 of the speed of own calls, to be 0.95",
        "reached  2 x 32K: 0.950 of the speed of own calls, to be 0.95",
        "MISSED   32K, one piece: 0.900 of the speed of own calls, to be 0.95",
        "reached  32K, pages of 64: 1.050 of the time of one piece, to be at most 1.05",
        "MISSED   32K, pages of 128: 1.040 of the time of one piece, to be at most 1.03",
        "reached  128K by 8K, pages of 128: 1.100 of the time of own calls, to be at most 1.10",
        "reached  the same bits as own calls: all",
    ]
    others = [record("32K, one piece", 9.0, same_bits=False, own_calls=9.0)]
    assert serving.verdicts(others)[-1] == "MISSED   the same bits as own calls: 32K, one piece"


def test_the_short_table():
    lines = serving.short_table(records())
    assert lines[1].split() == "128K, 8 x 8K, 32 x 1K 100.000 1.000 0.940 1.000 -".split()
    assert lines[4].split() == "32K, pages of 64 10.500 0.857 - - 0.952".split()
    assert lines[8:] == serving.verdicts(records())


def test_the_table_of_the_page():
    assert "--stage serving" in serving.measured_table([])
    text = serving.measured_table(records())
    assert text.startswith(
        "H100, CUDA 13.0, bfloat16, 32 query heads over 8 key heads, head size 128, random data with"
    )
    assert "(`gpu --stage serving` at commit abc)" in text
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert {row.count("|") for row in rows} == {8}
    assert rows[2] == (
        "| 2 x 32K | 20.000 ms | 19.000 ms, 0.950 x | 19.500 ms, 0.975 x | 18.000 ms, 0.900 x |  | the same |"
    )
    assert rows[4] == "| 32K, pages of 64 | 10.500 ms | 9.000 ms, 0.857 x |  |  | 10.000 ms, 0.952 x | the same |"
    assert text.endswith("- reached the same bits as own calls: all")
