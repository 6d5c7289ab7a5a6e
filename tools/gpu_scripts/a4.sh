. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
. .gpu/race.sh
sleep 3; export PYTHONPATH=/tmp/pd/site
build "90 90a"
python3 -m rrattn check 2>&1 | tail -3
WORKERS=14 tests paddle_hopper 150 tests/gpu/test_paddle_gpu.py tests/kernels/test_backward.py tests/kernels/test_select.py tests/kernels/test_attend.py tests/kernels/test_estimate.py tests/kernels/test_support.py tests/kernels/test_sink.py tests/kernels/test_grad_lse.py tests/kernels/test_value_head_dim.py -k "paddle and gpu"

build "90"
python3 -m rrattn check 2>&1 | tail -3
WORKERS=14 tests paddle_portable 150 tests/gpu/test_paddle_gpu.py tests/kernels/test_backward.py tests/kernels/test_select.py tests/kernels/test_attend.py tests/kernels/test_estimate.py tests/kernels/test_support.py tests/kernels/test_sink.py tests/kernels/test_grad_lse.py tests/kernels/test_value_head_dim.py -k "paddle and gpu"
wait; cat $OUT/race.txt
