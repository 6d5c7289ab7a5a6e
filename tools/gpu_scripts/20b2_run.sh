# No build. From a checkout's root, .gpu/20b2 carried; about 30 s.
export CUDA_MODULE_LOADING=EAGER
timeout 60 python3 .gpu/20b2/bench.py .gpu/20b2 check > $OUT/check.txt 2>&1; echo "check: rc $?"; tail -8 $OUT/check.txt | cut -c1-160
timeout 90 python3 .gpu/20b2/bench.py .gpu/20b2 time > $OUT/time.txt 2>&1; echo "time: rc $?"; tail -16 $OUT/time.txt | sed "s, | off.*,," | cut -c1-300
timeout 60 python3 .gpu/20b2/bench.py .gpu/20b2 prof "16K 32/8" "32 x 2K" "5% of 64K" "8 documents" > $OUT/prof.txt 2>&1; echo "prof: rc $?"; grep -v warn $OUT/prof.txt | tail -9 | cut -c1-300
