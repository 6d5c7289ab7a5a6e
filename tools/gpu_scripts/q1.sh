ROOT=$PWD
. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
for b in q21 r23; do mkdir -p /tmp/$b; tar -C /tmp/$b -xJf .gpu/$b.tar.xz; done
cp -r .gpu /tmp/q21/; cp -r .gpu /tmp/r23/
(cd /tmp/q21; build "90a") & (cd /tmp/r23; build "90 90a") & wait
cd /tmp/q21; echo "== q21"
timeout 60 python3 .gpu/q21_run.py check 2>&1 | tail -25 | cut -c1-170
timeout 100 python3 .gpu/q21_run.py time 2>&1 | tail -25 | cut -c1-170
timeout 60 bash .gpu/q21_variants.sh .gpu/q21_bin 2>&1 | cut -c1-150 | tail -40
cd /tmp/r23; echo "== r23"
WORKERS=10 tests ragged 120 tests/kernels/test_ragged.py tests/gpu/test_ragged_gpu.py -k gpu
grep -E "^E  " $OUT/ragged.log | cut -c1-200 | sort | uniq -c | sort -rn | head -8
timeout 90 python3 .gpu/r23_run.py --no-tests 2>&1 | tail -25 | cut -c1-170
