"""Masks of PaddleFormers models: padding and packing against the dense twin, and errors for what does not fit."""

import numpy as np
import paddle
import pytest

import rrattn
from rrattn.masks import document_startend_rows

pytest.importorskip("paddleformers")

from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from tiny_models import (  # noqa: E402
    DENSE,
    LENGTH,
    NUM_HEADS,
    SPARSE,
    assert_differs,
    assert_same,
    logits,
    make_model,
    make_tokens,
)

from rrattn.integrations import paddleformers as integration  # noqa: E402


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokens():
    return make_tokens()


# Padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_dense_twin(model, tokens, side):
    padding = (0, 150) if side == "right" else (0, 333)
    keep = np.ones([2, LENGTH], dtype=np.int64)
    for row, count in enumerate(padding):
        keep[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = 0
    dense = logits(model, tokens, attention_mask=paddle.to_tensor(keep))
    ours = logits(rrattn.enable(model, DENSE), tokens, attention_mask=paddle.to_tensor(keep))
    real = keep.astype(bool)
    assert_same(ours[real], dense[real])
    assert_differs(ours[real], logits(model, tokens)[real] if side == "left" else ours[real] + 1)
    sparse = logits(rrattn.enable(model, SPARSE), tokens, attention_mask=paddle.to_tensor(keep))
    assert np.isfinite(sparse).all()
    assert float(rrattn.layer_densities(model)[0].min()) < 1


def test_generation_with_padding_equals_the_dense_twin(model, tokens):
    keep = paddle.ones([2, LENGTH], dtype="int64")
    keep[1, :300] = 0
    settings = {
        "attention_mask": keep,
        "max_new_tokens": 5,
        "eos_token_id": -1,
        "decode_strategy": "greedy_search",
    }
    dense, _ = model.generate(tokens, **settings)
    ours, _ = rrattn.enable(model, DENSE).generate(tokens, **settings)
    assert (dense == ours).all()


def test_one_mask_is_read_once_and_the_next_one_anew(model, tokens, monkeypatch):
    reads = []
    read = integration.startend_rows_from_dense
    monkeypatch.setattr(integration, "startend_rows_from_dense", lambda mask: reads.append(0) or read(mask))
    for padding in (100, 200, 300):  # each mask may take the memory of the one before
        keep = paddle.ones([2, LENGTH], dtype="int64")
        keep[:, :padding] = 0
        dense = logits(rrattn.disable(rrattn.enable(model)), tokens, attention_mask=keep)
        ours = logits(rrattn.enable(model, DENSE), tokens, attention_mask=keep)
        rrattn.disable(model)
        assert_same(ours[:, padding:], dense[:, padding:])
    assert len(reads) == 3


def padding_mask(padding, length=256):
    mask = paddle.tril(paddle.ones([length, length], dtype="bool"))
    mask[:, :padding] = False
    return mask.reshape([1, 1, length, length])


def rows(mask):
    return integration._rows_of_mask(mask, batch_size=1).numpy()[0, 0, :, 0]


def test_one_mask_serves_the_whole_batch(model):
    layer = rrattn.enable(model, SPARSE).model.layers[0].self_attn
    query, (key, value) = paddle.randn([2, NUM_HEADS, 256, 16]), paddle.randn([2, 2, 2, 256, 16])
    attend = ALL_ATTENTION_FUNCTIONS["rrattn"]
    mask = padding_mask(70)
    out, _ = attend(layer, query, key, value, attention_mask=mask)
    expected, _ = attend(layer, query, key, value, attention_mask=mask.tile([2, 1, 1, 1]))
    assert (out == expected).all()
    assert (out[:, :70] == 0).all() and not (out[:, 70:] == 0).any()


def test_a_mask_that_changed_in_place_is_read_anew():
    mask = padding_mask(10)
    assert (rows(mask) == 0).sum() == 10
    mask[..., :100] = False
    assert (rows(mask) == 0).sum() == 100


def test_a_new_mask_on_the_memory_of_an_old_one_is_read_anew():
    mask = padding_mask(10)
    assert (rows(mask) == 0).sum() == 10
    next_mask = mask.detach()
    memory = paddle.utils.dlpack.from_dlpack(next_mask)  # the same memory, with a version count of its own
    del mask
    memory[..., :100] = False
    assert (rows(next_mask) == 0).sum() == 100


@pytest.mark.parametrize("dimensions", [3, 4])
def test_packing_equals_running_documents_apart(model, dimensions):
    lengths = (640, 128, 600)  # all but the last end on a block
    tokens = make_tokens(sum(lengths), batch=1)
    rows = document_startend_rows(lengths)
    if dimensions == 3:
        rows = rows.squeeze(-1)
    positions = paddle.concat([paddle.arange(length) for length in lengths]).unsqueeze(0)
    packing = {"attn_mask_startend_row_indices": rows, "position_ids": positions}
    dense = logits(model, tokens, **packing)
    assert_same(logits(rrattn.enable(model, DENSE), tokens, **packing), dense)
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=0.3))
    packed = logits(model, tokens, **packing)
    apart = [logits(model, part) for part in paddle.split(tokens, lengths, axis=1)]
    assert_same(packed, np.concatenate(apart, axis=1))
    assert_differs(packed, dense)


# What is refused


def call(model, length=256, **arguments):
    layer = model.model.layers[0].self_attn
    query = paddle.randn([1, NUM_HEADS, length, 16])
    key, value = paddle.randn([2, 1, 2, length, 16])
    return ALL_ATTENTION_FUNCTIONS["rrattn"](layer, query, key, value, **arguments)


def bidirectional():
    return paddle.zeros([1, 1, 256, 256])


def biased():
    position = paddle.arange(256, dtype="float32")
    distance = position - position.unsqueeze(-1)
    return paddle.where(distance <= 0, distance, paddle.full_like(distance, -1e9)).reshape([1, 1, 256, 256])


def with_a_hole():
    mask = paddle.tril(paddle.ones([256, 256], dtype="bool"))
    mask[200, 17] = False
    return mask.reshape([1, 1, 256, 256])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout.*0.1"),
        ({"sink": paddle.zeros([NUM_HEADS])}, "sink"),
        ({"sliding_window": 128}, "sliding_window.*128"),
        ({"attention_mask": bidirectional()}, "not causal"),
        ({"attention_mask": biased()}, "bias"),
        ({"attention_mask": with_a_hole()}, "not causal"),
        ({"attention_mask": paddle.zeros([1, 256])}, r"\[1, 256\]"),
        (
            {
                "attention_mask": bidirectional(),
                "attn_mask_startend_row_indices": document_startend_rows([256]),
            },
            "not both",
        ),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(model, **arguments)


def test_arguments_that_are_not_set_are_fine(model):
    out, weights = call(model, sliding_window=None, dropout=0.0)
    assert out.shape == [1, 256, NUM_HEADS * 16] and weights is None


def test_attention_dropout_in_training_is_an_error(tokens):
    model = make_model(attention_dropout=0.1)
    logits(rrattn.enable(model), tokens)
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        model(tokens)


def test_scaling_and_causality_are_honoured(model):
    paddle.seed(0)
    out, _ = call(model, scaling=0.5)
    for arguments, differs in (
        ({"scaling": 0.5}, False),
        ({"scaling": 0.25}, True),
        ({"is_causal": False}, True),
    ):
        paddle.seed(0)
        again, _ = call(model, **{"scaling": 0.5, **arguments})
        assert bool((again != out).any()) == differs
