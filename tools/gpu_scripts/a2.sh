. .gpu/env.sh
build "90 90a"
tests kernels 330 tests/kernels/test_backward.py tests/kernels/test_grad_lse.py tests/kernels/test_compensate.py tests/kernels/test_select.py -k "gpu and not paddle"
for what in "racecheck --stage backward --path portable-99KB" "memcheck --path portable-99KB" "memcheck --path auto"; do
  set -- $what; tool=$1; shift; start=$SECONDS
  timeout 90 compute-sanitizer --tool $tool --kernel-regex kns=rrattn python3 -m tools.gpu_calls "$@" > $OUT/san.log 2>&1; echo "$what: rc $? $((SECONDS - start)) s"; tail -3 $OUT/san.log
done
python3 -m tools.bench.gpu --stage attend --stage backward --tokens 8192 --density 0.5
