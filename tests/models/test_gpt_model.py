"""RRAttention in built GPTModels of PaddleFleet, of Qwen2's and Qwen3's shape and others, over the stand-in."""

import copy
import pickle

import numpy as np
import paddle
import paddlefleet_stand_in as stand_in
import pytest
from fleet_models import assert_same, assert_same_gradients, generate, gradients, logits, make_model, make_tokens

import rrattn

SHAPES = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True},
    "off-by-one": {"softmax_type": "off-by-one"},
    "sinks": {"add_full_attention_sink_bias": True, "params_dtype": "float32"},
    "sinks, windows": {
        "add_swa_attention_sink_bias": True,
        "sliding_window": (400, 0),
        "window_attn_skip_freq": [0, 1],
    },
    "mla": {"multi_latent_attention": True, "v_head_dim": 16, "num_key_value_heads": 4},
    "mla, sinks": {
        "multi_latent_attention": True,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "softmax_type": "learnable",
    },
}
LAYERS = 2


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture
def inputs(shape):
    """What a forward call gets besides tokens: windows take row indices."""
    return {"attn_mask_startend_row_indices": whole_rows()} if "sliding_window" in shape else {}


def whole_rows(batch=2):
    return rrattn.masks.document_startend_rows([[700]] * batch)


def make_sparse(fleet, shape, **settings):
    return rrattn.enable(make_model(**shape), **{"threshold": 0.5, **settings})


def held(model):
    """What each layer holds in its __dict__, by identity, but for what it holds of its sublayers and parameters."""
    return [{name: id(member) for name, member in vars(layer).items()} for layer in model.sublayers(include_self=True)]


def test_threshold_1_equals_the_dense_twin(fleet, shape, inputs):
    tokens, model = make_tokens(), make_model(**shape)
    with paddle.no_grad():
        dense = logits(model, tokens, **inputs)
    expected = gradients(model, tokens, **inputs)
    rrattn.enable(model, threshold=1.0)
    assert_same_gradients(gradients(model, tokens, **inputs), expected)
    model.eval()
    with paddle.no_grad():
        assert_same(logits(model, tokens, **inputs), dense)


def test_threshold_1_generates_what_the_dense_twin_does(fleet, shape):
    if "sliding_window" in shape:
        shape = {name: setting for name, setting in shape.items() if "window" not in name}  # takes row indices
    model = make_model(**shape)
    expected = generate(model, make_tokens(300), 32)
    np.testing.assert_array_equal(generate(rrattn.enable(model, threshold=1.0), make_tokens(300), 32), expected)


def test_below_threshold_1_it_equals_the_oracle(fleet, shape, inputs, by_oracle):
    model, tokens = make_sparse(fleet, shape), make_tokens()
    ours = gradients(model, tokens, **inputs)
    model.eval()
    sparse = logits(model, tokens, **inputs)
    assert all(float(density.min()) < 1 for density in rrattn.layer_densities(model))
    assert_same(sparse, by_oracle(logits, model, tokens, **inputs))
    assert_same_gradients(ours, by_oracle(gradients, model, tokens, **inputs))


def test_the_gradient_of_a_learned_sink_reaches_the_parameter(fleet):
    model = make_sparse(fleet, SHAPES["sinks"])
    _, grads = gradients(model, make_tokens())
    sinks = [name for name in grads if name.endswith("softmax_offset")]
    assert len(sinks) == LAYERS and all((grads[name] != 0).all() for name in sinks)


def test_disable_restores_all(fleet, shape):
    model, tokens = make_model(**shape), make_tokens(300)
    before, config, expected = held(model), dict(vars(model.config)), generate(model, tokens, 4)
    names = list(model.state_dict())
    rrattn.enable(model, threshold=0.5)
    assert list(model.state_dict()) == names and held(model) != before
    rrattn.disable(model)
    assert held(model) == before and vars(model.config) == config
    np.testing.assert_array_equal(generate(model, tokens, 4), expected)
    with pytest.raises(ValueError, match="not enabled"):
        rrattn.disable(model)


def test_enabling_changes_this_model_alone_and_copies_have_it(fleet):
    model, tokens = make_model(), make_tokens()
    other = copy.deepcopy(model)
    dense = logits(other, tokens)
    rrattn.enable(model, threshold=0.5)
    sparse = logits(model, tokens)
    assert float((sparse - dense).abs().max()) > 1e-2
    assert (logits(other, tokens) == dense).all()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (logits(twin, tokens) == sparse).all()
        rrattn.disable(twin)
        assert (logits(twin, tokens) == dense).all()
    assert (logits(model, tokens) == sparse).all()


def test_settings_of_the_models_config(fleet):
    model = rrattn.enable(make_model(rrattn_threshold=[0.3, 1.0]))
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]


def test_layers_are_numbered_without_empty_ones_and_predicting_ones_come_last(fleet):
    settings = {"num_empty_layers_add_in_head": 3, "num_nextn_predict_layers": 1}
    model = rrattn.enable(make_model(**settings), rrattn.RRAttentionConfig(threshold=[0.5, 1.0, 0.4]))
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True, False]
    with pytest.raises(ValueError, match="3"):
        rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[0.5, 1.0]))


def test_layers_come_in_the_order_of_their_numbers(fleet):
    model = make_model()
    model.layers = paddle.nn.LayerList(list(model.layers)[::-1])  # as stages of a pipeline may interleave
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[0.3, 1.0]))
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]


