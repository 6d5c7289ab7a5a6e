# kv.sh NAME DIM 'edits': a variant's cubin, from the worktree
dir=/tmp/21c/kv/$1; rm -rf $dir; mkdir -p $dir; cp -r ${TREE:-/work/wt-21c}/csrc $dir/csrc; cd $dir; python3 - "$3" <<'PY'
import sys
base='csrc/cuda/sm90/quantized_attend/'
f={n:open(base+n+'.cuh').read() for n in ('consumer','config','kernel','producer','stage','quantize')}
def sub(n,a,b):
    assert a in f[n],(n,a)
    f[n]=f[n].replace(a,b)
exec(sys.argv[1])
f['kernel']=f['kernel'].replace('__global__ void __launch_bounds__(Traits::kThreads, 1)\n    quantized_attend_kernel(const __grid_constant__ KernelParams<Traits::kHeadDim> params)','__device__ __forceinline__ void quantized_attend_body(const KernelParams<Traits::kHeadDim>& params)')
assert 'quantized_attend_body' in f['kernel']
for n in f: open(base+n+'.cuh','w').write(f[n])
PY
[ $? -eq 0 ] || exit 1
C=/work/main/.venv/lib/python3.11/site-packages/cutlass_library/source/include
/tmp/brief/slot nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I$C -Icsrc -DDIM=$2 -Xptxas=-v -cubin /tmp/21c/kk.cu -o /tmp/21c/kv/$1.cubin > /tmp/21c/kv/$1.log 2>&1; grep "error" /tmp/21c/kv/$1.log; echo "$1: $(grep -o "(C75..)\|[0-9]* bytes spill [a-z]*" /tmp/21c/kv/$1.log | tr '\n' ' ')"
