"""Attention over sequences that 2 and 4 processes share selects and computes what one process does."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
import pytest
from cases import Case, make_inputs
from paddle_harness import to_tensors
from processes import run_ranks

import rrattn
from rrattn import distributed, sequence_chunks
from rrattn.sequence_chunks import chunks_of_rank

HEAD_THRESHOLDS = (0.5, 0.3, 0.6, 0.4, 0.7, 0.5, 0.3, 1.0)
ROUNDING = {"float32": 2**-18, "bfloat16": 2**-6, "float16": 2**-9}  # of the largest, where ranks' parts are summed


def case_of(seqlen=1024, **changes):
    return Case(seqlen, seqlen, **{"num_heads": 8, "num_heads_k": 4, "head_dim": 32, **changes})


@dataclass(frozen=True)
class Problem:
    case: Case
    dtype: str = "float32"
    config: rrattn.RRAttentionConfig = field(default_factory=lambda: rrattn.RRAttentionConfig(threshold=0.5))
    wants: str = "query key value sink"
    """Names of the inputs that want a gradient."""
    document: int = 0
    """Length of packed documents, where there are any besides the case's FlashMask."""
    message_bytes: int = 1
    """sequence_chunks.MESSAGE_BYTES: so few that key heads are gathered one by one."""

    @property
    def inputs(self):
        return make_inputs(self.case, self.dtype)

    @property
    def rows(self):
        if self.document:
            positions = paddle.arange(self.case.seqlen_k, dtype="int32").reshape([1, 1, -1, 1])
            return ((positions // self.document + 1) * self.document).expand([self.case.batch, -1, -1, -1])
        return None if self.inputs.startend is None else paddle.to_tensor(self.inputs.startend)

    @property
    def sink(self):
        return None if self.inputs.sink is None else paddle.to_tensor(self.inputs.sink)

    def leaves(self, *inputs):
        """Those of query, key, value and sink that want a gradient, by their names; now they ask for it."""
        named = zip(("query", "key", "value", "sink"), inputs)
        leaves = {name: tensor for name, tensor in named if tensor is not None and name in self.wants.split()}
        for leaf in leaves.values():
            leaf.stop_gradient = False
        return leaves

    @cached_property
    def of_one_process(self):
        """out, gradients and block mask, by their names."""
        query, key, value = to_tensors(self.inputs, self.dtype)
        sink = self.sink
        leaves = self.leaves(query, key, value, sink)
        core = rrattn.RRAttention(self.config)
        out = core(query, key, value, self.rows, causal=self.case.causal, sink=sink)
        grads = paddle.grad([out], list(leaves.values()), [paddle.to_tensor(self.inputs.grad_out).astype(self.dtype)])
        results = {f"grad_{name}": grad.astype("float32").numpy() for name, grad in zip(leaves, grads)}
        mask = core.last_selection.block_mask.numpy()
        return {**results, "out": out.astype("float32").numpy(), "mask": mask}


IN_ONE_GROUP = sequence_chunks.MESSAGE_BYTES

PROBLEMS = {
    "plain": Problem(case_of(batch=2)),
    "all heads at once": Problem(case_of(batch=2, sink=True), message_bytes=IN_ONE_GROUP),
    "groups of several key heads": Problem(
        case_of(num_heads=20, num_heads_k=20, flashmask="document", flashmask_heads="Hkv", sink=True),
        config=rrattn.RRAttentionConfig(threshold=[HEAD_THRESHOLDS[:5] * 4]),
    ),
    "documents": Problem(case_of(batch=2, flashmask="document", flashmask_heads="Hkv")),
    "long documents": Problem(case_of(5120, num_heads=4, batch=2), document=1664),
    "rows without keys": Problem(case_of(flashmask="no_row_between", flashmask_heads="Hq")),
    "windows": Problem(case_of(flashmask="window_with_full_tail")),
    "not causal": Problem(case_of(causal=False)),
    "not causal, bounds": Problem(case_of(causal=False, flashmask="full_document", batch=2)),
    "two key heads, sink, values of 48": Problem(case_of(num_heads_k=2, head_dim_v=48, sink=True)),
    "gradient of the key alone": Problem(case_of(), wants="key"),
    "gradient of the sink alone": Problem(case_of(sink=True), wants="sink"),
    "a mask of two words": Problem(case_of(5120, num_heads=4)),
    "bfloat16": Problem(case_of(head_dim=64), "bfloat16"),
    "float16": Problem(case_of(head_dim=64, batch=2), "float16"),
    "thresholds of heads": Problem(
        case_of(), config=rrattn.RRAttentionConfig(threshold=[HEAD_THRESHOLDS], key_stride=4, head_offset=3)
    ),
    "dense, too short": Problem(case_of(), config=rrattn.RRAttentionConfig(threshold=0.5, min_length=1025)),
    "not too short": Problem(case_of(), config=rrattn.RRAttentionConfig(threshold=0.5, min_length=1024)),
}


@pytest.fixture(scope="module", params=[2, 4])
def ranks_and_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    run_ranks(Path(__file__).with_name("context_parallel_rank.py"), request.param, folder)
    return request.param, folder


@pytest.fixture(params=distributed.LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=PROBLEMS)
def name(request):
    return request.param


@pytest.fixture
def parts(ranks_and_folder, layout, name):
    """What each rank computed."""
    ranks, folder = ranks_and_folder
    return [dict(np.load(folder / f"{layout}-{name}-{rank}.npz")) for rank in range(ranks)]


def in_order(parts, layout):
    """[B, S, ...] of each rank's [B, S / ranks, ...]."""
    chunks = {}
    for rank, part in enumerate(parts):
        held = chunks_of_rank(layout, len(parts), rank)
        chunks.update(zip(held, np.split(part, len(held), axis=1)))
    return np.concatenate([chunks[i] for i in range(len(chunks))], axis=1)


def test_the_ranks_together_compute_what_one_process_does(parts, layout, name):
    expected = PROBLEMS[name].of_one_process
    np.testing.assert_array_equal(in_order([part["out"] for part in parts], layout), expected["out"])
    for gradient in (key for key in expected if key.startswith("grad_")):
        held = [part[gradient] for part in parts]
        whole = sum(held) if gradient == "grad_sink" else in_order(held, layout)
        tolerance = ROUNDING[PROBLEMS[name].dtype] * abs(expected[gradient]).max()
        np.testing.assert_allclose(whole, expected[gradient], rtol=0, atol=tolerance)


def test_the_ranks_select_what_one_process_does(parts, layout, name):
    mask = PROBLEMS[name].of_one_process["mask"]
    if layout == "all_to_all":
        np.testing.assert_array_equal(np.concatenate([part["mask_0"] for part in parts], axis=1), mask)
        return
    chunks = {}
    for rank, part in enumerate(parts):
        held = chunks_of_rank(layout, len(parts), rank)
        chunks.update({chunk: part[f"mask_{i}"] for i, chunk in enumerate(held)})
    blocks = mask.shape[2] // len(chunks)
    for chunk, selected in chunks.items():
        of_one = mask[:, :, chunk * blocks : (chunk + 1) * blocks]
        np.testing.assert_array_equal(selected, of_one[..., : selected.shape[-1]])
        assert not of_one[..., selected.shape[-1] :].any()


GROUPS = {  # of heads; in the others there is one for each of 4 key heads
    "all heads at once": {"forward": 1, "backward": 1},
    "groups of several key heads": {"forward": 4, "backward": 5},
    "two key heads, sink, values of 48": {"forward": 2, "backward": 2},
}


def test_keys_and_values_are_gathered_again_for_gradients(parts, layout, name):
    """So that none but a rank's own are kept for them; both times by groups of heads."""
    key, value = (x.size // len(parts) for x in PROBLEMS[name].inputs.forward[1:])
    for part in parts:
        for each, groups in GROUPS.get(name, {"forward": 4, "backward": 4}).items():
            gathered = [] if layout == "all_to_all" else groups * [key // groups, value // groups]
            np.testing.assert_array_equal(part[f"gathered_{each}"], gathered)


NOTHING_LEFT_OUT = (  # few blocks, or masked in part
    "dense, too short",
    "documents",
    "groups of several key heads",
    "windows",
    "not causal, bounds",
)


def test_selections_are_not_dense():
    """Else equal masks would say little."""
    for name, problem in PROBLEMS.items():
        mask = paddle.to_tensor(problem.of_one_process["mask"])
        visible = {"causal": problem.case.causal, "seqlen_q": problem.case.seqlen_q, "seqlen_k": problem.case.seqlen_k}
        density = rrattn.block_density(mask, problem.rows, **visible).mean().item()
        assert density == 1 if name in NOTHING_LEFT_OUT else density < 0.97, name


# Errors, which come before the ranks talk


@dataclass(frozen=True)
class Group:
    nranks: int = 2
    rank: int = 0


def attend(seqlen=256, heads=8, heads_k=2, group=Group(), **options):
    query, key = paddle.randn([1, seqlen, heads, 32]), paddle.randn([1, seqlen, heads_k, 32])
    return distributed.context_parallel_attention(query, key, key, group=group, **options)


@pytest.mark.parametrize(
    "options, told",
    (
        ({"layout": "swap2p"}, "layout is 'swap2p', but must be one of 'dual_chunk', 'contiguous', 'all_to_all'"),
        ({"seqlen": 384}, "has 384 tokens, but with the layout 'dual_chunk' must have a multiple of 256"),
        ({"seqlen": 192, "layout": "contiguous"}, "a multiple of 128, at least one: sequences of a multiple of 256"),
        ({"seqlen": 0}, "has 0 tokens"),
        ({"heads": 3, "heads_k": 3, "layout": "all_to_all"}, "3 query heads cannot be split over 2 ranks"),
        ({"heads": 6, "group": Group(3), "layout": "all_to_all"}, "2 key heads cannot be split over 3 ranks"),
        ({"heads": 8, "heads_k": 3}, "query has 8 heads and key has 3, but .* must be a multiple"),
        ({"sink": paddle.zeros([16])}, r"sink has shape \[16\], but must have \[8\], one for each query head"),
        ({"causal": 2}, "causal"),
        ({"softmax_scale": float("nan")}, "softmax_scale"),
        ({"config": rrattn.RRAttentionConfig(threshold=[[0.5, 0.6]])}, "2 thresholds"),
        ({"config": rrattn.RRAttentionConfig(threshold=[0.5, 0.6])}, "layer"),
    ),
)
def test_what_is_not_allowed_is_named(options, told):
    with pytest.raises(ValueError, match=told):
        attend(**options)


@pytest.mark.parametrize(
    "arguments, error, told",
    (
        (([2, 256, 8, 32], [1, 256, 2, 32], None), ValueError, r"key has shape \[1, 256, 2, 32\]"),
        (([1, 256, 8, 32], [1, 128, 2, 32], None), ValueError, r"key has shape \[1, 128, 2, 32\]"),
        (([256, 8, 32], [256, 2, 32], None), ValueError, r"query has shape \[256, 8, 32\]"),
        (([1, 256, 8, 32], [1, 256, 2, 32], [1, 1, 256, 1]), ValueError, "the third of the size 512"),
        (([1, 256, 8, 32], [1, 256, 2, 32], [1, 512]), ValueError, "must have 4 dimensions"),
        (([1, 256, 8, 32], None, None), TypeError, "key is a NoneType"),
        (([1, 256, 8, 32], [1, 256, 2, 32], [1, 4, 512, 1]), ValueError, r"has 4 heads, but must have 1, num_heads_k"),
    ),
)
def test_shapes_that_do_not_fit_are_named(arguments, error, told):
    query, key, rows = (None if shape is None else paddle.zeros(shape) for shape in arguments)
    rows = None if rows is None else rows.astype("int32")
    with pytest.raises(error, match=told):
        distributed.context_parallel_attention(query, key, key, rows, group=Group())


def test_values_have_the_heads_of_the_keys():
    query, key, value = (paddle.randn([1, 256, heads, 32]) for heads in (8, 2, 4))
    with pytest.raises(ValueError, match="value has 4 heads, but must have those of key, 2"):
        distributed.context_parallel_attention(query, key, value, group=Group())


@pytest.mark.parametrize(
    ("heads_k", "head_bytes", "most", "groups"),
    (
        (8, sequence_chunks.MESSAGE_BYTES, 8, 8),
        (8, sequence_chunks.MESSAGE_BYTES, 4, 4),
        (8, sequence_chunks.MESSAGE_BYTES - 1, 8, 4),
        (8, sequence_chunks.MESSAGE_BYTES // 8, 8, 1),
        (8, 1, 8, 1),
        (6, 1 << 30, 4, 3),
        (1, 1 << 30, 8, 1),
        (0, 1 << 30, 8, 1),
    ),
)
def test_heads_in_groups(heads_k, head_bytes, most, groups):
    found = sequence_chunks.head_groups(4 * heads_k, heads_k, head_bytes, most)
    assert len(found) == groups
    numbers = [(list(range(4 * heads_k))[heads.queries], list(range(heads_k))[heads.keys]) for heads in found]
    assert sum((queries for queries, _ in numbers), []) == list(range(4 * heads_k))
    assert sum((keys for _, keys in numbers), []) == list(range(heads_k))
    assert all([query // 4 for query in queries[::4]] == keys for queries, keys in numbers)


def test_what_is_too_long_for_some_ranks_is_refused_on_each():
    distributed._check_length(1 << 20, on_gpu=True)
    distributed._check_length(1 << 21, on_gpu=False)
    with pytest.raises(ValueError, match="seqlen_k is 1048832, but must be at most 1048576 on a GPU"):
        distributed._check_length((1 << 20) + 256, on_gpu=True)


@pytest.mark.parametrize("setting", ({"compensate": True}, {"quantization": "qk_int8_pv_fp8"}), ids=str)
def test_compensation_and_quantization_have_no_gradients(setting):
    config = rrattn.RRAttentionConfig(**setting)
    query = paddle.randn([1, 256, 2, 32])
    query.stop_gradient = False
    with pytest.raises(ValueError, match="(compensate|quantization) is "):
        distributed.context_parallel_attention(query, query, query, group=Group(), config=config)


def test_an_observed_layer_is_refused():
    core = rrattn.RRAttention()
    core._observer = lambda *arguments: None
    query = paddle.randn([1, 256, 2, 32])
    with pytest.raises(ValueError, match="statistics"):
        distributed.attend_in_context(core, query, query, query, group=Group(), layout="contiguous", causal=True)


def test_static_graphs_are_refused():
    spec = [paddle.static.InputSpec([1, 256, 2, 32], "float32")]

    def attend(query):
        return distributed.context_parallel_attention(query, query, query, group=Group())

    with pytest.raises(ValueError, match="runs eagerly"):
        _ = paddle.jit.to_static(attend, input_spec=spec, full_graph=True).concrete_program
