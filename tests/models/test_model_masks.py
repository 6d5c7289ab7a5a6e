"""Masks of models: padding and packing against the dense twin, and errors for what does not fit."""

from dataclasses import replace

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
    sparse = logits(rrattn.enable(model, replace(SPARSE, threshold=0.2)), tokens, **inputs)
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


def window_mask(length, window, padding):
    """bool [2, 1, length, length]: each row sees `window` positions up to its own, but none of padding on the left."""
    position = paddle.arange(length)
    distance = position.unsqueeze(-1) - position
    seen = (distance >= 0) & (distance < window)
    return paddle.stack([seen & (position >= count) for count in padding]).unsqueeze(1)


@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("held", "new"), [(0, 400), (300, 1), (99, 1), (300, 60), (300, 200)])
def test_columns_of_keys_that_left_the_cache_are_passed_over(held, new, additive, threshold):
    """A cache of a sliding window of 100 holds 99 keys, whereas masks go on to be of all positions."""
    total = held + new
    paddle.seed(0)
    query, (key, value) = paddle.randn([2, new, NUM_HEADS, 16]), paddle.randn([2, 2, total, 2, 16])
    mask = window_mask(total, 100, padding=(0, 250))[:, :, held:]
    mask = paddle.where(mask, 0.0, -1e9) if additive else mask
    config = rrattn.RRAttentionConfig(threshold=threshold, keep_sink=False)  # whose first block is another of more keys
    core, begin = rrattn.RRAttention(config), max(held - 99, 0)
    expected = common.attend(core, query, key, value, mask, None, causal=True)
    out = common.attend(core, query, key[:, begin:], value[:, begin:], mask, None, causal=True)
    if threshold == 1 or new == 1:
        np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=1e-5)
    cut = common.attend(core, query, key[:, begin:], value[:, begin:], mask[..., begin:], None, causal=True)
    np.testing.assert_array_equal(out.numpy(), cut.numpy())


def test_decoding_with_a_mask_of_one_row():
    query, (key, value) = paddle.randn([2, 1, NUM_HEADS, 16]), paddle.randn([2, 2, 300, 2, 16])
    core = rrattn.RRAttention(SPARSE)
    mask = window_mask(300, 300, padding=(0, 120))[:, :, -1:]
    out = common.attend(core, query, key, value, mask, None, causal=True)
    alone = common.attend(core, query[1:], key[1:, 120:], value[1:, 120:], None, None, causal=True)
    np.testing.assert_allclose(out[1:].numpy(), alone.numpy(), atol=1e-5)


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
        ({"attention_mask": bidirectional(), "startend_rows": document_startend_rows([256])}, "not both"),
    ],
)
def test_what_would_be_wrong_in_silence_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (paddle.zeros([1, 256]), r"shape \[1, 256\], but must be \[1 or 2, 1 or 4, 256, 256\]"),
        (padding_mask(9).tile([3, 1, 1, 1]), r"shape \[3, 1, 256, 256\], but must be \[1 or 2"),
        (padding_mask(9).tile([1, 2, 1, 1]), r"shape \[1, 2, 256, 256\], but must be \[1 or 2, 1 or 4"),
        (padding_mask(9)[:, :, -1:], r"shape \[1, 1, 1, 256\], but must be .* 256, 256\]"),
        (padding_mask(9)[..., 1:], r"shape \[1, 1, 256, 255\], but must be .* 256, 256\]"),
        (padding_mask(9, 300), r"shape \[1, 1, 300, 300\], but must be .* 256, 256\]"),
        (padding_mask(9, 300)[:, :, 44:], r"shape \[1, 1, 256, 300\], .* see keys of its first 44 columns"),
    ],
)
def test_a_mask_of_another_shape_is_named(mask, message):
    with pytest.raises(ValueError, match="attention_mask has " + message):
        call(attention_mask=mask)
