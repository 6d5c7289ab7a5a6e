"""Gradients on Hopper: checks against float32, and times beside cuDNN. From a checkout's root, built for 90a:

    python3 b20_bench.py            # checks, then times
    python3 b20_bench.py check      # or one of them; `time` runs in a checkout of before as well, to compare
    python3 b20_bench.py time "D 64" "MQA 32/1"
"""
import sys
import time

sys.path.insert(0, ".")
import torch

from rrattn import direct

torch.backends.cuda.matmul.allow_tf32 = False
BLOCK = 128


def make_mask(kind, batch, heads, mq, mk, shift_blocks, causal):
    g = torch.Generator(device="cuda").manual_seed(1)
    if kind == "none":
        return torch.zeros(batch, heads, mq, mk, dtype=torch.bool, device="cuda")
    if kind == "structured":  # sink, band, and a few heads with nothing but the sink
        row, col = torch.arange(mq, device="cuda")[:, None] + shift_blocks, torch.arange(mk, device="cuda")
        mask = ((row - col).abs() <= 2) | (col == 0)
        mask = mask.expand(batch, heads, mq, mk).clone()
        mask[:, ::3] &= col == 0
        return mask
    density = float(kind)
    mask = torch.rand(batch, heads, mq, mk, device="cuda", generator=g) < density
    return mask


def words_of(mask):
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32))
    words = (padded.unflatten(-1, (-1, 32)) * (1 << torch.arange(32, device="cuda"))).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int().contiguous()


def call(stage, *arrays, **options):
    options = {"stream": torch.cuda.current_stream().cuda_stream, **options}
    size = stage(*arrays, size_only=True, **options)
    buffer = torch.full([size + 4096], 0xFF, dtype=torch.uint8, device="cuda")
    stage(*arrays, workspace=buffer[:size], **options)
    assert (buffer[size:] == 0xFF).all(), "written behind the workspace"
    return size


