"""Portable attention and gradients, two versions in libraries: checks against float32, then times in turns.
From a checkout's root: python3 bench.py FOLDER [check|time]"""
import ctypes, sys, time
from pathlib import Path
sys.path.insert(0, ".")
import torch
from tools.bench.gpu_inputs import normal, pack
from tools.bench.gpu_rivals import interleaved_ms

torch.backends.cuda.matmul.allow_tf32 = False
I, P = ctypes.c_int64, ctypes.c_void_p
class Args(ctypes.Structure):
    _fields_ = [(n, I) for n in "batch lq lk hq hk d dv causal bounds flag table".split()] + [
        (n, P) for n in "q k v out mask lse grad_out dq dk dv_out workspace stream startend cu_q cu_k".split()] + [("scale", ctypes.c_double)]

folder = Path(sys.argv[1])
LIBS = {p.stem: ctypes.CDLL(str(p.resolve())) for p in sorted(folder.glob("*.so"))}  # base, new, ...

def pointer(x):
    return 0 if x is None else x.data_ptr()

def entry(lib, what, d, dv):
    size = 64 if d <= 64 else 128 if d <= 128 else 192 if what[0] != "b" and d <= 192 and dv <= 128 else 256
    f = getattr(lib, f"{what}_{size}_{min(size, 128) if size == 192 else size}", None)
    if f is not None and "bytes" in what: f.restype = I
    return f

