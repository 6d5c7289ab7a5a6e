"""Qwen2 and Qwen3 of PaddleFormers 1.2, which builds its GPTModel for them: its own classes over the stand-in."""

import enum
import importlib
import sys
from dataclasses import dataclass, fields
from importlib import metadata, util
from types import ModuleType

import numpy as np
import paddle
import paddlefleet_stand_in as stand_in
import pytest
from families import GPT_MODEL, VERSIONS
from fleet_models import assert_same, assert_same_gradients, generate, gradients, logits, make_tokens

import rrattn

if not util.find_spec("paddleformers") or metadata.version("paddleformers") == VERSIONS[0]:
    pytest.skip("this PaddleFormers builds its own models of these families", allow_module_level=True)
importlib.import_module("paddleformers.transformers.llama.modeling")  # and what else needs no PaddleFleet, without it


class ModelType(enum.Enum):
    encoder_or_decoder = 1


@dataclass
class GPTConfig(stand_in.TransformerConfig):
    """Takes what it knows from a model's config, as PaddleFleet's does."""

    pipeline_model_parallel_size: int = 1
    separate_mtp_headloss: bool = False

    @classmethod
    def from_config(cls, config):
        given = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}
        return cls(**given)


def gpt_builder(config, num_stages, seg_method, loss_fn):
    assert num_stages == 1 and loss_fn is None
    return stand_in.GPTModel(config)


# Modules of PaddleFleet that PaddleFormers' providers import, beside those of the stand-in.
MODULES = {
    "paddlefleet.gpt_builders": {"gpt_builder": gpt_builder},
    "paddlefleet.models.gpt.gpt_config": {"GPTConfig": GPTConfig},
    "paddlefleet.models.gpt.gpt_layer_specs": {"get_gpt_layer_local_spec": None},
    "paddlefleet.parallel_state": {},
    "paddlefleet.tensor_parallel": {},
    "paddlefleet.transformer.layer": {"FleetLayer": paddle.nn.Layer},
    "paddlefleet.utils": {"get_model_config": None},
}


@pytest.fixture
def make_model(fleet, monkeypatch):
    """make_model(family): a model of PaddleFormers, in eval mode with random weights."""
    from paddleformers.utils import import_utils

    for name, members in MODULES.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, attribute = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], attribute, module, raising=False)
    monkeypatch.setattr(sys.modules["paddlefleet.transformer.enums"], "ModelType", ModelType, raising=False)
    monkeypatch.setattr(import_utils, "is_paddlefleet_available", lambda: True)
    package = "paddleformers.transformers"
    ours = [f"{package}.{name}" for name in ("gpt_provider", "model_provider", *(f"{f}.modeling" for f in GPT_MODEL))]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(family):
        transformers = importlib.import_module(f"{package}.{family}.modeling")
        configuration = importlib.import_module(f"{package}.{family}.configuration")
        name = family.capitalize()
        config = getattr(configuration, f"{name}Config")(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=0,
        )
        paddle.seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.set_value(0.3 * paddle.randn(parameter.shape))
        model.eval()
        return model

    yield make
    for name in ours:
        sys.modules.pop(name, None)


@pytest.fixture(params=GPT_MODEL)
def model(make_model, request):
    return make_model(request.param)


def test_they_are_paddlefleets(model):
    assert type(model).__module__ == "paddleformers.transformers.gpt_provider"
    assert isinstance(model, stand_in.GPTModel)


def test_threshold_1_equals_the_dense_twin(model):
    tokens = make_tokens()
    with paddle.no_grad():
        dense = logits(model, tokens)
    made, expected = generate(model, tokens, 32), gradients(model, tokens)
    model.eval()
    rrattn.enable(model, threshold=1.0)
    np.testing.assert_array_equal(generate(model, tokens, 32), made)
    assert_same_gradients(gradients(model, tokens), expected)
    model.eval()
    with paddle.no_grad():
        assert_same(logits(model, tokens), dense)


def test_below_threshold_1_it_equals_the_oracle(model, by_oracle):
    tokens = make_tokens()
    dense = logits(model, tokens)
    rrattn.enable(model, threshold=0.5)
    sparse = logits(model, tokens)
    assert all(float(density.min()) < 1 for density in rrattn.layer_densities(model))
    assert_same(sparse, by_oracle(logits, model, tokens))
    assert (logits(rrattn.disable(model), tokens) == dense).all()


def test_settings_in_the_models_config(model):
    model.config.rrattn_threshold = [0.3, 1.0]
    logits(rrattn.enable(model), make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]
