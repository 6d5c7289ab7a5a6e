"""A Hugging Face LLaMA directory loads through PaddleFormers, without conversion, and runs with the flag."""

import copy
import json

import numpy as np
import pytest

import rrattn

pytest.importorskip("paddleformers")
from paddleformers.transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tiny_models import (  # noqa: E402
    DENSE,
    NUM_HEADS,
    NUM_LAYERS,
    SPARSE,
    VOCABULARY,
    assert_differs,
    assert_same,
    generate,
    logits,
    make_model,
)


@pytest.fixture(scope="module", params=[(1, True), (2, False)], ids=["one file, tied", "two files, untied"])
def checkpoint(request, tmp_path_factory):
    """(folder as Hugging Face writes it, the model that its weights are of)."""
    files, tied = request.param
    folder = tmp_path_factory.mktemp("llama")
    model = make_model(tie_word_embeddings=tied)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 16 * NUM_HEADS,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, parameter in model.named_parameters():
        weight = parameter.numpy()
        # the other library's linear layers hold [out, in]
        weights[name] = np.ascontiguousarray(weight.T) if "_proj." in name else weight
    names = sorted(weights)
    if files == 1:
        parts = {"model.safetensors": names}
    else:
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        index = {
            "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
            "weight_map": {name: part for part, held in parts.items() for name in held},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, str(folder / part), metadata={"format": "pt"})
    return folder, model


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, AutoModelForCausalLM])
def test_it_loads_and_runs_with_the_flag(checkpoint, model_class, tokens):
    folder, original = checkpoint
    expected = logits(original, tokens)
    model = model_class.from_pretrained(str(folder), dtype="float32")
    model.eval()
    model.config.fuse_rms_norm = False
    assert isinstance(model, LlamaForCausalLM)
    model.config._attn_implementation = "rrattn"
    model.config.rrattn_threshold = 1.0
    assert_same(logits(model, tokens), expected)
    assert (rrattn.layer_densities(model)[0] == 1).all()
    sparse = logits(rrattn.enable(model, SPARSE), tokens)
    assert_differs(sparse, expected)
    assert (sparse == logits(rrattn.enable(copy.deepcopy(original), SPARSE), tokens)).all()
    ours = generate(rrattn.enable(model, DENSE), tokens, 8)
    np.testing.assert_array_equal(ours, generate(original, tokens, 8))
