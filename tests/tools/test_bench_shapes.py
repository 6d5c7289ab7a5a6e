"""The benchmark of shapes as far as it goes without torch and a GPU: stand-ins for both compute nothing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from torch_stand_in import make_torch, modules_over, tensor

from rrattn import direct
from tools.bench import shapes, tables

TIMES = {"ours": 2.0, "cudnn dense": 5.0, "flash dense": 7.0, "fa4": 3.0}  # ms


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark, over a stand-in of torch; what rrattn.direct is called with is in `calls`."""
    with modules_over(make_torch(), monkeypatch) as found:
        found.calls, found.made, found.refused = [], [], set()
        replace_what_computes(found, monkeypatch)
        yield found


def replace_what_computes(found, monkeypatch):
    """Stages, rivals and times."""

    def stage(name):
        def call(*arrays, size_only=False, **options):
            if name in found.refused:
                raise ValueError(f"no {name} here")
            if not size_only:
                found.calls.append((name, arrays, options))
            return 64

        return call

    for name in ("block_sparse_attention", "block_sparse_attention_backward"):
        monkeypatch.setattr(direct, name, stage(name))

    def normal(length, heads, head_dim, batch):
        return tensor(np.broadcast_to(np.float16(0), (batch, length, heads, head_dim)))

    def random_blocks(seqlen_q, seqlen_k, density, heads, batch):
        blocks = np.tril(np.ones((seqlen_q // 128, seqlen_k // 128), bool))  # all that there are
        return tensor(np.broadcast_to(blocks, (batch, heads, *blocks.shape)))

    for name, stand_in in {"normal": normal, "random_blocks": random_blocks, "pack": lambda mask: mask}.items():
        monkeypatch.setattr(found.gpu_shapes, name, stand_in)

    def rival(name):
        def maker(*arguments):
            found.made.append((name, arguments))
            if name in found.refused:
                raise ValueError("not here")
            return lambda: None

        return maker

    for table in ("DENSE", "BACKWARD_DENSE", "SPARSE", "BACKWARD_SPARSE"):
        monkeypatch.setattr(found.gpu_shapes, table, {name: rival(name) for name in getattr(found.gpu_shapes, table)})

    def make(name, maker, *arguments, expected=None):
        return found.gpu_rivals.make(name, maker, *arguments)  # what rivals compute here is nothing

    monkeypatch.setattr(found.gpu_shapes, "make", make)

    def interleaved_ms(calls, rounds, seconds):
        return {name: TIMES[name] for name, call in calls.items() if call}

    monkeypatch.setattr(found.gpu_shapes, "interleaved_ms", interleaved_ms)


def test_every_shape_has_a_record_of_each_pass(bench):
    found = list(bench.gpu_shapes.measure())
    assert [(record["shape"], record["pass"]) for record in found] == [
        (name, each) for name in shapes.SHAPES for each in ("forward", "backward")
    ]
    for record in found:
        shape = shapes.SHAPES[record["shape"]]
        assert (record["seqlen_q"], record["num_heads_k"]) == (shape.tokens, shape.num_heads_k)
        assert record["density"] == 1  # all that a row sees of its own document
        assert record["ms"] == 2 and record["workspace_bytes"] == 64
        assert record["baselines"] == {"cudnn dense": 5.0, "flash dense": 7.0, "fa4": 3.0}
        # Products of all keys that are seen, by 128s: two of them, and five of gradients.
        length = shape.tokens // shape.documents
        pairs = shape.batch * shape.num_heads * shape.documents * length**2 / 2
        products = {"forward": 4, "backward": 10}[record["pass"]]
        assert record["tflops"] == pytest.approx(products * shape.head_dim * pairs / 2e9, rel=1e-6)


def test_documents_are_told_to_each_in_its_way(bench):
    records = list(bench.gpu_shapes.measure(["8 documents"]))
    assert len(records) == 2
    for name, arrays, _ in bench.calls:
        startend = arrays[4 if name == "block_sparse_attention" else 7]
        assert startend.shape == (1, 1, 32768, 1) and startend.dtype == np.int32
        np.testing.assert_array_equal(startend[0, 0, :, 0], np.repeat(np.arange(1, 9) * 4096, 4096))
        mask = arrays[3]
        assert mask.shape == (1, 32, 256, 256)
        assert mask[0, 0, 40].nonzero()[0].tolist() == list(range(32, 41))
    assert {name for name, _, _ in bench.calls} == {"block_sparse_attention", "block_sparse_attention_backward"}
    for name, arguments in bench.made:
        assert arguments[0].shape == ((1, 32768, 32, 128) if name == "fa4" else (8, 4096, 32, 128)), name
    assert [len(arguments) for name, arguments in bench.made if name == "cudnn dense"] == [3, 4]


def test_others_are_told_of_no_documents(bench):
    list(bench.gpu_shapes.measure(["batch 8 of 4K"]))
    assert {arrays[4 if name == "block_sparse_attention" else 7] for name, arrays, _ in bench.calls} == {None}
    assert {arguments[0].shape for _, arguments in bench.made} == {(8, 4096, 32, 128)}


def test_a_pass_that_is_refused_has_no_record(bench, capsys):
    bench.refused = {"block_sparse_attention_backward", "flash dense"}
    (record,) = bench.gpu_shapes.measure(["D 256, 16/4"])
    assert record["pass"] == "forward" and sorted(record["baselines"]) == ["cudnn dense", "fa4"]
    said = capsys.readouterr().out
    assert "without ours, D 256, 16/4, backward: ValueError: no block_sparse_attention_backward here" in said
    assert "without flash dense, D 256, 16/4, forward: ValueError: not here" in said


def test_fa4_is_left_out_when_its_time_is_up(bench, monkeypatch, capsys):
    clock = iter(range(0, 10000, 40))
    monkeypatch.setattr(bench.gpu_shapes.time, "monotonic", lambda: next(clock))
    records = list(bench.gpu_shapes.measure(["D 64", "D 96"]))
    assert ["fa4" in record["baselines"] for record in records] == [True, True, False, False]
    assert "without fa4, D 96, forward: the time to compile it for other shapes is up" in capsys.readouterr().out


def test_the_command_prints_and_keeps_each(bench, monkeypatch, capsys, tmp_path):
    path = tmp_path / "gpu.json"
    other = {"stage": "attend", "seqlen_q": 16384, "seqlen_k": 16384}
    lengths = {"stage": "shapes", "seqlen_q": 16384, "seqlen_k": 16384}
    kept, replaced = {**lengths, "shape": "D 64"}, {**lengths, "shape": "MQA 32/1"}
    path.write_text(json.dumps([other, kept, replaced]))
    monkeypatch.setattr(sys, "argv", ["gpu", "--stage", "shapes", "--shape", "MQA 32/1", "--json", str(path)])
    bench.gpu.__spec__ = SimpleNamespace(name="tools.bench.gpu")
    bench.gpu.main()
    assert json.loads(path.read_text())[:2] == [other, kept]
    forward, backward = json.loads(path.read_text())[2:]
    assert (forward["num_heads_k"], forward["pass"], backward["pass"]) == (1, "forward", "backward")
    assert (forward["gpu"], forward["cuda"], forward["dtype"]) == ("a GPU", "13.0", "bfloat16")
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("MQA 32/1        forward  density 1.000 |    2.000 ms |")
    assert said[1].endswith("cudnn dense 5.000 (2.50x)  flash dense 7.000 (3.50x)  fa4 3.000 (1.50x)")
    assert said[-1].split() == ["MQA", "32/1", f"{forward['tflops']:.0f}", "2.50", "1.50",
                                f"{backward['tflops']:.0f}", "2.50", "1.50"]  # fmt: skip
    for arguments, message in (
        (["--stage", "attend", "--shape", "D 64"], "--shape is of the stage shapes"),
        (["--stage", "shapes", "--shape", "D 65"], "invalid choice: 'D 65'"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit):
            bench.gpu.main()
        assert message in capsys.readouterr().err


def record(name="D 256, 16/4", each="forward", **baselines):
    shape = shapes.SHAPES[name]
    common = {"gpu": "H100", "cuda": "13.0", "dtype": "bfloat16", "commit": "abc", "command": "gpu --stage shapes"}
    given = {"stage": "shapes", "shape": name, "pass": each, "head_dim": shape.head_dim, "ms": 2.0, "tflops": 600.0}
    return {**common, **given, "density": 0.504, "baselines": baselines}


def test_which_dense_attention_counts():
    both = {"cudnn dense": 5.0, "flash dense": 4.0}
    assert shapes.dense_of(record(**both)) == ("cudnn dense", 5.0)
    assert shapes.dense_of(record("D 64", "backward", **both)) == ("cudnn dense", 5.0)
    assert shapes.dense_of(record(each="backward", **both)) == ("flash dense", 4.0)
    assert shapes.dense_of(record(each="backward", **{"flash dense": 4.0})) == ("flash dense", 4.0)
    assert shapes.dense_of(record(**{"flash dense": 4.0})) is None
    assert shapes.dense_of(record(each="backward", fa4=4.0)) is None


def test_the_table_of_the_page_has_a_row_for_each_shape():
    rows = [record(each="backward", **{"flash dense": 3.0}), record("D 64", **{"cudnn dense": 5.0, "fa4": 2.1})]
    table = tables.gpu_tables(rows)
    assert table.startswith("H100, CUDA 13.0, bfloat16, causal, random blocks")
    assert "(`gpu --stage shapes` at commit abc)" in table
    absent = " | ".join(["not measured"] * 4)
    assert table.splitlines()[-2:] == [
        f"| D 64 | 50% | 2.000 ms | 600 | 2.50 x | 1.05 x | {absent} |",
        f"| D 256, 16/4 | 50% | {absent} | 2.000 ms | 600 | 1.50 x | not measured |",
    ]
