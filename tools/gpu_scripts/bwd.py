import sys, torch
from rrattn import direct
from tools.bench.gpu_portable import *
from tools.bench.gpu_portable import random_pipeline, density_of, FLASH
direct.set_gpu_path("portable"); torch.manual_seed(0)
label = sys.argv[1]
for tokens in (16384, 32768):
    pipe = random_pipeline(128, tokens); inputs = pipe.query, pipe.key, pipe.value
    go, grads = torch.randn_like(pipe.query), tuple(torch.empty_like(x) for x in inputs)
    w = {d: pack(random_blocks(tokens, tokens, d, 32)) for d in DENSITIES}
    calls = {FLASH: make(FLASH, backward_of(DENSE[FLASH]), *inputs, go)}
    calls.update({d: pipe.with_workspace([backward(pipe, w[d], go, grads, deterministic=False)])[0] for d in DENSITIES})
    ms = interleaved_ms(calls, 7, 0.05)
    print(label, tokens, " ".join(f"{d}: {ms[d]:.3f} ms {ms[FLASH]*density_of(w[d],tokens)/ms[d]:.4f}" for d in DENSITIES), f"fa2 {ms[FLASH]:.3f}", flush=True)
