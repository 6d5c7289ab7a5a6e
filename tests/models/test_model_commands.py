"""`rrattn calibrate` and `rrattn visualize`, on a tiny byte-level model of the library that is installed."""

import os
import re
from argparse import Namespace
from importlib import util
from pathlib import Path

import numpy as np
import paddle
import pytest
from tiny_models import make_model

import rrattn
from rrattn import attention_mass, calibrate, checkpoint, reference, visualize, visualize_model
from rrattn.__main__ import main
from rrattn.tokens import Bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers of four heads."""
    folder = tmp_path_factory.mktemp("byte-model")
    make_model(vocab_size=256).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def text():
    """Lines of words, 18 KB."""
    rng = np.random.default_rng(1)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9), dtype=np.uint8)) for _ in range(3000)]
    return b"\n".join(b" ".join(words[i : i + 8]) for i in range(0, len(words), 8))


@pytest.fixture
def files(folder, text, tmp_path, monkeypatch):
    """A current folder with texts: long, short and empty."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("long", text), ("short", b"a short text\n"), ("empty", b"")):
        Path(name).write_bytes(content)
    return tmp_path


def curves(rng, layers=3, heads=4):
    """(kept, density) [thresholds, layers, heads] of heads with different curves; both grow with the threshold."""
    tau = np.asarray(calibrate.THRESHOLDS)[:, None, None]
    sharpness = rng.uniform(0.5, 6, (layers, heads))
    return 1 - (1 - tau) ** rng.uniform(0.7, 1.6, (layers, heads)), tau**sharpness


# What is measured


SINK = np.array([1.5, -2, 6, -np.inf], np.float32)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (127, 127), (128, 128), (129, 129), (700, 700), (72, 584)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("sink", [None, SINK], ids=["no sink", "sink"])
def test_exact_mass_is_the_softmax_summed_over_blocks(rng, seqlen_q, seqlen_k, scale, sink):
    query = rng.standard_normal((1, seqlen_q, 4, 16)).astype(np.float32)
    key = rng.standard_normal((1, seqlen_k, 2, 16)).astype(np.float32)
    tensors = paddle.to_tensor(query), paddle.to_tensor(key)
    mass = attention_mass.exact_block_mass(*tensors, scale, None if sink is None else paddle.to_tensor(sink))
    for head in range(4):
        products = (
            query[0, :, head].astype(np.float64) @ key[0, :, head // 2].T * (16**-0.5 if scale is None else scale)
        )
        weights = np.where(np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool), np.exp(products), 0)
        weights /= weights.sum(1, keepdims=True) + (0 if sink is None else np.exp(sink[head]))
        expected = np.add.reduceat(weights, np.arange(0, seqlen_q, 128), axis=0)
        expected = np.add.reduceat(expected, np.arange(0, seqlen_k, 128), axis=1)
        np.testing.assert_allclose(mass[head], expected, atol=1e-4)


