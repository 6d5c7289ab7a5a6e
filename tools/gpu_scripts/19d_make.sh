#!/bin/bash
# make.sh NAME TREE KIND:SIZE:SIZEV...: lib/NAME.so
name=$1 tree=$2; shift 2; cd /tmp/19d; mkdir -p lib/o
CUT=$(cat cutpath)
N="/tmp/brief/slot nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden -gencode arch=compute_80,code=sm_90 -DNDEBUG -I$CUT"
for f in common/span_bounds common/block_means common/stood_in_for common/device common/backward/prepare common/backward/finish_grad_sink; do
  o=lib/o/common-$(basename $f).o
  [ -f $o ] || $N -I/work/wt-19d/csrc -c /work/wt-19d/csrc/cuda/$f.cu -o $o || exit 1
done
for x in "$@"; do
  IFS=: read kind size sizev <<< $x
  k=$([ $kind = attend ] && echo -DATTEND || echo -DBACKWARD)
  $N -Xptxas=-v -I$tree/csrc $k $DEFS -DSIZE=$size -DSIZEV=$sizev -c stage.cu -o lib/o/$name.$kind.$size.$sizev.o 2>lib/o/$name.$kind.$size.$sizev.log || { cat lib/o/$name.$kind.$size.$sizev.log; exit 1; }
done
nvcc -shared -o lib/$name.so lib/o/$name.*.o lib/o/common-*.o && ls -la lib/$name.so
