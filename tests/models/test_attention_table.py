"""Attention layers that are not plain: they ask under another name, for no layer, or have a function of their own."""

import copy
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

pytest.importorskip("paddleformers")

import paddleformers  # noqa: E402
from families import FAMILIES, UNDER_PADDLEFLEET, build  # noqa: E402
from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from paddleformers.transformers import PretrainedConfig  # noqa: E402
from tiny_models import assert_differs, assert_same, assert_same_gradients, gradients, logits, make_model  # noqa: E402

import rrattn  # noqa: E402
from rrattn import integrations  # noqa: E402
from rrattn.integrations.paddleformers import LIBRARY  # noqa: E402

DENSE = rrattn.RRAttentionConfig(threshold=1.0)
SPARSE = rrattn.RRAttentionConfig(threshold=0.3, keep_local=0, keep_last=False)


def built(name, **settings):
    return build(next(family for family in FAMILIES if family.name == name), **settings)


@pytest.fixture
def tokens():
    return paddle.to_tensor(np.random.default_rng(1).integers(3, 80, [1, 500]))


# Which layers they are


class Attention(nn.Layer):
    """Of a new family: it looks the function up in a method, and hands down an argument of its own."""

    def __init__(self, number, **arguments):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=1, num_attention_heads=2)
        self.config.model_type = "new"
        self.layer_idx, self.arguments = number, arguments

    def forward(self, states):
        return self.attend(states.transpose([0, 2, 1, 3]))

    def attend(self, states):
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(self, states, states, states, scaling=0.25, **self.arguments)[0]


class WithoutTable(Attention):
    def attend(self, states):
        return states


STATES = paddle.to_tensor(np.random.default_rng(0).standard_normal([1, 300, 2, 16], dtype=np.float32))


def test_a_layer_of_a_new_family_is_found_by_its_code():
    model = nn.Sequential(Attention(0), WithoutTable(1))
    rrattn.enable(model, DENSE)
    assert [core is None for core in integrations.attention_cores(model)] == [False]
    expected = rrattn.rr_attention(STATES, STATES, STATES, causal=True, threshold=1.0, softmax_scale=0.25)
    np.testing.assert_allclose(model[0](STATES).numpy(), expected.reshape([1, 300, 32]).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="no integration for .*WithoutTable"):
        rrattn.enable(model[1])


def test_what_a_new_family_asks_for_beyond_is_refused():
    model = rrattn.enable(Attention(0, attention_bias=paddle.ones([3])), DENSE)
    with pytest.raises(ValueError, match=r"attention argument attention_bias, got a tensor of shape \[3\]"):
        model(STATES)


def test_a_config_that_cannot_have_a_flag_of_its_own_leaves_the_model_as_it_was():
    model = Attention(0)
    model.config = SimpleNamespace(**vars(model.config))
    before = dict(vars(model))
    with pytest.raises(TypeError, match="SimpleNamespace"):
        rrattn.enable(model)
    assert vars(model) == before and model.config._attn_implementation == "eager"


def test_layers_without_a_number_are_named():
    with pytest.raises(ValueError, match="no attention layers in Attention: .* a layer_idx, which Attention lack"):
        LIBRARY.attention_layers(Attention(None))


def test_the_library_is_that_of_the_layers(monkeypatch):
    """A model of PaddleFormers that is built of PaddleFleet's layers is PaddleFleet's."""
    fleets = type("Attention", (nn.Layer,), {"__module__": "paddlefleet.transformer.attention"})
    theirs = type("Qwen3ForCausalLM", (nn.Sequential,), {"__module__": "paddleformers.transformers.qwen3.modeling"})
    library = object()
    monkeypatch.setitem(sys.modules, "rrattn.integrations.paddlefleet", SimpleNamespace(LIBRARY=library))
    assert integrations._library_of(theirs(fleets())) is library
    assert integrations._library_of(nn.Sequential(make_model(), fleets())) is LIBRARY
    assert integrations._library_of(theirs()) is LIBRARY  # whose message says what is missing


@pytest.mark.skipif(metadata.version("paddleformers") != "1.0.0", reason="it imports other parts of PaddleFleet")
@pytest.mark.parametrize("name", UNDER_PADDLEFLEET)
def test_models_under_paddlefleets_name(name, tmp_path):
    """PaddleFleet has PaddleFormers' models as well: here PaddleFormers' own sources under that name."""
    (tmp_path / "paddlefleet").symlink_to(Path(paddleformers.__file__).parent)
    title = next(family.classes for family in FAMILIES if family.name == name)
    program = f"""
import numpy as np
import paddle
import rrattn
from paddlefleet.transformers.{name}.configuration import {title}Config
from paddlefleet.transformers.{name}.modeling import {title}ForCausalLM

sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=2)
config = {title}Config(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3, **sizes)
config.fuse_rms_norm = False
model = {title}ForCausalLM(config)
model.eval()
tokens = paddle.to_tensor(np.random.default_rng(1).integers(3, 97, [1, 500]))
dense = model(tokens, return_dict=True).logits
for threshold in (1.0, 0.3):
    rrattn.enable(model, threshold=threshold, keep_local=0, keep_last=False)
    enabled = model(tokens, return_dict=True).logits
    assert (float((enabled - dense).abs().max()) < 1e-4) == (threshold == 1), threshold
    rrattn.disable(model)
    assert (model(tokens, return_dict=True).logits == dense).all()
config._attn_implementation, config.rrattn_threshold = "rrattn", 0.3
config.rrattn_keep_local, config.rrattn_keep_last = 0, False
assert (model(tokens, return_dict=True).logits == enabled).all()
"""
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{program}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"rrattn runs 2 attention layers of {title}ForCausalLM (PaddleFleet)" in process.stdout + process.stderr


