# Eight bits, second round: no build, about 30 s of GPU. First the pieces of a tile in cycles, then variants.
nvidia-smi --query-gpu=name,clocks.sm,power.limit --format=csv,noheader
mkdir -p /tmp/b21b; tar -C /tmp/b21b -xJf .gpu/21b/bins.tar.xz; cd /tmp/b21b
timeout 20 ./micro > $OUT/micro.txt 2>&1 || echo "micro FAILED $?"; cat $OUT/micro.txt
nvidia-smi --query-gpu=clocks.sm,power.draw,clocks_event_reasons.active --format=csv,noheader -lms 50 > $OUT/clocks.txt 2>&1 & smi=$!
for b in fin ahead aheadq aheadp8 aheadnw aheadne count new flush8 noflush noturns qregs8 d64 fin; do
  [ -f bench_$b ] && { echo "$b" >> $OUT/clocks.txt; timeout 20 ./bench_$b || echo "$b FAILED $?"; }
done > $OUT/bench.txt 2>&1; kill $smi
cut -c1-175 $OUT/bench.txt; sort $OUT/clocks.txt | cut -d, -f1 | sort | uniq -c | sort -rn | head -12; echo "done at $SECONDS s"
