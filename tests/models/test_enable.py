"""enable and disable touch their own model alone: beside models of the same config, copied, saved, under LoRA."""

import copy
import importlib
import pickle
from dataclasses import fields, replace

import numpy as np
import paddle
import pytest
from tiny_models import (
    DENSE,
    LIBRARY,
    MODELS,
    NUM_LAYERS,
    SPARSE,
    assert_differs,
    assert_same,
    attention_layers,
    logits,
    make_model,
    make_tokens,
)

import rrattn
from rrattn.config import SETTINGS, Settings
from rrattn.integrations import attention_cores

LENGTH = 580  # five blocks, the last one partial: enough to leave some out
FLAG, OFF = {"paddleformers": ("_attn_implementation", "eager"), "paddlenlp": ("use_rrattn", False)}[LIBRARY]
SPARSER = replace(SPARSE, threshold=0.2)


@pytest.fixture
def tokens():
    return make_tokens(LENGTH)


def built_from(config, weights_of):
    """Another model from a config, with the weights of a model."""
    other = type(weights_of)(config)
    other.set_state_dict(weights_of.state_dict())
    other.eval()
    return other


def pickled(model):
    """The model, through pickle."""
    other = pickle.loads(pickle.dumps(model))
    for parameter in other.parameters():
        parameter.is_distributed = False  # Paddle pickles parameters as tensors, which lack what PaddleFormers asks for
    return other


def flag_of(model):
    return getattr(model.config, FLAG, None)


def assert_causal(model, tokens):
    changed = tokens.clone()
    changed[:, -1] = 3 + (tokens[:, -1] - 2) % 7
    np.testing.assert_array_equal(logits(model, changed)[:, :-1], logits(model, tokens)[:, :-1])


# Beside models of the same config


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_of_the_same_config_stays_as_it_is(model_type, tokens):
    policy = make_model(model_type)
    config = policy.config
    reference = built_from(config, policy)
    before = flag_of(reference)
    dense = logits(reference, tokens)
    assert_differs(logits(rrattn.enable(policy, SPARSE), tokens), dense)
    assert reference.config is config and flag_of(reference) == before
    assert (logits(reference, tokens) == dense).all()
    assert_causal(reference, tokens)
    assert rrattn.layer_densities(reference) == [None] * NUM_LAYERS
    later = built_from(config, policy)
    assert (logits(later, tokens) == dense).all() and flag_of(later) == before
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(reference)
    assert (logits(rrattn.disable(policy), tokens) == dense).all()


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("first", [0, 1])
def test_models_of_the_same_config_are_enabled_apart_and_disabled_in_any_order(model_type, first, tokens):
    models = [make_model(model_type)]
    config = models[0].config
    models.append(built_from(config, models[0]))
    dense = logits(models[0], tokens)
    settings = (SPARSE, SPARSER)
    expected = [logits(rrattn.enable(make_model(model_type), each), tokens) for each in settings]
    for model, each in zip(models, settings):
        rrattn.enable(model, DENSE)
        rrattn.enable(model, each)
    for model, output in zip(models, expected):
        assert (logits(model, tokens) == output).all()
    rrattn.disable(models[first])
    assert (logits(models[first], tokens) == dense).all()
    assert (logits(models[1 - first], tokens) == expected[1 - first]).all()
    rrattn.disable(models[1 - first])
    assert (logits(models[1 - first], tokens) == dense).all()
    assert models[0].config is models[1].config is config
    for layer in models[0].sublayers() + models[1].sublayers():
        assert getattr(layer, "config", config) is config


def test_the_flag_of_one_model_is_switched_alone(tokens):
    model = make_model()
    other = built_from(model.config, model)
    dense = logits(model, tokens)
    sparse = [logits(rrattn.enable(each, SPARSE), tokens) for each in (model, other)]
    on = flag_of(model)
    setattr(model.config, FLAG, OFF)
    assert (logits(model, tokens) == dense).all() and (logits(other, tokens) == sparse[1]).all()
    assert flag_of(other) == on
    setattr(model.config, FLAG, on)
    assert (logits(model, tokens) == sparse[0]).all()