# Gemma 3, whose layers ask for "sdpa" where there is no mask


def test_gemma_is_enabled_whatever_name_it_asks_for(tokens):
    model = built("gemma3_text")
    layers = LIBRARY.attention_layers(model)
    held = [layer.attn_implementation for layer in layers]
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    assert layers[1].attn_implementation == "sdpa"  # of full attention
    assert None not in rrattn.layer_densities(model)
    assert (logits(model, tokens) == sparse).all()
    model.config._attn_implementation = "eager"
    assert rrattn.layer_densities(model) == [None, None]
    rrattn.disable(model)
    assert [layer.attn_implementation for layer in layers] == held


# DeepSeek V3, whose layers hold a function that calls the table with a bare layer


def test_every_layer_of_deepseek_has_a_core_of_its_own(tokens):
    model = built("deepseek_v3")
    rrattn.enable(model, threshold=[1.0, 0.3], keep_local=0, keep_last=False)
    logits(model, tokens)
    dense, sparse = rrattn.layer_densities(model)
    assert (dense == 1).all() and float(sparse.min()) < 1


def test_copies_of_deepseek_run_by_themselves(tokens):
    model = built("deepseek_v3")
    dense, sparse = logits(model, tokens), logits(rrattn.enable(model, SPARSE), tokens)
    pickled = pickle.loads(pickle.dumps(model))
    for parameter in pickled.parameters():
        parameter.is_distributed = False  # Paddle pickles parameters as tensors, which lack what PaddleFormers asks for
    for other in (copy.deepcopy(model), pickled):
        assert (logits(other, tokens) == sparse).all()
        for layer, original in zip(LIBRARY.attention_layers(other), LIBRARY.attention_layers(model)):
            assert layer.attn_func.layer is layer is not original
        assert (logits(rrattn.disable(other), tokens) == dense).all()
    assert (logits(model, tokens) == sparse).all()


def test_deepseek_with_recomputed_attention(tokens):
    model = rrattn.enable(built("deepseek_v3"), SPARSE)
    expected = gradients(model, tokens)
    model.config.recompute_granularity, model.config.recompute_modules = "selective", ["core_attn"]
    model.config.recompute_use_reentrant = True
    calls = []
    for layer in LIBRARY.attention_layers(model):
        core = integrations.common.core_of(layer)
        core.register_forward_post_hook(lambda *_: calls.append(0))
    assert_same_gradients(gradients(model, tokens), expected)
    assert len(calls) == 4  # twice a layer


def test_layers_that_predict_further_tokens_have_the_settings_of_the_last(tokens):
    model = built("deepseek_v3", num_nextn_predict_layers=1, first_k_dense_replace=3)
    rrattn.enable(model, threshold=[0.5, 0.3])
    assert [core.threshold for core in integrations.attention_cores(model)] == [0.5, 0.3, 0.3]


# ERNIE 4.5 VL, whose layers hold their own attention function


def test_ernie_vl_follows_its_flag_while_it_is_enabled(tokens):
    model = built("ernie4_5_moe_vl")
    dense, sparse = logits(model, tokens), logits(rrattn.enable(model, SPARSE), tokens)
    assert_differs(sparse, dense)
    model.config._attn_implementation = "eager"
    assert (logits(model, tokens) == dense).all()
    assert rrattn.layer_densities(model) == [None, None]


def test_ernie_vl_with_masks(tokens):
    model = built("ernie4_5_moe_vl", use_flash_attention=False, scale_qk_coeff=1.0)  # which needs a mask
    causal = paddle.tril(paddle.ones([1, 1, 500, 500], dtype="bool"))
    padded = causal & (paddle.arange(500) < 410)
    dense = [logits(model, tokens, attention_mask=mask) for mask in (causal, padded)]
    rrattn.enable(model, DENSE)
    assert_same(logits(model, tokens, attention_mask=causal), dense[0])
    assert_same(logits(model, tokens, attention_mask=padded), dense[1])
    assert_same(logits(model, tokens), dense[0])


def test_ernie_vl_with_dropout_in_training_is_an_error(tokens):
    model = rrattn.enable(built("ernie4_5_moe_vl", attention_probs_dropout_prob=0.1), DENSE)
    logits(model, tokens)
    model.train()
    with pytest.raises(ValueError, match="attention_probs_dropout_prob to 0.0, got 0.1"):
        model(tokens)


def test_a_function_of_ernie_vl_that_is_not_known_leaves_the_model_as_it_was(tokens):
    model = built("ernie4_5_moe_vl")
    layers = LIBRARY.attention_layers(model)
    layers[1].attn_func = functions = lambda *arguments: arguments
    before = [dict(vars(layer)) for layer in model.sublayers(include_self=True)]
    with pytest.raises(ValueError, match="does not support the attn_func .*cachekv_quant"):
        rrattn.enable(model)
    assert [dict(vars(layer)) for layer in model.sublayers(include_self=True)] == before
    assert layers[1].attn_func is functions and model.config._attn_implementation == "eager"
