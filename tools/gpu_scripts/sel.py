"""Backward over random blocks, over selected ones, and over random ones whose columns or rows differ in density."""
import sys, torch
from tools.bench.gpu_attend import Pipeline, HALF, empty
from tools.bench.gpu_backward import backward
from tools.bench.gpu_inputs import *
from tools.bench.gpu_rivals import interleaved_ms
from rrattn.config import RRAttentionConfig
torch.manual_seed(0)
for tokens in map(int, sys.argv[1:]):
    n = tokens // 128
    own = torch.ones(n, n, device="cuda", dtype=torch.bool).tril(); before = own.tril(-1)
    def fix(m): return m & before | own & ~before
    words = {}
    words["random"] = pack(random_blocks(tokens, tokens, 0.5))
    u = torch.rand(1, NUM_HEADS, n, n, device="cuda")
    p = 0.1 + 0.8 * torch.rand(1, NUM_HEADS, 1, n, device="cuda")
    words["columns"] = pack(fix(u < p)); words["rows"] = pack(fix(u < p.transpose(2, 3)))
    pk = p[:, ::4].repeat_interleave(4, 1); words["columns of kv head"] = pack(fix(u < pk))
    del u
    q = normal(tokens, 32), normal(tokens, 8), normal(tokens, 8)
    pipe = Pipeline(*q)
    scores = empty(torch.float32, 1, 32, n, n)
    for name, data, cfg in (("selected random", q, HALF), ("selected structured", structured(tokens), {})):
        m = empty(torch.int32, 1, 32, n, -(-n // 32)); pp = Pipeline(*data)
        pp.with_workspace(pp.stages(scores, m, RRAttentionConfig(**cfg))[:2])[0](); words[name] = m
    torch.cuda.synchronize()
    go = torch.randn_like(q[0]); grads = tuple(torch.empty_like(x) for x in q)
    calls = {name: pipe.with_workspace([backward(pipe, w, go, grads, False)])[0] for name, w in words.items()}
    fwd = {name: pipe.with_workspace([pipe.attend(w)])[0] for name, w in words.items()}
    ms = interleaved_ms(calls, 2, 0.05); mf = interleaved_ms(fwd, 2, 0.05)
    for name, w in words.items():
        s = selected_blocks(w); f = attend_flops(s, tokens)
        print(f"{tokens:7} {name:20} density {s/32/visible_blocks(tokens,tokens):.3f} backward {ms[name]:8.2f} ms {2.5*f/ms[name]/1e9:5.0f} TFLOP/s | forward {mf[name]:8.2f} ms {f/mf[name]/1e9:5.0f}", flush=True)
