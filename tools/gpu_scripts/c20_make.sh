#!/bin/bash
# make.sh NAME TREE SIZE...: /tmp/20c/lib/NAME.so of the sources of TREE
cd /tmp/20c/lib; name=$1 tree=$2; shift 2
CUT=$(/work/main/.venv/bin/python -c "import cutlass_library,os;print(os.path.dirname(cutlass_library.__file__)+'/source/include')")
N="/tmp/brief/slot nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden -gencode arch=compute_90a,code=sm_90a -DNDEBUG -Xptxas=-v"
mkdir -p o
for f in sm90/common/tensor_map common/span_bounds common/backward/prepare common/backward/finish_grad_sink; do
  [ -f o/common/$(basename $f).o ] || { mkdir -p o/common; $N -I$CUT -I/work/main/csrc -c /work/main/csrc/cuda/$f.cu -o o/common/$(basename $f).o 2>/dev/null || exit 1; }
done
for s in "$@"; do $N -I$CUT -I$tree/csrc -DSIZE=$s -DSIZE_V=$s -c stage.cu -o o/$name.$s.o 2>o/$name.$s.log || exit 1; done
nvcc -shared -o $name.so o/$name.*.o o/common/*.o && ls -la $name.so
