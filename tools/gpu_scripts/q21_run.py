"""Eight-bit attention on Hopper against the oracle, and against our own bf16. Run in the root of the checkout that was built:

    python q21_run.py [check|time|all]      (PYTHONPATH=. ; needs torch)
"""
import os
import sys
import time

sys.path.insert(0, os.getcwd())
sys.path.insert(0, os.path.join(os.getcwd(), "tests", "kernels"))
import numpy as np
import torch

from rrattn import direct, reference
from tools.bench.gpu_inputs import attend_flops, normal, pack, random_blocks, selected_blocks

Q = "qk_int8_pv_fp8"
what = sys.argv[1] if len(sys.argv) > 1 else "all"
lines = []


def say(line):
    print(line, flush=True)
    lines.append(line)


def attend(query, key, value, mask, startend=None, **options):
    out = torch.full((*query.shape[:3], value.shape[3]), float("nan"), device="cuda", dtype=query.dtype)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), float("nan"), device="cuda")
    given = dict(out=out, lse=lse, stream=torch.cuda.current_stream().cuda_stream, **options)
    size = direct.block_sparse_attention(query, key, value, mask, startend, size_only=True, **given)
    workspace = torch.full([size // 4 + 1], float("nan"), device="cuda").view(torch.uint8)[:size]
    direct.block_sparse_attention(query, key, value, mask, startend, workspace=workspace, **given)
    torch.cuda.synchronize()
    return out, lse


def check_cases():
    from cases import ATTENTION_CASES, FEW_CASES, Case, make_inputs

    cases = [c for c in ATTENTION_CASES if max(c.head_dim, c.head_dim_v or 0) <= 128]
    cases += [Case(700, 1500, head_dim=128, num_heads=4, num_heads_k=2), Case(1, 129, head_dim=128), Case(640, 640, head_dim=128, causal=False)]
    bad = 0
    for dtype in ("bfloat16", "float16"):
        for case in cases:
            inputs = make_inputs(case, dtype)
            torch_type = getattr(torch, dtype)
            q, k, v = (torch.from_numpy(x).cuda().to(torch_type) for x in inputs.forward)
            mask = torch.from_numpy(reference.pack(inputs.block_mask)).cuda()
            startend = None if inputs.startend is None else torch.from_numpy(inputs.startend).cuda()
            sink = None if inputs.sink is None else torch.from_numpy(inputs.sink).cuda()
            try:
                out, lse = attend(q, k, v, mask, startend, causal=case.causal, sink=sink, quantization=Q)
            except Exception as error:
                say(f"FAILED {dtype} {case}: {type(error).__name__}: {error}")
                bad += 1
                if "CUDA" in str(error) or "cuda" in str(error):
                    raise
                continue
            out, lse = out.float().cpu().numpy(), lse.cpu().numpy()
            oracle, oracle_lse = reference.quantized_attend(*inputs.forward, inputs.block_mask, inputs.startend, causal=case.causal, sink=inputs.sink)
            seen = np.isfinite(oracle_lse)
            same_seen = np.array_equal(np.isneginf(lse), ~seen)
            error = np.abs(np.where(seen, lse, 0) - np.where(seen, oracle_lse, 0))
            same = np.swapaxes(error < 1e-3, 1, 2)
            errors = reference.errors(out[same], oracle[same], reference.cast(oracle, "bfloat16")[same])
            fine = same_seen and error.max(initial=0) < 0.07 and (~same).sum() <= max(2, 0.02 * same.size) and all(e <= a for _, e, a in errors)
            if not fine:
                bad += 1
            text = " ".join(f"{name} {e:.2g}/{a:.2g}" for name, e, a in errors)
            if not fine or dtype == "bfloat16":
                print(f"{'ok    ' if fine else 'FAILED'} {dtype} {case}: {text}; lse {error.max(initial=0):.2g}, moved rows {(~same).sum()} of {same.size}, -inf alike {same_seen}", flush=True)
    say(f"check: {bad} of {2 * len(cases)} cases FAILED")


def check_long():
    """One head's last block of queries over all keys of 128K, in float64 with the same semantics."""
    torch.manual_seed(1)
    for tokens in (8192, 131072):
        for kind in ("random", "all values alike"):
            q, k = normal(128, 1), normal(tokens, 1)
            v = normal(tokens, 1)
            if kind != "random":
                q, v = q * 0.1, (v * 0.1 + 1).bfloat16()
            mask = pack(torch.ones(1, 1, 1, tokens // 128, device="cuda", dtype=torch.bool))
            out, lse = attend(q, k, v, mask, causal=True, quantization=Q)
            scale = np.float32(128**-0.5)
            qf, kf, vf = (x[0, :, 0].float() for x in (q, k, v))
            mean = kf[:128].double().mean(0).float()
            kc = kf - mean
            kl, ql = kc.abs().amax(1), qf.abs().amax(1)
            k8 = torch.round(kc * (127 / kl)[:, None]).double()
            q8 = torch.round(qf * (127 / ql)[:, None]).double()
            s = q8 @ k8.T * (ql / 127 * float(scale * np.float32(np.log2(np.e)))).double()[:, None] * (kl / 127).double()
            row = torch.arange(128, device="cuda")[:, None] + tokens - 128
            s = s.masked_fill(torch.arange(tokens, device="cuda") > row, -torch.inf)
            base = s.amax(1).ceil()
            p = (256 * torch.exp2(s - base[:, None])).float().to(torch.float8_e4m3fn).double()
            e = torch.frexp(vf.abs().amax(0)).exponent - 9 + (torch.frexp(vf.abs().amax(0)).mantissa > 0.875).int()
            v8 = (vf * torch.exp2(-e.float())).to(torch.float8_e4m3fn).double() * torch.exp2(e.double())
            oracle = p @ v8 / p.sum(1, keepdim=True)
            oracle_lse = (base - 8) * np.log(2) + p.sum(1).log() + (qf.double() @ mean.double()) * float(scale)
            error = (out[0, :, 0].double() - oracle).abs()
            rounding = (oracle.bfloat16().double() - oracle).abs()
            say(f"{tokens} keys, {kind}: error rms {error.square().mean().sqrt():.2e} max {error.max():.2e}, bf16 rounding rms "
                f"{rounding.square().mean().sqrt():.2e} max {rounding.max():.2e}, lse error max {(lse[0, 0].double() - oracle_lse).abs().max():.1e}")


def events_ms(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def prologue_share(call):
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            call()
            torch.cuda.synchronize()
        times = {}
        for event in prof.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                name = next((n for n in ("survey", "quantize_keys", "quantize_queries", "quantized_attend_kernel") if n in event.name), "other")
                times[name] = times.get(name, 0) + event.time_range.elapsed_us()
        return times
    except Exception as error:
        return {str(error)[:80]: 0}


def times(tokens, densities, head_dim=128):
    torch.manual_seed(0)
    q, k, v = normal(tokens, 32, head_dim), normal(tokens, 8, head_dim), normal(tokens, 8, head_dim)
    out, lse = torch.empty_like(q), torch.empty(1, 32, tokens, device="cuda")
    masks = {d: pack(random_blocks(tokens, tokens, d)) for d in densities}
    given = dict(out=out, lse=lse, causal=True)
    sizes = {n: direct.block_sparse_attention(q, k, v, masks[densities[0]], size_only=True, quantization=n, **given) for n in (None, Q)}
    workspace = torch.empty(max(sizes.values()), dtype=torch.uint8, device="cuda")

    def make(mask, quantization):
        return lambda: direct.block_sparse_attention(q, k, v, mask, workspace=workspace, stream=torch.cuda.current_stream().cuda_stream, quantization=quantization, **given)

    calls = {(d, n): make(masks[d], n) for d in densities for n in (None, Q)}
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    taken = {key: [] for key in calls}
    for _ in range(5 if tokens <= 32768 else 3):
        for key, call in calls.items():
            taken[key].append(events_ms(call))
    for d in densities:
        blocks = selected_blocks(masks[d])
        flops = attend_flops(blocks, tokens, head_dim=head_dim)
        bf16, eight = (float(np.median(taken[d, n])) for n in (None, Q))
        parts = prologue_share(calls[d, Q])
        main = parts.get("quantized_attend_kernel", 0) / 1e3
        prologue = sum(t for n, t in parts.items() if n in ("survey", "quantize_keys", "quantize_queries")) / 1e3
        detail = " ".join(f"{n} {t / 1e3:.3f}" for n, t in parts.items() if n != "quantized_attend_kernel")
        say(f"{tokens:7} D{head_dim} {d:4.0%} blocks: bf16 {bf16:8.3f} ms {flops / bf16 / 1e9:5.0f} TFLOP/s | eight bits {eight:8.3f} ms {flops / eight / 1e9:5.0f} | "
            f"ratio {bf16 / eight:.3f} | kernel {main:.3f} ms {flops / max(main, 1e-9) / 1e9:.0f} TFLOP/s, prologue {prologue:.3f} ms ({prologue / max(main, 1e-9):.1%}): {detail}")


start = time.time()
say(f"{torch.cuda.get_device_name()} | workspace NaN-filled in checks")
if what in ("check", "all"):
    check_cases()
    check_long()
if what in ("time", "all"):
    times(8192, (1.0, 0.5))
    times(32768, (1.0, 0.5, 0.25))
    times(32768, (0.5,), 64)
    times(131072, (1.0, 0.5, 0.25))
print(f"\n{'=' * 20} summary ({time.time() - start:.0f} s)")
print("\n".join(lines))
