"""`tools.evaluate many`: in PyTorch, what the harness in Paddle does. Skipped where PyTorch is not installed."""

import json
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import rrattn

torch = pytest.importorskip("torch")
pytest.importorskip("paddleformers")
ROOT = Path(__file__).parents[2]

from gguf_files import tiny_llama  # noqa: E402

from tools import smollm2  # noqa: E402
from tools.evaluation import many, records, run, torch_attention, torch_model, torch_rrattn, torch_selection  # noqa: E402
from tools.evaluation.methods import Method  # noqa: E402
from tools.evaluation.model import Model  # noqa: E402

PROBE = ROOT / "examples" / "probe"
METHODS = ["dense", "rrattn:0.6:16", "rrattn+last+near:0.5", "xattention:0.6", "exact+near:0.5", "group-mean:0.5"]
METHODS += ["row-maximum:0.5", "rotated-blocks+last:0.5", "rotated-strides:0.5:4"]


@pytest.fixture(scope="module")
def text():
    return np.frombuffer(b"\0" + (ROOT / "rrattn" / "reference.py").read_bytes(), np.uint8)


@pytest.mark.parametrize("text_of_method", METHODS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(700, 700), (200, 712)])
def test_selections_are_those_of_the_harness(text_of_method, seqlen_q, seqlen_k):
    rng = np.random.default_rng(4)
    query = 2 * rng.standard_normal((1, seqlen_q, 6, 32), np.float32)
    key = rng.standard_normal((1, seqlen_k, 2, 32), np.float32)
    key += np.repeat(rng.standard_normal((1, 6, 2, 32), np.float32), 128, axis=1)[:, :seqlen_k]  # of each block
    method = Method(text_of_method)
    words = method.block_mask(paddle.to_tensor(query), paddle.to_tensor(key), None, 0, 1)
    expected = rrattn.unpack_block_mask(words, -(-seqlen_k // 128)).numpy()
    mask = torch_selection.block_mask(method, torch.from_numpy(query), torch.from_numpy(key), 32**-0.5)
    visible = torch_selection.visible_blocks(seqlen_q, seqlen_k, "cpu").numpy()
    assert np.array_equal(mask.numpy(), expected & visible)
    assert np.array_equal(mask.numpy(), visible & np.ones_like(expected)) == (text_of_method == "dense")


@pytest.fixture(params=["bytes", "tokenizer"])
def checkpoint(request, tmp_path):
    """The probe, and a tiny model with a tokenizer and tied embeddings."""
    if request.param == "bytes":
        return PROBE
    smollm2.write_checkpoint(tiny_llama(np.random.default_rng(0))[0], tmp_path / "model")
    return tmp_path / "model"


def test_results_are_those_of_the_harness(checkpoint, text, tmp_path):
    layers = 1 if checkpoint != PROBE else 6
    per_layer = f"rrattn:threshold={[0.6] * (layers - 1) + [0.8]},keep_local=2".replace(" ", "")
    methods, kinds = ["dense", "rrattn+last+near:0.7:16", per_layer], ["lookup", "needle", "inside", "copy", "text"]
    ours, expected = (records.Results(tmp_path / f"{name}.jsonl") for name in ("torch", "paddle"))
    mass = ["rrattn:0.8:8", "exact+near:0.9", "rrattn:threshold=0.8,stride=16,dense_layers=[0]"]
    arguments = (checkpoint, ours, text, kinds, methods, mass, 1500, 1, 6, "cpu")
    many.run_many(*arguments)
    model = Model(checkpoint)
    run.run_tasks(model, expected, text, kinds, methods, [1500], 1, 6)
    run.measure_mass(model, expected, text, kinds, mass, [1500], 1, 6)
    found = {(row["task"], row["method"]): row for row in ours.rows}
    assert len(found) == len(ours.rows) == len(expected.rows) == 6 * 3 + 5 * 3
    for row in expected.rows:
        other = found[row["task"], row["method"]]
        assert other["density"] == pytest.approx(row["density"], abs=1e-3)
        for name in ("score", "nats", "guessed", "agreement", "divergence", "kept"):
            assert other.get(name) == pytest.approx(row.get(name), abs=1e-3)
        assert other.get("right") == row.get("right")
    lines = ours.path.read_text()
    many.run_many(*arguments)  # all is there
    assert ours.path.read_text() == lines


def test_plain_attention_is_that_over_the_blocks():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(700, heads, 32, generator=generator) for heads in (6, 2, 2))
    mask = torch.rand(6, 6, 6, generator=generator) < 0.5
    mask |= torch_selection.always_kept(700, 700, False, 0, "cpu")
    out = torch_attention.Plain().attend(query, key, value, mask, 0.2, rows_at_once=256)
    words = rrattn.pack_block_mask(paddle.to_tensor(mask.numpy()[None]))
    arrays = (paddle.to_tensor(x.numpy()[None]) for x in (query, key, value))
    expected = rrattn.block_sparse_attention(*arrays, words, causal=True, softmax_scale=0.2)
    np.testing.assert_allclose(out.numpy(), expected.numpy()[0], atol=1e-5)


DENSE_SETTINGS = ["min_length=907", "dense_layers=[1],threshold=0.1,compensate=true"]
SETTINGS = ["threshold=0.7", "threshold=[0.9,[0.2,0.4,0.6,0.8]]", "stride=32", "head_offset=3", "softmax_scale=0.3"]
SETTINGS += [
    "keep_last=false,keep_local=0,keep_sink=false",
    "min_share=0.9",
    "spread=2,key_stride=1",
    "compensate=true",
]


def test_settings_reach_the_kernels_by_name():
    """As they reach the layer that a model would run; each changes what attention gives."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, *size, 32), np.float32) for size in ((650, 4), (906, 2), (906, 2)))
    key += np.repeat(rng.standard_normal((2, 8, 2, 32), np.float32), 128, axis=1)[:, :906]  # of each block
    found = {}
    for settings in [*SETTINGS, *DENSE_SETTINGS]:
        method = Method(f"rrattn:{settings}" if "threshold" in settings else f"rrattn:threshold=0.8,{settings}")
        mask, out = torch_rrattn.attend(method.config, 1, 2, *map(torch.from_numpy, (query, key, value)), 0.2)
        core = method.core(1, 2, 4)
        expected = core(*map(paddle.to_tensor, (query, key, value)), causal=True, softmax_scale=0.2)
        np.testing.assert_array_equal(out.numpy(), expected.numpy())
        selected = rrattn.unpack_block_mask(core.last_selection.block_mask, 8).numpy()
        visible = torch_selection.visible_blocks(650, 906, "cpu").numpy()
        np.testing.assert_array_equal(mask.numpy(), selected & visible)
        assert (mask.numpy() == visible).all() == (settings in DENSE_SETTINGS)
        found[settings] = out.numpy().tobytes()
    assert len({found[settings] for settings in SETTINGS}) == len(SETTINGS)


def test_no_build_for_the_device_is_named(monkeypatch):
    torch_rrattn.check_device("cpu")
    monkeypatch.setitem(sys.modules, "rrattn.direct", None)
    monkeypatch.delattr(rrattn, "direct")
    with pytest.raises(ValueError, match="rrattn has no build for cpu, which its settings by name need"):
        torch_rrattn.check_device("cpu")


def test_what_is_refused(tmp_path):
    for text, message in (("window:4", "window:4"), ("rrattn:1.5", "1.5"), ("nothing:1", "nothing")):
        with pytest.raises(ValueError, match=message):
            many.chosen(text)
    config = {**json.loads((PROBE / "config.json").read_text()), "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attention_bias is True, but must be False"):
        torch_model.Model(tmp_path, torch.device("cpu"), 100)
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False, "vocab_size": 1000}))
    with pytest.raises(ValueError, match="has 1000 tokens, but no tokenizer.json"):
        torch_model.Model(tmp_path, torch.device("cpu"), 100)