@pytest.mark.parametrize("causal, num_bounds", [(True, 0), (True, 1), (True, 2), (False, 0), (False, 2), (False, 4)])
@pytest.mark.parametrize("bounds_heads", [1, 2, 4])
@pytest.mark.parametrize("sink", [None, SINK], ids=["no sink", "sink"])
def test_mass_of_rows_under_flashmask(rng, causal, num_bounds, bounds_heads, sink):
    """By the masks of the oracle; rows that see nothing have none."""
    sizes = (200, 4), (300, 2)
    query, key = (rng.standard_normal((2, *size, 16)).astype(np.float32) for size in sizes)
    bounds = None
    if num_bounds:
        bounds = np.sort(rng.integers(0, 201, (2, bounds_heads, 300, num_bounds)), axis=-1).astype(np.int32)
        if num_bounds == 2 and not causal:
            bounds = bounds[..., ::-1].copy()  # hidden are the rows from the first on, and those before the second
        bounds[1, :, :, 0] = 0  # in the second sequence a key is hidden from the first row on
    rows = np.array([0, 5, 127, 128, 150, 190, 199])
    mass = attention_mass.row_mass(
        paddle.to_tensor(query),
        paddle.to_tensor(key),
        rows,
        None if bounds is None else paddle.to_tensor(bounds),
        causal=causal,
        softmax_scale=0.4,
        sink=None if sink is None else paddle.to_tensor(sink),
    )
    geometry = {"causal": causal, "batch": 2, "num_heads": 4, "seqlen_q": 200, "seqlen_k": 300}
    seen = reference.token_mask(bounds, **geometry)
    for batch, head in np.ndindex(2, 4):
        products = query[batch, :, head].astype(np.float64) @ key[batch, :, head // 2].T * 0.4
        of_sink = None if sink is None else sink[head]
        weights = reference.masked_softmax(products, seen[batch, head], of_sink)[0][rows]
        expected = np.add.reduceat(weights, [0, 128, 256], axis=1)
        np.testing.assert_allclose(mass[batch, head], expected, atol=1e-5)
    assert mass.shape == (2, 4, 7, 3) and mass[0].sum() > 0
    assert num_bounds != 1 or mass[1].sum() == 0


def test_sampled_rows_are_spread_over_a_call():
    assert attention_mass.sampled_rows(5, 64).tolist() == [0, 1, 2, 3, 4]
    assert attention_mass.sampled_rows(64, 64).tolist() == list(range(64))
    assert len(attention_mass.sampled_rows(9, 0)) == 0
    rows = attention_mass.sampled_rows(8192, 64)
    assert (rows // 128).tolist() == list(range(64)) and rows.dtype == np.int64
    places = np.sort(rows % 128)  # in a block
    assert places[0] < 4 and places[-1] >= 124 and np.diff(places).max() <= 4


def test_density_and_kept_mass_of_blocks():
    selected = np.zeros((2, 3, 3), bool)
    selected[0] = np.eye(3)
    selected[1] = True  # also what no query sees
    mass = np.tril(np.full((2, 3, 3), 0.25)) + 0.5 * np.eye(3)
    density, kept = attention_mass.density_and_kept(selected, mass)
    np.testing.assert_allclose(density, [0.5, 1])
    np.testing.assert_allclose(kept, [2.25 / 3, 1])
    assert attention_mass.density_and_kept(selected, 0 * mass)[1].tolist() == [1, 1]  # sinks have taken all of it


def test_calibration_measures_with_the_sink():
    paddle.seed(0)
    query, key = paddle.randn([1, 700, 4, 16]), paddle.randn([1, 700, 2, 16])
    sink = paddle.to_tensor(SINK)
    measurement = calibrate._Measurement(calibrate.config_of(1.0, 8))
    out, _ = measurement(query, key, key, None, causal=True, softmax_scale=None, sink=sink)
    everything = paddle.full([1, 4, 6, 1], -1, "int32")
    assert (out == rrattn.block_sparse_attention(query, key, key, everything, causal=True, sink=sink)).all()
    mass = attention_mass.exact_block_mass(query, key, sink=sink)
    index = calibrate.THRESHOLDS.index(0.8)
    core = rrattn.RRAttention(calibrate.config_of(0.8, 8))
    core(query, key, key, causal=True, sink=sink)
    selected = reference.unpack(core.last_selection.block_mask.numpy(), 6)[0]
    expected = attention_mass.density_and_kept(selected, mass)
    np.testing.assert_allclose(measurement.results[0][index], np.stack(expected, -1), rtol=1e-6)


def test_measured_blocks_are_those_that_an_enabled_model_selects(folder, text):
    (tokens,) = checkpoint.samples(checkpoint.codec_of(folder), text, 900, 1)
    model = rrattn.enable(checkpoint.load_model(folder, "float32"), rrattn.RRAttentionConfig(stride=16))
    kept, density = calibrate.measure(model, [tokens], "text")
    assert kept.shape == density.shape == (len(calibrate.THRESHOLDS), 2, 4)
    for index, threshold in ((0, 0.3), (calibrate.THRESHOLDS.index(0.8), 0.8)):
        rrattn.enable(model, rrattn.RRAttentionConfig(threshold=threshold, stride=16))
        checkpoint.prefill(model, tokens)  # of which the first layer's queries and keys are those of a dense prefill
        np.testing.assert_allclose(density[index, 0], rrattn.layer_densities(model)[0].numpy()[0])
    assert (density[-1] == 1).all() and kept[-1] == pytest.approx(1) and (np.diff(kept, axis=0) >= 0).all()
    assert 0.3 < kept[0].min() < kept[0].max() < 1


# Samples


def test_samples_of_bytes_come_from_all_of_a_text(text):
    found = checkpoint.samples(Bytes(), text, 1000, 4)
    for index, tokens in enumerate(found):
        assert tokens.shape == (1000,) and tokens.dtype == np.int64 and tokens[0] == 0
        begin = text.index(bytes(tokens[1:].tolist()))
        assert len(text) * index // 4 <= begin < len(text) * (index + 1) // 4 and text[begin - 1 : begin] in b"\n"
    with pytest.raises(ValueError, match="a part of it, one of 4, has [0-9,]+ tokens, fewer than 7,999"):
        checkpoint.samples(Bytes(), text, 8000, 4)


def test_samples_are_of_the_tokenizer_of_the_checkpoint(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    words = ["<s>", "<unk>", *(f"w{i}" for i in range(900))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    text = " ".join(words[2:]).encode()
    for has_start in (False, True):
        if has_start:
            model.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", unk_token="<unk>"
        ).save_pretrained(tmp_path)
        (tokens,) = checkpoint.samples(checkpoint.codec_of(tmp_path), text, 600, 1)
        assert list(tokens) == [0] * has_start + list(range(2, 602 - has_start))
        with pytest.raises(ValueError, match="it has 900 tokens, fewer than"):
            checkpoint.samples(checkpoint.codec_of(tmp_path), text, 1000, 1)


def test_a_checkpoint_of_more_tokens_than_bytes_needs_a_tokenizer(tmp_path):
    make_model(vocab_size=600).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has 600 tokens, but no tokenizer"):
        checkpoint.codec_of(tmp_path)


# Calibration


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("loss", [0.02, 0.1, 0.3])
def test_calibration_meets_its_bounds(rng, per, loss):
    kept, density = curves(rng)
    groups = 12 if per == "head" else 3
    of_groups = calibrate.grouped(kept, per), calibrate.grouped(density, per)
    each = calibrate.choose(kept, density, Namespace(per=per, bound="each", loss=loss))
    assert each.shape == (groups,)
    for group, chosen in enumerate(each):
        assert 1 - of_groups[0][chosen, group] <= loss
        assert chosen == 0 or 1 - of_groups[0][chosen - 1, group] > loss
    mean = calibrate.choose(kept, density, Namespace(per=per, bound="mean", loss=loss))
    assert 1 - calibrate.at(of_groups[0], mean) <= loss
    same_loss = calibrate.global_density(*of_groups, calibrate.at(of_groups[0], mean))
    assert calibrate.at(of_groups[1], mean) < same_loss


def test_fewest_blocks_against_every_choice(rng):
    """Of all combinations of thresholds with the bound kept, none has clearly fewer blocks."""
    kept, density = (calibrate.grouped(x, "head")[::4, :3] for x in curves(rng))
    chosen = calibrate.fewest_blocks(kept, density, 0.15)
    best = min(
        calibrate.at(density, choice)
        for choice in np.ndindex(*[len(kept)] * 3)
        if 1 - calibrate.at(kept, choice) <= 0.15
    )
    assert calibrate.at(density, chosen) <= best + 0.08


@pytest.mark.parametrize(("per", "shape"), [("head", (2, 4)), ("layer", (2,))])
def test_calibration_writes_a_config_that_enable_reads(folder, files, capfd, per, shape):
    options = "--text long --held-out long --length 512 --samples 1 --loss 0.1 --stride 16"
    assert main(["calibrate", str(folder), "out.json", *options.split(), "--per", per]) == 0
    said = capfd.readouterr()
    assert all(part in said.out for part in ("true mass lost", "bound on mean: 10.00%", "written: out.json"))
    names = [line.rpartition(":")[0] for line in said.err.splitlines()]  # and nothing of the libraries
    assert names == ["sample text", "held-out text"]
    config = rrattn.RRAttentionConfig.from_json("out.json")
    assert np.shape(config.threshold) == shape and config.stride == 16
    rrattn.enable(checkpoint.load_model(folder, "float32"), config)


def test_samples_of_several_files_count_alike(folder, files, monkeypatch):
    Path("other").write_bytes(Path("long").read_bytes()[::-1])
    seen = []

    def measure(model, samples, name):
        seen.append((name, len(samples)))
        return curves(np.random.default_rng(0), 2, 4)

    monkeypatch.setattr(calibrate, "measure", measure)
    options = "--text long other --held-out other --length 512 --samples 3 --loss 0.5"
    assert main(["calibrate", str(folder), "out.json", *options.split()]) == 0
    assert seen == [("sample text", 6), ("held-out text", 3)]


@pytest.mark.parametrize(
    ("bound", "held_out", "message"),
    [
        ("mean", 0.90, None),
        ("mean", 0.88, r"it loses 12\.000% of the true mass, more than --loss 10\.000%"),
        ("each", 0.90, r"the worst head loses 18\.000% of the true mass"),
    ],
)
def test_a_loss_above_the_bound_on_held_out_text_is_said(folder, files, monkeypatch, capsys, bound, held_out, message):
    tau = np.linspace(0.5, 1, len(calibrate.THRESHOLDS))[:, None, None]
    of_sample = np.broadcast_to(tau, (len(tau), 2, 4)).copy()
    of_held_out = of_sample + held_out - of_sample[np.argmax(of_sample[:, 0, 0] >= 0.9)]
    of_held_out[:, 0, 0] -= 0.08  # a head that loses more, and one that loses less
    of_held_out[:, 0, 1] += 0.08
    measured = iter([(of_sample, of_sample), (of_held_out, of_sample)])
    monkeypatch.setattr(calibrate, "measure", lambda *_: next(measured))
    options = f"--text long --held-out long --length 1024 --loss 0.1 --bound {bound}"
    assert main(["calibrate", str(folder), "out.json", *options.split()]) == (0 if message is None else 1)
    said = capsys.readouterr().err
    assert re.search(message, said) and "out.json was written all the same" in said if message else not said
    assert rrattn.RRAttentionConfig.from_json("out.json").threshold[0][0] == calibrate.THRESHOLDS[16]


# Pictures


def test_visualize_draws_and_tells_what_the_model_selects(folder, files, capfd, text):
    options = "--text long --output blocks.png --length 1500 --threshold 0.5 --stride 16"
    assert main(["visualize", str(folder), *options.split()]) == 0
    said = capfd.readouterr()
    assert Path("blocks.png").read_bytes().startswith(b"\x89PNG") and not said.err
    model = rrattn.enable(checkpoint.load_model(folder, "float32"), rrattn.RRAttentionConfig(threshold=0.5, stride=16))
    checkpoint.prefill(model, *checkpoint.samples(Bytes(), text, 1500, 1))
    densities = [density.numpy() for density in rrattn.layer_densities(model)]
    lines = said.out.splitlines()
    for layer, density in enumerate(densities):
        numbers = [float(number) / 100 for number in re.findall(r"([\d.]+)%", lines[layer])]
        assert numbers == pytest.approx([density.mean(), density.min(), density.max()], abs=6e-4)
    assert lines[2].startswith(f"density {np.mean(densities):.1%}: ") and 0 < np.mean(densities) < 1
    assert lines[3] == "picture: blocks.png, of all layers"


def test_visualize_takes_a_file_of_settings(folder, files, capsys):
    rrattn.RRAttentionConfig(threshold=[0.2, 1.0]).to_json("config.json")
    options = "--text long --output blocks.svg --length 1500 --config config.json --layers 1 --heads 0 3"
    assert main(["visualize", str(folder), *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "density 100.0%" in lines[1] and "density 100.0%" not in lines[0]
    assert lines[3] == "picture: blocks.svg, of layers 1; the others of 2 are not drawn: --layers chooses"


def test_of_more_heads_than_a_picture_holds_layers_are_left_out(folder, files, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "QUICK_PANELS", 5)
    monkeypatch.setattr(visualize_model, "MAX_PANELS", 5)
    options = "--text long --output blocks.png --length 600"
    assert main(["visualize", str(folder), *options.split()]) == 0
    assert "picture: blocks.png, of layers 0; the others of 2 are not drawn" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["visualize", str(folder), *options.split(), "--layers", "0", "1"])
    assert "2 layers of 4 heads are more than the 5 panels of a picture" in capsys.readouterr().err


# What is checked before anything is loaded or computed

CALIBRATE = "calibrate MODEL out.json --text long --held-out long --length 1024"
VISUALIZE = "visualize MODEL --text long --output blocks.png --length 1024"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{CALIBRATE} --text none", "there is no file none for --text"),
        (f"{CALIBRATE} --text short", "--text short: the text is of 13 bytes: .* tokens, fewer than 1,023"),
        (f"{CALIBRATE} --text long empty", "--text empty: the text is of 0 bytes"),
        (f"{CALIBRATE} --held-out long short", "--held-out short: the text is of 13 bytes"),
        (f"{CALIBRATE} --samples 20", "--text long: .* a part of it, one of 20, has"),
        (f"{CALIBRATE} --loss nan", "--loss must be between 0 and 1, got nan"),
        (f"{CALIBRATE} --samples 0", "--samples must be at least 1, got 0"),
        (f"{CALIBRATE} --length 511", "--length must be at least 512, got 511"),
        (f"{CALIBRATE} --stride 7", "--stride: invalid choice: 7"),
        (CALIBRATE.replace("out.json", "no/out.json"), "there is no folder no for CONFIG"),
        (CALIBRATE.replace("out.json", "."), r"CONFIG must be a file, but \. is a folder"),
        (CALIBRATE.replace("MODEL", "no"), "there is no checkpoint in no for MODEL"),
        (CALIBRATE.replace("MODEL", "words"), "MODEL words: words has 600 tokens, but no tokenizer"),
        (f"{VISUALIZE} --text none", "there is no file none for --text"),
        (f"{VISUALIZE} --text short", "--text short: .* it has 13 tokens, fewer than 1,023"),
        (f"{VISUALIZE} --length 1", "--length must be at least 2, got 1"),
        (f"{VISUALIZE} --threshold 0", r"threshold is 0\.0, but must be"),
        (f"{VISUALIZE} --config none.json", "--config: .*none.json"),
        (f"{VISUALIZE} --config long", "--config: long is not JSON"),
        (f"{VISUALIZE} --config long --stride 8", "--config sets --stride as well"),
        (f"{VISUALIZE} --layers 2", "--layers names 2, but the model has 2 layers"),
        (f"{VISUALIZE} --heads 0 -1", "--heads names -1, but the model has 4 heads"),
        (VISUALIZE.replace(".png", ".jpg"), "--output must end in .png or .pdf or .svg"),
        (VISUALIZE.replace("MODEL", "no"), "there is no checkpoint in no for MODEL"),
        (VISUALIZE.replace("MODEL", "words"), "MODEL words: words has 600 tokens, but no tokenizer"),
    ],
)
def test_everything_is_checked_first(folder, files, monkeypatch, capsys, command, message):
    """With status 2, naming the option and the file; no weights are read, and no file is written."""
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the model was loaded"))
    make_model(vocab_size=600).save_pretrained("words")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(command.replace("MODEL", str(folder)).split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"rrattn {command.split()[0]}: error: " in said and re.search(message, said), said
    after = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert all(path.parent.name == "words" for path in set(after) - set(before))  # what the library notes there


def test_a_missing_matplotlib_is_named(folder, files, monkeypatch, capsys):
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(SystemExit) as stop:
        main(VISUALIZE.replace("MODEL", str(folder)).split())
    assert stop.value.code == 2
    assert "--output takes matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_a_missing_model_library_is_named(folder, files, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "LIBRARIES", ("no_such_library",))
    with pytest.raises(SystemExit) as stop:
        main(VISUALIZE.replace("MODEL", str(folder)).split())
    assert stop.value.code == 2 and "no_such_library is installed" in capsys.readouterr().err


def test_all_cores_work(folder, files, monkeypatch):
    asked = []
    monkeypatch.setattr(paddle.base.core, "set_num_threads", asked.append)
    assert main(VISUALIZE.replace("MODEL", str(folder)).split()) == 0
    assert asked == [os.cpu_count()]
