. .gpu/env.sh
build "90a"
J=tools/bench/results/gpu_context_parallel.json
timeout 170 torchrun --nproc-per-node 2 -m tools.bench.gpu_context_parallel --layout dual_chunk --tokens 262144 --json $J --commit $1 > $OUT/cp.log 2>&1; echo rc $?
grep -v "^W1127" $OUT/cp.log | tail -32 | cut -c1-200
cp $J $OUT
