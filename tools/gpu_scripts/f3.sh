. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
cp .gpu/pc/* /tmp/pd; python3 /tmp/pd/unpack.py /tmp/pd/site > /tmp/unpack.log 2>&1; export PYTHONPATH=/tmp/pd/site; echo "unpacked at $SECONDS s"
sed -i 's/        if is_stale(target, \[source, \*HEADERS, configuration\]):/        if not target.exists():/' setup.py
build "90"
timeout 60 python3 -m rrattn check > $OUT/check.txt 2>&1; grep -c " ok " $OUT/check.txt; grep FAILED $OUT/check.txt | head -5; tail -1 $OUT/check.txt; echo "at $SECONDS s"
WORKERS=14 tests paddle_portable 100 tests/gpu/test_paddle_gpu.py tests/kernels/test_backward.py tests/kernels/test_ragged.py tests/kernels/test_attend.py -k "paddle and gpu"
echo "at $SECONDS s"
