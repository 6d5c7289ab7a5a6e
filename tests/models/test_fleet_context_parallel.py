"""PaddleFleet's models whose sequences, and heads, are split over 2 and 4 processes do what they do in one process."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import paddle
import paddlefleet_stand_in as stand_in
import pytest
from fleet_models import assert_same, logits, make_model, make_tokens
from processes import run_ranks
from test_context_parallel import in_order

import rrattn

pytest.importorskip("paddleformers")  # no model is a library's own: one of the environments is enough

LENGTH, BATCH, LAYERS = 1024, 2, 2  # 1,024 tokens are 8 chunks of one block, the fewest that 4 ranks can share
LAYOUTS = {"dualchunk_allgather": "dual_chunk", "contiguous_allgather": "contiguous", "contiguous_a2a": "all_to_all"}
GATHERED = ("dualchunk_allgather", "contiguous_allgather")
TWO, FOUR, TWO_BY_TWO = (2, 1), (4, 1), (2, 2)  # context-parallel times tensor-parallel ranks
TOPOLOGIES = {2: [TWO], 4: [FOUR, TWO_BY_TWO]}  # of so many processes
CONFIG = rrattn.RRAttentionConfig(threshold=[0.4, (0.4, 0.2, 0.6, 0.3)], keep_local=0)  # one layer's by heads
NO_LABEL = -100


@dataclass(frozen=True)
class Case:
    """A model, and inputs for it."""

    settings: dict = field(default_factory=dict)
    """Of the model's config."""
    documents: tuple = ()
    """Lengths of the documents in each row of the batch; without them there are no row indices."""
    by_heads: bool = False
    """Whether the second key head has the documents of the batch in reverse."""
    ranks: tuple = (TWO,)
    modes: tuple = tuple(LAYOUTS)
    twin: tuple = ()
    """Modes in which two ranks compare it with PaddleFleet's own attention too."""

    @property
    def rows(self):
        heads = [self.documents, self.documents[::-1]] if self.by_heads else [self.documents]
        if not self.documents:
            return None
        return paddle.concat([rrattn.masks.document_startend_rows(documents) for documents in heads], axis=1)

    @property
    def rows_of_one_process(self):
        """With what PaddleFleet fills in for windows where ranks share keys, and takes from the caller elsewhere."""
        whole = rrattn.masks.document_startend_rows([[LENGTH]] * BATCH)
        return whole if self.rows is None and "sliding_window" in self.settings else self.rows

    def layout(self, mode):
        """How its attention is split."""
        return LAYOUTS[self.settings.get("hybrid_mla_cp_mode", mode)]

    def make(self, **settings):
        return make_model(**{**self.settings, **settings})


PACKED = ([900, 124], [200, 824])
MLA = {"multi_latent_attention": True, "num_key_value_heads": 4}
WINDOWS = {"sliding_window": (400, 0), "window_attn_skip_freq": [0, 1]}
CASES = {
    "plain": Case(ranks=(TWO, FOUR, TWO_BY_TWO), twin=GATHERED),
    "documents": Case({"recompute_core_attention": True}, PACKED, ranks=(TWO, TWO_BY_TWO), twin=GATHERED),
    "documents of heads": Case({"attention_bias": True}, PACKED, by_heads=True, ranks=(FOUR,)),
    "sequence parallel": Case({"sequence_parallel": True, "softmax_type": "learnable"}, PACKED, ranks=(TWO_BY_TWO,)),
    "off by one": Case(
        {"use_qk_norm": True, "softmax_type": "off-by-one"}, modes=("dualchunk_allgather", "contiguous_a2a")
    ),
    "windows, sinks": Case({**WINDOWS, "add_swa_attention_sink_bias": True}, PACKED, ranks=(FOUR, TWO_BY_TWO)),
    "windows": Case(WINDOWS, twin=("contiguous_allgather",)),
    "mla, sinks": Case(
        {**MLA, "v_head_dim": 32, "softmax_type": "learnable"}, PACKED, ranks=(TWO, FOUR), twin=tuple(LAYOUTS)
    ),
    "mla, windows": Case(
        {**MLA, "v_head_dim": 16, **WINDOWS},
        PACKED,
        modes=("contiguous_allgather", "contiguous_a2a"),
        twin=("contiguous_a2a",),
    ),
    "mla by heads": Case(
        {**MLA, "v_head_dim": 16, "hybrid_mla_cp_mode": "contiguous_a2a"}, modes=("contiguous_allgather",)
    ),
}
RUNS = [
    (ranks, name, mode)
    for listed in TOPOLOGIES.values()
    for ranks in listed
    for name, case in CASES.items()
    if ranks in case.ranks
    for mode in case.modes
]


