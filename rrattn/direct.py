"""The stages on plain arrays, without Paddle: for kernel work, tests and benchmarks beside other array libraries.

An array is anything with ``__dlpack__``: NumPy arrays in host memory; torch, CuPy or Paddle tensors, on a GPU too
where this build has the stage for it. Inputs come as in the functions of the same names on Paddle tensors. The caller
allocates everything, outputs too, which are given by name and written in place; arrays of [B, L, H, D] may be strided
as long as their last dimension is contiguous. Inputs may be read-only. An output may share memory with no other array,
except that ``out`` may be ``query``. Functions release the GIL. They raise ValueError (TypeError for what is not an
array, and for options that they do not have) with the value and what is allowed, before anything is written.

NumPy has no bfloat16: pass uint16 arrays that hold the bits, and ``dtype="bfloat16"``. B, L, H, D stand for batch,
length, heads and head size, Dv for that of values; blocks are of 128 tokens; Mq and Mk are the numbers of query and key
blocks.

All functions take these options and return the bytes of workspace that they need:

num_threads : int, optional
    The most threads to use on the CPU. Default: `default_num_threads()`, as many as OpenMP would take
    (OMP_NUM_THREADS), but no more than the process has processors or its container's CPU quota pays for. Results do
    not depend on it.
workspace : array, optional on the CPU
    Scratch memory on the device of the other arrays, of any type.
stream : int
    The cudaStream_t to run on, as an integer.
size_only : bool
    Only return the bytes; nothing runs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Callable, Protocol, TypedDict, Union, cast

from . import _direct, arguments
from .config import CAUSAL, RRAttentionConfig, checked_keep_rules, sampling_of_call

_DEFAULTS = RRAttentionConfig()
_DEFAULT_THRESHOLD = cast(float, _DEFAULTS.threshold)  # one number, where a config may have several
_OPTIONS = ("num_threads", "workspace", "stream", "size_only")

available_gpu_paths = _direct.available_gpu_paths
available_simd = _direct.available_simd
cuda_archs = _direct.cuda_archs
default_num_threads = _direct.default_num_threads
gpu_path = _direct.gpu_path
simd = _direct.simd


class SupportsDlpack(Protocol):
    """An array of any library that exchanges arrays by DLPack."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...


if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    Array = Union[NDArray[Any], SupportsDlpack]  # NumPy says that its arrays of bool are none, and they are read

    class Options(TypedDict, total=False):
        """What all functions take, besides their own arguments."""

        num_threads: int | None
        workspace: Array | None
        stream: int
        size_only: bool


def set_simd(name: str) -> None:
    """Makes the CPU stages use the instruction set of this name, one of :func:`available_simd`."""
    if not isinstance(name, str):
        raise TypeError(f"simd is {name!r}, but must be a name, one of {', '.join(available_simd())}")
    _direct.set_simd(name)


def gpu_kernels(device: int = 0, path: str | None = None) -> str:
    """The kernels that a GPU, by its number, gets for a path of :func:`available_gpu_paths`, by default that in use.

    "hopper", its own ones, or "portable-99KB" and so on, the portable ones with these tiles. A ValueError where this
    build has none for the GPU says what it has.
    """
    return _direct.gpu_kernels(device, gpu_path() if path is None else _checked_gpu_path(path))


def set_gpu_path(name: str) -> None:
    """Makes the GPU stages of this module use the kernels of this name, one of :func:`available_gpu_paths`.

    The path holds for all threads and GPUs from the next call on; Paddle's operators always take "auto".

    - "auto", the default: Hopper's own kernels on a Hopper GPU if they are built (90a), else the portable ones.
    - "portable": the kernels for every GPU from Ampere on, on Hopper too if they are built for it (90, or PTX), which
      take the tiles that fit the GPU's shared memory.
    - "portable-99KB", "portable-163KB", "portable-227KB": the same with the tiles for this much shared memory for a
      thread block, which the GPU must have.
    """
    _direct.set_gpu_path(_checked_gpu_path(name))


def _checked_gpu_path(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"GPU path is {name!r}, but must be a name, one of {', '.join(available_gpu_paths())}")
    return name