def test_layers_of_versions_that_do_not_number_them_are_counted(fleet, monkeypatch):
    model = make_model()
    for layer in model.layers:
        del layer.self_attn.core_attention.is_mtp_layer, layer.self_attn.core_attention.hybrid_mla_cp_mode
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=[0.3, 1.0]))
    logits(model, make_tokens())
    assert [float(density.mean()) == 1 for density in rrattn.layer_densities(model)] == [False, True]
    with pytest.raises(ValueError, match="1 of its 2 attention layers"):
        rrattn.enable(model.layers[1], rrattn.RRAttentionConfig(dense_layers=[1]))


@pytest.mark.parametrize("shape", ["qwen3", "mla, sinks"])
def test_recomputed_core_attention(fleet, shape):
    tokens = make_tokens()
    expected = gradients(make_sparse(fleet, SHAPES[shape]), tokens)
    recomputed = make_sparse(fleet, {**SHAPES[shape], "recompute_core_attention": True})
    assert_same_gradients(gradients(recomputed, tokens), expected)


def test_tensor_parallel_ranks_have_the_settings_of_their_heads(fleet, monkeypatch):
    config = rrattn.RRAttentionConfig(threshold=[(0.5, 0.2, 0.7, 0.4)])
    paddle.seed(3)
    query, (key, value) = 3 * paddle.randn([1, 700, 4, 16]), paddle.randn([2, 1, 700, 2, 16])

    def attend(rank, ranks, heads, kv_heads):
        monkeypatch.setattr(stand_in.ProcessGroupCollection, "tp_group", stand_in.group(rank, ranks))
        settings = {"num_hidden_layers": 1, "add_full_attention_sink_bias": True}
        core = make_model(**settings).layers[0].self_attn.core_attention
        core.softmax_offset.set_value(paddle.to_tensor([0.5, -1.0, 2.0, 3.0])[heads])
        rrattn.enable(core, config)
        out = core(query[:, :, heads], key[:, :, kv_heads], value[:, :, kv_heads], None)
        return out.numpy(), rrattn.layer_selections(core)[0].block_mask.numpy()

    out, mask = attend(0, 1, slice(0, 4), slice(0, 2))
    parts = [attend(rank, 2, slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts], axis=2), out)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], axis=1), mask)


def test_ranks_that_are_not_those_of_the_layers_are_refused(fleet, monkeypatch):
    model = make_model()
    monkeypatch.setattr(stand_in.ProcessGroupCollection, "tp_group", stand_in.group(0, 2))
    with pytest.raises(ValueError, match="4 of its 4 heads here.*one of 2 tensor-parallel ranks"):
        rrattn.enable(model)


class Tower(paddle.nn.Layer):
    """A model with a vision tower, whose attention is not causal."""

    def __init__(self):
        super().__init__()
        self.language_model = make_model()
        groups = stand_in.ProcessGroupCollection.use_mpu_process_groups()
        core, kind = stand_in.DotProductAttention, stand_in.AttnMaskType.no_mask
        self.vision = stand_in.SelfAttention(self.language_model.config, core, 0, groups, mask_type=kind)
        self.eval()


def test_vision_towers_stay_as_they_are(fleet, monkeypatch):
    monkeypatch.setattr(Tower, "__module__", "paddlefleet.models.multimodal")
    model, patches = Tower(), paddle.randn([1, 300, 64])
    features, before = model.vision(patches, paddle.arange(300)), held(model.vision)
    rrattn.enable(model, threshold=0.5)
    assert (model.vision(patches, paddle.arange(300)) == features).all() and held(model.vision) == before
    assert len(rrattn.layer_densities(model)) == LAYERS
    with pytest.raises(ValueError, match="SelfAttention has no causal DotProductAttention"):
        rrattn.enable(model.vision)


class OtherAttention(stand_in.DotProductAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class LatentAttention(paddle.nn.Layer):
    def __init__(self, **options):
        super().__init__()


@pytest.mark.parametrize("kind", [OtherAttention, LatentAttention])
def test_other_core_attentions_are_refused_by_name(fleet, kind):
    model = make_model(lambda **options: (kind if options["layer_number"] else stand_in.DotProductAttention)(**options))
    before = held(model)
    with pytest.raises(ValueError, match=f"{kind.__name__} as core attention, which this GPTModel has"):
        rrattn.enable(model)
    assert held(model) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling=True"),
        ({"gpt_model_use_experimental_version": True}, "gpt_model_use_experimental_version=True"),
        ({"sliding_window": (128, 0), "head_wise_swa_ratio": 0.5}, r"head_wise_swa_ratio=0\.5"),
        ({"rrattn_treshold": 0.5}, "rrattn_treshold"),
    ],
)
def test_models_that_are_not_supported_are_refused_and_left_as_they_were(fleet, settings, message):
    model = make_model(**settings)
    before = held(model)
    with pytest.raises(ValueError, match=message):
        rrattn.enable(model)
    assert held(model) == before


def test_a_window_that_layers_do_not_tell_of_is_refused(fleet):
    model = make_model(sliding_window=(128, 0))
    for layer in model.layers:
        del layer.self_attn.core_attention.is_swa
    with pytest.raises(ValueError, match=r"sliding_window=\(128, 0\) with this version"):
        rrattn.enable(model)


def test_a_prefill_with_a_window_takes_row_indices(fleet):
    model = rrattn.enable(make_model(sliding_window=(128, 0)))
    with pytest.raises(ValueError, match="sliding_window 128 takes attn_mask_startend_row_indices"):
        logits(model, make_tokens())
