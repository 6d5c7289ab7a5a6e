"""The kernels on a GPU in place of the CPU's: torch tensors through rrattn.direct, and Paddle's operators.

They need torch, a GPU, and rrattn built with the GPU kernels for it (see setup.py); those through Paddle a GPU build of
it. `PLATFORMS` has what is here: "gpu", "paddle-gpu", and "gpu-portable-99KB" and so on, the portable kernels with each
table of tiles, where they are built for the GPU and fit.
"""

import contextlib
import threading

import harness
import numpy as np
import pytest

from rrattn import direct, reference

try:
    import torch

    WHY_NOT = None if torch.cuda.is_available() else "torch sees no GPU"
except ImportError:
    WHY_NOT = "torch is not installed"
try:
    import paddle

    import rrattn

    WHY_NOT_PADDLE = None if paddle.is_compiled_with_cuda() else "Paddle is a build for the CPU"
except ImportError:
    WHY_NOT_PADDLE = "Paddle is not installed"

WORKSPACE_BYTES = 1 << 28


@contextlib.contextmanager
def path_in_use(path):
    """The path of rrattn.direct on GPUs, as long as the context lasts."""
    before = direct.gpu_path()
    direct.set_gpu_path(path)
    try:
        yield
    finally:
        direct.set_gpu_path(before)


def path_runs(path):
    """Whether this build has kernels of a path for the GPU, and the GPU room for them."""
    scores = torch.zeros(1, 1, 1, 1, device="cuda")
    arrays = {"block_mask": torch.zeros(1, 1, 1, 1, dtype=torch.int32, device="cuda")}
    with path_in_use(path):
        try:
            direct.select_blocks(scores, 0.5, **arrays, seqlen_q=1, seqlen_k=1, size_only=True)
        except ValueError:
            return False
    return True


