# No build: libraries of base (main) and variants of it. From a checkout's root, .gpu/19d carried; about 30 s.
timeout 60 python3 .gpu/19d/bench.py .gpu/19d check > $OUT/check.txt 2>&1; echo "check: rc $?"; tail -14 $OUT/check.txt | cut -c1-170
timeout 60 python3 .gpu/19d/bench.py .gpu/19d time > $OUT/time.txt 2>&1; echo "time: rc $?"; tail -15 $OUT/time.txt | cut -c1-190
