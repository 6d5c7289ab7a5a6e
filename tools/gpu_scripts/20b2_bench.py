"""Gradients on Hopper, kernels of several versions in libraries: checks against float32, then times, all in one process.
From a checkout's root: python3 bench.py FOLDER [check|time] [shape...]"""
import ctypes, sys, time
from pathlib import Path
sys.path.insert(0, ".")
import torch
from tools.bench.gpu_inputs import attend_flops, normal, pack, structured
from tools.bench.gpu_rivals import interleaved_ms

torch.backends.cuda.matmul.allow_tf32 = False
what = sys.argv[2] if len(sys.argv) > 2 else "all"
I, P = ctypes.c_int64, ctypes.c_void_p
class Args(ctypes.Structure):
    _fields_ = [(n, I) for n in "batch lq lk hq hk d dv causal bounds deterministic".split()] + [
        (n, P) for n in "q k v out mask lse grad_out dq dk dv_out workspace stream startend".split()] + [("scale", ctypes.c_double)]
class ForwardArgs(ctypes.Structure):
    _fields_ = [(n, I) for n in "batch lq lk hq hk d dv causal bounds".split()] + [
        (n, P) for n in "q k v out mask lse workspace stream startend".split()] + [("scale", ctypes.c_double)]

ORDER = ["base", "m", "q", "k", "ke", "g", "h", "kf"]
folder = Path(sys.argv[1])
def what_of(p): return ("prof" in p.stem) == (sys.argv[2:3] == ["prof"])
names = sorted((p.stem for p in folder.glob("*.so") if what_of(p)), key=lambda n: (ORDER.index(n) if n in ORDER else 9, n))
LIBS = {n: ctypes.CDLL(str((folder / f"{n}.so").resolve())) for n in names}
FORWARD = ctypes.CDLL(str((folder / "forward.fwd").resolve()))

def pointer(x):
    return 0 if x is None else x.data_ptr()

def entry(lib, what, d):
    f = getattr(lib, f"{what}_{64 if d <= 64 else 128 if d <= 128 else 256}", None)
    if f is not None and what == "bytes": f.restype = I
    return f

def sizes(q, k, v, startend, causal):
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], int(causal), (
        0 if startend is None else startend.shape[-1])

def forward(q, k, v, words, startend, causal):
    out = torch.empty(q.shape[:3] + v.shape[3:], device="cuda", dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device="cuda")
    args = ForwardArgs(*sizes(q, k, v, startend, causal), *map(pointer, (q, k, v, out, words, lse)), 0,
                       torch.cuda.current_stream().cuda_stream, pointer(startend), q.shape[3] ** -0.5)
    workspace = torch.empty(entry(FORWARD, "bytes", q.shape[3])(ctypes.byref(args)), device="cuda", dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    assert entry(FORWARD, "run", q.shape[3])(ctypes.byref(args)) == 0
    torch.cuda.synchronize()
    return out, lse

def torch_forward(q, k, v, mask, startend, causal):
    B, Lq, H, D = q.shape
    Lk, group = k.shape[1], H // k.shape[2]
    seen = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :Lq, :Lk]
    if causal: seen = seen & torch.ones(Lq, Lk, device="cuda", dtype=torch.bool).tril(Lk - Lq)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(group, 2)) * D**-0.5
    scores.masked_fill_(~seen, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0), v.float().repeat_interleave(group, 2))
    return out.bfloat16(), scores.logsumexp(-1)

