"""Masks of models: padding and packing against the dense twin, and errors for what does not fit."""

import numpy as np
import paddle
import pytest
from tiny_models import (
    DENSE,
    LENGTH,
    MODELS,
    NUM_HEADS,
    SPARSE,
    assert_differs,
    assert_same,
    assert_same_gradients,
    generate,
    gradients,
    logits,
    make_model,
    make_tokens,
    packing,
)

import rrattn
from rrattn.integrations import common
from rrattn.masks import document_startend_rows


def padding(side, counts=(150, 333)):
    """A tokenizer's attention mask, int64 [2, LENGTH]."""
    keep = np.ones([2, LENGTH], dtype=np.int64)
    for row, count in enumerate(counts):
        keep[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = 0
    return keep


# Padding and packing


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_dense_twin(model_type, tokens, side):
    model = make_model(model_type)
    keep = padding(side)
    inputs = {"attention_mask": paddle.to_tensor(keep)}
    dense = logits(model, tokens, **inputs)
    ours = logits(rrattn.enable(model, DENSE), tokens, **inputs)
    real = keep.astype(bool)
    assert_same(ours[real], dense[real])
    if side == "left":
        assert_differs(ours[real], logits(model, tokens)[real])
    sparse = logits(rrattn.enable(model, SPARSE), tokens, **inputs)
    assert np.isfinite(sparse).all()
    assert float(rrattn.layer_densities(model)[0].min()) < 1


def test_gradients_with_padding_equal_the_dense_twin(model, tokens):
    keep = padding("right")  # so that every row sees something: one that sees nothing is zero here, a mean there
    inputs = {"attention_mask": paddle.to_tensor(keep)}
    dense = gradients(model, tokens, **inputs)
    assert_same_gradients(gradients(rrattn.enable(model, DENSE), tokens, **inputs), dense)


def test_generation_with_padding_equals_the_dense_twin(model, tokens):
    keep = paddle.to_tensor(padding("left", (0, 300)))
    dense = generate(model, tokens, 32, attention_mask=keep)
    ours = generate(rrattn.enable(model, DENSE), tokens, 32, attention_mask=keep)
    assert (dense == ours).all()


def test_a_mask_on_the_memory_of_the_one_before_is_read_anew(model, tokens):
    masks = [paddle.to_tensor(padding("left", (count, count))) for count in (100, 200, 300)]
    dense = [logits(model, tokens, attention_mask=mask) for mask in masks]
    rrattn.enable(model, DENSE)
    for count, expected in zip((100, 200, 300), dense):
        ours = logits(model, tokens, attention_mask=paddle.to_tensor(padding("left", (count, count))))
        assert_same(ours[:, count:], expected[:, count:])


def padding_mask(count, length=256):
    mask = paddle.tril(paddle.ones([length, length], dtype="bool"))
    mask[:, :count] = False
    return mask.reshape([1, 1, length, length])


def rows(mask):
    return common.rows_of_mask(mask, batch_size=1).numpy()[0, 0, :, 0]


def assign(mask, values):
    mask[...] = values


CHANGES = {
    "assignment": assign,
    "set_value": lambda mask, values: mask.set_value(values),
    "copy_": lambda mask, values: mask.copy_(values, True),
    "get_tensor().set": lambda mask, values: mask.get_tensor().set(values.numpy(), paddle.CPUPlace()),
    "DLPack": lambda mask, values: paddle.utils.dlpack.from_dlpack(mask.detach()).copy_(values, True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("additive", (False, True), ids=("bool", "additive"))
def test_a_mask_that_changed_in_place_is_read_anew(change, additive):
    """Some of these changes do not count in the tensor's inplace_version."""
    masks = [padding_mask(count) for count in (10, 100)]
    if additive:
        masks = [(mask.astype("float32") - 1) * 1e9 for mask in masks]
    mask = masks[0].clone()
    before = call(attention_mask=mask)
    np.testing.assert_array_equal(before, call(attention_mask=masks[0]))
    CHANGES[change](mask, masks[1])
    np.testing.assert_array_equal(call(attention_mask=mask), call(attention_mask=masks[1]))
    assert_differs(call(attention_mask=mask), before)


def test_a_new_mask_on_the_memory_of_an_old_one_is_read_anew():
    mask = padding_mask(10)
    assert (rows(mask) == 0).sum() == 10
    next_mask = mask.detach()
    memory = paddle.utils.dlpack.from_dlpack(next_mask)  # the same memory, with a version count of its own
    del mask
    memory[..., :100] = False
    assert (rows(next_mask) == 0).sum() == 100


@pytest.mark.parametrize("model_type", MODELS)
def test_packing_equals_running_documents_apart(model_type):
    model = make_model(model_type)
    lengths = (640, 128, 600)  # all but the last end on a block
    tokens = make_tokens(sum(lengths), batch=1)
    dense = logits(model, tokens, **packing(model, lengths, dense=True))
    assert_same(logits(rrattn.enable(model, DENSE), tokens, **packing(model, lengths, dense=False)), dense)
    rrattn.enable(model, rrattn.RRAttentionConfig(threshold=0.3, keep_last=False))  # which is of the pack
    packed = logits(model, tokens, **packing(model, lengths, dense=False))
    apart = [logits(model, part) for part in paddle.split(tokens, lengths, axis=1)]
    assert_same(packed, np.concatenate(apart, axis=1))
    assert_differs(packed, dense)


def test_gradients_with_packing_equal_the_dense_twin(model):
    lengths = (200, 300, 200)
    tokens = make_tokens(sum(lengths), batch=1)
    dense = gradients(model, tokens, **packing(model, lengths, dense=True))
    assert_same_gradients(gradients(rrattn.enable(model, DENSE), tokens, **packing(model, lengths, dense=False)), dense)


# What is refused


def call(**arguments):
    paddle.seed(0)
    query = paddle.randn([2, 256, NUM_HEADS, 16])
    key, value = paddle.randn([2, 2, 256, 2, 16])
    core = rrattn.RRAttention(SPARSE)
    arguments = {"attention_mask": None, "startend_rows": None, "causal": True, **arguments}
    return common.attend(core, query, key, value, **arguments).numpy()


def test_one_mask_serves_the_whole_batch():
    out = call(attention_mask=padding_mask(70))
    np.testing.assert_array_equal(out, call(attention_mask=padding_mask(70).tile([2, 1, 1, 1])))
    assert (out[:, :70] == 0).all() and not (out[:, 70:] == 0).any()


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_row_bounds_of_any_number_of_dimensions(dimensions):
    rows = document_startend_rows([[100, 156], [156, 100]])  # [2, 1, 256, 1]
    expected = call(startend_rows=rows)
    fewer = rows.squeeze({2: [1, 3], 3: [3], 4: []}[dimensions])
    np.testing.assert_array_equal(call(startend_rows=fewer), expected)
    assert np.abs(expected - call()).max() > 1e-2


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
        ({"attention_mask": bidirectional()}, "not causal"),
        ({"attention_mask": biased()}, "bias"),
        ({"attention_mask": with_a_hole()}, "not causal"),
        ({"attention_mask": paddle.zeros([1, 256])}, r"\[1, 256\]"),
        ({"attention_mask": bidirectional(), "startend_rows": document_startend_rows([256])}, "not both"),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)
