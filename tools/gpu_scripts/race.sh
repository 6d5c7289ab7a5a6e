mkdir -p /tmp/tree; cp -r rrattn tools /tmp/tree
(cd /tmp/tree; for d in 64 128; do for p in portable-99KB portable-227KB; do
 timeout 200 compute-sanitizer --tool racecheck --kernel-name kns=rrattn python3 -m tools.gpu_calls --stage backward --head-dim $d --path $p > $OUT/race$d$p.log 2>&1; echo "race $d $p rc $? in $SECONDS s: $(tail -2 $OUT/race$d$p.log | tr '\n' ' ' | cut -c1-200)" >> $OUT/race.txt; done; done) &
