#!/bin/bash
# make.sh NAME TREE SIZE...: /tmp/20b2/lib/NAME.so of the sources of TREE; EXTRA=-D...
cd /tmp/20b2/lib; name=$1 tree=$2; shift 2
CUT=$(/work/main/.venv/bin/python -c "import cutlass_library,os;print(os.path.dirname(cutlass_library.__file__)+'/source/include')")
N="/tmp/brief/slot nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden -gencode arch=compute_90a,code=sm_90a -DNDEBUG -Xptxas=-v $EXTRA"
h=o/common.$(cat $tree/csrc/cuda/common/*.* $tree/csrc/cuda/common/backward/*.* | md5sum | cut -c1-8); mkdir -p $h
for f in sm90/common/tensor_map common/span_bounds common/backward/prepare common/backward/finish_grad_sink; do
  [ -f $h/$(basename $f).o ] || $N -I$CUT -I$tree/csrc -c $tree/csrc/cuda/$f.cu -o $h/$(basename $f).o 2>$h/log || { cat $h/log; exit 1; }
done
for s in "$@"; do $N -I$CUT -I$tree/csrc -DSIZE=$s -DSIZE_V=$s -c stage.cu -o o/$name.$s.o 2>o/$name.$s.log || { grep error o/$name.$s.log; exit 1; }; done
nvcc -shared -o $name.so o/$name.*.o $h/*.o && ls -la $name.so
PATH=/tmp/20b/bin:$PATH python3 /tmp/20c/an.py o/$name.*.o
