"""Attention in eight bits on a GPU over long rows, whose products the tensor cores add up with few bits."""

from functools import partial

import numpy as np
import pytest
import torch
from cases import Case, make_inputs
from harness import assert_as_good_as_naive
from test_attend_gpu import with_workspace

from rrattn import direct, reference

QUANTIZATION = "qk_int8_pv_fp8"
hopper_alone = pytest.mark.skipif(direct.gpu_kernels() != "hopper", reason="Hopper's kernels alone have eight bits")


@hopper_alone
@pytest.mark.one_path
@pytest.mark.parametrize("head_dim", (64, 128))
def test_sums_over_many_keys_lose_nothing(kernels, head_dim):
    """Of 65,536 keys of about the same score and value: each 32 of them are 2^-11 of what is summed up."""
    case = Case(130, 1 << 16, causal=False, num_heads=1, num_heads_k=1, head_dim=head_dim)
    inputs = make_inputs(case, "bfloat16", query_scale=0.1)
    value = reference.cast(1 + 0.1 * inputs.value, "bfloat16")
    given = inputs.query, inputs.key, value
    out, lse = kernels.attend(
        *given, np.ones(case.block_shape, bool), causal=False, quantization=QUANTIZATION, dtype="bfloat16"
    )
    exact, exact_lse = reference.quantized_attend(*given, np.ones(case.block_shape, bool), causal=False)
    assert_as_good_as_naive(out, exact, reference.cast(exact, "bfloat16"))
    assert np.abs(lse - exact_lse).max() < 1e-3


@hopper_alone
@pytest.mark.one_path
def test_a_call_stays_in_its_workspace_and_in_a_graph():
    query, key, value = (torch.randn(1, 700, h, 128, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    mask = torch.from_numpy(reference.pack(np.ones((1, 4, 6, 6), bool))).cuda()
    results = [(torch.empty_like(query), torch.empty(1, 4, 700, device="cuda")) for _ in range(2)]

    def call(out, lse):
        options = {"out": out, "lse": lse, "causal": True, "quantization": QUANTIZATION}
        return partial(direct.block_sparse_attention, query, key, value, mask, **options)

    with_workspace(call(*results[0]))
    captured = call(*results[1])
    workspace = torch.empty(captured(size_only=True), dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(workspace=workspace, stream=torch.cuda.current_stream().cuda_stream)
    for tensor in results[1]:
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("head_dim", (136, 256))
def test_larger_heads_are_refused_by_name(kernels, head_dim, platform):
    inputs = make_inputs(Case(130, 130, head_dim=head_dim), "bfloat16")
    message = (
        "head_dim is .* at most 128" if direct.gpu_kernels() == "hopper" else "with quantization on: CPU, GPU with"
    )
    with pytest.raises(ValueError, match=message):
        kernels.attend(*inputs.forward, inputs.block_mask, causal=True, quantization=QUANTIZATION, dtype="bfloat16")
