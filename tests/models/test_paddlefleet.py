"""RRAttention as the core attention of PaddleFleet's layer specs, against the contract in paddlefleet_stand_in.py."""

import copy
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import paddlefleet_stand_in as stand_in
import pytest
from fleet_models import LENGTH, assert_same, assert_same_gradients, gradients, logits, make_model, make_tokens

import rrattn
from rrattn import reference

SPARSE = rrattn.RRAttentionConfig(threshold=0.5)
DENSE = rrattn.RRAttentionConfig(threshold=1.0)


@pytest.fixture
def model(fleet):
    return make_model(fleet.RRCoreAttention, rrattn_threshold=0.5)


def test_without_paddlefleet_the_import_says_what_is_missing():
    command = [sys.executable, "-c", "import rrattn.integrations.paddlefleet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(rrattn.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 1
    assert "needs PaddleFleet, of which PyPI has no release: install it from github.com" in result.stderr


def test_it_takes_what_the_contract_passes(fleet):
    core = make_core(fleet)
    theirs = inspect.signature(stand_in.DotProductAttention.forward.__get__(core))
    assert inspect.signature(core.forward) == theirs  # by which recompute binds keyword arguments
    assert set(fleet._READ + fleet._UNREAD) < set(theirs.parameters)
    training_op = inspect.signature(rrattn.rr_attention).parameters
    assert list(training_op)[:4] == ["query", "key", "value", "startend_row_indices"]
    assert {"causal", "training", "stride", "threshold"} <= set(training_op)


@paddle.no_grad()
def test_every_block_selected_equals_the_dense_twin_and_fewer_differ(model):
    tokens = make_tokens()
    dense = logits(make_model(), tokens)
    sparse = logits(model, tokens)
    assert float(rrattn.layer_densities(model)[0].mean()) < 1
    assert float((sparse - dense).abs().max()) > 1e-2
    assert_same(logits(rrattn.enable(model, DENSE), tokens), dense)
    assert_same(logits(rrattn.disable(model), tokens), dense)
    assert (logits(rrattn.enable(model), tokens) == sparse).all()
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(rrattn.disable(model))


def test_below_threshold_1_it_equals_the_oracle(fleet):
    core = make_model(fleet.RRCoreAttention, rrattn_threshold=0.5).layers[0].self_attn.core_attention
    paddle.seed(2)
    query, (key, value) = 3 * paddle.randn([1, LENGTH, 4, 16]), paddle.randn([2, 1, LENGTH, 2, 16])
    out = core(query, key, value, None, attn_mask_type=stand_in.AttnMaskType.causal)
    arrays = [tensor.numpy().astype(np.float64) for tensor in (query, key, value)]
    scores = reference.estimate(*arrays[:2], causal=True).astype(np.float32)
    kept = reference.select(scores, 0.5, causal=True, seqlen_q=LENGTH, seqlen_k=LENGTH)
    expected, _ = reference.attend(*arrays, kept, causal=True)
    assert not kept.all()
    np.testing.assert_allclose(out.numpy(), expected.reshape(1, LENGTH, 64), atol=1e-4)


def test_gradients_equal_the_dense_twin(fleet):
    expected = gradients(make_model(), make_tokens())
    assert_same_gradients(gradients(make_model(fleet.RRCoreAttention, rrattn_threshold=1.0), make_tokens()), expected)


@paddle.no_grad()
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_cache_is_updated_by_chunks_and_decoding_steps(model, threshold):
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=threshold))
    tokens = make_tokens()
    cache, parts = stand_in.Cache(), []
    for begin, end in ((0, 384), (384, LENGTH - 1), (LENGTH - 1, LENGTH)):
        parts.append(logits(model, tokens[:, begin:end], past_key_values=cache, use_cache=True))
    assert cache.states[0][0].shape == cache.states[1][1].shape == [2, LENGTH, 2, 16]
    assert_same(paddle.concat(parts[:2], axis=1), logits(model, tokens[:, :-1]))
    if threshold == 1:  # a decoding step is dense
        assert_same(parts[2], logits(model, tokens)[:, -1:])


@paddle.no_grad()
def test_masks(model):
    rrattn.enable(model, DENSE)
    dense, tokens = make_model(), make_tokens()
    rows = rrattn.masks.document_startend_rows([[300, 400], [450, 250]])
    packed = logits(model, tokens, attn_mask_startend_row_indices=rows)
    assert_same(packed, logits(dense, tokens, attn_mask_startend_row_indices=rows))
    position = paddle.arange(LENGTH)
    hidden = (position[:, None] < position).unsqueeze([0, 1]) | (position < 100)  # causal, and 100 of padding
    expected = logits(dense, tokens, attention_mask=hidden)[:, 100:]
    ones = (~hidden).astype("float32")
    for mask in (hidden, ones, (1 - ones) * -1e9):
        assert_same(logits(model, tokens, attention_mask=mask)[:, 100:], expected)
    assert float((packed[:, 100:] - expected).abs().max()) > 1e-2