def labels_of(tokens):
    return paddle.concat([tokens[:, 1:], paddle.full([tokens.shape[0], 1], NO_LABEL, tokens.dtype)], axis=1)


def train(model, tokens, labels, rows):
    """(logits, loss, name -> gradient) of a training step on all tokens, or on some: then the loss is their part."""
    model.train()
    model.clear_gradients()
    out = logits(model, tokens, attn_mask_startend_row_indices=rows)
    flat = out.reshape([-1, out.shape[-1]]), labels.reshape([-1])
    loss = paddle.nn.functional.cross_entropy(*flat, ignore_index=NO_LABEL, reduction="sum") / (BATCH * (LENGTH - 1))
    loss.backward()
    return out, loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class TwoBounds:
    """A call of a core attention with row indices of two bounds, which are not causal."""

    settings: dict
    kv_heads: int

    def core(self, **settings):
        model = make_model(**self.settings, experimental_dataflow=True, **settings)
        return rrattn.enable(model, threshold=0.4).layers[0].self_attn.core_attention

    @property
    def inputs(self):
        rng = np.random.default_rng(5)
        return [3 * rng.standard_normal([1, LENGTH, heads, 16], np.float32) for heads in (4, *[self.kv_heads] * 2)]

    @property
    def rows(self):
        """int32 [1, 1, LENGTH, 2]: two documents, and the first 200 tokens see each other both ways."""
        start = rrattn.masks.document_startend_rows([[600, LENGTH - 600]])
        end = paddle.arange(LENGTH, dtype="int32")
        end = paddle.where(end < 200, paddle.zeros_like(end), end)
        return paddle.concat([start, end.reshape(start.shape)], axis=-1)

    def mask_type(self, mode):
        """Where ranks share keys, PaddleFleet takes two bounds as not causal, whatever the call says."""
        types, causal = stand_in.AttnMaskType, mode in GATHERED or "sliding_window" in self.settings
        return types.causal if causal else types.no_mask


TWO_BOUNDS = {
    "two bounds": TwoBounds({}, 2),
    "two bounds, mla, windows": TwoBounds({**MLA, "v_head_dim": 16, "sliding_window": (400, 0)}, 4),
}


class OneProcess:
    """A training step of a case in one process, and what each layer's attention was called with."""

    def __init__(self, case):
        self.calls, forward = [], rrattn.RRAttention.forward

        def record(core, query, key, value, rows, **options):
            out = forward(core, query, key, value, rows, **options)
            if len(self.calls) < LAYERS:  # later calls recompute
                self.calls.append((core, rows, options, core.last_selection.block_mask.numpy()))
            return out

        model, tokens = case.make(sequence_parallel=False), make_tokens(LENGTH, BATCH)
        self.weights = {name: parameter.numpy() for name, parameter in model.named_parameters()}
        if case.twin:
            self.dense = logits(model, tokens, attn_mask_startend_row_indices=case.rows_of_one_process).detach()
        rrattn.enable(model, CONFIG)
        rrattn.RRAttention.forward = record
        try:
            results = train(model, tokens, labels_of(tokens), case.rows_of_one_process)
        finally:
            rrattn.RRAttention.forward = forward
        self.logits, self.loss, self.gradients = results


@pytest.fixture(scope="module")
def one_process():
    """one_process(name of a case)."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        yield cache(lambda name: OneProcess(CASES[name]))


@pytest.fixture(scope="module")
def parts_of(one_process, tmp_path_factory):
    """parts_of(ranks, name of a case, mode): what they computed, as [context-parallel rank][tensor-parallel rank]."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in CASES:
        np.savez(folder / f"{name}.npz", **one_process(name).weights)

    @cache
    def ran(processes):
        run_ranks(Path(__file__).with_name("fleet_context_parallel_rank.py"), processes, folder)

    def parts(ranks, name, mode):
        cp, tp = ranks
        ran(cp * tp)
        names = ([f"{name}-{mode}-{cp}x{tp}-{i}-{j}.npz" for j in range(tp)] for i in range(cp))
        return [[dict(np.load(folder / file)) for file in row] for row in names]

    return parts


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0][0]}x{run[0][1]}-{run[1]}-{run[2]}")
def run(request):
    return request.param


@pytest.fixture
def parts(parts_of, run):
    return parts_of(*run)


def whole(parts, name, layout, axis):
    """The whole of a tensor of this name, whose tokens are split over some ranks, and dimension `axis` over others."""
    return in_order([np.concatenate([part[name] for part in row], axis=axis) for row in parts], layout)


