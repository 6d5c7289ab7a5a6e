. .gpu/env.sh
cp .gpu/pb/* /tmp/pd
timeout 75 python3 -m tools.bench.gpu_portable --stage backward --json tools/bench/results/gpu_portable.json --commit $1 > $OUT/portable.txt 2>&1; echo rc $? at $SECONDS; tail -40 $OUT/portable.txt | cut -c1-170; cp tools/bench/results/gpu_portable.json $OUT