def test_rows_of_two_bounds_are_causal_as_the_mask_type_says(model):
    core = model.layers[0].self_attn.core_attention
    query, (key, value) = paddle.randn([1, 256, 4, 16]), paddle.randn([2, 1, 256, 2, 16])
    rows = paddle.concat([paddle.full([1, 1, 256, 1], bound, "int32") for bound in (200, 250)], -1)
    for mask_type, causal in ((stand_in.AttnMaskType.causal, True), (stand_in.AttnMaskType.no_mask, False)):
        out = core(query, key, value, None, rows, attn_mask_type=mask_type)
        expected = rrattn.rr_attention(query, key, value, rows, causal=causal, threshold=0.5)
        assert (out == expected.reshape([1, 256, 64])).all()


def test_heads_split_over_tensor_parallel_ranks(fleet):
    paddle.seed(3)
    query, (key, value) = 3 * paddle.randn([1, LENGTH, 4, 16]), paddle.randn([2, 1, LENGTH, 2, 16])
    config = rrattn.RRAttentionConfig(threshold=[(0.5, 0.2, 0.7, 0.4)])

    def attend(rank, ranks, heads, kv_heads):
        core = make_core(fleet, stand_in.group(rank, ranks))
        rrattn.enable(core, config)
        out = core(query[:, :, heads], key[:, :, kv_heads], value[:, :, kv_heads], None)
        (selection,) = rrattn.layer_selections(core)
        return out.numpy(), selection.block_mask.numpy()

    out, mask = attend(0, 1, slice(0, 4), slice(0, 2))
    parts = [attend(rank, 2, slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts], axis=2), out)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], axis=1), mask)


def make_core(fleet, tp=None, **settings):
    config = stand_in.TransformerConfig(num_hidden_layers=1)
    options = {"is_swa": settings.pop("is_swa", False)}
    vars(config).update(settings)
    causal = stand_in.AttnMaskType.causal
    groups = stand_in.ProcessGroupCollection(tp=tp)
    return fleet.RRCoreAttention(
        config=config, layer_number=0, attn_mask_type=causal, attention_type="self", pg_collection=groups, **options
    )


@pytest.fixture
def context_parallel(monkeypatch, fleet):
    """context_parallel(group, **settings): a core of the group's rank, which no other ranks talk to."""

    def build(group, **settings):
        monkeypatch.setattr(stand_in.ContextParallel, "size", group.world_size)

        class Groups:
            @staticmethod
            def get_context_parallel_group():
                return group

        monkeypatch.setattr(fleet.fleet, "get_hybrid_communicate_group", Groups)
        return make_core(fleet, **settings)

    return build


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp_balance_mode": "contiguous_swap2p"}, r"'contiguous_swap2p' \(keys of a window alone.*'contiguous_a2a'"),
        ({"cp_balance_mode": "ring"}, "cp_balance_mode 'ring' in PaddleFleet models; it must be one of 'dualchunk_all"),
        ({"hybrid_mla_cp_mode": "ring"}, "cp_balance_mode 'ring'"),
        ({"num_attention_heads": 3, "cp_balance_mode": "contiguous_a2a"}, "cannot split 3 heads over 2 context-"),
    ],
)
def test_context_parallelism_that_is_not_supported_is_refused_when_a_layer_is_built(
    context_parallel, settings, message
):
    with pytest.raises(ValueError, match=message):
        context_parallel(stand_in.group(0, 2), **settings)


def test_heads_are_split_over_context_parallel_ranks_by_all_to_all_alone(context_parallel):
    groups = {"tp": stand_in.group(1, 2)}
    for mode, offsets in {
        "contiguous_a2a": [2, 3],
        "contiguous_allgather": [2, 2],
        "dualchunk_allgather": [2, 2],
    }.items():
        cores = [context_parallel(stand_in.group(rank, 2), cp_balance_mode=mode, **groups) for rank in (0, 1)]
        assert [core._rrattn.config.head_offset for core in cores] == offsets


@pytest.mark.parametrize("mode", ["dualchunk_allgather", "contiguous_allgather", "contiguous_a2a"])
def test_calls_that_context_parallelism_does_not_support_are_refused(context_parallel, mode):
    core = context_parallel(stand_in.group(0, 2), cp_balance_mode=mode)
    x = paddle.ones([1, 256, 4, 16])
    for refused in (
        {"attention_mask": None, "past_key_values": stand_in.Cache(), "use_cache": True},
        {"attention_mask": paddle.zeros([1, 1, 256, 256])},
    ):
        with pytest.raises(ValueError, match="neither a cache nor attention_mask"):
            core(x, x, x, **refused)


