"""The stage shapes of gpu.py: inputs, calls and records of what shapes.py lists."""

from __future__ import annotations

import time

import torch

from .gpu_attend import Pipeline
from .gpu_backward import backward
from .gpu_inputs import attend_flops, normal, pack, random_blocks
from .gpu_rivals import BACKWARD_SPARSE, DENSE, SPARSE, backward_of, interleaved_ms, make
from .shapes import PASSES, SHAPES

ROUNDS, SECONDS_BEFORE = 3, 0.1  # the stage is to take minutes
SECONDS_OF_FA4 = 70  # until it is left out: it is compiled anew for each head size and ratio of heads
BACKWARD_DENSE = {name: backward_of(maker) for name, maker in DENSE.items()}


def inputs_of(shape):
    """(query, key, value, grad_out, startend or None)."""
    query, grad_out = (normal(shape.tokens, shape.num_heads, shape.head_dim, shape.batch) for _ in range(2))
    key, value = (normal(shape.tokens, shape.num_heads_k, shape.head_dim, shape.batch) for _ in range(2))
    if shape.documents == 1:
        return query, key, value, grad_out, None
    length = shape.document_tokens
    row = torch.arange(shape.tokens, device="cuda", dtype=torch.int32)
    return query, key, value, grad_out, ((row // length + 1) * length).int().reshape(1, 1, -1, 1).contiguous()


def blocks_of(shape):
    """bool [B, Hq, Mq, Mk]: the selected blocks, none of another document than the row's."""
    mask = random_blocks(shape.tokens, shape.tokens, shape.density, shape.num_heads, shape.batch)
    document = torch.arange(mask.shape[-1], device="cuda") // (mask.shape[-1] // shape.documents)
    return mask & (document[:, None] == document)


def apart(shape, tensor):
    """[B, L, H, D] with each document as a sequence of its own, which is how dense attention leaves the others out."""
    return tensor.reshape(shape.batch * shape.documents, shape.document_tokens, *tensor.shape[2:])


class TimeLimit:
    """Makes rivals until this many seconds have gone into that."""

    def __init__(self, seconds):
        self.left = seconds

    def make(self, name, *arguments, **options):
        if self.left <= 0:
            print(f"  without {name}: the time to compile it for other shapes is up", flush=True)
            return None
        start = time.monotonic()
        call = make(name, *arguments, **options)
        self.left -= time.monotonic() - start
        return call


def calls_of(problem, each, fa4):
    """({name: call} of ours and others, None where it does not run, bytes of our workspace) of a pass, or None."""
    *inputs, grad_out = problem.tensors
    pipeline, label = problem.pipeline, f"{problem.name}, {each}"
    of_pass = [] if each == "forward" else [grad_out]
    workspace_bytes = []

    def ours():
        if each == "forward":
            stage = pipeline.attend(problem.words)
        else:
            stage = backward(pipeline, problem.words, grad_out, problem.grads, deterministic=False)
        call, num_bytes = pipeline.with_workspace([stage])
        workspace_bytes.append(num_bytes)
        return call

    calls = {"ours": make(f"ours, {label}", ours)}
    if calls["ours"] is None:
        return None
    expected = pipeline.out.clone() if each == "forward" else tuple(x.clone() for x in problem.grads)
    sequences = [apart(problem.shape, x) for x in (*inputs, *of_pass)]
    for name, maker in (DENSE if each == "forward" else BACKWARD_DENSE).items():
        calls[name] = make(f"{name}, {label}", maker, *sequences)
    maker = (SPARSE if each == "forward" else BACKWARD_SPARSE)["fa4"]
    calls["fa4"] = fa4.make(f"fa4, {label}", maker, *inputs, problem.mask, *of_pass, expected=expected)
    return calls, workspace_bytes[0]


class Problem:
    """Inputs of a shape, its selected blocks, and where results lie."""

    def __init__(self, name):
        self.name, self.shape = name, SHAPES[name]
        *self.tensors, startend = inputs_of(self.shape)
        self.mask = blocks_of(self.shape)
        self.words, self.num_selected = pack(self.mask), int(self.mask.sum())
        self.pipeline = Pipeline(*self.tensors[:3], startend)
        self.grads = tuple(torch.empty_like(x) for x in self.tensors[:3])


def measure_shape(name, fa4):
    """Records of the passes of a shape that run here, in each all calls in turns; `fa4` is its TimeLimit."""
    problem = Problem(name)
    shape, pipeline = problem.shape, problem.pipeline
    flops = attend_flops(problem.num_selected, shape.tokens, shape.all_heads, shape.head_dim)
    for each, products in zip(PASSES, (1, 2.5)):
        found = calls_of(problem, each, fa4)
        if found is None:
            continue
        calls, workspace_bytes = found
        ms = interleaved_ms(calls, ROUNDS, SECONDS_BEFORE)
        ours = ms.pop("ours")
        yield {
            "stage": "shapes",
            "shape": name,
            "pass": each,
            **pipeline.lengths,
            "stride": None,
            "batch": shape.batch,
            "documents": shape.documents,
            "num_heads": shape.num_heads,
            "num_heads_k": shape.num_heads_k,
            "head_dim": shape.head_dim,
            "density": problem.num_selected / shape.visible_blocks,
            "ms": ours,
            "tflops": products * flops / ours / 1e9,
            "workspace_bytes": workspace_bytes,
            "baselines": ms,
        }


def measure(names=None):
    """Records of these shapes; default: all."""
    fa4 = TimeLimit(SECONDS_OF_FA4)
    for name in names or SHAPES:
        yield from measure_shape(name, fa4)
        torch.cuda.empty_cache()