def test_other_settings_stay_shared():
    model = make_model()
    config = model.config
    other = built_from(config, model)
    rrattn.enable(model, SPARSE)
    model.config.use_cache = "by the model"
    assert other.config.use_cache == "by the model"
    config.a_new_setting = "by the config"
    assert model.config.a_new_setting == attention_layers(model)[0].config.a_new_setting == "by the config"
    rrattn.disable(model)
    assert model.config is config and config.use_cache == "by the model"
    assert isinstance(model.config, type(config)) and model.config == config


def test_a_model_built_from_the_config_of_an_enabled_one(tokens):
    model = make_model()
    dense = logits(model, tokens)
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    of_a_copy = built_from(copy.deepcopy(model.config), model)
    assert (logits(of_a_copy, tokens) == dense).all() and flag_of(of_a_copy) in (None, OFF)
    other = built_from(model.config, model)
    if LIBRARY == "paddleformers":  # which finds the flag there
        with pytest.raises(ValueError, match="built from the config of a model that rrattn is enabled on"):
            logits(other, tokens)
        with pytest.raises(ValueError, match="built from the config of a model that rrattn is enabled on"):
            rrattn.layer_densities(other)
    rrattn.enable(other, SPARSER)
    setattr(other.config, FLAG, OFF)
    assert (logits(other, tokens) == dense).all()
    assert (logits(model, tokens) == sparse).all()
    rrattn.disable(model)
    assert (logits(rrattn.disable(other), tokens) == dense).all() and flag_of(other) in (None, OFF)


# Settings by keyword


def state_of(model):
    """All that `enable` could change of a model."""
    config = model.config
    layers = [dict(vars(layer)) for layer in model.sublayers(include_self=True)]
    return layers, config, dict(vars(config)), flag_of(model)


def configs(model):
    """The settings that its layers run with, other than per layer."""
    return {replace(core.config, threshold=core.threshold) for core in attention_cores(model)}


def test_settings_by_keyword_are_those_of_a_config(model, tokens):
    expected = logits(rrattn.enable(make_model(), SPARSE), tokens)
    assert rrattn.enable(model, threshold=0.5, keep_last=False) is model
    assert (logits(model, tokens) == expected).all()
    assert configs(model) == {SPARSE}
    rrattn.enable(model, threshold=[1.0, 0.5], dense_layers=np.array([0]))
    assert [core.dense for core in attention_cores(model)] == [True, False]
    rrattn.enable(model)  # nothing of an earlier call is left
    assert configs(model) == {rrattn.RRAttentionConfig()}


def test_settings_by_keyword_win_over_those_of_the_model(model):
    model.config.rrattn_threshold, model.config.rrattn_stride = 0.25, 16
    rrattn.enable(model, threshold=0.5, keep_local=2)
    expected = rrattn.RRAttentionConfig(threshold=0.5, stride=16, keep_local=2)
    assert configs(model) == {expected}
    assert (model.config.rrattn_threshold, model.config.rrattn_stride) == (0.25, 16)
    rrattn.enable(model, SPARSE)  # a config leaves nothing for the model's to say
    assert configs(model) == {SPARSE}


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        (SPARSE, {"threshold": 0.9, "stride": 8}, TypeError, "either a config or settings.*a config and threshold, st"),
        (
            None,
            {"treshold": 0.9, "threshold": 0.8},
            TypeError,
            "no setting treshold;.* stride, key_stride, threshold, keep_sink,",
        ),
        (0.9, {}, TypeError, r"config is 0\.9, but must be an RRAttentionConfig"),
        (None, {"threshold": 1.5}, ValueError, r"threshold is 1\.5, but must be in \(0, 1\]"),
        (None, {"threshold": "0.9"}, TypeError, "threshold is '0.9', but must be a number"),
        (None, {"stride": 3}, ValueError, "stride is 3, but must be an integer and a divisor of 128"),
        (None, {"threshold": [0.5] * 5}, ValueError, "threshold has 5 entries, but the model has 2 layers"),
        (None, {"threshold": [[0.5] * 3] * NUM_LAYERS}, ValueError, "3 thresholds to layer 0, which has 4 query heads"),
        (None, {"dense_layers": [NUM_LAYERS]}, ValueError, "dense_layers names layer 2"),
    ],
)
@pytest.mark.parametrize("enabled", [False, True])
def test_bad_settings_change_nothing_of_the_model(config, settings, error, message, enabled, model):
    if enabled:
        rrattn.enable(model, SPARSER)
    before = state_of(model)
    with pytest.raises(error, match=message):
        rrattn.enable(model, config, **settings)
    assert state_of(model) == before and model.config is before[1]


