. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
nvidia-smi -L
sed -i 's/        if is_stale(target, \[source, \*HEADERS, configuration\]):/        if not target.exists():/' setup.py; grep -c "if not target.exists" setup.py
mkdir -p build/temp.linux-x86_64-cpython-312/cuda; tar -C build/temp.linux-x86_64-cpython-312/cuda -xJf .gpu/objs.tar.xz
build "90 90a" & 
bash .gpu/20f2/run.sh; echo "20f2 done at $SECONDS s"
mkdir -p /tmp/b21; tar -C /tmp/b21 -xJf .gpu/21/bins.tar.xz
(for b in base k3 d64 d64poly4 noq noturns flush8 room0 poly8 poly4 nocheck noexp sepq; do timeout 12 /tmp/b21/bench_$b || echo "$b FAILED $?"; done) > $OUT/b21.txt 2>&1; cut -c1-175 $OUT/b21.txt; echo "21 done at $SECONDS s"
wait; ls -la rrattn/*.so | wc -l
WORKERS=12 tests gpu 110 tests/gpu/test_attend_gpu.py tests/gpu/test_backward_gpu.py tests/gpu/test_ragged_gpu.py -k "not million"
echo "at $SECONDS s"