def oracle(q, k, v, do, mask, causal, startend):
    B, Lq, H, D = q.shape
    Lk, Hk = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    scale = D**-0.5
    col = torch.arange(Lk, device="cuda")
    rows = torch.arange(Lq, device="cuda")
    step = 2048
    for b in range(B):
        for h in range(H):
            kh = h // (H // Hk)
            kf, vf = k[b, :, kh].float(), v[b, :, kh].float()
            for r0 in range(0, Lq, step):
                r = rows[r0 : r0 + step]
                seen = mask[b, h][r // BLOCK].repeat_interleave(BLOCK, 1)[:, :Lk]
                if causal:
                    seen = seen & (col <= r[:, None] + Lk - Lq)
                if startend is not None:
                    seen = seen & (r[:, None] < startend[b, 0, :, 0])
                qf, dof = q[b, r, h].float(), do[b, r, h].float()
                s = (qf @ kf.T * scale).masked_fill(~seen, float("-inf"))
                p = s.softmax(-1).nan_to_num(0)
                o = p @ vf
                dv[b, :, kh] += p.T @ dof
                ds = p * (dof @ vf.T - (o * dof).sum(-1, keepdim=True))
                dq[b, r, h] = ds @ kf * scale
                dk[b, :, kh] += ds.T @ qf * scale
    return dq, dk, dv


CASES = [  # B, Lq, Lk, Hq, Hk, D, Dv, causal, mask, documents
    (1, 2, 3, 4, 1, 128, 128, True, "1.0", 0),
    (1, 127, 127, 4, 2, 64, 64, True, "1.0", 0),
    (1, 129, 129, 32, 1, 128, 128, True, "1.0", 0),
    (2, 1000, 1000, 8, 2, 64, 64, True, "0.5", 0),
    (2, 1000, 1000, 8, 2, 128, 128, True, "0.5", 0),
    (1, 1000, 1000, 6, 6, 64, 64, False, "0.5", 0),
    (1, 1000, 2333, 8, 1, 64, 32, True, "0.5", 0),
    (1, 1000, 2333, 8, 1, 32, 64, True, "0.5", 0),
    (1, 1000, 2333, 8, 1, 96, 96, True, "0.5", 0),
    (1, 300, 777, 8, 1, 64, 64, True, "1.0", 0),
    (1, 4096, 4096, 32, 1, 128, 128, True, "0.5", 0),
    (1, 4096, 4096, 32, 1, 64, 64, True, "0.5", 0),
    (1, 4096, 4096, 28, 4, 128, 128, True, "structured", 0),
    (1, 4096, 4096, 28, 4, 64, 64, True, "structured", 0),
    (1, 8192, 8192, 12, 3, 128, 128, True, "0.5", 0),
    (1, 8192, 8192, 10, 5, 64, 64, True, "0.5", 0),
    (1, 8192, 8192, 32, 8, 128, 128, True, "0.5", 0),
    (1, 16384, 16384, 32, 1, 128, 128, True, "0.5", 0),
    (1, 16384, 16384, 32, 8, 64, 64, True, "0.5", 0),
    (4, 2048, 2048, 8, 2, 64, 64, True, "0.5", 0),
    (1, 4096, 4096, 8, 2, 64, 64, True, "0.7", 700),
    (1, 4096, 4096, 8, 2, 128, 128, True, "0.7", 700),
    (1, 2048, 2304, 4, 2, 256, 256, True, "0.5", 0),
    (1, 4096, 4096, 8, 1, 192, 128, True, "0.5", 0),
    (1, 2048, 2048, 8, 2, 64, 64, True, "none", 0),
]


def check():
    lines, worst = [], 0
    for case in CASES:
        B, Lq, Lk, H, Hk, D, Dv, causal, kind, length = case
        torch.manual_seed(0)
        for dtype in (torch.bfloat16, torch.float16):
            q = torch.randn(B, Lq, H, D, device="cuda", dtype=dtype)
            k = torch.randn(B, Lk, Hk, D, device="cuda", dtype=dtype)
            v = torch.randn(B, Lk, Hk, Dv, device="cuda", dtype=dtype)
            do = torch.randn(B, Lq, H, Dv, device="cuda", dtype=dtype)
            startend = None
            if length:
                row = torch.arange(Lk, device="cuda", dtype=torch.int32)
                startend = ((row // length + 1) * length).int().reshape(1, 1, -1, 1).contiguous()
            mq, mk = -(-Lq // BLOCK), -(-Lk // BLOCK)
            mask = make_mask(kind, B, H, mq, mk, mk - mq, causal)
            words = words_of(mask)
            out, lse = torch.empty_like(do), torch.empty(B, H, Lq, device="cuda")
            call(direct.block_sparse_attention, q, k, v, words, startend, out=out, lse=lse, causal=causal)
            exact = oracle(q, k, v, do, mask, causal, startend)
            errors = []
            for deterministic in (False, True):
                runs = []
                for _ in range(3):
                    grads = {n: torch.full_like(x, float("nan")) for n, x in zip(("grad_query", "grad_key", "grad_value"), (q, k, v))}
                    call(direct.block_sparse_attention_backward, q, k, v, words, out, lse, do, startend, **grads,
                         causal=causal, deterministic=deterministic)
                    runs.append(list(grads.values()))
                for again in runs[1:]:
                    for i in range(0 if deterministic else 1, 3):
                        assert torch.equal(again[i], runs[0][i]), (case, dtype, deterministic, "other bits", i)
                for mine, want in zip(runs[0], exact):
                    norm = want.norm()
                    errors.append(((mine.float() - want).norm() / norm.clamp_min(1e-30)).item() if norm else mine.float().abs().max().item())
            bad = not max(errors) < (0.02 if dtype is torch.bfloat16 else 0.004)
            worst = max(worst, *errors) if dtype is torch.bfloat16 else worst
            line = f"{'BAD ' if bad else 'ok  '}{case} {str(dtype)[6:]:8} dQ dK dV {' '.join(f'{e:.1e}' for e in errors)}"
            print(line, flush=True)
            lines += [line] if bad else []
    return [f"checks: {len(CASES) * 2 - len(lines)} of {len(CASES) * 2} right, worst of bfloat16 {worst:.1e}", *lines]


def breakdown(call):
    """Microseconds of each kernel of a call."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as run:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        found = {}
        for event in run.key_averages():
            us = getattr(event, "device_time_total", None) or getattr(event, "cuda_time_total", 0)
            for short in ("prepare_rows", "bound_keys", "transpose_mask", "backward_kernel", "sum_subgroups", "finish_grad_query"):
                if short in event.key:
                    found[short] = found.get(short, 0) + us / 3
        return " ".join(f"{k} {v:.0f}us" for k, v in found.items())
    except Exception as error:  # noqa: BLE001
        return f"(no profile: {type(error).__name__})"


def timings(names):
    from tools.bench import gpu_shapes, shapes
    from tools.bench.gpu_inputs import attend_flops
    from tools.bench.gpu_rivals import interleaved_ms

    shapes.SHAPES.update({"8K": shapes.Shape(8192), "32K": shapes.Shape(32768), "128K": shapes.Shape(131072),
                          "4K": shapes.Shape(4096), "2K": shapes.Shape(2048), "MQA 8K": shapes.Shape(8192, num_heads_k=1),
                          "D 64 4K b8": shapes.Shape(4096, batch=8, head_dim=64), "D 64 64K": shapes.Shape(65536, head_dim=64)})
    lines = []
    for name in names or ["D 128, 32/8", "MQA 32/1", "MQA 8K", "28/4", "4/1, 64K", "batch 8 of 4K", "batch 32 of 2K", "MHA 32/32",
                          "D 64", "D 64 4K b8", "D 64 64K", "D 96", "8 documents", "5% of 64K", "2K", "4K", "8K", "32K", "128K"]:
        problem = gpu_shapes.Problem(name)
        shape = problem.shape
        found = gpu_shapes.calls_of(problem, "backward", gpu_shapes.TimeLimit(0))
        if found is None:
            lines.append(f"{name:16} does not run")
            continue
        calls, size = found
        calls = {n: c for n, c in calls.items() if n != "flash dense" or "cudnn dense" not in calls}
        ms = interleaved_ms(calls, 3, 0.1)
        flops = 2.5 * attend_flops(problem.num_selected, shape.tokens, shape.all_heads, shape.head_dim)
        dense = min((t for n, t in ms.items() if n != "ours"), default=float("nan"))
        extra = size - 4 * problem.tensors[0].numel() * max(1, 128 * (shape.head_dim > 64) // shape.head_dim)
        parts = breakdown(calls["ours"]) if name in ("batch 32 of 2K", "batch 8 of 4K", "MQA 32/1", "D 64", "D 128, 32/8") else ""
        lines.append(f"{name:16} {ms['ours']:9.3f} ms {flops / ms['ours'] / 1e9:5.0f} TFLOP/s  {dense / ms['ours']:.3f} x dense  "
                     f"workspace - dQ {extra / 2**20:.0f} MB  {parts}")
        print(lines[-1], flush=True)
        del problem, calls, found
        torch.cuda.empty_cache()
    return lines


if __name__ == "__main__":
    what, names = (sys.argv[1] if len(sys.argv) > 1 else "all"), sys.argv[2:]
    start, table = time.time(), []
    if what in ("all", "check"):
        table += check()
    if what in ("all", "time"):
        table += timings(names)
    print(f"\n==== {torch.cuda.get_device_name()}, {time.time() - start:.0f} s")
    print("\n".join(table))