def test_the_keywords_are_the_fields_of_the_config():
    assert SETTINGS == tuple(field.name for field in fields(rrattn.RRAttentionConfig))
    assert sorted(Settings.__annotations__) == sorted(SETTINGS)


# Copied, pickled, saved


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_duplicate_is_a_model_of_its_own(model_type, duplicate, tokens):
    model = make_model(model_type)
    dense = logits(model, tokens)
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    other = duplicate(model)
    assert (logits(other, tokens) == sparse).all()
    setattr(other.config, FLAG, flag_of(model))
    rrattn.enable(other, SPARSER)
    assert_differs(logits(other, tokens), sparse)
    assert (logits(model, tokens) == sparse).all()
    other.config.a_setting = 1
    assert not hasattr(model.config, "a_setting")
    third = duplicate(other)
    expected = logits(other, tokens)
    assert (logits(rrattn.disable(other), tokens) == dense).all()
    assert (logits(model, tokens) == sparse).all() and (logits(third, tokens) == expected).all()
    assert (logits(rrattn.disable(model), tokens) == dense).all()
    assert (logits(third, tokens) == expected).all()
    assert (logits(rrattn.disable(third), tokens) == dense).all()
    assert type(third.config) is type(make_model(model_type).config)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_of_the_config_alone_is_as_before(model, duplicate):
    config = model.config
    before = flag_of(model)
    rrattn.enable(model, SPARSE)
    other = duplicate(model.config)
    assert type(other) is type(config) and other is not config and other == config
    assert getattr(other, FLAG, None) == before
    other.use_cache = "changed"
    assert model.config.use_cache != "changed"


@pytest.mark.parametrize("save", ["model", "config"])
def test_what_is_saved_loads_as_it_was_before(model, save, tokens, tmp_path):
    dense = logits(model, tokens)
    rrattn.enable(model, SPARSE)
    model.config.save_pretrained(str(tmp_path)) if save == "config" else model.save_pretrained(str(tmp_path))
    assert "rrattn" not in (tmp_path / "config.json").read_text()
    if save == "config":
        loaded = built_from(type(make_model().config).from_pretrained(str(tmp_path)), model)
    else:
        loaded = type(model).from_pretrained(str(tmp_path))
    loaded.eval()
    loaded.config.fuse_rms_norm = False
    assert flag_of(loaded) in (None, OFF)
    assert_same(logits(loaded, tokens), dense)
    assert rrattn.layer_densities(loaded) == [None] * NUM_LAYERS
    assert "rrattn" not in model.config.to_json_string()


# Under LoRA


def lora(model):
    peft = importlib.import_module(f"{LIBRARY}.peft")
    wrapped = peft.LoRAModel(model, peft.LoRAConfig(target_modules=[".*[qv]_proj"], r=4, lora_alpha=8))
    wrapped.eval()  # a fresh adapter adds nothing
    return wrapped


