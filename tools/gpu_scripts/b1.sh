. .gpu/env.sh
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
build "90a"
mkdir -p /tmp/old; tar -C /tmp/old -xJf .gpu/old.tar.xz; cp -r build rrattn /tmp/old/ ; tar -C /tmp/old -xJf .gpu/old.tar.xz
cp .gpu/b20_bench.py .gpu/sel.py . ; cp .gpu/b20_bench.py .gpu/sel.py /tmp/old/
(cd /tmp/old; find . -type f -exec touch -d '2 hours ago' {} +; find build -name '*.o' -exec touch -d '1 hour ago' {} +; find csrc/cuda/sm90/backward/instantiations csrc/cuda/dispatch.cpp -type f -exec touch {} +; rm -f build/temp*/cuda/*sm90*backward* build/temp*/csrc/cuda/dispatch.o build/lib*/*.so rrattn/*.so; build "90a")
ls build/temp*/cuda | head -3
timeout 100 python3 b20_bench.py check 2>&1 | tail -6 | cut -c1-160
N=("MQA 32/1" "D 64" "D 128, 32/8" "8K" "32K" "28/4" "batch 8 of 4K" "batch 32 of 2K" "D 96" "D 80")
timeout 70 python3 b20_bench.py time "${N[@]}" > $OUT/new.txt 2>&1
(cd /tmp/old; timeout 70 python3 b20_bench.py time "${N[@]}" > $OUT/old.txt 2>&1)
echo NEW; cut -c1-150 $OUT/new.txt | tail -40; echo OLD; cut -c1-150 $OUT/old.txt | tail -40
timeout 60 python3 sel.py 16384 131072
