"""Every family of PaddleFormers' models: threshold 1 against the dense twin, less against the oracle's attention."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import paddle
import pytest

pytest.importorskip("paddleformers")

import paddleformers  # noqa: E402
from families import FAMILIES, GPT_MODEL_ALONE, VERSIONS, build  # noqa: E402
from tiny_models import assert_differs, assert_same, assert_same_gradients, generate, gradients, logits  # noqa: E402

import rrattn  # noqa: E402
from rrattn.integrations import attention_cores  # noqa: E402
from rrattn.integrations.paddleformers import FAMILIES as KNOWN  # noqa: E402
from rrattn.integrations.paddleformers import LIBRARY  # noqa: E402

VERSION = metadata.version("paddleformers")
HERE = [family for family in FAMILIES if VERSION in family.versions()]
WITH_TOWER = [family for family in HERE if family.tower is not None]
PROMPT = 140  # more than a window
LENGTH = 500  # four blocks, the last one partial, and more than a window
DENSE = rrattn.RRAttentionConfig(threshold=1.0)
SPARSE = rrattn.RRAttentionConfig(threshold=0.3, keep_local=0, keep_last=False)


def each(families):
    return pytest.mark.parametrize("family", families, ids=[family.name for family in families])


@pytest.fixture
def tokens():
    return paddle.to_tensor(np.random.default_rng(1).integers(3, 80, [1, LENGTH]))


def gradients_of(model, tokens):
    step = gradients(model, tokens)
    model.eval()
    return step


def text_of(model, family, tokens, **settings):
    """32 tokens more, greedy."""
    prompt = tokens[:, :PROMPT]
    if family.generates:
        return generate(model, prompt, 32, **settings)
    for _ in range(32):
        last = paddle.to_tensor(logits(model, prompt)[:, -1:].argmax(-1))
        prompt = paddle.concat([prompt, last], axis=1)
    return prompt[:, PROMPT:].numpy()


def state_of(model):
    """All that `enable` could change: attributes of layers and of their classes, and configs."""
    layers = model.sublayers(include_self=True)
    held = [value for layer in layers for value in vars(layer).values()]
    objects = [*layers, *{type(layer) for layer in layers}, *(value for value in held if hasattr(value, "model_type"))]
    return [(each, dict(vars(each))) for each in objects]


def assert_unchanged(before):
    for each, attributes in before:
        now = vars(each)
        assert set(now) == set(attributes), each
        for name, value in attributes.items():
            assert now[name] is value or isinstance(value, paddle.Tensor) or now[name] == value, (each, name)


@each(HERE)
def test_a_family(family, tokens, by_oracle):
    model = build(family)
    # PaddleFormers' own attention reads a mask wrongly when the cache of a window is full
    cache = {"use_cache": False} if "sliding_window" in family.settings else {}
    dense = logits(model, tokens), gradients_of(model, tokens), text_of(model, family, tokens, **cache)
    before = state_of(model)
    rrattn.enable(model, DENSE)
    assert_same(logits(model, tokens), dense[0])
    assert_same_gradients(gradients_of(model, tokens), dense[1])
    np.testing.assert_array_equal(text_of(model, family, tokens), dense[2])
    rrattn.enable(model, SPARSE)
    sparse = logits(model, tokens)
    assert_differs(sparse, dense[0])
    assert_same(sparse, by_oracle(logits, model, tokens))
    assert_same_gradients(gradients_of(model, tokens), by_oracle(gradients_of, model, tokens))
    assert rrattn.disable(model) is model
    assert_unchanged(before)
    assert (logits(model, tokens) == dense[0]).all()


@each(HERE)
def test_the_class_is_the_one_that_the_list_says(family):
    old = type(build(family)).__name__.endswith(("Deprecated", "Decapitated"))
    assert old == (VERSION in family.old_class)


@each(HERE)
def test_the_flag_runs_a_family_or_says_why_not(family, tokens):
    model = build(family)
    expected = logits(rrattn.enable(model), tokens)
    (config,) = {id(layer.config): layer.config for layer in LIBRARY.attention_layers(rrattn.disable(model))}.values()
    config._attn_implementation = "rrattn"
    refused = {
        "gemma3_text": "runs 'eager': it took its own .*rrattn.enable",
        "ernie4_5": "runs 'eager': it took its own .*rrattn.enable",
        "ernie4_5_moe": "runs 'eager': it took its own .*rrattn.enable",
        "deepseek_v3": "Layer has no config and layer_idx.*rrattn.enable",
        "ernie4_5_moe_vl": "no attention layer of Ernie4_5_Model looks it up.*rrattn.enable",
    }
    if family.name in refused:
        with pytest.raises(ValueError, match=refused[family.name]):
            logits(model, tokens)
    else:
        assert (logits(model, tokens) == expected).all()
        assert None not in rrattn.layer_densities(model)


def test_the_list_is_what_rrattn_knows():
    assert {family.attention_type for family in FAMILIES} == KNOWN
    assert VERSION in VERSIONS


def test_every_family_that_looks_up_the_table_is_in_the_list():
    folder = Path(paddleformers.__file__).parent / "transformers"
    with_table = {
        path.parent.name for path in folder.glob("*/modeling*.py") if "ALL_ATTENTION_FUNCTIONS" in path.read_text()
    }
    assert with_table <= {family.name for family in HERE}
    others = {path.parent.name for path in folder.glob("*/modeling.py")} - {family.name for family in HERE} - {"auto"}
    assert others == (set(GPT_MODEL_ALONE) if VERSION == "1.2.0" else set())


def test_packages_are_missing_as_the_list_says():
    program = f"""