def prepared(lib, stage, q, k, v, words, out, lse, flag=0, table=227, startend=None, causal=True, grad_out=None, grads=(None,) * 3):
    run, need = entry(lib, f"{stage}_run", q.shape[3], v.shape[3]), entry(lib, f"{stage}_bytes", q.shape[3], v.shape[3])
    if run is None: return None
    args = Args(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], int(causal),
                0 if startend is None else startend.shape[-1], int(flag), table,
                *map(pointer, (q, k, v, out, words, lse, grad_out, *grads)), 0, torch.cuda.current_stream().cuda_stream,
                pointer(startend), 0, 0, q.shape[3] ** -0.5)
    size = need(ctypes.byref(args))
    workspace = torch.full((size + 4096,), 0xFF, device="cuda", dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    keep = q, k, v, words, out, lse, grad_out, startend, workspace, args, grads
    def call(keep=keep):
        assert run(ctypes.byref(args)) == 0
    return call

def document_bounds(tokens, length):
    row = torch.arange(tokens, device="cuda", dtype=torch.int32)
    return ((row // length + 1) * length).int().reshape(1, 1, -1, 1).contiguous()

def window_bounds(tokens, length):
    row = torch.arange(tokens, device="cuda", dtype=torch.int32)
    return (row + length).int().reshape(1, 1, -1, 1).contiguous()

def inputs(B, Lq, Lk, H, Hk, D, Dv, density, kind):
    torch.manual_seed(0)
    q, k, v, do = 2 * normal(Lq, H, D, B), normal(Lk, Hk, D, B), normal(Lk, Hk, Dv, B), normal(Lq, H, Dv, B)
    mask = torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), device="cuda") < density
    if kind == "rise": k[:, :128] *= 16; mask[..., 0] = True
    if kind == "holes": mask[:, ::3, ::2] = False
    startend = None
    if kind.startswith("doc"): startend = document_bounds(Lk, int(kind[3:]))
    if kind.startswith("win"): startend = window_bounds(Lk, int(kind[3:]))
    return q, k, v, do, mask, startend

def visible(mask, Lq, Lk, causal, startend):  # [Lq, Lk] of a head
    row, col = torch.arange(Lq, device="cuda")[:, None], torch.arange(Lk, device="cuda")
    see = mask.repeat_interleave(128, 0)[:Lq].repeat_interleave(128, 1)[:, :Lk]
    if causal: see = see & (col <= row + Lk - Lq)
    if startend is not None: see = see & (row < startend[0, 0, :, 0])
    return see

def reference(q, k, v, mask, causal, startend, do=None):
    B, Lq, H, D = q.shape
    group, Lk = H // k.shape[2], k.shape[1]
    out = torch.zeros(B, Lq, H, v.shape[3], device="cuda")
    lse = torch.full((B, H, Lq), float("-inf"), device="cuda")
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            see = visible(mask[b, h], Lq, Lk, causal, startend)
            kf, vf, qf = k[b, :, h // group].float(), v[b, :, h // group].float(), q[b, :, h].float()
            s = (qf @ kf.T * D**-0.5).masked_fill(~see, float("-inf"))
            lse[b, h], p = s.logsumexp(-1), s.softmax(-1).nan_to_num(0)
            out[b, :, h] = p @ vf
            if do is None: continue
            dof = do[b, :, h].float()
            dv[b, :, h // group] += p.T @ dof
            ds = p * (dof @ vf.T - (out[b, :, h] * dof).sum(-1, keepdim=True))
            dq[b, :, h] = ds @ kf * D**-0.5
            dk[b, :, h // group] += ds.T @ qf * D**-0.5
    return out, lse, dq, dk, dv

FORWARD = [  # B, Lq, Lk, H, Hk, D, Dv, causal, density, kind
    (1, 128, 128, 2, 1, 64, 64, 1, 1.0, ""), (1, 1, 130, 2, 1, 128, 128, 1, 1.0, ""), (2, 1000, 1000, 4, 2, 64, 64, 1, 0.5, ""),
    (1, 1000, 2333, 4, 2, 40, 40, 0, 0.4, ""), (1, 4096, 4096, 8, 2, 64, 64, 1, 0.7, "doc700"), (2, 1000, 1000, 4, 2, 128, 128, 1, 0.5, ""),
    (1, 1000, 2333, 4, 2, 96, 96, 1, 0.4, ""), (1, 1000, 2333, 4, 2, 128, 128, 0, 0.4, "holes"), (4, 2048, 2048, 8, 2, 128, 128, 1, 0.5, "holes"),
    (1, 4096, 4096, 8, 2, 128, 128, 1, 0.3, "rise"), (1, 4096, 4096, 8, 2, 128, 128, 1, 0.7, "doc700"),
    (1, 4096, 4096, 8, 2, 128, 128, 1, 0.7, "doc512"), (1, 4096, 4096, 8, 2, 128, 128, 1, 0.5, "win900"),
    (1, 1000, 2333, 4, 2, 128, 128, 1, 0.7, "doc300"), (1, 1000, 2333, 4, 2, 192, 128, 1, 0.5, ""), (2, 2048, 2048, 8, 2, 192, 128, 1, 0.5, "doc700"),
    (1, 1000, 2333, 4, 2, 256, 256, 1, 0.5, ""), (2, 2048, 2048, 8, 2, 256, 256, 1, 0.5, "doc700"),
]
BACKWARD = [
    (1, 2, 3, 4, 1, 128, 128, 1, 1.0, ""), (2, 1000, 1000, 8, 2, 64, 64, 1, 0.5, ""), (1, 1000, 2333, 8, 1, 40, 40, 0, 0.4, ""),
    (1, 2048, 2048, 8, 2, 64, 64, 1, 0.5, "doc700"), (1, 4096, 4096, 4, 2, 64, 64, 1, 0.3, "holes"), (1, 129, 129, 32, 1, 128, 128, 1, 1.0, ""),
    (2, 1000, 500, 4, 2, 128, 128, 1, 0.5, ""), (1, 1000, 2333, 8, 1, 128, 128, 1, 0.4, ""), (1, 1000, 2333, 4, 2, 96, 96, 0, 0.4, ""),
    (1, 4096, 4096, 8, 2, 128, 128, 1, 0.7, "doc700"), (1, 4096, 4096, 8, 2, 128, 128, 1, 0.7, "doc512"),
    (1, 4096, 4096, 8, 2, 128, 128, 1, 0.5, "win900"), (2, 2048, 2048, 8, 2, 128, 128, 1, 0.3, "holes"),
    (1, 8192, 8192, 32, 1, 128, 128, 1, 0.2, ""), (1, 8192, 8192, 32, 1, 64, 64, 1, 0.2, ""), (1, 1000, 2333, 4, 2, 256, 256, 1, 0.5, ""),
    (1, 2048, 2048, 8, 2, 256, 256, 1, 0.5, "doc700"),
]

def error(x, y):
    return ((x.float() - y).norm() / (y.norm() + 1e-20)).item()

def check():
    bad = cases = 0
    def verdict(ok, *text):
        nonlocal bad, cases
        cases += 1
        if not ok: bad += 1; print("BAD", *text, flush=True)
    for case in FORWARD:
        B, Lq, Lk, H, Hk, D, Dv, causal, density, kind = case
        q, k, v, _, mask, startend = inputs(B, Lq, Lk, H, Hk, D, Dv, density, kind)
        words = pack(mask)
        exact = reference(q, k, v, mask, causal, startend)
        for table in (227, 99):
            for flag in (0, 1):  # with compensation: the same as base
                found = {}
                for name, lib in LIBS.items():
                    out = torch.full(q.shape[:3] + (Dv,), float("nan"), device="cuda", dtype=q.dtype)
                    lse = torch.full((B, H, Lq), float("nan"), device="cuda")
                    call = prepared(lib, "attend", q, k, v, words, out, lse, flag, table, startend, causal)
                    if call is None: continue
                    runs = []
                    for _ in range(2):
                        out.fill_(float("nan")); call(); torch.cuda.synchronize(); runs.append((out.clone(), lse.clone()))
                    found[name] = runs[0]
                    same = all(torch.equal(a, b) for a, b in zip(*runs)) and not out.isnan().any()
                    if flag == 0:
                        seen = exact[1].isfinite()
                        off = ((lse - exact[1])[seen].abs() / (1 + exact[1][seen].abs())).max().item() if seen.any() else 0
                        e = error(out, exact[0])
                        verdict(same and e < 4e-3 and off < 1e-4 and torch.equal(seen, lse.isfinite()), "attend", name, table, case, f"{e:.1e} {off:.1e} {same}")
                    elif "base" in found:
                        verdict(same and all(torch.equal(a, b) for a, b in zip(runs[0], found["base"])), "compensated", name, table, case, same)
    for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256)):
        torch.manual_seed(0)
        lq, lk = [1, 300, 128, 517, 0, 1000], [700, 300, 128, 2000, 0, 1500]
        cu_q, cu_k = ((ctypes.c_int64 * 7)(0, *torch.tensor(x).cumsum(0).tolist()) for x in (lq, lk))
        H, Hk = 4, 2
        q, k, v = (normal(n, h, x, 1)[0] for n, h, x in ((sum(lq), H, d), (sum(lk), Hk, d), (sum(lk), Hk, dv)))
        masks = [torch.rand(1, H, -(-a // 128), -(-b // 128), device="cuda") < 0.6 for a, b in zip(lq, lk)]
        words = torch.cat([pack(m).flatten() for m in masks if m.numel()])
        for table in (227, 99):
            for name, lib in LIBS.items():
                run = entry(lib, "ragged_run", d, dv)
                if run is None: continue
                out = torch.full((sum(lq), H, dv), float("nan"), device="cuda", dtype=q.dtype)
                lse = torch.full((H, sum(lq)), float("nan"), device="cuda")
                args = Args(6, 0, max(lk), H, Hk, d, dv, 1, 0, 0, table, *map(pointer, (q, k, v, out, words, lse)), 0, 0, 0, 0, 0,
                            torch.cuda.current_stream().cuda_stream, 0, ctypes.addressof(cu_q), ctypes.addressof(cu_k), d**-0.5)
                rc = run(ctypes.byref(args))
                worst = 0
                for b in range(6):
                    if not lq[b]: continue
                    a, z, ka, kz = cu_q[b], cu_q[b + 1], cu_k[b], cu_k[b + 1]
                    o, l = reference(q[None, a:z], k[None, ka:kz], v[None, ka:kz], masks[b], True, None)[:2]
                    seen = l[0].isfinite()
                    worst = max(worst, error(out[a:z], o[0]), 10 * (lse[:, a:z] - l[0])[seen].abs().max().item(),
                                0 if torch.equal(seen, lse[:, a:z].isfinite()) else 9)
                verdict(rc == 0 and worst < 4e-3, "ragged", name, table, d, dv, rc, f"{worst:.1e}")
    for case in BACKWARD:
        B, Lq, Lk, H, Hk, D, Dv, causal, density, kind = case
        q, k, v, do, mask, startend = inputs(B, Lq, Lk, H, Hk, D, Dv, density, kind)
        words = pack(mask)
        exact = reference(q, k, v, mask, causal, startend, do)
        out, lse = exact[0].to(q.dtype), exact[1].contiguous()
        for table in (227, 99):
            for flag in (0, 1):
                found = {}
                for name, lib in LIBS.items():
                    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
                    call = prepared(lib, "backward", q, k, v, words, out, lse, flag, table, startend, causal, do, grads)
                    if call is None: continue
                    runs = []
                    for _ in range(2):
                        for g in grads: g.fill_(float("nan"))
                        call(); torch.cuda.synchronize(); runs.append([g.clone() for g in grads])
                    same = not flag or all(torch.equal(a, b) for a, b in zip(*runs))
                    found[name] = runs[0]
                    if flag and "base" in found: same = same and all(torch.equal(a, b) for a, b in zip(runs[0], found["base"]))
                    e = max(error(g, x) for g, x in zip(grads, exact[2:]))
                    verdict(same and e < 1e-2 and not any(g.isnan().any() for g in grads), "backward", name, table, "det" if flag else "", case, f"{e:.1e} {same}")
    print(f"checks: {cases}, {bad} bad", flush=True)

def causal_blocks(H, n, density):
    own = torch.eye(n, device="cuda", dtype=torch.bool)
    return (torch.rand(1, H, n, n, device="cuda") < density) & torch.ones(n, n, device="cuda", dtype=torch.bool).tril(-1) | own

SHAPES = [  # stage, L, H, Hk, D, Dv, density, documents, flag, table
    *[("attend", 32768, 32, 8, D, D, 0.5, 0, 0, 227) for D in (128, 64)], ("attend", 32768, 32, 8, 128, 128, 0.5, 4096, 0, 227),
    ("attend", 32768, 32, 8, 128, 128, 0.25, 0, 1, 227), ("attend", 4096, 32, 8, 128, 128, 0.1, 0, 0, 227), ("attend", 16384, 16, 4, 256, 256, 0.5, 0, 0, 227),
    *[("backward", 16384, 32, 8, D, D, 0.5, 0, flag, 227) for D in (128, 64) for flag in (0, 1)],
    ("backward", 16384, 32, 8, 128, 128, 0.5, 4096, 0, 227), ("backward", 16384, 16, 4, 256, 256, 0.5, 0, 0, 227),
]

def timing():
    print("ms of " + ", ".join(LIBS) + "; base over each")
    ratios = {}
    for shape in SHAPES:
        stage, L, H, Hk, D, Dv, density, documents, flag, table = shape
        torch.manual_seed(0)
        q, k, v, do = normal(L, H, D, 1), normal(L, Hk, D, 1), normal(L, Hk, Dv, 1), normal(L, H, Dv, 1)
        mask = causal_blocks(H, L // 128, density)
        startend = document_bounds(L, documents) if documents else None
        words = pack(mask)
        out, lse = torch.empty_like(do), torch.empty(1, H, L, device="cuda")
        forward = prepared(LIBS["base"], "attend", q, k, v, words, out, lse, flag if stage == "attend" else 0, table, startend)
        forward(); torch.cuda.synchronize()
        calls = {}
        for name, lib in [*LIBS.items(), ("again", LIBS["base"])]:
            if stage == "attend":
                calls[name] = prepared(lib, stage, q, k, v, words, torch.empty_like(out), torch.empty_like(lse), flag, table, startend)
            else:
                calls[name] = prepared(lib, stage, q, k, v, words, out, lse, flag, table, startend, True, do, [torch.empty_like(x) for x in (q, k, v)])
        calls = {n: c for n, c in calls.items() if c is not None}
        for c in calls.values(): c()
        torch.cuda.synchronize()
        ms = interleaved_ms(calls, 5, 0.03)
        print(f"{stage:8} D{D} {L:6} {density:4} doc{documents} f{flag} {table} |{ms['base']:.3f}" + "".join(f" {n} {ms['base'] / t:.4f}" for n, t in ms.items() if n != "base"), flush=True)
        for n, t in ms.items(): ratios.setdefault(n, []).append(ms["base"] / t)
    print({n: round(torch.tensor(r).log().mean().exp().item(), 4) for n, r in ratios.items()})

if __name__ == "__main__":
    start = time.time()
    if "check" in sys.argv[2:]: check()
    if "time" in sys.argv[2:]: timing()
    print(f"{torch.cuda.get_device_name()}, {time.time() - start:.0f} s")
