"""PaddleNLP's LLaMA trains on sequences that 2 and 4 processes share as one process does, and what is refused."""

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import rrattn

paddlenlp = pytest.importorskip("paddlenlp")

from context_parallel_rank import block_masks_of  # noqa: E402
from fleet_ranks import part_of  # noqa: E402
from processes import run_ranks  # noqa: E402
from tiny_models import (  # noqa: E402
    MODELS,
    NUM_LAYERS,
    assert_same,
    assert_same_gradients,
    attention_layers,
    gradients,
    logits,
    make_model,
    make_tokens,
)

from rrattn.integrations import common  # noqa: E402
from rrattn.integrations import paddlenlp as integration  # noqa: E402
from rrattn.sequence_chunks import chunks_of_rank  # noqa: E402

OLD = paddlenlp.__version__.startswith("2.")
BY_HEADS, BY_CHUNKS = "sep_parallel_degree", "context_parallel_degree"
SPLITS = (BY_HEADS,) if OLD else (BY_HEADS, BY_CHUNKS)
LAYOUTS = {BY_HEADS: "all_to_all", BY_CHUNKS: "dual_chunk"}
RANKS = ((1, 2), (1, 4), (2, 2))  # tensor-parallel ones, and those that share a sequence
HEADS, KV_HEADS = 8, 4
VOCABULARY = 96  # every number of tensor-parallel ranks divides it
LENGTH = 1024  # of four ranks, each has two chunks of 128
HEAD_THRESHOLDS = (0.5, 0.3, 0.6, 0.4, 0.7, 0.5, 0.3, 1.0)
CONFIG = rrattn.RRAttentionConfig(threshold=[0.5, HEAD_THRESHOLDS])


def make_split_model(**parallel):
    return make_model(heads=HEADS, kv_heads=KV_HEADS, vocab_size=VOCABULARY, seq_length=LENGTH, **parallel)


def inputs_of(case):
    """What the model gets beside the tokens, the same on every rank."""
    if case != "documents":
        return {}
    rows = rrattn.masks.document_startend_rows([[300, 500, 224], [640, 384]])
    return {"attn_mask_startend_row_indices": rows.squeeze(-1)}


def cases(**parallel):
    """What is run of a model."""
    if parallel.get("sequence_parallel"):
        return ["plain"]
    return ["plain", "full", "core_attn", *([] if OLD else ["documents"])]


def all_tokens():
    return make_tokens(LENGTH) % VOCABULARY


