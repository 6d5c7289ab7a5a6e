"""Models whose heads are split over 2 and 4 processes select and compute what one process does."""

from pathlib import Path

import numpy as np
import paddle
import pytest
import tiny_models
from processes import run_ranks
from tiny_models import LIBRARY, MODELS, NUM_LAYERS, SPARSE, assert_same, generate, logits, make_model, make_tokens

import rrattn

HEADS = 8
VOCABULARY = 96  # every number of ranks divides it
# PaddleNLP's LLaMA gives a key head to two ranks where there are fewer heads than ranks; the others refuse that.
KV_HEADS = {model_type: 2 if (LIBRARY, model_type) == ("paddlenlp", "llama") else 4 for model_type in MODELS}
HEAD_THRESHOLDS = (0.5, 0.3, 0.6, 0.4, 0.7, 0.5, 0.3, 1.0)
CONFIG = rrattn.RRAttentionConfig(threshold=[0.5, HEAD_THRESHOLDS])


def make_wide_model(model_type, **parallel):
    return make_model(model_type, heads=HEADS, kv_heads=KV_HEADS[model_type], vocab_size=VOCABULARY, **parallel)


def recorded(model):
    """Logits, new tokens, and what went into and came out of the attention of each layer in a prefill.

    Named query_0, key_0, value_0, out_0, mask_0 and so on for each layer, in Paddle's layout.
    """
    results = {}
    forward = rrattn.RRAttention.forward

    def record(core, query, key, value, *arguments, **options):
        layer = sum(name.startswith("query") for name in results)
        out = forward(core, query, key, value, *arguments, **options)
        if layer < NUM_LAYERS:
            tensors = {"query": query, "key": key, "value": value, "out": out, "mask": core.last_selection.block_mask}
            results.update({f"{name}_{layer}": tensor.numpy() for name, tensor in tensors.items()})
        return out

    tokens = make_tokens() % VOCABULARY
    rrattn.RRAttention.forward = record
    try:
        results["logits"] = logits(model, tokens)
    finally:
        rrattn.RRAttention.forward = forward
    results["generated"] = generate(model, tokens, 4)
    return results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder with the weights, model type -> what one process records)."""
    folder = tmp_path_factory.mktemp("whole")
    results = {}
    for model_type in MODELS:
        model = make_wide_model(model_type)
        np.savez(folder / f"{model_type}.npz", **{name: p.numpy() for name, p in model.named_parameters()})
        results[model_type] = recorded(rrattn.enable(model, CONFIG))
    return folder, results


@pytest.fixture(scope="module", params=[2, 4])
def split(request, whole):
    """(ranks, model type -> what each rank records)."""
    ranks, folder = request.param, whole[0]
    run_ranks(Path(__file__).with_name("tensor_parallel_rank.py"), ranks, folder)
    return ranks, {
        model_type: [dict(np.load(folder / f"{model_type}_{rank}.npz")) for rank in range(ranks)]
        for model_type in MODELS
    }


@pytest.mark.parametrize("model_type", MODELS)
def test_the_ranks_together_do_what_one_process_does(model_type, whole, split):
    one = whole[1][model_type]
    ranks, parts = split[0], split[1][model_type]
    here = HEADS // ranks
    for rank, part in enumerate(parts):
        assert list(part["head_offsets"]) == [rank * here] * NUM_LAYERS
        assert part["query_0"].shape[2] == here
        assert_same(part["logits"], one["logits"])
        np.testing.assert_array_equal(part["generated"], one["generated"])

    sizes = [part["key_0"].shape[2] for part in parts]
    shared = max(1, sum(sizes) // KV_HEADS[model_type])  # ranks that hold a copy of the same key head
    for layer in range(NUM_LAYERS):
        out, mask, query = (
            np.concatenate([part[f"{name}_{layer}"] for part in parts], axis=axis)
            for name, axis in (("out", 2), ("mask", 1), ("query", 2))
        )
        key, value = (
            np.concatenate([part[f"{name}_{layer}"] for part in parts[::shared]], axis=2) for name in ("key", "value")
        )
        np.testing.assert_array_equal(mask, one[f"mask_{layer}"])
        # The products around the attention add up in another order on several ranks, so that the bits of its output
        # are those of one process on the inputs of the ranks.
        core = rrattn.RRAttention(CONFIG, threshold=CONFIG.threshold[layer])
        np.testing.assert_array_equal(out, core(*map(paddle.to_tensor, (query, key, value)), causal=True).numpy())
        np.testing.assert_array_equal(mask, core.last_selection.block_mask.numpy())
        # And had a rank counted its heads from 0, it would have selected otherwise.
        last, heads = parts[-1], slice(HEADS - here, HEADS)
        threshold = CONFIG.threshold[layer]
        core = rrattn.RRAttention(SPARSE, threshold=threshold if layer == 0 else threshold[heads])
        core(*(paddle.to_tensor(last[f"{name}_{layer}"]) for name in ("query", "key", "value")), causal=True)
        assert (core.last_selection.block_mask.numpy() != mask[:, heads]).any()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_fleet_does_not_know_are_refused(ranks):
    model = make_model()
    name = {"paddleformers": "tensor_model_parallel_size", "paddlenlp": "tensor_parallel_degree"}[LIBRARY]
    setattr(model.config, name, ranks)
    with pytest.raises(ValueError, match=f"split over {ranks} ranks.*fleet was not initialized"):
        rrattn.enable(model)
    setattr(model.config, name, 1)
    rrattn.enable(model)
    assert tiny_models.attention_layers(model)[0].__dict__["_rrattn"].config.head_offset == 0
