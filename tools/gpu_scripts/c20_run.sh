# No build: libraries of base (main), a (first block looked up early), b (a + lists of items), c (b + bounded), and c with 4 or 16 in place of 8
# selected blocks (heads of 128 alone). From a checkout's root, .gpu/20c carried; about 40 s.
timeout 60 python3 .gpu/20c/bench.py .gpu/20c check > $OUT/check.txt 2>&1; echo "check: rc $?"; tail -14 $OUT/check.txt | cut -c1-200
timeout 90 python3 .gpu/20c/bench.py .gpu/20c time > $OUT/time.txt 2>&1; echo "time: rc $?"; tail -14 $OUT/time.txt | cut -c1-220