def test_row_indices_that_paddlefleet_does_not_take_with_gathered_keys_are_refused(context_parallel):
    x = paddle.ones([1, 256, 4, 16])
    for settings, shape in (({}, [1, 1, 512, 2]), ({"experimental_dataflow": True}, [1, 1, 512, 4]), ({}, [1, 512])):
        core = context_parallel(stand_in.group(0, 2), **settings)
        with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*one bound, or with two where experimental"):
            core(x, x, x, None, paddle.full(shape, 512, "int32"))


def test_lengths_that_context_parallelism_does_not_support_are_refused(context_parallel):
    core = context_parallel(stand_in.group(0, 2, nranks=2))
    x = paddle.ones([1, 320, 4, 16])
    with pytest.raises(ValueError, match="320 tokens.* multiple of 256"):
        core(x, x, x, None)


def test_statistics_and_settings_per_layer(model):
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[0.3, 1.0]))
    with rrattn.collect_stats(model) as stats:
        logits(model, make_tokens())
    assert (stats.layers[0].density < 1).all() and (stats.layers[1].density == 1).all()
    rrattn.enable(model.layers[1], rrattn.RRAttentionConfig(dense_layers=[1]))  # a layer knows its number
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]


def test_settings_per_layer_stand_in_the_models_config_too(fleet):
    model = make_model(fleet.RRCoreAttention, rrattn_threshold=[0.3, 1.0])
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_swa": True, "sliding_window": (128, 0), "head_wise_swa_ratio": 0.5}, r"head_wise_swa_ratio=0\.5"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling=True"),
        ({"gpt_model_use_experimental_version": True}, "gpt_model_use_experimental_version=True"),
        ({"rrattn_threshold": [0.5, 0.6]}, "2 entries"),
        ({"rrattn_dense_layers": [1]}, "dense_layers"),
        ({"rrattn_threshold": 0.0}, r"threshold is 0\.0"),
        ({"rrattn_treshold": 0.5}, "rrattn_treshold"),
    ],
)
def test_layers_that_are_not_supported_are_refused(fleet, settings, message):
    with pytest.raises(ValueError, match=message):
        make_core(fleet, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_bias": paddle.zeros([4, 1])}, r"attention_bias=a tensor \[4, 1\] .* must be None or False"),
        ({"packed_seq_params": "packed"}, "packed_seq_params='packed'"),
        ({"use_rr_flash_attention": True}, "use_rr_flash_attention=True"),
        ({"attention_mask": paddle.zeros([1, 1, 128, 128])}, "not causal"),
        ({"attention_mask": paddle.zeros([1, 1, 64, 128])}, r"attention_mask has shape \[1, 1, 64, 128\], but"),
    ],
)
def test_calls_that_are_not_supported_are_refused(fleet, arguments, message):
    x = paddle.ones([1, 128, 4, 16])
    core = make_core(fleet)
    core.eval()
    with pytest.raises(ValueError, match=message):
        core(x, x, x, **{"attention_mask": None, **arguments})


def test_dropout_in_training_is_refused(fleet):
    core = make_core(fleet, attention_dropout=0.1)
    x = paddle.ones([1, 128, 4, 16])
    with pytest.raises(ValueError, match="dropout.*0.1"):
        core(x, x, x, None)
    core.eval()
    core(x, x, x, None)


def test_models_of_the_same_config_and_parts_are_switched_apart(fleet, model):
    settings, tokens = dict(vars(model.config)), make_tokens()
    other = stand_in.GPTModel(model.config, fleet.RRCoreAttention)
    other.set_state_dict(model.state_dict())
    other.eval()
    sparse = logits(model, tokens)
    dense = logits(rrattn.disable(other), tokens)
    assert float((sparse - dense).abs().max()) > 1e-2
    assert (logits(model, tokens) == sparse).all()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    rrattn.disable(model.layers[0])
    assert [density is None for density in rrattn.layer_densities(model)] == [True, False]
    rrattn.disable(model)
    assert (logits(model, tokens) == dense).all() and rrattn.layer_densities(model) == [None, None]
    for each in (rrattn.enable(other), *copies):
        assert (logits(each, tokens) == sparse).all()
    assert vars(model.config) == settings
    with rrattn.collect_stats(other), pytest.raises(ValueError, match="statistics of this model are being collected"):
        rrattn.enable(other, DENSE)
