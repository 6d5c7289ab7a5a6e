"""Other implementations of attention on the same inputs, for the GPU benchmarks, and how all are timed in turn.

Each maker takes query [B, Lq, Hq, D], key and value [B, Lk, Hkv, D], and where it is block-sparse a mask, bool
[B, Hq, Mq, Mk], of selected causal blocks, each row's own among them; it returns a call without arguments. What cannot
run here raises, and `make` tells why.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SECONDS_BEFORE = 0.3  # that a call runs before it is timed


def dense(backend):
    """torch's scaled_dot_product_attention with one of its backends, causal, all blocks."""

    def maker(query, key, value):
        if query.shape[1] != key.shape[1]:
            raise ValueError("its causal mask is for equal lengths")
        arrays = [x.transpose(1, 2) for x in (query, key, value)]

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*arrays, is_causal=True, enable_gqa=True).transpose(1, 2)

        return call

    return maker


def index_lists(mask):
    """(number of blocks [B, Hq, Mq], their indices in rising order [B, Hq, Mq, Mk]), int32."""
    mask = mask.contiguous()
    order = (~mask).byte().argsort(dim=-1, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.int()


def whole_and_own(mask):
    """The selected blocks that every row sees whole, and those on the diagonal."""
    own = torch.ones_like(mask[0, 0]).triu(mask.shape[3] - mask.shape[2])
    return mask & ~own, mask & own


@cache  # another function would be compiled again
def flex_causal(shift):
    return lambda batch, head, row, column: column <= row + shift


@cache
def compiled_flex():
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    config.donated_buffer = False  # or a backward pass could not be run again
    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, mask):
    """torch's FlexAttention, compiled, with the mask as its BlockMask."""
    from torch.nn.attention.flex_attention import BlockMask

    if key.shape[1] > 32768:
        raise ValueError("left out above 32768 keys")
    causal = flex_causal(key.shape[1] - query.shape[1])
    whole, own = map(index_lists, whole_and_own(mask))
    block_mask = BlockMask.from_kv_blocks(*own, *whole, BLOCK_SIZE=128, mask_mod=causal)
    compiled = compiled_flex()
    arrays = [x.transpose(1, 2) for x in (query, key, value)]
    return lambda: compiled(*arrays, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


@cache
def fa4_causal(shift):
    import cutlass.cute as cute

    if shift:

        @cute.jit
        def causal(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
            return n_idx <= m_idx + shift
    else:

        @cute.jit
        def causal(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
            return n_idx <= m_idx

    return causal


def fa4_blocks(whole, own):
    """Its lists: blocks that are seen whole, and those on the diagonal, one a row."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    whole, own = index_lists(whole), index_lists(own)
    return BlockSparseTensorsTorch(
        mask_block_cnt=own[0],
        mask_block_idx=own[1][..., :1].contiguous(),
        full_block_cnt=whole[0],
        full_block_idx=whole[1],
        block_size=(128, 128),
    )


def flash_attention_4(query, key, value, mask):
    """FlashAttention-4 (CuTe DSL) with the mask's blocks."""
    from flash_attn.cute.interface import _flash_attn_fwd

    causal = fa4_causal(key.shape[1] - query.shape[1])
    blocks = fa4_blocks(*whole_and_own(mask))
    return lambda: _flash_attn_fwd(query, key, value, mask_mod=causal, block_sparse_tensors=blocks)[0]


DENSE = {"cudnn dense": dense(SDPBackend.CUDNN_ATTENTION), "flash dense": dense(SDPBackend.FLASH_ATTENTION)}
SPARSE = {"flex": flex, "fa4": flash_attention_4}


def backward_of(forward):
    """The backward pass of one of the above, by torch's autograd: takes grad_out [B, Lq, Hq, D] as well, at the end."""

    def maker(*arguments):
        *inputs, grad_out = arguments
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = forward(*leaves, *inputs[3:])()
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return maker


def flash_attention_4_backward(query, key, value, mask, grad_out):
    """The backward pass of FlashAttention-4 with the mask's blocks, their lists made beforehand."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    options = {"mask_mod": fa4_causal(key.shape[1] - query.shape[1])}
    blocks, blocks_of_keys = (fa4_blocks(*parts) for parts in zip(*((x, x.mT) for x in whole_and_own(mask))))
    out, lse = _flash_attn_fwd(query, key, value, block_sparse_tensors=blocks, return_lse=True, **options)[:2]
    arrays = query, key, value, out, grad_out, lse
    return lambda: _flash_attn_bwd(*arrays, block_sparse_tensors=blocks_of_keys, **options)


BACKWARD_DENSE = {"cudnn dense": backward_of(DENSE["cudnn dense"])}
BACKWARD_SPARSE = {"flex": backward_of(flex), "fa4": flash_attention_4_backward}


def make(name, maker, *arguments, expected=None):
    """The rival's call, tried once; None where it does not run or its results are not `expected`, with the reason."""
    try:
        call = maker(*arguments)
        result = call()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  (whatever a compiler or an import throws)
        print(f"  without {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}", flush=True)
        return None
    if expected is not None:
        pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
        error = max(relative_error(*pair) for pair in pairs)
        if not error < 0.01:
            print(f"  without {name}: its result is off by {error:.2g}", flush=True)
            return None
    return call


def relative_error(actual, expected):
    """Root mean square error over root mean square, by the largest of 4096 tokens at a time."""
    errors = [
        (a.float() - b.float()).norm() / b.float().norm()
        for a, b in zip(actual.split(4096, 1), expected.split(4096, 1))
    ]
    return torch.stack(errors).max().item()  # NaN where one is


def elapsed_ms(call):
    """Milliseconds that the GPU takes for a call, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved_ms(calls, rounds, seconds_before=SECONDS_BEFORE):
    """{name: median ms over the rounds} of the calls that are not None.

    Each runs in every round, so that a GPU that slows down slows all of them. What ran before sets the clock that
    a call finds: an H200 at its power limit is faster after a light kernel than after a heavy one. So each round has an
    order of its own, and a call runs for a while by itself before it is timed. In between the GPU sleeps for about a
    millisecond, so that the time to launch is not counted.
    """
    calls = {name: call for name, call in calls.items() if call is not None}
    times = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name, call in shuffled.sample(list(calls.items()), len(calls)):
            start = time.monotonic()
            while time.monotonic() - start < seconds_before:
                call()
                torch.cuda.synchronize()
            for _ in range(2):
                torch.cuda._sleep(2_000_000)
                times[name].append(elapsed_ms(call))
    return {name: statistics.median(each) for name, each in times.items()}


def rivals_ms(ms, case, of_all, of_each):
    """{name: ms} of the rivals that ran: those that all cases share, by name, and of this case, by (name, case)."""
    rivals = {name: ms[name] for name in of_all if name in ms}
    rivals.update((name, ms[name, case]) for name in of_each if (name, case) in ms)
    return rivals