import importlib
for name in {[family.name for family in HERE]}:
    module = "model.modeling_moe_vl" if name == "ernie4_5_moe_vl" else "modeling"
    try:
        importlib.import_module(f"paddleformers.transformers.{{name}}.{{module}}")
    except (ImportError, NameError):
        print("missing:", name)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    missing = {line.split()[1] for line in process.stdout.splitlines() if line.startswith("missing:")}
    assert missing == {family.name for family in HERE if VERSION in family.missing}


# Models of pictures and text


@each([family for family in WITH_TOWER if family.name != "ernie4_5_moe_vl"])
def test_the_flag_on_a_tower_for_pictures_is_an_error(family):
    model = build(family)
    (tower,) = {
        id(layer.config): layer
        for layer in model.sublayers()
        if LIBRARY.is_attention(layer) and layer not in LIBRARY.attention_layers(model)
    }.values()
    tower.config._attn_implementation = "rrattn"
    part = paddle.zeros([1, 2, 16, 16])
    with pytest.raises(ValueError, match=f"{type(tower).__name__} has no config and layer_idx.*the config of the text"):
        LIBRARY.rrattn_attention_forward(tower, part, part, part, is_causal=False)


@each(WITH_TOWER)
def test_the_tower_for_pictures_stays_as_it_was(family):
    model = build(family)
    text = LIBRARY.attention_layers(model)
    others = [layer for layer in model.sublayers() if not any(layer is part for part in parts_of(text))]
    before = [(layer, {name: held for name, held in vars(layer).items() if name != "config"}) for layer in others]
    tower = [layer for layer in others if LIBRARY.is_attention(layer)]
    flags = [layer.config._attn_implementation for layer in tower]
    rrattn.enable(model, SPARSE)
    assert all(
        {**vars(layer), "config": 0} == {**held, "config": 0} for layer, held in before if "config" in vars(layer)
    )
    assert [layer.config._attn_implementation for layer in tower] == flags
    assert len(attention_cores(model)) == len(text)


def parts_of(layers):
    return [part for layer in layers for part in layer.sublayers(include_self=True)]


def test_settings_of_a_whole_config_are_not_left_unread():
    family = next(family for family in WITH_TOWER if family.name == "qwen2_5_vl")
    model = build(family)
    model.config.rrattn_threshold = 0.5
    with pytest.raises(
        ValueError, match="has rrattn_threshold, which its attention layers do not see.*'qwen2_5_vl_text'"
    ):
        rrattn.enable(model)
    del model.config.rrattn_threshold
    model.config.text_config.rrattn_threshold = 0.5
    assert [core.threshold for core in attention_cores(rrattn.enable(model))] == [0.5, 0.5]
