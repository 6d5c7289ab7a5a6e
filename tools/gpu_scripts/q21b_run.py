"""Eight bits over long rows against the oracle's rules in float64 by torch, and beside our bf16. In the root of what was built."""
import os
import sys

sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests", "kernels")]
import numpy as np
import torch

from rrattn import direct
from tools.bench.gpu_inputs import attend_flops, normal, pack, random_blocks, selected_blocks

Q = "qk_int8_pv_fp8"


def attend(query, key, value, mask, quantization=Q):
    out = torch.full((*query.shape[:3], value.shape[3]), float("nan"), device="cuda", dtype=query.dtype)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), float("nan"), device="cuda")
    given = dict(out=out, lse=lse, stream=torch.cuda.current_stream().cuda_stream, causal=True, quantization=quantization)
    size = direct.block_sparse_attention(query, key, value, mask, size_only=True, **given)
    workspace = torch.full([size // 4 + 1], float("nan"), device="cuda").view(torch.uint8)[:size]
    direct.block_sparse_attention(query, key, value, mask, workspace=workspace, **given)
    torch.cuda.synchronize()
    return out, lse


def rotated(x):
    n = x.shape[-1]
    x, step = x / n, 1
    while step < n:
        a, b = x.view(len(x), -1, 2, step).unbind(2)
        x = torch.stack([a + b, a - b], 2).reshape(len(x), n)
        step *= 2
    return x


def check_long(tokens, kind, dim):
    q, k, v = normal(128, 1, dim), normal(tokens, 1, dim), normal(tokens, 1, dim)
    if kind == "alike":
        q, v = q * 0.1, (v * 0.1 + 1).bfloat16()
    if kind == "rising":  # towards the first key, which is taken last: bases rise
        k = (k.float() * torch.linspace(3, 0.2, tokens, device="cuda")[:, None, None]).bfloat16()
    out, lse = attend(q, k, v, pack(torch.ones(1, 1, 1, tokens // 128, device="cuda", dtype=torch.bool)))
    scale = np.float32(dim**-0.5)
    qf, kf, vf = (x[0, :, 0].float() for x in (q, k, v))
    mean = kf[:128].double().mean(0).float()
    of_mean = (qf.double() @ mean.double()) * float(scale)
    qr, kr = rotated(qf), rotated(kf - mean)
    ql, kl = qr.abs().amax(1), kr.view(-1, 128, dim).abs().amax((1, 2)).repeat_interleave(128)
    k8, q8 = torch.round(kr * (127 / kl)[:, None]).double(), torch.round(qr * (127 / ql)[:, None]).double()
    s = q8 @ k8.T * (ql / 127 * float(scale * np.float32(np.log2(np.e))) * dim).double()[:, None] * (kl / 127).double()
    row = torch.arange(128, device="cuda")[:, None] + tokens - 128
    s = s.masked_fill(torch.arange(tokens, device="cuda") > row, -torch.inf)
    base = s.amax(1).ceil()
    p = (256 * torch.exp2(s - base[:, None])).float().to(torch.float8_e4m3fn).double()
    fraction, e = torch.frexp(vf.abs().amax(0))
    e = (e - 9 + (fraction > 0.875).int()).double()
    v8 = (vf.double() * torch.exp2(-e)).float().to(torch.float8_e4m3fn).double() * torch.exp2(e)
    oracle = p @ v8 / p.sum(1, keepdim=True)
    oracle_lse = (base - 8) * np.log(2) + p.sum(1).log() + of_mean
    exact = torch.softmax((qf.double() @ kf.double().T * float(scale)).masked_fill(torch.isinf(s), -torch.inf), 1) @ vf.double()
    error, rounding = (out[0, :, 0].double() - oracle).abs(), (oracle.bfloat16().double() - oracle).abs()
    rms = lambda x: x.square().mean().sqrt().item()
    print(f"D{dim} {tokens:6} {kind:7}: error/allowed rms {rms(error) / (2 * rms(rounding)):.2f} largest {(error.max() / (2 * rounding.max())).item():.2f}, "
          f"lse {(lse[0, 0].double() - oracle_lse).abs().max():.1e}, to exact {rms(out[0, :, 0].double() - exact) / rms(exact):.4f} (oracle {rms(oracle - exact) / rms(exact):.4f})", flush=True)


def events_ms(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def times(tokens, densities, dim=128):
    q, k, v = normal(tokens, 32, dim), normal(tokens, 8, dim), normal(tokens, 8, dim)
    out, lse = torch.empty_like(q), torch.empty(1, 32, tokens, device="cuda")
    given = dict(out=out, lse=lse, causal=True)
    for d in densities:
        mask = pack(random_blocks(tokens, tokens, d))
        sizes = [direct.block_sparse_attention(q, k, v, mask, size_only=True, quantization=n, **given) for n in (None, Q)]
        workspace = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
        call = lambda n: direct.block_sparse_attention(q, k, v, mask, workspace=workspace, stream=torch.cuda.current_stream().cuda_stream, quantization=n, **given)
        taken = {n: [] for n in (None, Q)}
        for round_ in range(5):
            for n in taken:
                ms = events_ms(lambda: call(n))
                if round_:
                    taken[n].append(ms)
        a, b = (float(np.median(x)) for x in taken.values())
        flops = attend_flops(selected_blocks(mask), tokens, head_dim=dim)
        print(f"{tokens:6} D{dim} {d:4.0%}: bf16 {a:8.3f} ms {flops / a / 1e9:4.0f} | eight {b:8.3f} ms {flops / b / 1e9:4.0f} TFLOP/s | ratio {a / b:.3f}", flush=True)


torch.manual_seed(1)
for dim in (64, 128):
    for tokens in (1024, 8192, 131072):
        for kind in ("random", "alike", "rising"):
            if dim == 128 or tokens == 8192:
                check_long(tokens, kind, dim)
times(8192, (1.0, 0.5))
times(32768, (1.0, 0.5, 0.25, 0.05))
times(32768, (0.5,), 64)
