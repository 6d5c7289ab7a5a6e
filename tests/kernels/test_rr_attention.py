"""All stages in one call: the same bits as the stages one by one, whatever of theirs the caller asks for."""

import doctest
from itertools import combinations

import numpy as np
import pytest
from cases import FEW_CASES, UNEQUAL, Case, make_inputs
from harness import (
    LAYOUTS,
    assert_all_given_are,
    assert_identical,
    assert_same_in_two_threads,
    lse_shape,
    poisoned,
)

from rrattn import direct

OUTPUTS = ("block_scores", "block_mask", "lse")
SUBSETS = [names for count in range(len(OUTPUTS) + 1) for names in combinations(OUTPUTS, count)]
SETTINGS = {
    "stride": 16,
    "threshold": 0.6,
    "head_offset": 3,
    "softmax_scale": 0.2,
    "keep_sink": False,
    "keep_last": False,
    "keep_local": 2,
    "compensate": False,
}
SIZES_OF_ZERO = [Case(0, 300), Case(300, 0, causal=False), Case(0, 0), Case(300, 300, batch=0)]


def one_call(kernels, case, dtype="float32", settings=SETTINGS, **options):
    """(block_scores, block_mask, out, lse), None for what is not asked for."""
    inputs = make_inputs(case, dtype)
    return kernels.rr_attention(
        *inputs.forward, inputs.startend, sink=inputs.sink, causal=case.causal, dtype=dtype, **settings, **options
    )


