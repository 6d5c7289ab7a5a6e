mkdir -p /tmp/b21c; tar -C /tmp/b21c -xJf .gpu/21c/bins.tar.xz; cd /tmp/b21c
timeout 15 ./micro3 > $OUT/micro.txt 2>&1 || echo "micro FAILED $?"; cut -c1-130 $OUT/micro.txt
timeout 12 ./b3_128 s a0.cubin a1.cubin h1.cubin a0prof.cubin h1prof.cubin > $OUT/s.txt 2>&1 || echo "b3 FAILED"; cut -c1-150 $OUT/s.txt
timeout 12 ./b3_128 m a0.cubin a0nocopy.cubin > $OUT/m.txt 2>&1 || echo "b3 m FAILED"; cut -c1-150 $OUT/m.txt
