. .gpu/env.sh
mkdir -p /tmp/pd; cp .gpu/pa/* /tmp/pd
nvidia-smi -L
build "90 90a"
tests gpu 420 tests/gpu -k "not paddle"
