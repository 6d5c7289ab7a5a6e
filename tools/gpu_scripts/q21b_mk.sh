# mk.sh NAME DIM FULL TREE 'python edits'
name=$1; dir=/tmp/21b/var/$name; rm -rf $dir; mkdir -p $dir; cp -r $4/csrc $dir/csrc
cd $dir; python3 - "$5" <<'PY'
import sys
base='csrc/cuda/sm90/quantized_attend/'
f={n:open(base+n+'.cuh').read() for n in ('consumer','config','kernel','producer','stage','quantize')}
def sub(n,a,b):
    assert a in f[n],(n,a)
    f[n]=f[n].replace(a,b)
sub('stage','quantized_attend_kernel<Traits, true>','quantized_attend_kernel<Traits, false>')
exec(sys.argv[1])
for n in f: open(base+n+'.cuh','w').write(f[n])
PY
[ $? -eq 0 ] || exit 1
C=/work/main/.venv/lib/python3.11/site-packages/cutlass_library/source/include
F="-std=c++17 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I$C -Icsrc"
[ -f /tmp/21/common.a ] || (cd /tmp/21; for x in common/span_bounds common/stood_in_for common/block_means sm90/common/tensor_map sm90/attend/instantiations/attend_bf16_128 sm90/attend/instantiations/attend_bf16_64; do /tmp/brief/slot nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I$C -I$dir/csrc -c $dir/csrc/cuda/$x.cu -o $(basename $x).o; done; ar rcs common.a span_bounds.o stood_in_for.o block_means.o tensor_map.o attend_bf16_128.o attend_bf16_64.o)
/tmp/brief/slot nvcc $F -DNAME="\"$name\"" $EXTRA -DDIM=$2 -DFULL=$3 -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -Xptxas=-v /tmp/21b/bench.cu /tmp/21/common.a -o /tmp/21b/var/bench_$name > /tmp/21b/var/$name.log 2>&1; grep "error\|C75" /tmp/21b/var/$name.log
ls -la /tmp/21b/var/bench_$name | awk '{print $5,$9}'
