"""Forward attention on Hopper, kernels of several versions in libraries: checks against float32, then times beside cuDNN.
From a checkout's root: python3 bench.py FOLDER [check|time] [shape...]"""
import ctypes, sys, time
from pathlib import Path
sys.path.insert(0, ".")
import torch
from tools.bench.gpu_inputs import attend_flops, normal, pack
from tools.bench.gpu_rivals import DENSE, interleaved_ms

torch.backends.cuda.matmul.allow_tf32 = False
I, P = ctypes.c_int64, ctypes.c_void_p
class Args(ctypes.Structure):
    _fields_ = [(n, I) for n in "batch lq lk hq hk d dv causal bounds".split()] + [
        (n, P) for n in "q k v out mask lse workspace stream startend".split()] + [("scale", ctypes.c_double)]

ORDER = ["base", "again", "new"]  # and variants of the kernels of 128
folder = Path(sys.argv[1])
names = sorted((p.stem for p in folder.glob("*.so")), key=lambda n: (ORDER.index(n) if n in ORDER else 9, n))
LIBS = {n: ctypes.CDLL(str((folder / f"{n}.so").resolve())) for n in names}
LIBS = {"base": LIBS["base"], "again": LIBS["base"], **LIBS}  # base twice: the noise

def prepared(lib, q, k, v, words, startend=None, causal=True):
    """(call, out, lse) of a library, or None where it has no kernel of the size."""
    size = max(q.shape[3], v.shape[3])
    for s in (64, 128, 192, 256):
        if size <= s and hasattr(lib, f"run_{s}"):
            break
    else:
        return None
    if (size <= 64 and s != 64) or (size <= 128 and s > 128): return None
    run, need = getattr(lib, f"run_{s}"), getattr(lib, f"bytes_{s}")
    need.restype = I
    out = torch.full(q.shape[:3] + v.shape[3:], float("nan"), device="cuda", dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device="cuda")
    args = Args(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], int(causal),
                0 if startend is None else startend.shape[-1], q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
                words.data_ptr(), lse.data_ptr(), 0, torch.cuda.current_stream().cuda_stream,
                0 if startend is None else startend.data_ptr(), q.shape[3] ** -0.5)
    workspace = torch.empty(need(ctypes.byref(args)), device="cuda", dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    keep = q, k, v, words, startend, workspace, args
    def call(keep=keep):
        assert run(ctypes.byref(args)) == 0
    return call, out, lse

def blocks(batch, heads, nq, nk, density, documents=1):
    own = torch.ones(nq, nk, device="cuda", dtype=torch.bool).tril(nk - nq)
    before = own.tril(nk - nq - 1)
    mask = (torch.rand(batch, heads, nq, nk, device="cuda") < density) & before | own & ~before
    if documents > 1:
        document = torch.arange(nk, device="cuda") // (nk // documents)
        mask &= document[:, None] == document
    return mask

def document_bounds(tokens, length):
    row = torch.arange(tokens, device="cuda", dtype=torch.int32)
    return ((row // length + 1) * length).int().reshape(1, 1, -1, 1).contiguous()

CHECKS = [  # B, Lq, Lk, H, Hk, D, causal, density, length of documents, kind
    (1, 128, 128, 2, 1, 64, 1, 1.0, 0, ""), (1, 1, 130, 2, 1, 64, 1, 1.0, 0, ""), (2, 1000, 1000, 4, 2, 64, 1, 0.5, 0, ""),
    (1, 1000, 2333, 4, 2, 64, 1, 0.4, 0, ""), (1, 1000, 2333, 4, 2, 40, 0, 0.4, 0, ""), (8, 2048, 2048, 16, 4, 64, 1, 0.5, 0, "holes"),
    (1, 4096, 4096, 8, 2, 64, 1, 0.3, 0, "rise"), (1, 4096, 4096, 8, 2, 64, 1, 0.7, 700, ""), (1, 4096, 4096, 8, 2, 64, 1, 0.7, 512, ""),
    (1, 1000, 1000, 4, 2, 128, 1, 0.5, 0, ""), (1, 1000, 2333, 4, 2, 96, 1, 0.4, 0, ""), (1, 1000, 2333, 4, 2, 128, 0, 0.4, 0, ""),
    (8, 2048, 2048, 16, 4, 128, 1, 0.5, 0, "holes"), (1, 4096, 4096, 8, 2, 128, 1, 0.3, 0, "rise"),
    (1, 4096, 4096, 8, 2, 128, 1, 0.7, 700, ""), (1, 4096, 4096, 8, 2, 128, 1, 0.7, 512, ""), (1, 1000, 2333, 4, 2, 128, 1, 0.7, 300, ""),
    (1, 1000, 2333, 4, 2, 192, 1, 0.5, 0, ""), (4, 2048, 2048, 8, 2, 192, 1, 0.5, 0, "holes"), (1, 4096, 4096, 8, 2, 192, 1, 0.3, 0, "rise"),
    (1, 1000, 2333, 4, 2, 256, 1, 0.5, 0, ""), (4, 2048, 2048, 8, 2, 256, 1, 0.5, 0, "holes"), (1, 4096, 4096, 8, 2, 256, 1, 0.3, 0, "rise"),
    (1, 1000, 2333, 4, 2, 152, 0, 0.5, 0, ""),
]

def check():
    bad = 0
    for case in CHECKS:
        B, Lq, Lk, H, Hk, D, causal, density, length, kind = case
        torch.manual_seed(0)
        q, k, v = 2 * normal(Lq, H, D, B), normal(Lk, Hk, D, B), normal(Lk, Hk, D, B)
        if kind == "rise": k[:, :128] *= 16
        nq, nk = -(-Lq // 128), -(-Lk // 128)
        mask = torch.rand(B, H, nq, nk, device="cuda") < density
        if kind == "rise": mask[..., 0] = True
        if kind == "holes": mask[:, ::3, ::2] = False
        startend = document_bounds(Lk, length) if length else None
        words = pack(mask)
        row, col = torch.arange(Lq, device="cuda")[:, None], torch.arange(Lk, device="cuda")
        see = torch.ones(Lq, Lk, device="cuda", dtype=torch.bool) if not causal else col <= row + Lk - Lq
        if length: see = see & (row < startend[0, 0, :, 0])
        def reference(dtype):
            out = torch.empty(B, Lq, H, D, device="cuda")
            lse = torch.empty(B, H, Lq, device="cuda")
            for b in range(B):
                for h in range(H):
                    m = mask[b, h].repeat_interleave(128, 0)[:Lq].repeat_interleave(128, 1)[:, :Lk] & see
                    s = (q[b, :, h].to(dtype) @ k[b, :, h // (H // Hk)].to(dtype).T * D**-0.5).masked_fill(~m, float("-inf"))
                    lse[b, h] = s.float().logsumexp(-1)
                    out[b, :, h] = (s.softmax(-1).nan_to_num(0) @ v[b, :, h // (H // Hk)].to(dtype)).float()
            return out, lse
        exact, naive = reference(torch.float32), reference(torch.bfloat16)[0]
        allowed = 2 * (naive - exact[0]).norm() / exact[0].norm() + 1e-6
        for name, lib in LIBS.items():
            found = prepared(lib, q, k, v, words, startend, causal)
            if found is None or name in ("base", "again"): continue
            call, out, lse = found
            runs = []
            for _ in range(2):
                out.fill_(float("nan")); lse.fill_(float("nan"))
                call(); torch.cuda.synchronize()
                runs.append((out.clone(), lse.clone()))
            same = all(torch.equal(a, b) for r in runs[1:] for a, b in zip(r, runs[0]))
            error = (out.float() - exact[0]).norm() / exact[0].norm()
            seen = exact[1].isfinite()
            off = ((lse - exact[1])[seen].abs() / (1 + exact[1][seen].abs())).max().item() if seen.any() else 0
            ok = same and bool(error <= allowed) and off < 1e-4 and torch.equal(seen, lse.isfinite()) and not out.isnan().any()
            if kind == "rise" and name == "new":
                over = ((lse - exact[1])[seen].abs() / (2e-5 + 2e-6 * exact[1][seen].abs())).max().item()
                print(f"D {D}, scores that rise: lse off by {over:.2f} of what the test allows", flush=True)
            if not ok:
                bad += 1
                print(f"BAD {name} {case}: error {error:.2e} of {allowed:.2e}, lse {off:.1e}, same bits {same}", flush=True)
    print(f"checks: {len(CHECKS)} cases, {bad} bad", flush=True)

# name: B, L, H, Hk, D, documents, density, x dense recorded and wanted
VARIANTS = ("D 128 32/8", "D 96", "batch 32 of 2K", "5% of 64K")  # where these are timed too
SHAPES = {
    "D 128 32/8": (1, 16384, 32, 8, 128, 1, 0.5, "2.19 of 2.19"), "D 64": (1, 16384, 32, 8, 64, 1, 0.5, "2.04 of 2.20"),
    "D 96": (1, 16384, 32, 8, 96, 1, 0.5, "2.32 of 2.32"), 
    "D 192 16/4": (1, 16384, 16, 4, 192, 1, 0.5, "1.65 of 2.00"), "D 256 16/4": (1, 16384, 16, 4, 256, 1, 0.5, "1.87 of 2.05"),
    "batch 8 of 4K": (8, 4096, 32, 8, 128, 1, 0.5, "1.94 of 2.00"), "batch 32 of 2K": (32, 2048, 32, 8, 128, 1, 0.5, "1.67 of 1.85"),
    "8 documents": (1, 32768, 32, 8, 128, 8, 0.5, "432 of 540 TF"), "5% of 64K": (1, 65536, 32, 8, 128, 1, 0.05, "18.4 of 18.4"),
}

def timing(names):
    lines = []
    for name in names or SHAPES:
        B, L, H, Hk, D, documents, density, wanted = SHAPES[name]
        torch.manual_seed(0)
        q, k, v = normal(L, H, D, B), normal(L, Hk, D, B), normal(L, Hk, D, B)
        mask = blocks(B, H, L // 128, L // 128, density, documents)
        words, selected = pack(mask), int(mask.sum())
        startend = document_bounds(L, L // documents) if documents > 1 else None
        found = {n: prepared(lib, q, k, v, words, startend) for n, lib in LIBS.items()}
        found = {n: f for n, f in found.items() if f and (n in ORDER or name in VARIANTS)}
        calls = {n: f[0] for n, f in found.items()}
        for c in calls.values(): c()
        torch.cuda.synchronize()
        base = found["base"][1].float()
        off = max((f[1].float() - base).norm().item() / base.norm().item() for f in found.values())
        del base
        try:
            apart = [x.reshape(B * documents, L // documents, *x.shape[2:]) for x in (q, k, v)]
            dense = DENSE["cudnn dense"](*apart)
            dense(); torch.cuda.synchronize()
            calls["dense"] = dense
        except Exception as error:
            print("no cuDNN:", str(error).splitlines()[0][:80])
        ms = interleaved_ms(calls, 4, 0.08)
        flops = attend_flops(selected, L, B * H, D)
        best = ms.get("dense", float("nan"))
        lines.append(f"{name:15}" + "".join(f" {n} {flops / t / 1e9:4.0f} ({best / t:5.2f})" for n, t in ms.items() if n != "dense")
                     + f" | was, wanted {wanted} | off {off:.0e}")
        print(lines[-1], flush=True)
        del q, k, v, mask, words, found, calls
        torch.cuda.empty_cache()

if __name__ == "__main__":
    what = sys.argv[2] if len(sys.argv) > 2 else "all"
    start = time.time()
    if what in ("all", "check"): check()
    print(f"at {time.time() - start:.0f} s", flush=True)
    if what in ("all", "time"):
        print("TFLOP/s (x cuDNN dense) of " + ", ".join(LIBS))
        timing(sys.argv[3:])
    print(f"{torch.cuda.get_device_name()}, {time.time() - start:.0f} s")
