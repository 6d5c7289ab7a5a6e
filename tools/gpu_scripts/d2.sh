. .gpu/env.sh
sed -i 's/        if is_stale(target, \[source, \*HEADERS, configuration\]):/        if not target.exists():/' setup.py
mkdir -p build/temp.linux-x86_64-cpython-312/cuda; tar -C build/temp.linux-x86_64-cpython-312/cuda -xJf .gpu/objs.tar.xz
build "90a"
J=tools/bench/results/gpu_context_parallel.json
timeout 95 torchrun --nproc-per-node 2 -m tools.bench.gpu_context_parallel --layout dual_chunk --tokens 262144 --json $J --commit $1 > $OUT/cp.log 2>&1; echo rc $? at $SECONDS
grep -v "^W1127" $OUT/cp.log | tail -32 | cut -c1-200
cp $J $OUT
