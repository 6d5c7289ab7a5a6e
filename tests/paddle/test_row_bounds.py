"""FlashMask bounds of causal attention, packed documents, padding and dense masks: whatever their arguments come as."""

import numpy as np
import paddle
import pytest
from harness import assert_identical
from test_dense_mask import additive, causal_mask

from rrattn import masks, reference

DOCUMENTS = ["a" * 100, "b" * 28, "", "c" * 130]
LENGTHS = [100, 28, 0, 130]


def seen(rows, causal, seqlen_q):
    """bool [B, Lq, Lk]: what the bounds leave visible."""
    sizes = {"causal": causal, "seqlen_q": seqlen_q, "seqlen_k": rows.shape[2], "batch": rows.shape[0], "num_heads": 1}
    return reference.token_mask(rows.numpy(), **sizes)[:, 0]


def seen_by_documents(lengths, seqlen, causal):
    """The same of one packed row, from its documents."""
    document = np.full(seqlen, -1)
    document[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    same = (document[:, None] == document) & (document >= 0)
    return same & np.tril(np.ones_like(same)) if causal else same


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(
    "give",
    (
        lambda: LENGTHS,
        lambda: map(len, DOCUMENTS),
        lambda: (len(document) for document in DOCUMENTS),
        lambda: dict(enumerate(LENGTHS)).values(),
        lambda: np.array(LENGTHS, np.uint16),
        lambda: [np.int64(length) for length in LENGTHS],
        lambda: paddle.to_tensor(LENGTHS),
        lambda: [paddle.to_tensor(length) for length in LENGTHS],
        lambda: [map(len, DOCUMENTS)],
        lambda: iter([tuple(LENGTHS)]),
        lambda: np.array([LENGTHS]),
        lambda: paddle.to_tensor([LENGTHS], dtype="int32"),
        lambda: [paddle.to_tensor(LENGTHS)],
    ),
)
def test_documents_of_one_row(give, causal):
    for seqlen in (300, np.int64(258)):
        rows = masks.document_startend_rows(give(), seqlen, causal=causal)
        assert rows.dtype == paddle.int32 and rows.shape == [1, 1, seqlen, 1 if causal else 2]
        np.testing.assert_array_equal(seen(rows, causal, seqlen)[0], seen_by_documents(LENGTHS, seqlen, causal))
    assert masks.document_startend_rows(give(), causal=causal).shape[2] == 258


@pytest.mark.parametrize("causal", (True, np.bool_(False)))
def test_documents_of_rows(causal):
    given = [[100, 156], iter([30]), np.array([1, 2, 3]), []]
    lengths = [[100, 156], [30], [1, 2, 3], []]
    visible = seen(masks.document_startend_rows(given, causal=causal), bool(causal), 256)
    for row, expected in zip(visible, lengths):
        np.testing.assert_array_equal(row, seen_by_documents(expected, 256, causal))


@pytest.mark.parametrize(
    "lengths, options, message",
    (
        (None, {}, "lengths is None, but must be a sequence of integers"),
        (300, {}, "lengths is 300, but must be a sequence of integers"),
        ("12", {}, "lengths is '12', but must be a sequence of integers"),
        ({100, 28}, {}, r"lengths is \{.*\}, but must be a sequence of integers"),
        ({"a": 100}, {}, r"lengths is \{'a': 100\}, but must be a sequence of integers"),
        ([], {"seqlen": 300}, r"lengths is \[\], but must be .*at least one"),
        (map(len, ()), {"seqlen": 300}, r"lengths is \[\], but must be .*at least one"),
        ([100, [28]], {}, r"lengths is \[100, \[28\]\], but must be .*no mixture"),
        ([[100], "28"], {}, r"lengths is \[\[100\], '28'\], but must be .*no mixture"),
        ([100, -1], {}, r"lengths\[1\] is -1, but must be an integer of at least 0"),
        ([100.0], {}, r"lengths\[0\] is 100.0, but must be an integer"),
        (np.array([100.0]), {}, r"lengths\[0\] is 100.0, but must be an integer"),
        (paddle.to_tensor([100.0]).astype("bfloat16"), {}, r"lengths\[0\] is 100.0, but must be an integer"),
        ([float("nan")], {}, r"lengths\[0\] is nan, but must be an integer"),
        ([True], {}, r"lengths\[0\] is True, but must be an integer"),
        (["100"], {}, r"lengths\[0\] is '100', but must be an integer"),
        ([[100], [28, None]], {}, r"lengths\[1\]\[1\] is None, but must be an integer"),
        ([2**30, 1], {}, "the sum of a row's lengths is 1073741825, but must be an integer from 0 to 1073741824"),
        ([100], {"seqlen": 99}, "a row hold 100 tokens, more than seqlen=99"),
        ([100], {"seqlen": "300"}, "seqlen is '300', but must be an integer from 0"),
        ([100], {"seqlen": 300.0}, "seqlen is 300.0, but must be an integer from 0"),
        ([100], {"causal": "False"}, "causal is 'False', but must be True or False"),
        ([100], {"causal": None}, "causal is None, but must be True or False"),
    ),
    ids=str,
)
def test_lengths_that_are_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        masks.document_startend_rows(lengths, **options)


KEEP = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0] * 5])


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(
    "keep",
    (
        paddle.to_tensor(KEEP),
        paddle.to_tensor(KEEP == 1),
        paddle.to_tensor(KEEP, dtype="float32"),
        paddle.to_tensor(KEEP).astype("bfloat16"),
        paddle.to_tensor(3 * KEEP, dtype="uint8"),
        KEEP,
        KEEP == 1,
        KEEP.astype(np.float16),
        KEEP.tolist(),
        (KEEP == 1).tolist(),
        paddle.to_tensor(np.where(KEEP, 0, -1e4)) == 0,  # an additive mask, as its error says
    ),
)
def test_padding(keep, causal):
    for seqlen_q in (None, 3, np.int16(5)):
        rows = masks.padding_startend_rows(keep, seqlen_q, causal=causal)
        assert rows.dtype == paddle.int32 and rows.shape == [4, 1, 5, 1 if causal else 2]
        seqlen_q = int(seqlen_q or 5)
        expected = np.broadcast_to((KEEP == 1)[:, None], (4, seqlen_q, 5))
        if causal:
            expected = expected & np.tril(np.ones((seqlen_q, 5), bool), 5 - seqlen_q)
        np.testing.assert_array_equal(seen(rows, causal, seqlen_q), expected)


