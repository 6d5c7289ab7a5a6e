"""Compensated attention through Paddle: as the kernels compute it, and without gradients."""

import inspect

import numpy as np
import paddle
import pytest
from cases import make_inputs
from paddle.distributed.fleet.utils import recompute
from paddle_harness import CASE, assert_all_identical, run, to_numpy, to_tensors

import rrattn
from rrattn import functional, published

REFUSED = r"compensate is True.*no gradients.*compensate=False.*paddle\.no_grad\(\)"


def test_the_layer():
    config = rrattn.RRAttentionConfig(threshold=0.5, compensate=True)
    layer, plain = rrattn.RRAttention(config), rrattn.RRAttention(rrattn.RRAttentionConfig(threshold=0.5))
    tensors = to_tensors(make_inputs(CASE))
    out = layer(*tensors, causal=True)
    assert_all_identical([out], [run(tensors, threshold=0.5, compensate=True)[0]])
    assert (out != plain(*tensors, causal=True)).any()
    tensors[0].stop_gradient = False
    with pytest.raises(ValueError, match=REFUSED):
        layer(*tensors, causal=True)
    with pytest.raises(ValueError, match=REFUSED):
        recompute(layer, *tensors, causal=True, use_reentrant=False)


@pytest.mark.parametrize("settings", ({"dense_layers": [0]}, {"min_length": 10000}), ids=str)
def test_where_a_layer_attends_every_block_there_is_nothing_to_compensate(settings):
    """So there are gradients."""
    tensors = to_tensors(make_inputs(CASE), requires_grad=True)
    grads = []
    for compensate in (True, False):
        layer = rrattn.RRAttention(rrattn.RRAttentionConfig(compensate=compensate, **settings))
        grads.append(paddle.grad(layer(*tensors, causal=True).sum(), tensors))
    assert_all_identical(*grads)


def test_the_published_names_have_none(monkeypatch):
    assert not any(
        config.compensate
        for config in (
            published.PUBLISHED_PREFILL,
            published.PUBLISHED_ESTIMATE,
            published.PUBLISHED_TRAINING,
            published.PUBLISHED_PATCH,
        )
    )
    given = []
    rr_attention = functional.rr_attention

    def noted(*tensors, **options):
        given.append(options["compensate"])
        return rr_attention(*tensors, **options)

    monkeypatch.setattr(functional, "rr_attention", noted)
    states = [x.transpose([0, 2, 1, 3]) for x in to_tensors(make_inputs(CASE))]
    published.rrattn_prefill(*states, causal=True)
    published.rr_attention(*to_tensors(make_inputs(CASE)), causal=True)
    assert given == [False, False]


def test_it_is_off_unless_asked_for():
    for function in (rrattn.rr_attention, rrattn.block_sparse_attention):
        default = inspect.signature(inspect.unwrap(function)).parameters["compensate"].default
        assert default is rrattn.RRAttentionConfig().compensate is functional._DEFAULTS.compensate
    tensors = to_tensors(make_inputs(CASE))
    assert np.isfinite(to_numpy(run(tensors)[1])).all()
