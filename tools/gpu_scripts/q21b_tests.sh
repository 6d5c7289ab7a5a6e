# Eight bits: the build of the tree, its tests and long rows (about 70 s).
. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
nvidia-smi --query-gpu=name,clocks.sm,power.limit --format=csv,noheader
root=$PWD; mkdir -p /tmp/t21b; tar -C /tmp/t21b -xJf .gpu/21b/tree.tar.xz; cd /tmp/t21b
build "90a"; echo "built at $SECONDS s"
timeout 60 python3 $root/.gpu/21b/run.py 2>&1 | grep -v Warn | tail -24 | cut -c1-170; echo "run.py at $SECONDS s"
WORKERS=15 tests quantized 120 tests/kernels/test_quantized.py tests/kernels/test_support.py -k "gpu and not paddle"
grep -E "^E   " $OUT/quantized.log | cut -c1-150 | sort | uniq -c | sort -rn | head -12
WORKERS=4 tests quantized_gpu 60 tests/gpu/test_quantized_gpu.py
grep -E "^E   " $OUT/quantized_gpu.log | cut -c1-150 | head -6
timeout 40 compute-sanitizer --tool memcheck --kernel-name kns=rrattn python3 - > $OUT/san.log 2>&1 <<'P'
import sys; sys.path[:0] = ["."]
import torch
from rrattn import direct
q, k, v = (torch.randn(1, 700, h, 128, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
m = torch.full((1, 4, 6, 1), 63, dtype=torch.int32, device="cuda"); out = torch.empty_like(q); lse = torch.empty(1, 4, 700, device="cuda")
g = dict(out=out, lse=lse, causal=True, quantization="qk_int8_pv_fp8")
w = torch.empty(direct.block_sparse_attention(q, k, v, m, size_only=True, **g), dtype=torch.uint8, device="cuda")
direct.block_sparse_attention(q, k, v, m, workspace=w, **g); torch.cuda.synchronize(); print(out.float().std().item())
P
tail -3 $OUT/san.log | cut -c1-150; echo "done at $SECONDS s"