class GpuKernels(harness.Kernels):
    """The stages through rrattn.direct on torch tensors, with a workspace full of NaN."""

    dtypes = ("bfloat16", "float16")

    def __init__(self, layout="contiguous"):
        super().__init__(layout)
        self.of_thread = threading.local()

    @property
    def options(self):
        """The workspace is each thread's own: a call may launch several kernels, so two at once cannot share one."""
        if not hasattr(self.of_thread, "workspace"):
            self.of_thread.workspace = torch.full([WORKSPACE_BYTES // 4], float("nan"), device="cuda")
        return {"workspace": self.of_thread.workspace, "stream": torch.cuda.current_stream().cuda_stream}

    def allocate(self, storage):
        if storage.dtype == np.uint16:  # the bits of bfloat16
            return torch.from_numpy(storage.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(storage).cuda()

    def download(self, array):
        if array.dtype == torch.bfloat16:
            return array.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
        return array.cpu().numpy()

    def typed(self, dtype):
        return self.options

    def mean_dtype(self, dtype):
        return dtype

    def estimate_reference(self, query, key, startend=None, *, dtype, **options):
        return reference.estimate_on_tensor_cores(query, key, startend, dtype=dtype, **options)

    def assert_same(self, actual, expected, dtype):
        """Up to two roundings: another place among the tiles may mean another order of additions."""
        rounding = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]  # the sums': in float32
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        np.testing.assert_allclose(actual, expected, rtol=2 * rounding, atol=rounding * largest)


class PaddleKernels(GpuKernels):
    """The stages through Paddle's operators.

    The newest GPU wheel of Paddle on PyPI, 2.6.2, has no kernels for Hopper: its own fills, casts and copies of strided
    tensors give garbage there, without an error. So torch makes every input and hands it over by DLPack, contiguous
    (2.6.2 reads no strides), and results are only copied to the host.
    """

    grad_lock = threading.Lock()  # paddle.grad keeps its state in one place for all threads

    def tensor(self, values, dtype):
        """Values as a Paddle tensor on the GPU, None as None."""
        if values is None:
            return None
        if 0 in values.shape:
            pytest.skip("Paddle 2.6 takes no empty tensors in custom operators")
        if dtype == "bool":  # which it does not take over DLPack
            return paddle.to_tensor(values, place=paddle.CUDAPlace(0))
        tensor = self.input(values, dtype)
        torch.cuda.synchronize()  # Paddle has a stream of its own
        return paddle.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))

    def threshold(self, threshold):
        """One for all heads as it is, those of single heads as a tensor."""
        return self.tensor(threshold, "float32") if isinstance(threshold, np.ndarray) else threshold

    def values(self, tensor):
        """A result as NumPy has it."""
        torch.cuda.synchronize()
        return tensor.numpy()

    def estimate(self, query, key, startend=None, *, sink=None, dtype="float32", **options):
        scores = rrattn.estimate_block_scores(
            self.tensor(query, dtype),
            self.tensor(key, dtype),
            self.tensor(startend, "int32"),
            sink=self.tensor(sink, "float32"),
            **options,
        )
        return self.values(scores)

    def select(self, block_scores, startend=None, *, threshold, **options):
        mask = rrattn.select_blocks(
            self.tensor(block_scores, "float32"), self.threshold(threshold), self.tensor(startend, "int32"), **options
        )
        return harness.unpacked(self.values(mask), block_scores.shape[-1])

    def attend(self, query, key, value, block_mask, startend=None, *, sink=None, dtype="float32", **options):
        out, lse = rrattn.block_sparse_attention(
            *(self.tensor(x, dtype) for x in (query, key, value)),
            self.tensor(harness.packed(block_mask), "int32"),
            self.tensor(startend, "int32"),
            sink=self.tensor(sink, "float32"),
            return_softmax_lse=True,
            **options,
        )
        return harness.decode(self.values(out), dtype), self.values(lse)

    def dense_mask(self, mask, *, dtype):
        rows, verdict = rrattn.operators.call("dense_mask", self.tensor(mask, dtype))
        return self.values(rows), self.values(verdict).tolist()

    def backward(
        self, query, key, value, block_mask, grad_out, startend=None, *,
        sink=None, grad_lse=None, dtype="float32", **options,
    ):  # fmt: skip
        leaves = [self.tensor(x, dtype) for x in (query, key, value)]
        if sink is not None:
            leaves.append(self.tensor(sink, "float32"))
        for leaf in leaves:
            leaf.stop_gradient = False
        mask, startend = self.tensor(harness.packed(block_mask), "int32"), self.tensor(startend, "int32")
        results = rrattn.block_sparse_attention(
            *leaves[:3],
            mask,
            startend,
            sink=leaves[3] if sink is not None else None,
            return_softmax_lse=True,
            **options,
        )
        given = [self.tensor(grad_out, dtype)]
        if grad_lse is not None:
            given.append(self.tensor(grad_lse, "float32"))
        with self.grad_lock:
            grads = [self.values(grad) for grad in paddle.grad(results[: len(given)], leaves, given)]
        return (*(harness.decode(grad, dtype) for grad in grads[:3]), *grads[3:])

    def rr_attention(self, query, key, value, startend=None, *, threshold, sink=None, dtype="float32", **options):
        """(None, block_mask, out, lse) of one operator, which keeps the scores to itself."""
        out, lse, mask = rrattn.rr_attention(
            *(self.tensor(x, dtype) for x in (query, key, value)),
            self.tensor(startend, "int32"),
            threshold=self.threshold(threshold),
            sink=self.tensor(sink, "float32"),
            return_softmax_lse=True,
            return_block_mask=True,
            **options,
        )
        selected = harness.unpacked(self.values(mask), reference.num_blocks(key.shape[1]))
        return None, selected, harness.decode(self.values(out), dtype), self.values(lse)


PATHS = {}  # of the platforms whose path is forced
if not WHY_NOT:
    tables = [path for path in direct.available_gpu_paths() if path.startswith("portable-")]
    PATHS = {f"gpu-{path}": path for path in tables if path_runs(path)}
PLATFORMS = {} if WHY_NOT else {"gpu": GpuKernels, **dict.fromkeys(PATHS, GpuKernels)}
if PLATFORMS and not WHY_NOT_PADDLE:
    PLATFORMS["paddle-gpu"] = PaddleKernels
