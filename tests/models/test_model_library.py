"""A library that rrattn does not know is added by what `rrattn.integrations` says, here one of a single layer class."""

import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

import rrattn
from rrattn import info, integrations
from rrattn.integrations.common import Place, attend, core_of
from rrattn.integrations.model_library import ModelLibrary

SPARSE = rrattn.RRAttentionConfig(threshold=0.5)


def dense(layer, query, key, value):
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def sparse(layer, query, key, value):
    return attend(core_of(layer), query, key, value, None, None, causal=True)


class Attention(nn.Layer):
    __module__ = "toy.layers"  # of the library, as it were
    function = staticmethod(dense)

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, states):
        query = states.reshape([0, 0, self.config.heads, -1])
        return self.function(self, query, query, query).reshape(states.shape)


class Model(nn.Sequential):
    __module__ = "toy.models"


class ToyLibrary(ModelLibrary):
    name = "Toy"

    def __init__(self):
        self.lines = []

    def attention_layers(self, model):
        layers = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, Attention)]
        if not layers:
            raise ValueError(f"found no attention layers in {type(model).__name__}")
        return layers

    def place(self, layer):
        return Place(layer.config.layers, layer.config.heads)

    def replacements(self, layer):
        if layer.config.strange:
            raise ValueError("rrattn does not know this layer")
        return {"function": sparse}

    def log(self, line):
        self.lines.append(line)


@pytest.fixture
def library(monkeypatch):
    """The library, added to those that rrattn knows."""
    library = ToyLibrary()
    monkeypatch.setitem(sys.modules, "rrattn.integrations.toy", SimpleNamespace(LIBRARY=library))
    monkeypatch.setattr(integrations, "_LIBRARIES", (*integrations._LIBRARIES, "toy"))
    return library


def make_model(num_layers=2, strange=False, **settings):
    configs = [SimpleNamespace(layers=num_layers, heads=2, strange=False, **settings) for _ in range(num_layers)]
    configs[-1].strange = strange
    return Model(*map(Attention, configs))


@pytest.fixture
def states():
    return paddle.to_tensor(np.random.default_rng(0).standard_normal([1, 1500, 32], dtype=np.float32))


def test_it_is_enabled_and_disabled_by_the_hooks_alone(library, states):
    model = make_model(rrattn_stride=16)
    before = model(states)
    assert rrattn.enable(model, threshold=0.3) is model
    assert library.lines == ["rrattn runs 2 attention layers of Model (Toy): threshold 0.3, stride 16"]
    assert float((model(states) - before).abs().max()) > 1e-3
    assert [float(density.max()) < 1 for density in rrattn.layer_densities(model)] == [True, True]
    np.testing.assert_allclose(rrattn.enable(model, threshold=1.0)(states).numpy(), before.numpy(), atol=1e-5)
    assert rrattn.disable(model) is model
    assert (model(states) == before).all() and rrattn.layer_densities(model) == [None, None]
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(model)


def test_what_was_there_comes_back(library):
    model = make_model()
    of_its_own = model[0].function = lambda layer, query, key, value: value
    before = [dict(vars(layer)) for layer in model]
    rrattn.enable(model)
    rrattn.enable(model, SPARSE)
    assert [layer.function for layer in model] == [sparse, sparse]
    rrattn.disable(model[1])
    assert rrattn.enable(model)[1].function is sparse
    rrattn.disable(model)
    assert [vars(layer) for layer in model] == before
    assert [layer.function for layer in model] == [of_its_own, dense]


def test_a_layer_that_a_hook_refuses_leaves_all_as_they_were(library):
    model = make_model(strange=True)
    before = [dict(vars(layer)) for layer in model]
    with pytest.raises(ValueError, match="does not know this layer"):
        rrattn.enable(model)
    assert [vars(layer) for layer in model] == before


def test_layers_are_counted_where_they_do_not_know_their_number(library):
    model = make_model(3)
    rrattn.enable(model, threshold=[0.3, 0.4, 0.5])
    assert [core.threshold for core in integrations.attention_cores(model)] == [0.3, 0.4, 0.5]
    rrattn.enable(model[1:], threshold=0.6)
    with pytest.raises(ValueError, match="Model has 2 of its 3 attention layers here.*no dense_layers"):
        rrattn.enable(model[1:], dense_layers=[1])
    assert [core.threshold for core in integrations.attention_cores(model)] == [0.3, 0.6, 0.6]


def test_every_library_has_its_module_and_its_line_in_info():
    assert tuple(info.MODEL_LIBRARIES) == integrations._LIBRARIES