def three_stages(kernels, case, dtype="float32", settings=SETTINGS):
    """The same by the stages."""
    inputs, settings = make_inputs(case, dtype), dict(settings)
    common, sink = {"causal": case.causal}, {"sink": inputs.sink}
    keep = {name: settings.pop(name) for name in list(settings) if name.startswith("keep") or name == "threshold"}
    attention = {"softmax_scale": settings.get("softmax_scale"), "compensate": settings.pop("compensate")}
    scores = kernels.estimate(inputs.query, inputs.key, inputs.startend, dtype=dtype, **common, **sink, **settings)
    lengths = {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    mask = kernels.select(scores, inputs.startend, **lengths, **common, **keep)
    out, lse = kernels.attend(*inputs.forward, mask, inputs.startend, dtype=dtype, **common, **sink, **attention)
    return scores, mask, out, lse


@pytest.mark.parametrize("case", FEW_CASES + UNEQUAL + SIZES_OF_ZERO, ids=str)
def test_one_call_is_the_three_stages(kernels, case, dtype):
    assert_all_given_are(three_stages(kernels, case, dtype), one_call(kernels, case, dtype))


@pytest.mark.parametrize(
    "changes",
    (
        {"stride": 8},
        {"head_offset": 0},
        {"softmax_scale": None},
        {"threshold": 0.2},
        {"threshold": np.array([0.3, 0.9, 1.0, 0.5], np.float32)},
        {"threshold": np.array([0.3], np.float32)},
        {"keep_sink": True},
        {"keep_last": True},
        {"keep_local": 0},
        {"compensate": True},
    ),
    ids=str,
)
def test_every_setting_reaches_its_stage(kernels, main_dtype, changes):
    case, settings = Case(1000, 1256, num_heads=4, num_heads_k=2), {**SETTINGS, **changes}
    before, after = (one_call(kernels, case, main_dtype, each) for each in (SETTINGS, settings))
    assert_all_given_are(three_stages(kernels, case, main_dtype, settings), after)
    assert any((a != b).any() for a, b in zip(after, before) if a is not None)


@pytest.mark.parametrize("outputs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("case", FEW_CASES[1:3], ids=str)
def test_what_is_not_asked_for_lies_in_the_workspace(make_kernels, main_dtype, case, outputs):
    kernels, names = make_kernels(), ("block_scores", "block_mask", "out", "lse")
    asked = dict(zip(names, one_call(kernels, case, main_dtype, outputs=outputs)))
    everything = dict(zip(names, one_call(kernels, case, main_dtype)))
    assert [name for name in OUTPUTS if asked[name] is not None] == list(outputs)
    for name in (*outputs, "out"):
        assert_identical(asked[name], everything[name])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_arrays_are_read_and_written_in_place(make_kernels, main_dtype, layout):
    case = FEW_CASES[2]
    expected = one_call(make_kernels(), case, main_dtype)
    assert_identical(one_call(make_kernels(layout=layout), case, main_dtype), expected)


def arrays_of(kernels, case, dtype):
    """(inputs, poisoned outputs) of a call, in the kernels' memory."""
    inputs = make_inputs(case, dtype)
    outputs = {
        "out": kernels.allocate(poisoned(inputs.query.shape, dtype)),
        "lse": kernels.allocate(poisoned(lse_shape(inputs.query), "float32")),
    }
    return [kernels.input(x, dtype) for x in inputs.forward], outputs


@pytest.mark.parametrize("offset", (0, 1, 100))
def test_a_workspace_of_the_size_that_it_says_is_enough(make_kernels, main_dtype, offset):
    """Wherever it begins, and whatever it holds; nothing around it is written."""
    kernels, case = make_kernels(), FEW_CASES[1]
    inputs, outputs = arrays_of(kernels, case, main_dtype)
    options = {**kernels.typed(main_dtype), **outputs, "causal": case.causal, "workspace": None}
    size = direct.rr_attention(*inputs, size_only=True, **options)
    assert np.isnan(kernels.download(outputs["lse"])).all()
    buffer = kernels.allocate(np.full(size + offset + 100, 0xA5, np.uint8))
    options["workspace"] = buffer[offset : offset + size]
    assert direct.rr_attention(*inputs, **options) == size
    around = kernels.download(buffer)
    assert (around[:offset] == 0xA5).all() and (around[offset + size :] == 0xA5).all()
    written = {name: kernels.download(array) for name, array in outputs.items()}
    options["workspace"] = kernels.allocate(np.zeros(size, np.uint8))
    direct.rr_attention(*inputs, **options)
    for name, array in outputs.items():
        assert kernels.download(array).tobytes() == written[name].tobytes()


def test_a_workspace_that_is_too_small_is_refused(make_kernels, main_dtype):
    kernels, case = make_kernels(), FEW_CASES[0]
    inputs, outputs = arrays_of(kernels, case, main_dtype)
    options = {**kernels.typed(main_dtype), **outputs, "causal": case.causal, "workspace": None}
    size = direct.rr_attention(*inputs, size_only=True, **options)
    options["workspace"] = kernels.allocate(np.zeros(size - 1, np.uint8))
    with pytest.raises(ValueError, match=f"workspace has {size - 1} bytes, but must have at least {size}"):
        direct.rr_attention(*inputs, **options)
    assert np.isnan(kernels.download(outputs["lse"])).all()


def test_outputs_that_are_given_take_no_workspace(make_kernels, main_dtype):
    kernels, case = make_kernels(), Case(1024, 1024, num_heads=4)
    inputs, outputs = arrays_of(kernels, case, main_dtype)
    options = {**kernels.typed(main_dtype), "size_only": True}
    whole, without = (direct.rr_attention(*inputs, **given, **options) for given in ({"out": outputs["out"]}, outputs))
    assert whole - without == 4 * 4 * 1024  # lse, float32 [1, 4, 1024]


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_threads", (1, 3))
def test_threads_change_nothing(make_kernels, num_threads):
    case = FEW_CASES[2]
    assert_identical(one_call(make_kernels(num_threads=num_threads), case), one_call(make_kernels(), case))


def test_two_calls_at_once(make_kernels, main_dtype):
    kernels = make_kernels()
    assert_same_in_two_threads(*(lambda case=case: one_call(kernels, case, main_dtype) for case in FEW_CASES[1:3]))


def test_the_example_of_its_docstring_runs():
    tests = doctest.DocTestFinder().find(direct.rr_attention, "rr_attention", globs={})
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) == 7 and not any(result.failed for result in results)


@pytest.mark.cpu_only
@pytest.mark.parametrize("heads_k", (0, 2))
def test_arrays_without_heads_are_left_as_they_are(heads_k):
    query, key = poisoned((1, 5, 0, 32), "float32"), poisoned((1, 5, heads_k, 32), "float32")
    assert direct.rr_attention(query, key, key, out=query.copy(), causal=True) > 0
