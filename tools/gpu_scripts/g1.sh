cp .rivals/piece1/* /tmp/rv; python3 /tmp/rv/unpack.py /tmp/rv/site | tail -1; export PYTHONPATH=/tmp/rv/site:/tmp/rv/site/nvidia_cutlass_dsl/dsl_packages; echo at $SECONDS
J=tools/bench/results/gpu.json
timeout 100 python3 -m tools.bench.gpu --stage backward --json $J --commit $1 > $OUT/backward.txt 2>&1; echo backward rc $? at $SECONDS; tail -22 $OUT/backward.txt | cut -c1-190; cp $J $OUT
timeout 60 python3 -m tools.bench.gpu --stage attend --json $J --commit $1 > $OUT/attend.txt 2>&1; echo attend rc $? at $SECONDS; tail -22 $OUT/attend.txt | cut -c1-190; cp $J $OUT