def rr_attention(
    query: Array,
    key: Array,
    value: Array,
    startend_row_indices: Array | None = None,
    *,
    out: Array,
    lse: Array | None = None,
    block_mask: Array | None = None,
    block_scores: Array | None = None,
    sink: Array | None = None,
    causal: bool = CAUSAL,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    threshold: float | Array = _DEFAULT_THRESHOLD,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
    compensate: bool = _DEFAULTS.compensate,
    quantization: str | None = _DEFAULTS.quantization,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> int:
    """All three stages in one call: the attention of :func:`rrattn.rr_attention`, without its gradient.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key : [B, Lk, Hkv, D], same dtype
    value : [B, Lk, Hkv, Dv], same dtype
    out : [B, Lq, Hq, Dv], output, same dtype
    lse : [B, Hq, Lq] float32, output if given: log-sum-exp of each row; where nothing is visible the sink, or -inf
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32, output if given: the selected blocks
    block_scores : [B, Hq, Mq, Mk] float32, output if given: what they were selected by
    sink : [Hq] float32, optional
    threshold : float in (0, 1], or [Hq] or [1] float32
    startend_row_indices, causal, stride, key_stride, head_offset, softmax_scale, spread
        As in :func:`rrattn.rr_attention`.
    keep_sink, keep_last, keep_local, min_share, compensate, quantization
        As there.

    The workspace holds the outputs that are not given too.

    Examples
    --------
    >>> import numpy as np
    >>> from rrattn import direct
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 1, 1000, 4, 64), dtype=np.float32)
    >>> arrays = {"out": np.empty_like(query), "lse": np.empty((1, 4, 1000), np.float32)}
    >>> size = direct.rr_attention(query, key, value, **arrays, causal=True, size_only=True)
    >>> workspace = np.empty(size, np.uint8)  # for all calls of these sizes; without it, each allocates its own
    >>> direct.rr_attention(query, key, value, **arrays, causal=True, workspace=workspace) == size
    True
    """
    scalar, per_head = _split_threshold(threshold)
    return _direct.rr_attention(
        query,
        key,
        value,
        startend_row_indices=startend_row_indices,
        head_thresholds=per_head,
        sink=sink,
        out=out,
        lse=lse,
        block_mask=block_mask,
        block_scores=block_scores,
        causal=arguments.flag(causal, "causal"),
        sampling=_direct.Sampling(**sampling_of_call(stride, key_stride, head_offset, softmax_scale, spread)),
        rules=_direct.KeepRules(threshold=scalar, **checked_keep_rules(keep_sink, keep_last, keep_local, min_share)),
        compensate=arguments.flag(compensate, "compensate"),
        quantization=arguments.quantization(quantization) or "",
        dtype=_name(dtype),
        options=_options(rr_attention, options),
    )


def estimate_block_scores(
    query: Array,
    key: Array,
    startend_row_indices: Array | None = None,
    *,
    block_scores: Array,
    sink: Array | None = None,
    causal: bool = CAUSAL,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> int:
    """Estimate how much each query block attends to each key block.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key : [B, Lk, Hkv, D], same dtype
    startend_row_indices : [B, 1 | Hkv | Hq, Lk, 1 | 2 | 4] int32, FlashMask
    block_scores : [B, Hq, Mq, Mk] float32, output
    sink : [Hq] float32, optional
    causal, stride, key_stride, head_offset, softmax_scale, spread : as in :func:`rrattn.rr_attention`
    """
    return _direct.estimate_block_scores(
        query,
        key,
        startend_row_indices,
        sink=sink,
        block_scores=block_scores,
        causal=arguments.flag(causal, "causal"),
        sampling=_direct.Sampling(**sampling_of_call(stride, key_stride, head_offset, softmax_scale, spread)),
        dtype=_name(dtype),
        options=_options(estimate_block_scores, options),
    )


def select_blocks(
    block_scores: Array,
    threshold: float | Array,
    startend_row_indices: Array | None = None,
    *,
    block_mask: Array,
    causal: bool = CAUSAL,
    seqlen_q: int,
    seqlen_k: int,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
    **options: Unpack[Options],
) -> int:
    """Keep the blocks whose scores reach ``threshold`` of their row's sum.

    Parameters
    ----------
    block_scores : [B, Hq, Mq, Mk] float32
    threshold : float in (0, 1], or [Hq] or [1] float32
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32, output: bit j % 32 of word j / 32 for key block j
    seqlen_q, seqlen_k : lengths in tokens
    startend_row_indices, causal, keep_sink, keep_last, keep_local, min_share : as in :func:`rrattn.rr_attention`
    """
    scalar, per_head = _split_threshold(threshold)
    return _direct.select_blocks(
        block_scores,
        startend_row_indices=startend_row_indices,
        head_thresholds=per_head,
        block_mask=block_mask,
        causal=arguments.flag(causal, "causal"),
        seqlen_q=arguments.length(seqlen_q, "seqlen_q"),
        seqlen_k=arguments.length(seqlen_k, "seqlen_k"),
        rules=_direct.KeepRules(threshold=scalar, **checked_keep_rules(keep_sink, keep_last, keep_local, min_share)),
        options=_options(select_blocks, options),
    )


def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    block_mask: Array,
    startend_row_indices: Array | None = None,
    *,
    out: Array,
    lse: Array,
    sink: Array | None = None,
    causal: bool = CAUSAL,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    compensate: bool = _DEFAULTS.compensate,
    quantization: str | None = _DEFAULTS.quantization,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> int:
    """Flash attention over the selected blocks.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key : [B, Lk, Hkv, D], same dtype
    value : [B, Lk, Hkv, Dv], same dtype
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32
    out : [B, Lq, Hq, Dv], output, same dtype
    lse : [B, Hq, Lq] float32, output: log-sum-exp of each row; where nothing is visible the sink, or -inf
    sink : [Hq] float32, optional
    startend_row_indices, causal, softmax_scale, compensate, quantization : as in :func:`rrattn.rr_attention`
    """
    return _direct.block_sparse_attention(
        query,
        key,
        value,
        block_mask,
        startend_row_indices,
        sink=sink,
        out=out,
        lse=lse,
        causal=arguments.flag(causal, "causal"),
        softmax_scale=arguments.softmax_scale(softmax_scale),
        compensate=arguments.flag(compensate, "compensate"),
        quantization=arguments.quantization(quantization) or "",
        dtype=_name(dtype),
        options=_options(block_sparse_attention, options),
    )


def block_sparse_attention_backward(
    query: Array,
    key: Array,
    value: Array,
    block_mask: Array,
    out: Array,
    lse: Array,
    grad_out: Array,
    startend_row_indices: Array | None = None,
    *,
    grad_query: Array,
    grad_key: Array,
    grad_value: Array,
    sink: Array | None = None,
    grad_sink: Array | None = None,
    grad_lse: Array | None = None,
    causal: bool = CAUSAL,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    deterministic: bool = False,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> int:
    """Gradients of :func:`block_sparse_attention` without compensation, given what it was given and what it wrote.

    Parameters
    ----------
    query : [B, Lq, Hq, D] float32, float16 or bfloat16
    key : [B, Lk, Hkv, D], same dtype
    value : [B, Lk, Hkv, Dv], same dtype
    block_mask : [B, Hq, Mq, ceil(Mk / 32)] int32
    out, grad_out : [B, Lq, Hq, Dv], same dtype
    lse : [B, Hq, Lq] float32
    grad_query : [B, Lq, Hq, D], output, same dtype
    grad_key : [B, Lk, Hkv, D], output, same dtype
    grad_value : [B, Lk, Hkv, Dv], output, same dtype
    sink : [Hq] float32, where the forward pass had one
    grad_sink : [Hq] float32, output, where there is a sink; always the same bits on every run
    grad_lse : [B, Hq, Lq] float32, of any strides, optional: zeros without it
    startend_row_indices, causal, softmax_scale : as in :func:`rrattn.rr_attention`
    deterministic : whether a GPU too is to give the same bits on every run, as a CPU always does
    """
    return _direct.block_sparse_attention_backward(
        query,
        key,
        value,
        block_mask,
        out,
        lse,
        grad_out,
        startend_row_indices,
        sink=sink,
        grad_lse=grad_lse,
        grad_query=grad_query,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_sink=grad_sink,
        causal=arguments.flag(causal, "causal"),
        softmax_scale=arguments.softmax_scale(softmax_scale),
        deterministic=arguments.flag(deterministic, "deterministic"),
        dtype=_name(dtype),
        options=_options(block_sparse_attention_backward, options),
    )


def ragged_attention(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array,
    seqlens_k: Array,
    block_tables: Array | None = None,
    *,
    out: Array,
    lse: Array | None = None,
    block_mask: Array | None = None,
    pooled_keys: Array | None = None,
    heads_first: bool = True,
    sink: Array | None = None,
    stride: int = _DEFAULTS.stride,
    key_stride: int | None = _DEFAULTS.key_stride,
    threshold: float | Array = _DEFAULT_THRESHOLD,
    head_offset: int = _DEFAULTS.head_offset,
    softmax_scale: float | None = _DEFAULTS.softmax_scale,
    spread: float = _DEFAULTS.spread,
    keep_sink: bool = _DEFAULTS.keep_sink,
    keep_last: bool | Array = _DEFAULTS.keep_last,
    keep_local: int = _DEFAULTS.keep_local,
    min_share: float = _DEFAULTS.min_share,
    compensate: bool = _DEFAULTS.compensate,
    max_seqlen_k: int | None = None,
    max_num_keys: int | None = None,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> int:
    """All three stages for requests of several lengths in one call: :func:`rrattn.serving.ragged_attention` on arrays.

    T stands for the queries of all requests, P for pages. On a GPU the lengths, tables and flags lie in its memory and
    the host does not read them, so that one CUDA graph serves changing lengths up to the maxima. There T may be more
    than the queries that there are; rows past the last one are not written.

    Parameters
    ----------
    query : [T, Hq, D] float32, float16 or bfloat16
    key, value : [tokens, Hkv, D] and [tokens, Hkv, Dv], same dtype, of all requests; or with block_tables
        [P, Hkv, page size, D] and [P, Hkv, page size, Dv]
    cu_seqlens_q : [B + 1] int32
    seqlens_k : [B] int32
    block_tables : [B, pages of a request] int32, optional
    out : [T, Hq, Dv], output, same dtype
    lse : [Hq, T] float32, output if given
    block_mask : [words] int32, output if given: of each request [Hq, Mq, ceil(Mk / 32)], one after the other. On a GPU
        Hq * ((T + 127 * min(B, T)) // 128) * ceil(max_seqlen_k / 4096) words, of which the first ones are written.
    pooled_keys : [P, Hkv, page size / key_stride, D + 1] float32, read and written, optional; on a CPU alone
    sink : [Hq] float32, optional
    threshold : float in (0, 1], or [Hq] or [1] float32
    keep_last : bool, or [B] bool
    max_seqlen_k, max_num_keys, heads_first, and all other settings
        As in :func:`rrattn.serving.ragged_attention`.
    """
    scalar, per_head = _split_threshold(threshold)
    keeps_last, per_request = (True, keep_last) if hasattr(keep_last, "__dlpack__") else (keep_last, None)
    return _direct.ragged_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        seqlens_k,
        block_tables=block_tables,
        keep_last=per_request,
        head_thresholds=per_head,
        sink=sink,
        pooled_keys=pooled_keys,
        out=out,
        lse=lse,
        block_mask=block_mask,
        heads_first=arguments.flag(heads_first, "heads_first"),
        sampling=_direct.Sampling(**sampling_of_call(stride, key_stride, head_offset, softmax_scale, spread)),
        rules=_direct.KeepRules(threshold=scalar, **checked_keep_rules(keep_sink, keeps_last, keep_local, min_share)),
        compensate=arguments.flag(compensate, "compensate"),
        max_seqlen_k=arguments.most(max_seqlen_k, "max_seqlen_k"),
        max_num_keys=arguments.most(max_num_keys, "max_num_keys"),
        dtype=_name(dtype),
        options=_options(ragged_attention, options),
    )


def startend_rows_from_dense(
    mask: Array, *, start_rows: Array, verdict: Array, dtype: str | None = None, **options: Unpack[Options]
) -> int:
    """FlashMask bounds of a dense causal mask, and a verdict that says whether they are exact.

    Parameters
    ----------
    mask : [B, 1 | Hq, Lq, Lk] bool (True: visible), or float32, float16 or bfloat16 (0: visible; -9984 or less: hidden)
    start_rows : [B, 1 | Hq, Lk, 1] int32, output: one bound for causal=True
    verdict : [2] int32, output: first 0 where the bounds say what the mask does, or 1 for a value that is neither
        visible nor hidden, plus 2 for a mask that is not causal or shows a key again after hiding it; then the bits of
        such a value
    """
    return _direct.startend_rows_from_dense(
        mask,
        start_rows=start_rows,
        verdict=verdict,
        dtype=_name(dtype),
        options=_options(startend_rows_from_dense, options),
    )


def _split_threshold(threshold: Any) -> tuple[float, Array | None]:
    """(float, None), or (unused float, array of one element per head)."""
    if hasattr(threshold, "__dlpack__") and getattr(threshold, "shape", None) != ():
        return 1.0, threshold
    return arguments.threshold(threshold, allowed="a number in (0, 1] or a float32 array of one per head"), None


def _options(function: Callable[..., int], given: Options) -> Any:
    """The options that all functions take, for the one that was called."""
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        raise TypeError(
            f"rrattn.direct.{function.__name__} has no argument {', '.join(unknown)}; "
            f"by name it takes {', '.join([*own, *_OPTIONS])}"
        )
    checked: Options = {**given}
    if given.get("num_threads") is not None:
        checked["num_threads"] = min(arguments.integer(given["num_threads"], "num_threads", low=1), arguments.MAX_INT32)
    if "stream" in given:
        checked["stream"] = arguments.integer(given["stream"], "stream", 0, arguments.MAX_INT64)
    if "size_only" in given:
        checked["size_only"] = arguments.flag(given["size_only"], "size_only")
    return _direct.Options(**checked)


def _name(dtype: object) -> str | None:
    """The name of a dtype, which the library checks; None stays None."""
    if dtype is not None and not isinstance(dtype, str):
        raise TypeError(f"dtype is {dtype!r}, but must be a name: 'float32', 'float16' or 'bfloat16'")
    return dtype