@pytest.mark.parametrize("hidden", (-1e4, -65504.0, float("-inf"), -1.0))
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_an_additive_mask_is_no_padding(hidden, dtype):
    """Read as a tokenizer's it would hide every token, and show the padding."""
    with pytest.raises(ValueError, match="keep holds -.*: of an additive mask, where zero is a token, give mask == 0"):
        masks.padding_startend_rows(paddle.to_tensor(np.where(KEEP, 0, hidden)).astype(dtype))


def test_floats_that_are_all_zero_are_either():
    """An additive mask that hides nothing, and a tokenizer's that hides all: only integers and flags are the latter."""
    for keep in (paddle.zeros([2, 5]), np.zeros((2, 5)), [[0.0]]):
        with pytest.raises(ValueError, match="keep holds floats that are all zero.*keep != 0.*mask == 0"):
            masks.padding_startend_rows(keep)
    for keep in (paddle.zeros([2, 5], "int64"), np.zeros((2, 5), bool), [[0] * 5] * 2):
        assert not masks.padding_startend_rows(keep).numpy().any()
    assert masks.padding_startend_rows(paddle.zeros([2, 0])).shape == [2, 1, 0, 1]


@pytest.mark.parametrize(
    "keep, options, message",
    (
        (None, {}, "keep is None, but must be a Tensor"),
        ("11", {}, "keep is '11', but must be a Tensor"),
        (0.5, {}, r"keep must be \[B, Lk\], got shape \[\]"),
        (map(list, KEEP), {}, "keep is <map.*, but must be a Tensor"),
        ([[1, 1], [1]], {}, r"keep is \[\[1, 1\], \[1\]\], but must be a Tensor"),
        ([["1"]], {}, r"keep is \[\['1'\]\], but must be a Tensor"),
        ([1, 1], {}, r"keep must be \[B, Lk\], got shape \[2\]"),
        (np.ones((2, 1, 1, 5)), {}, r"keep must be \[B, Lk\], got shape \[2, 1, 1, 5\]"),
        ([[1, -1]], {}, "keep holds -1, but must hold whole numbers of at least 0"),
        ([[1, 0.5]], {}, "keep holds 0.5, but must hold whole numbers of at least 0"),
        ([[1, float("nan")]], {}, "keep holds nan, but must hold whole numbers"),
        ([[0, float("inf")]], {}, "keep holds inf, but must hold whole numbers"),
        ([[1]], {"seqlen_q": "1"}, "seqlen_q is '1', but must be an integer from 0"),
        ([[1]], {"seqlen_q": 1.0}, "seqlen_q is 1.0, but must be an integer from 0"),
        ([[1]], {"seqlen_q": -1}, "seqlen_q is -1, but must be an integer from 0"),
        ([[1]], {"causal": 0}, "causal is 0, but must be True or False"),
    ),
    ids=str,
)
def test_padding_that_is_refused(keep, options, message):
    with pytest.raises(ValueError, match=message):
        masks.padding_startend_rows(keep, **options)