def prepared(lib, q, k, v, words, out, lse, grad_out, startend=None, causal=True, deterministic=False, grads=None):
    """(call, grads), or None where the library has no kernel of the size."""
    run, need = entry(lib, "run", q.shape[3]), entry(lib, "bytes", q.shape[3])
    if run is None: return None
    grads = grads or [torch.full_like(x, float("nan")) for x in (q, k, v)]
    args = Args(*sizes(q, k, v, startend, causal), int(deterministic), *map(pointer, (q, k, v, out, words, lse, grad_out, *grads)),
                0, torch.cuda.current_stream().cuda_stream, pointer(startend), q.shape[3] ** -0.5)
    size = need(ctypes.byref(args))
    workspace = torch.full((size + 4096,), 0xFF, device="cuda", dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    keep = q, k, v, words, out, lse, grad_out, startend, workspace, args, grads
    def call(keep=keep):
        assert run(ctypes.byref(args)) == 0
    return call, grads, workspace[size:]

def document_bounds(tokens, length):
    row = torch.arange(tokens, device="cuda", dtype=torch.int32)
    return ((row // length + 1) * length).int().reshape(1, 1, -1, 1).contiguous()

def window_bounds(tokens, length):  # a sliding window, which begins within blocks
    row = torch.arange(tokens, device="cuda", dtype=torch.int32)
    return (row + length).int().reshape(1, 1, -1, 1).contiguous()

CHECKS = [  # B, Lq, Lk, H, Hk, D, causal, density, kind
    (1, 2, 3, 4, 1, 128, 1, 1.0, ""), (1, 129, 129, 32, 1, 128, 1, 1.0, ""), (2, 1000, 1000, 8, 2, 64, 1, 0.5, ""),
    (2, 1000, 500, 4, 2, 128, 1, 0.5, ""), (1, 1000, 2333, 8, 1, 128, 1, 0.4, ""), (1, 1000, 2333, 8, 1, 40, 0, 0.4, ""),
    (1, 2048, 2048, 8, 2, 64, 1, 0.5, "none"), (1, 2048, 2048, 8, 2, 128, 1, 0.3, "holes"), (3, 2048, 2048, 12, 6, 128, 1, 0.5, ""),
    (1, 4096, 4096, 32, 1, 128, 1, 0.5, ""), (1, 4096, 4096, 28, 4, 128, 1, 0.02, "sink"), (1, 4096, 4096, 28, 4, 64, 1, 0.02, "sink"),
    (1, 8192, 8192, 32, 2, 128, 1, 0.02, ""), (1, 8192, 8192, 32, 2, 64, 0, 0.02, "holes"), (1, 8192, 8192, 12, 3, 128, 1, 0.5, ""),
    (1, 8192, 8192, 8, 2, 128, 1, 0.7, "documents 700"), (1, 8192, 8192, 8, 2, 64, 1, 0.7, "documents 512"),
    (1, 8192, 8192, 8, 2, 128, 1, 0.1, "window 1000"), (1, 32768, 32768, 2, 1, 128, 1, 0.03, "sink"),
    (1, 8192, 8192, 192, 1, 128, 1, 0.02, "sink"), (2, 1000, 1000, 8, 2, 256, 1, 0.5, ""), (1, 4096, 4096, 8, 1, 192, 1, 0.3, "sink"), (1, 2048, 2048, 8, 2, 256, 0, 0.3, "holes"),
    (1, 40000, 40000, 2, 1, 128, 1, 0.01, ""), (1, 40000, 40000, 2, 1, 64, 1, 0.05, ""),
]

def reference(q, k, v, do, mask, causal, startend):
    B, Lq, H, D = q.shape
    Lk, Hk = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    col, rows = torch.arange(Lk, device="cuda"), torch.arange(Lq, device="cuda")
    for b in range(B):
        for h in range(H):
            kh = h // (H // Hk)
            kf, vf = k[b, :, kh].float(), v[b, :, kh].float()
            for r in rows.split(2048):
                seen = mask[b, h][r // 128].repeat_interleave(128, 1)[:, :Lk]
                if causal: seen = seen & (col <= r[:, None] + Lk - Lq)
                if startend is not None: seen = seen & (r[:, None] < startend[0, 0, :, 0])
                qf, dof = q[b, r, h].float(), do[b, r, h].float()
                p = (qf @ kf.T * D**-0.5).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
                o = p @ vf
                dv[b, :, kh] += p.T @ dof
                ds = p * (dof @ vf.T - (o * dof).sum(-1, keepdim=True))
                dq[b, r, h] = ds @ kf * D**-0.5
                dk[b, :, kh] += ds.T @ qf * D**-0.5
    return dq, dk, dv

def check():
    bad = 0
    for case in CHECKS:
        B, Lq, Lk, H, Hk, D, causal, density, kind = case
        torch.manual_seed(0)
        q, k, v, do = normal(Lq, H, D, B), normal(Lk, Hk, D, B), normal(Lk, Hk, D, B), normal(Lq, H, D, B)
        nq, nk = -(-Lq // 128), -(-Lk // 128)
        mask = torch.rand(B, H, nq, nk, device="cuda") < density
        if kind == "none": mask[:] = False
        if kind == "sink": mask[..., 0] = True
        if kind == "holes": mask[:, ::3, ::5] = False; mask[:, :, 5:7] = False; mask[..., 3] = False; mask[:, -1] = False
        startend = None
        if kind.startswith("documents"): startend = document_bounds(Lk, int(kind.split()[1]))
        if kind.startswith("window"): startend = window_bounds(Lk, int(kind.split()[1]))
        words = pack(mask)
        out, lse = (forward if D <= 128 else torch_forward)(q, k, v, words if D <= 128 else mask, startend, causal)
        exact = reference(q, k, v, do, mask, causal, startend)
        for name, lib in LIBS.items():
            if name in ("base",): continue
            for deterministic in (False, True):
                found = prepared(lib, q, k, v, words, out, lse, do, startend, causal, deterministic)
                if found is None: continue
                call, grads, behind = found
                runs = []
                for _ in range(2):
                    for g in grads: g.fill_(float("nan"))
                    call(); torch.cuda.synchronize()
                    runs.append([g.clone() for g in grads])
                same = all(torch.equal(runs[1][i], runs[0][i]) for i in range(0 if deterministic else 1, 3))
                errors = [((g.float() - e).norm() / e.norm().clamp_min(1e-30)).item() if e.norm() else g.float().abs().max().item()
                          for g, e in zip(grads, exact)]
                if not (same and max(errors) < 0.02 and (behind == 0xFF).all()):
                    bad += 1
                    print(f"BAD {name} {case} deterministic {deterministic}: {errors} same bits {same}", flush=True)
                del found, call, grads, runs
    print(f"checks: {len(CHECKS)} cases, {bad} bad", flush=True)

def blocks(batch, heads, n, density, documents=1):
    own = torch.ones(n, n, device="cuda", dtype=torch.bool).tril()
    before = own.tril(-1)
    mask = (torch.rand(batch, heads, n, n, device="cuda") < density) & before | own & ~before
    if documents > 1:
        document = torch.arange(n, device="cuda") // (n // documents)
        mask &= document[:, None] == document
    return mask

def selected(q, k, mass):
    """The fewest blocks of each row that hold this share of the mass, by every 16th or rarer query; its own, and the sink."""
    tokens, heads = q.shape[1], q.shape[2]
    n, group = tokens // 128, heads // k.shape[2]
    step = max(16, tokens // 2048)
    mask = torch.empty(1, heads, n, n, device="cuda", dtype=torch.bool)
    rows = torch.arange(step - 1, tokens, step, device="cuda")
    for h in range(heads):
        score = (q[0, rows, h] @ k[0, :, h // group].T).float() * q.shape[3] ** -0.5
        score.masked_fill_(torch.arange(tokens, device="cuda") > rows[:, None], float("-inf"))
        share = score.softmax(-1).unflatten(1, (n, 128)).sum(-1)  # [rows, n]
        if step < 128: share = share.unflatten(0, (n, 128 // step)).mean(1)
        largest, which = share.sort(-1, descending=True)
        keep = largest.cumsum(-1) - largest < mass
        mask[0, h] = torch.zeros_like(keep).scatter_(1, which, keep).repeat_interleave(n // keep.shape[0], 0)
    own = torch.eye(n, device="cuda", dtype=torch.bool)
    mask |= own
    mask[..., 0] = True
    return mask & torch.ones(n, n, device="cuda", dtype=torch.bool).tril()

SHAPES = {  # batch, tokens, query heads, key heads, head size, documents, density
    "16K 32/8": (1, 16384, 32, 8, 128, 1, 0.5), "28/4": (1, 16384, 28, 4, 128, 1, 0.5), "D 64": (1, 16384, 32, 8, 64, 1, 0.5),
    "MHA": (1, 16384, 32, 32, 128, 1, 0.5), "4/1 64K": (1, 65536, 4, 1, 128, 1, 0.5), "8K": (1, 8192, 32, 8, 128, 1, 0.5),
    "32K": (1, 32768, 32, 8, 128, 1, 0.5), "8 x 4K": (8, 4096, 32, 8, 128, 1, 0.5), "32 x 2K": (32, 2048, 32, 8, 128, 1, 0.5),
    "5% of 64K": (1, 65536, 32, 8, 128, 1, 0.05), "2% of 64K": (1, 65536, 32, 8, 128, 1, 0.02), "8 documents": (1, 32768, 32, 8, 128, 8, 0.5),
    "struct 32K": (1, 32768, 32, 8, 128, 1, None), "struct 128K": (1, 131072, 32, 8, 128, 1, None),
}

def timing(shapes):
    for name in shapes or SHAPES:
        B, L, H, Hk, D, documents, density = SHAPES[name]
        torch.manual_seed(0)
        if density is None:
            q, k, v = structured(L)
            mask = selected(q, k, 0.9)
        else:
            q, k, v = normal(L, H, D, B), normal(L, Hk, D, B), normal(L, Hk, D, B)
            mask = blocks(B, H, L // 128, density, documents)
        do = normal(L, H, D, B)
        words, num_selected = pack(mask), int(mask.sum())
        del mask
        startend = document_bounds(L, L // documents) if documents > 1 else None
        out, lse = forward(q, k, v, words, startend, True)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        calls, first, off = {}, None, 0
        for n, lib in LIBS.items():
            found = prepared(lib, q, k, v, words, out, lse, do, startend, grads=grads)
            if found is None: continue
            calls[n] = found[0]
            found[0](); torch.cuda.synchronize()
            if first is None: first = [g.clone() for g in grads]
            off = max(off, *((g.float() - f.float()).norm().item() / f.float().norm().item() for g, f in zip(grads, first)))
        if what == "prof":
            for n, lib in LIBS.items():
                got = (ctypes.c_ulonglong * 8)()
                lib.prof_128(got); calls[n](); torch.cuda.synchronize(); lib.prof_128(got)
                w, st, tu, ad, en, c, fi, dr = got
                print(f"{name:11} {n:5} items {c} | cycles an item: wait {w/c:.0f} steps {st/c:.0f} (blocks {num_selected/c:.1f}) turn {tu/c:.0f} add {ad/c:.0f} end {en/c:.0f} fill {fi/c:.0f} drain {dr/c:.0f} | Mcycles a worker {(w+st+tu+ad+en)/132e6:.2f}", flush=True)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    for _ in range(3): calls[n]()
                    torch.cuda.synchronize()
                print("   us: " + ", ".join(f"{e.key.split('(')[0].split('<')[0].split('::')[-1][:24]} {e.device_time_total / 3:.1f}" for e in profile.key_averages() if e.device_time_total > 0), flush=True)
            continue
        ms = interleaved_ms(calls, 4, 0.01)
        flops = 2.5 * attend_flops(num_selected, L, H * B, D)
        density = num_selected / B / H / (L // 128 * (L // 128 + 1) // 2)
        base = ms["base"]
        print(f"{name:11} {density:.3f} |" + "".join(f" {n} {t:.3f} ({flops / t / 1e9:.0f}, {base / t:.3f})" for n, t in ms.items()) + f" | off {off:.0e}", flush=True)
        del q, k, v, do, words, calls, out, lse, grads, first, found
        torch.cuda.empty_cache()

if __name__ == "__main__":
    start = time.time()
    if what in ("all", "check"): check()
    print(f"at {time.time() - start:.0f} s", flush=True)
    if what in ("all", "time", "prof"):
        print("ms (TFLOP/s) of " + ", ".join(LIBS))
        timing(sys.argv[3:])
    print(f"{torch.cuda.get_device_name()}, {time.time() - start:.0f} s")
