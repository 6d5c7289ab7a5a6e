. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=/tmp/pd/site
sed -i 's/        if is_stale(target, \[source, \*HEADERS, configuration\]):/        if not target.exists():/' setup.py
build "90 90a"
WORKERS=14 tests paddle_hopper 70 tests/gpu/test_paddle_gpu.py tests/kernels/test_backward.py tests/kernels/test_ragged.py tests/kernels/test_attend.py -k "paddle and gpu"
echo "at $SECONDS s"