def trained(model, tokens, **inputs):
    """(loss, name -> gradient, logits, block masks of the prefill)."""
    loss, grads = gradients(model, tokens, **inputs)
    model.eval()
    found, masks = block_masks_of(lambda: logits(model, tokens, **inputs))
    return loss, grads, found, masks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(file with the weights, case -> what one process does)."""
    file = tmp_path_factory.mktemp("whole") / "llama.npz"
    model = make_split_model()
    np.savez(file, **{name: parameter.numpy() for name, parameter in model.named_parameters()})
    rrattn.enable(model, CONFIG)
    done = {case: trained(model, all_tokens(), **inputs_of(case)) for case in cases() if case in ("plain", "documents")}
    return file, done


@pytest.fixture(scope="module")
def run_processes(whole, tmp_path_factory):
    """A function of the number of processes, 2 or 4: the folder with what each did, run once."""

    @cache
    def run(processes):
        folder = tmp_path_factory.mktemp("ranks")
        (folder / whole[0].name).symlink_to(whole[0])
        (folder / "ranks.json").write_text(json.dumps([ranks for ranks in RANKS if ranks[0] * ranks[1] == processes]))
        run_ranks(Path(__file__).with_name("split_sequences_rank.py"), processes, folder)
        return folder

    return run


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks[0]}x{ranks[1]}")
def split(request, run_processes):
    """(tensor-parallel ranks, ranks of a sequence, folder with what each rank did)."""
    tensor_ranks, sequence_ranks = request.param
    return tensor_ranks, sequence_ranks, run_processes(tensor_ranks * sequence_ranks)


def results_of(split, name, rank):
    """(loss, name -> gradient, logits, block masks) that a rank left."""
    tensor_ranks, sequence_ranks, folder = split
    stored = dict(np.load(folder / f"{name}_{tensor_ranks}x{sequence_ranks}_{rank}.npz"))
    loss, found = float(stored.pop("loss")), stored.pop("logits")
    masks = [stored.pop(f"mask_{i}") for i in range(sum(key.startswith("mask_") for key in stored))]
    return loss, stored, found, masks


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("case", cases())
def test_the_ranks_together_do_what_one_process_does(by, case, split, whole):
    check(split, whole, by, case, f"{by}_{case}")


def test_sequence_parallelism_changes_nothing(split, whole):
    if split[0] == 1:
        pytest.skip("there are no tensor-parallel ranks, which sequence parallelism takes")
    check(split, whole, BY_HEADS, "plain", f"{BY_HEADS}_sequence_parallel_plain")


def check(split, whole, by, case, name):
    tensor_ranks, sequence_ranks, _ = split
    loss, grads, found, masks = whole[1]["documents" if case == "documents" else "plain"]
    for rank in range(tensor_ranks * sequence_ranks):
        sequence_rank, tensor_rank = divmod(rank, tensor_ranks)
        loss_here, grads_here, found_here, masks_here = results_of(split, name, rank)

        held = chunks_of_rank(LAYOUTS[by], sequence_ranks, sequence_rank)
        chunks = np.split(found, len(held) * sequence_ranks, axis=1)
        assert_same(found_here, np.concatenate([chunks[i] for i in held], axis=1))
        parts = {
            key: part_of(grad, grads_here[key].shape, tensor_rank, tensor_ranks, key) for key, grad in grads.items()
        }
        assert_same_gradients((loss_here, grads_here), (loss, parts))

        heads = np.split(np.arange(HEADS), tensor_ranks)[tensor_rank]
        if by == BY_HEADS:
            heads, held = np.split(heads, sequence_ranks)[sequence_rank], [0]
        assert len(masks_here) == NUM_LAYERS * len(held)
        for i, mask in enumerate(masks_here):
            layer, place = divmod(i, len(held))
            of_layer = masks[layer][:, heads]
            if by == BY_CHUNKS:
                of_layer = np.split(of_layer, 2 * sequence_ranks, axis=2)[held[place]]
            np.testing.assert_array_equal(mask, of_layer)


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("case", ["full", "core_attn"])
def test_recompute_changes_no_gradient(by, case, split):
    for rank in range(split[0] * split[1]):
        plain, again = (results_of(split, f"{by}_{which}", rank)[1] for which in ("plain", case))
        for name, grad in plain.items():
            np.testing.assert_array_equal(again[name], grad, err_msg=name)


# What is refused


def built(model_type="llama", **settings):
    """A model whose config has these settings, and which was built without them: that takes processes."""
    model = make_model(model_type)
    for name, setting in settings.items():
        setattr(model.config, name, setting)
    return model


def exchanging(model, **attributes):
    """The model, whose attention layers have what one that is built for sep_parallel_degree has."""
    for layer in attention_layers(model):
        vars(layer).update(reshard_layer=paddle.nn.Identity(), **attributes)
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({BY_HEADS: 2, BY_CHUNKS: 2}, "either sep_parallel_degree=2 or context_parallel_degree=2, not both"),
        ({BY_HEADS: 2}, "sep_parallel_degree=2 in this LlamaAttention, which was built without it"),
        (
            {BY_CHUNKS: 2, "sequence_parallel": True},
            "context_parallel_degree=2 with sequence_parallel=True, .*sep_parallel_degree works",
        )
        if not OLD
        else ({BY_CHUNKS: 2}, "context_parallel_degree=2 in LlamaAttention, which does not read it"),
    ],
)
def test_splits_that_a_layer_would_not_do_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rrattn.enable(built(**settings))


@pytest.mark.skipif("qwen2" not in MODELS, reason="this PaddleNLP's Qwen2 is not supported")
@pytest.mark.parametrize(
    ("by", "message"),
    [(BY_HEADS, "or does not know it: it has no reshard_layer"), (BY_CHUNKS, "Qwen2Attention, which does not read it")],
)
def test_qwen2_knows_no_split_of_sequences(by, message):
    with pytest.raises(ValueError, match=f"{by}=2 .*{message}"):
        rrattn.enable(built("qwen2", **{by: 2}))


def test_key_heads_that_tensor_parallel_ranks_share_are_not_exchanged():
    model = exchanging(built(**{BY_HEADS: 2}), kv_indices=paddle.to_tensor([0]))
    with pytest.raises(ValueError, match="sep_parallel_degree=2 where tensor-parallel ranks share key heads"):
        rrattn.enable(model)


@pytest.mark.parametrize("by", SPLITS)
def test_ranks_that_fleet_does_not_know_are_refused(by, monkeypatch):
    model = exchanging(built(**{by: 2}))
    with pytest.raises(ValueError, match=f"{by}=2 ranks.*fleet was not initialized"):
        rrattn.enable(model)
    groups = SimpleNamespace(get_sep_parallel_world_size=lambda: 4)
    monkeypatch.setattr(paddle.distributed.fleet.fleet, "_hcg", groups, raising=False)
    with pytest.raises(ValueError, match=f"{by}=2 ranks.*fleet has 4"):
        rrattn.enable(model)


def test_enabled_layers_have_an_exchange_of_their_own(monkeypatch):
    model = exchanging(built(**{BY_HEADS: 2}))
    layers = attention_layers(model)
    before = [layer.reshard_layer for layer in layers]
    group = SimpleNamespace(world_size=2, rank=1)
    groups = SimpleNamespace(get_sep_parallel_world_size=lambda: 2, get_sep_parallel_group=lambda: group)
    monkeypatch.setattr(paddle.distributed.fleet.fleet, "_hcg", groups, raising=False)
    rrattn.enable(model)
    assert [layer.reshard_layer for layer in layers] == [integration._exchanged] * NUM_LAYERS
    assert [common.core_of(layer).config.head_offset for layer in layers] == [2] * NUM_LAYERS
    rrattn.disable(model)
    assert [layer.reshard_layer for layer in layers] == before


def attend_with(mask, *, by, queries=256, repeats=1):
    """What the attention function of a layer returns whose sequences two ranks share, 256 keys of 2 heads here."""
    settings = SimpleNamespace(use_flash_attention=False, **{by: 2})
    layer = paddle.nn.Layer()
    layer.config, layer.num_key_value_groups = settings, 2
    layer.num_key_value_heads, layer.kv_indices = 4 if by == BY_HEADS else 2, None
    common.set_core(layer, common.make_core(rrattn.RRAttentionConfig(), common.Place(1, 4), 0))
    original = sys.modules["paddlenlp.transformers.llama.modeling"].scaled_dot_product_attention
    attention = integration.LayerAttention(layer, original)
    paddle.seed(0)
    query, key = paddle.randn([2, queries, 4, 16]), paddle.randn([2, 256, 2, 16]).repeat_interleave(repeats, axis=2)
    return attention(query, settings, key, key, mask, False)


def test_heads_that_a_layer_repeated_after_the_exchange_are_its_own_again(monkeypatch):
    attend, heads = rrattn.RRAttention.forward, []

    def record(core, query, key, value, *arguments, **options):
        heads.append((key.shape[2], value.shape[2]))
        return attend(core, query, key, value, *arguments, **options)

    monkeypatch.setattr(rrattn.RRAttention, "forward", record)
    out = attend_with(None, by=BY_HEADS)
    np.testing.assert_array_equal(attend_with(None, by=BY_HEADS, repeats=2), out)
    assert heads == [(2, 2)] * 2


@pytest.mark.parametrize("by", SPLITS)
def test_masks_of_a_part_of_the_sequence_are_causal_alone(by):
    hidden = paddle.tril(paddle.ones([2, 1, 128, 128], dtype="bool"))
    hidden[1, :, :, :5] = False  # padding in front
    with pytest.raises(ValueError, match=rf"with {by}, .*no attention_mask \[2, 1, 128, 128\].*whole sequence"):
        attend_with(hidden, by=by)


def test_masks_of_the_whole_sequence_are_read_where_heads_are_split():
    whole = paddle.tril(paddle.ones([2, 1, 256, 256], dtype="bool"))
    causal = attend_with(None, by=BY_HEADS)
    np.testing.assert_array_equal(attend_with(whole, by=BY_HEADS), causal)
    whole[:, :, 200:, :200] = False  # two documents
    packed = attend_with(whole, by=BY_HEADS)
    assert (packed[:, :200] == causal[:, :200]).all() and (packed[:, 200:] != causal[:, 200:]).any()


@pytest.mark.parametrize("by", SPLITS)
def test_a_cache_is_refused(by):
    with pytest.raises(ValueError, match=f"with {by}, rrattn supports no cache, from which 255 keys come"):
        attend_with(None, by=by, queries=1)