def test_a_training_step_is_that_of_one_process(run, parts, one_process):
    _, name, mode = run
    case, one = CASES[name], one_process(name)
    axis = 1 if case.settings.get("sequence_parallel") else 0
    out = whole(parts, "logits", LAYOUTS[mode], axis)
    copies = np.split(out, len(out) // BATCH)  # where tensor-parallel ranks have the same
    for logits_of_rank in copies:
        assert_same(paddle.to_tensor(logits_of_rank), one.logits)
    np.testing.assert_allclose(parts[0][0]["loss"], float(one.loss), rtol=1e-5)
    for parameter, gradient in one.gradients.items():
        of_ranks = [part["grad " + parameter] for part in parts[0]]
        split = [i for i, size in enumerate(gradient.shape) if size != of_ranks[0].shape[i]]
        of_ranks = [np.concatenate(of_ranks, axis=split[0])] if split else of_ranks
        for actual in of_ranks:
            atol = 1e-4 * float(gradient.abs().max()) + 1e-7
            np.testing.assert_allclose(actual, gradient.numpy(), atol=atol, err_msg=parameter)


def test_blocks_and_outputs_are_those_of_one_process(run, parts, one_process):
    _, name, mode = run
    layout = CASES[name].layout(mode)
    for layer, (core, rows, options, mask) in enumerate(one_process(name).calls):
        selected = selected_by(parts, layer, layout, mask.shape)
        np.testing.assert_array_equal(selected, mask)
        # The products around the attention add up in another order on several ranks, so that the bits of its output
        # are those of one process on the inputs of the ranks.
        inputs = (paddle.to_tensor(whole(parts, f"{x}_{layer}", layout, 2)) for x in ("query", "key", "value"))
        with paddle.no_grad():
            out = core(*inputs, rows, **options)
        np.testing.assert_array_equal(whole(parts, f"out_{layer}", layout, 2), out.numpy())
        np.testing.assert_array_equal(selected, core.last_selection.block_mask.numpy())


def selected_by(parts, layer, layout, shape):
    """The block mask of the whole sequence and all heads out of those of the ranks, of this shape."""
    held = [[part[mask] for mask in sorted(part) if mask.startswith(f"mask_{layer}")] for row in parts for part in row]
    if layout == "all_to_all":
        cp, tp = len(parts), len(parts[0])
        return np.concatenate([held[i * tp + j][0] for j in range(tp) for i in range(cp)], axis=1)
    # As many words for each chunk as for the last one, which sees all keys.
    padded = [
        [np.pad(mask, [(0, 0)] * 3 + [(0, shape[3] - mask.shape[3])]).swapaxes(1, 2) for mask in masks]
        for masks in held
    ]
    tp = len(parts[0])
    of_ranks = [
        np.concatenate([np.concatenate(padded[i * tp + j], axis=1) for j in range(tp)], axis=2)
        for i in range(len(parts))
    ]
    return in_order(of_ranks, layout).swapaxes(1, 2)


def test_selections_are_not_dense(one_process):
    """Else equal masks would say little."""
    for name in CASES:
        for _, rows, _, mask in one_process(name).calls:
            visible = {"causal": True, "seqlen_q": LENGTH, "seqlen_k": LENGTH}
            assert rrattn.block_density(paddle.to_tensor(mask), rows, **visible).mean().item() < 0.97, name


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for ranks, name, mode in RUNS if ranks == TWO and mode in CASES[name].twin]
)
def test_every_block_selected_equals_paddlefleets_own_attention(name, mode, parts_of, one_process):
    parts = parts_of(TWO, name, mode)
    for results in ("dense", "every block"):
        out = in_order([row[0][results] for row in parts], LAYOUTS[mode])
        assert_same(paddle.to_tensor(out), one_process(name).dense)


@pytest.mark.parametrize("mode", LAYOUTS)
@pytest.mark.parametrize("ranks", [TWO, FOUR])
@pytest.mark.parametrize("name", TWO_BOUNDS)
def test_row_indices_of_two_bounds(name, ranks, mode, parts_of):
    problem, parts = TWO_BOUNDS[name], parts_of(ranks, name, mode)
    core, inputs = problem.core(), map(paddle.to_tensor, problem.inputs)
    out = core(*inputs, None, problem.rows, attn_mask_type=stand_in.AttnMaskType.no_mask)
    assert float(rrattn.layer_densities(core)[0].mean()) < 0.97
    np.testing.assert_array_equal(in_order([row[0]["out"] for row in parts], LAYOUTS[mode]), out.numpy())