@pytest.mark.parametrize("enable_first", [True, False])
@pytest.mark.parametrize("disable_wrapper", [True, False])
def test_lora_around_it(model, tokens, enable_first, disable_wrapper, tmp_path):
    reference = built_from(model.config, model)
    dense = logits(model, tokens)
    sparse = logits(rrattn.enable(make_model(), SPARSE), tokens)
    if enable_first:
        wrapped = lora(rrattn.enable(model, SPARSE))
    else:
        wrapped = rrattn.enable(lora(model), SPARSE)
    assert (logits(wrapped, tokens) == sparse).all()
    assert [density.shape for density in rrattn.layer_densities(wrapped)] == [[2, 4]] * NUM_LAYERS
    assert (logits(reference, tokens) == dense).all()
    wrapped.save_pretrained(str(tmp_path))
    assert not any("rrattn" in path.read_text() for path in tmp_path.glob("*.json"))
    wrapped.train()
    loss = wrapped(tokens, labels=tokens, return_dict=True).loss
    loss.backward()
    wrapped.eval()
    rrattn.disable(wrapped if disable_wrapper else model)
    assert (logits(wrapped, tokens) == dense).all() and model.config is reference.config


# Parts, and what is there to see


def test_parts_of_a_model_are_enabled_and_disabled_in_any_order(model, tokens):
    dense = logits(model, tokens)
    both = logits(rrattn.enable(model, SPARSE), tokens)
    first, second = (layer for layer in model.sublayers() if type(layer).__name__.endswith("DecoderLayer"))
    rrattn.disable(second)
    assert_differs(logits(model, tokens), both)
    assert [core is None for core in attention_cores(model)] == [False, True]
    rrattn.enable(second, SPARSE)
    assert (logits(model, tokens) == both).all()
    rrattn.disable(first)
    config = rrattn.disable(model).config
    assert (logits(model, tokens) == dense).all()
    assert all(layer.config is config for layer in attention_layers(model))


def test_a_layer_that_runs_something_else_has_no_density(model, tokens):
    rrattn.enable(model, SPARSE)
    logits(model, tokens)
    assert None not in rrattn.layer_densities(model)
    on = flag_of(model)
    setattr(model.config, FLAG, OFF)
    assert rrattn.layer_densities(model) == rrattn.layer_selections(model) == [None] * NUM_LAYERS
    with pytest.raises(ValueError, match="not enabled"), rrattn.collect_stats(model):
        pass
    logits(model, tokens)
    setattr(model.config, FLAG, on)
    assert rrattn.layer_densities(model) == [None] * NUM_LAYERS  # the last prefill was not rrattn's
    logits(model, tokens)
    assert None not in rrattn.layer_densities(model)


@pytest.mark.parametrize("change", [lambda model: rrattn.enable(model, SPARSER), rrattn.disable])
def test_a_model_is_not_changed_while_its_statistics_are_collected(model, tokens, change):
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    with rrattn.collect_stats(model) as stats:
        with pytest.raises(ValueError, match="statistics of this model are being collected"):
            change(model)
        assert (logits(model, tokens) == sparse).all()
    assert all(layer.prefills == 1 for layer in stats.layers)
    change(model)


def test_what_is_refused_leaves_the_model_as_it_was(model, tokens):
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    with pytest.raises(ValueError, match="5 entries"):
        rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[0.5] * 5))
    assert (logits(model, tokens) == sparse).all()


def test_training_two_models_of_one_config(model):
    tokens = make_tokens(256)
    reference = built_from(model.config, model)
    dense = logits(reference, tokens)
    rrattn.enable(model, SPARSE).train()
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=model.parameters())
    for _ in range(2):  # as DPO has it, on the policy's and the reference's output
        difference = model(tokens, return_dict=True).logits - reference(tokens, return_dict=True).logits
        difference.square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    assert (logits(reference, tokens) == dense).all()
