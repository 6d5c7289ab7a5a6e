. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
mkdir -p /tmp/pd; cp .gpu/pa/* /tmp/pd
mkdir -p /tmp/tree; cp -r rrattn tools /tmp/tree
(cd /tmp/tree; for what in "memcheck --path portable-99KB" "memcheck --path auto" "racecheck --stage backward --head-dim 128 --path portable-227KB" "racecheck --stage backward --head-dim 64 --path portable-99KB"; do set -- $what; tool=$1; shift
 timeout 60 compute-sanitizer --tool $tool --kernel-name kns=rrattn python3 -m tools.gpu_calls "$@" > /tmp/san.log 2>&1; echo "$what: rc $? $(tail -2 /tmp/san.log | tr '\n' ' ' | cut -c1-150)"; done > $OUT/san.txt 2>&1) &
WORKERS=14 tests kernels 110 tests/kernels/test_attend.py tests/kernels/test_backward.py tests/kernels/test_grad_lse.py tests/kernels/test_ragged.py tests/kernels/test_compensate.py tests/kernels/test_sink.py tests/kernels/test_value_head_dim.py tests/kernels/test_hidden_values.py -k "gpu and not paddle"
wait; cat $OUT/san.txt; echo "at $SECONDS s"
