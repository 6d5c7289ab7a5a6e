"""collect_stats: what it counts, that it changes nothing, and its table and picture."""

from dataclasses import replace

import numpy as np
import paddle
import pytest
from tiny_models import (
    LENGTH,
    LIBRARY,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    enable_recompute,
    forward,
    generate,
    gradients,
    logits,
    make_model,
    make_tokens,
    packing,
)

import rrattn
from rrattn import reference
from rrattn.integrations import attention_cores
from rrattn.masks import document_startend_rows


@pytest.fixture
def model():
    return rrattn.enable(make_model(), SPARSE)


def true_share(query, key, kept, startend=None, sink=None):
    """float64 [Hq]: of the exact attention of all queries to keys, causal, what kept blocks [B, Hq, Mq, Mk] hold."""
    (batch, length, heads, dim), group = query.shape, query.shape[2] // key.shape[2]
    sizes = {"causal": True, "batch": batch, "num_heads": heads, "seqlen_q": length, "seqlen_k": length}
    seen = reference.token_mask(startend, **sizes)
    sums = np.zeros((2, heads))
    for b, h in np.ndindex(batch, heads):
        products = query[b, :, h] @ key[b, :, h // group].T * dim**-0.5
        weights = reference.masked_softmax(products, seen[b, h], None if sink is None else sink[h])[0]
        blocks = kept[b, h].repeat(128, 0)[:length].repeat(128, 1)[:, :length]
        sums[:, h] += (weights * blocks).sum(), weights.sum()
    return sums[0] / sums[1]


def test_density_and_kept_mass_of_one_prefill(model, tokens, monkeypatch):
    inputs = []
    attend = rrattn.RRAttention._attend
    monkeypatch.setattr(rrattn.RRAttention, "_attend", lambda *a, **k: inputs.append(a) or attend(*a, **k))
    with rrattn.collect_stats(model, mass_rows=LENGTH) as stats:
        logits(model, tokens)
    assert len(stats.layers) == len(inputs) == NUM_LAYERS
    for layer, density, (_, query, key, *_) in zip(stats.layers, rrattn.layer_densities(model), inputs):
        np.testing.assert_allclose(layer.density, density.numpy().mean(0), rtol=1e-6)
        query, key = query.numpy().astype(np.float64), key.numpy().astype(np.float64)
        scores = reference.estimate(query, key, causal=True)
        lengths = {"seqlen_q": LENGTH, "seqlen_k": LENGTH}
        kept = reference.select(scores.astype(np.float32), 0.5, causal=True, keep_last=False, **lengths)
        expected = (scores * kept).sum((0, 2, 3)) / scores.sum((0, 2, 3))
        np.testing.assert_allclose(layer.estimated_mass, expected, rtol=1e-5)
        assert (0.5 <= expected).all() and (expected < 1).all()
        np.testing.assert_allclose(layer.true_mass, true_share(query, key, kept), rtol=1e-5)
        assert (layer.true_mass < 1).all() and (layer.true_mass != layer.estimated_mass).all()
        assert layer.prefills == 1 and layer.decodings == 0
        assert 0 < layer.prefill_seconds < 60 and layer.decode_seconds == 0


def test_masses_beside_a_sink():
    """The estimated one and the true one are of what the sinks leave to the keys, row by row."""
    rng = np.random.default_rng(0)
    query, key = 2 * rng.standard_normal((2, 700, 4, 16)), rng.standard_normal((2, 700, 2, 16))
    key += np.repeat(rng.standard_normal((2, 6, 2, 16)), 128, axis=1)[:, :700]
    sink = np.array([3, 6, 9, -np.inf])
    core, layer = rrattn.RRAttention(SPARSE), rrattn.stats.LayerStats()
    core._observer = rrattn.stats._Observer(core, layer, 700)
    tensors = [paddle.to_tensor(x, dtype="float32") for x in (query, key, key)]
    core(*tensors, causal=True, sink=paddle.to_tensor(sink, dtype="float32"))
    query, key = (tensor.numpy().astype(np.float64) for tensor in tensors[:2])
    scores = reference.estimate(query, key, causal=True, sink=sink)
    kept = reference.unpack(core.last_selection.block_mask.numpy(), 6)
    np.testing.assert_allclose(layer.estimated_mass, (scores * kept).sum((0, 2, 3)) / scores.sum((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(layer.true_mass, true_share(query, key, kept, sink=sink), rtol=1e-5)
    without = true_share(query, key, kept)
    assert (np.abs(layer.true_mass - without)[:3] > 1e-4).all()  # the rows count otherwise
    np.testing.assert_allclose(layer.true_mass[3], without[3], rtol=1e-5)


def test_true_mass_of_sampled_queries_is_near_that_of_all(model, tokens):
    found = {}
    for rows in (0, 8, rrattn.stats.MASS_ROWS, LENGTH):
        with rrattn.collect_stats(model, mass_rows=rows) as stats:
            logits(model, tokens)
        found[rows] = [layer.true_mass for layer in stats.layers]
    assert found.pop(0) == [None] * NUM_LAYERS
    exact = np.stack(found.pop(LENGTH))
    for rows, sampled in found.items():
        assert 0 < np.abs(np.stack(sampled) - exact).max() < 0.5 / rows**0.5


@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_packed_documents_count_what_they_can_see(threshold):
    lengths = (640, 700, 300)
    model = rrattn.enable(make_model(), replace(SPARSE, threshold=threshold))
    with rrattn.collect_stats(model) as stats:
        logits(model, make_tokens(sum(lengths), batch=1), **packing(model, lengths, dense=False))
    rows = document_startend_rows(lengths)
    sizes = {"causal": True, "seqlen_q": sum(lengths), "seqlen_k": sum(lengths)}
    hidden, _ = reference.block_geometry(rows.numpy(), batch=1, num_heads=NUM_HEADS, **sizes)
    densities = rrattn.layer_densities(model)
    for layer, density, selection in zip(stats.layers, densities, rrattn.layer_selections(model)):
        mask = reference.unpack(selection.block_mask.numpy(), hidden.shape[3])
        expected = (mask & ~hidden).sum((0, 2, 3)) / (~hidden).sum((0, 2, 3))
        np.testing.assert_allclose(layer.density, expected, rtol=1e-12)
        np.testing.assert_allclose(density.numpy()[0], expected, rtol=1e-6)
        assert (expected == 1).all() == (threshold == 1)
        assert np.allclose(layer.true_mass, 1, rtol=0, atol=1e-5) == (threshold == 1)  # a sum of float32


@paddle.no_grad()
def test_chunks_add_up(model, tokens):
    with rrattn.collect_stats(model, mass_rows=LENGTH) as whole:
        logits(model, tokens)
    cache = None
    with rrattn.collect_stats(model, mass_rows=LENGTH) as chunks:
        for begin in range(0, LENGTH, 256):
            part = forward(model, tokens[:, begin : begin + 256], begin=begin, cache=cache, use_cache=True)
            cache = part.past_key_values
    for one, three in zip(whole.layers, chunks.layers):
        np.testing.assert_allclose(three.density, one.density, rtol=1e-12)
        np.testing.assert_allclose(three.estimated_mass, one.estimated_mass, rtol=1e-4)
        np.testing.assert_allclose(three.true_mass, one.true_mass, rtol=1e-4)
        assert three.prefills == 3


def test_generation_counts_its_steps(model, tokens):
    expected = generate(model, tokens, 5)
    with rrattn.collect_stats(model) as stats:
        np.testing.assert_array_equal(generate(model, tokens, 5), expected)
    for layer in stats.layers:
        assert (layer.prefills, layer.decodings) == (1, 4) and layer.decode_seconds > 0


def test_training_with_recompute_counts_both_calls(model, tokens):
    enable_recompute(model)
    expected = gradients(model, tokens)
    with rrattn.collect_stats(model) as stats:
        collected = gradients(model, tokens)
    assert all(layer.prefills == 2 for layer in stats.layers)
    for name, gradient in expected[1].items():
        np.testing.assert_array_equal(collected[1][name], gradient, err_msg=name)


def test_dense_layers_keep_everything(tokens):
    model = rrattn.enable(make_model(), replace(SPARSE, dense_layers=[1]))
    with rrattn.collect_stats(model) as stats:
        logits(model, tokens)
    assert (stats.layers[0].density < 1).all()
    of_dense = stats.layers[1]
    assert (
        (of_dense.density == 1).all()
        and (of_dense.estimated_mass == 1).all()
        and np.allclose(of_dense.true_mass, 1, rtol=0, atol=1e-5)
    )


def test_nothing_is_collected_outside(model, tokens):
    with rrattn.collect_stats(model) as stats:
        pass
    logits(model, tokens)
    assert all(core._observer is None for core in attention_cores(model))
    assert all(layer.prefills == 0 and layer.density is None for layer in stats.layers)
    with pytest.raises(RuntimeError, match="stop"), rrattn.collect_stats(model):
        raise RuntimeError("stop")
    assert all(core._observer is None for core in attention_cores(model))


def test_what_cannot_be_collected_is_refused(model):
    with rrattn.collect_stats(model):
        with pytest.raises(ValueError, match="already"), rrattn.collect_stats(model):
            pass
    with pytest.raises(ValueError, match="mass_rows is -1"), rrattn.collect_stats(model, mass_rows=-1):
        pass
    with pytest.raises(ValueError, match="not enabled"), rrattn.collect_stats(rrattn.disable(model)):
        pass


@pytest.mark.skipif(LIBRARY != "paddleformers", reason="the flag alone runs rrattn in PaddleFormers only")
def test_a_model_that_runs_by_the_flag_alone(tokens):
    model = make_model()
    model.config._attn_implementation = "rrattn"
    with rrattn.collect_stats(model) as stats:
        logits(model, tokens)
    assert all(layer.prefills == 1 for layer in stats.layers)


def test_the_table(model, tokens):
    with rrattn.collect_stats(model) as stats:
        generate(model, tokens, 3)
    stats.layers[0].prefill_seconds, stats.layers[0].decode_seconds = 0.25, 0.003
    header, first, second = str(stats).splitlines()
    assert header.split("  ")[0] == "layer" and "estimated mass" in header and "true mass" in header
    density, estimated, true = (getattr(stats.layers[0], name) for name in ("density", "estimated_mass", "true_mass"))
    assert first.split() == [
        "0",
        f"{density.mean():.1%},",
        f"{density.min():.1%},",
        f"{density.max():.1%}",
        f"{estimated.mean():.1%},",
        f"{estimated.min():.1%}",
        f"{true.mean():.1%},",
        f"{true.min():.1%}",
        *"1 x 250.00 ms".split(),
        *"2 x 1.50 ms".split(),
    ]
    assert len(header) == len(first) == len(second)
    with rrattn.collect_stats(model) as empty:
        pass
    assert str(empty).splitlines()[1].split() == ["0", "-", "-", "-", "-", "-"]


def test_the_picture(model, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    with rrattn.collect_stats(model) as stats:
        generate(model, tokens, 3)
    figure = stats.plot(tmp_path / "stats.png", title="two layers")
    density, *masses, times = figure.axes
    np.testing.assert_array_equal(density.images[0].get_array(), [layer.density for layer in stats.layers])
    for panel, name in zip(masses, ("estimated_mass", "true_mass")):
        assert panel.get_title() == f"{name.replace('_', ' ')} kept, %"
        np.testing.assert_array_equal(panel.images[0].get_array(), [getattr(layer, name) for layer in stats.layers])
    assert len(density.texts) == NUM_LAYERS * NUM_HEADS
    widths = [bar.get_width() for bar in times.patches]
    expected = [1e3 * layer.prefill_seconds for layer in stats.layers]
    np.testing.assert_allclose(widths[:NUM_LAYERS], expected)
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    with rrattn.collect_stats(model, mass_rows=0) as stats:
        logits(model, tokens)
    assert len(stats.plot().axes) == 3 and str(stats).splitlines()[1].split()[6] == "-"  # without true masses
    with rrattn.collect_stats(model) as empty:
        pass
    with pytest.raises(ValueError, match="not run"):
        empty.plot()