@pytest.mark.parametrize("shape", ([4, 5], [None, None]))
@pytest.mark.parametrize("causal", (True, False))
def test_traced(shape, causal):
    def rows(keep):
        bounds = masks.causal_startend_rows(keep.shape[0], keep.shape[1])
        return masks.padding_startend_rows(keep, causal=causal), bounds

    for dtype in ("bool", "int64"):
        keep = paddle.to_tensor(KEEP).astype(dtype)
        spec = [paddle.static.InputSpec(list(shape), dtype)]
        padding, plain = paddle.jit.to_static(rows, full_graph=True, input_spec=spec)(keep)
        expected = masks.padding_startend_rows(keep, causal=causal)
        assert padding.dtype == expected.dtype and (padding == expected).all()
        assert plain.dtype == paddle.int32 and (plain == masks.causal_startend_rows(4, 5)).all()
    with pytest.raises(TypeError, match="keep holds floats of a static graph"):
        spec = [paddle.static.InputSpec(list(shape), "float32")]
        _ = paddle.jit.to_static(rows, full_graph=True, input_spec=spec).concrete_program


def test_causal():
    for sizes in ((2, 3, 5), (np.int64(2), np.uint8(3), np.array(5))):
        rows = masks.causal_startend_rows(*sizes)
        assert rows.dtype == paddle.int32 and rows.shape == [2, 1, 5, 1]
        np.testing.assert_array_equal(seen(rows, True, 3)[1], np.tril(np.ones((3, 5), bool), 2))
    assert (masks.causal_startend_rows(2, 5) == masks.causal_startend_rows(2, 5, 5)).all()


@pytest.mark.parametrize(
    "sizes, message",
    (
        ((1.0, 5), "batch_size is 1.0, but must be an integer of at least 0"),
        ((-1, 5), "batch_size is -1, but must be an integer of at least 0"),
        ((1, None), "seqlen_q is None, but must be an integer from 0"),
        ((1, "5"), "seqlen_q is '5', but must be an integer from 0"),
        ((1, 5, 5.0), "seqlen_k is 5.0, but must be an integer from 0"),
        ((1, True, 5), "seqlen_q is True, but must be an integer from 0"),
        ((1, 2**31), "seqlen_q is 2147483648, but must be an integer from 0"),
        ((1, 5, 3), "seqlen_q <= seqlen_k, got seqlen_q=5, seqlen_k=3"),
    ),
    ids=str,
)
def test_causal_sizes_that_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        masks.causal_startend_rows(*sizes)


@pytest.mark.parametrize("hidden", (-1e4, -65504.0, -1e30, -np.inf, np.finfo(np.float32).min))
def test_what_hides(hidden, rng):
    mask = causal_mask(130, 130, rng)
    expected = masks.startend_rows_from_dense(paddle.to_tensor(mask)).numpy()
    values = paddle.to_tensor(additive(mask, hidden))
    for dtype in ("float64", "float32", "bfloat16", *(["float16"] if hidden in (-1e4, -65504.0, -np.inf) else [])):
        assert_identical(masks.startend_rows_from_dense(values.astype(dtype)).numpy(), expected)
    assert_identical(masks.startend_rows_from_dense(paddle.to_tensor(np.where(mask, -0.0, hidden))).numpy(), expected)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16", "float64", "int64"))
@pytest.mark.parametrize("value", (-1.0, 7.0, -9000.0, np.inf, np.nan))
def test_an_error_names_the_value(dtype, value):
    if dtype == "int64" and not np.isfinite(value):
        pytest.skip("no integer")
    values = additive(np.tril(np.ones((300, 300), bool))[None, None])
    values[0, 0, 200, 100] = value
    shown = {"bfloat16": "-9024", "float16": "-9000"}.get(dtype, "-9000") if value == -9000 else f"{value:g}"
    with pytest.raises(ValueError, match=rf"mask holds {shown}, which is neither 0 \(visible\) nor -1e4 or less"):
        masks.startend_rows_from_dense(paddle.to_tensor(values).astype(dtype))


def test_a_mask_with_holes_is_an_error():
    mask = np.tril(np.ones((300, 300), bool))[None, None]
    mask[0, 0, 200, 100] = False
    with pytest.raises(ValueError, match="not causal with padding"):
        masks.startend_rows_from_dense(paddle.to_tensor(mask))


def test_a_dense_mask_may_be_an_array_or_lists(rng):
    mask = causal_mask(5, 7, rng, batch=1, heads=1)
    expected = masks.startend_rows_from_dense(paddle.to_tensor(mask)).numpy()
    assert_identical(masks.startend_rows_from_dense(mask).numpy(), expected)
    assert_identical(masks.startend_rows_from_dense(mask.tolist()).numpy(), expected)
    with pytest.raises(TypeError, match="mask is 'all', but must be a Tensor"):
        masks.startend_rows_from_dense("all")
    with pytest.raises(ValueError, match="mask has 2 dimensions"):
        masks.startend_rows_from_dense(paddle.ones([3, 3]))
