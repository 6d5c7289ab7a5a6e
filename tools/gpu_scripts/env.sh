mkdir -p /tmp/cutlass; [ -d /tmp/cutlass/cute ] || tar -C /tmp/cutlass -xJf .gpu/cutlass.tar.xz
export RRATTN_CUTLASS=/tmp/cutlass
build() { # ARCHS
  local start=$SECONDS
  find build -name '*.o' -exec touch {} + 2>/dev/null
  RRATTN_CUDA_ARCHS="$1" python3 setup.py build_clib build_ext --inplace > /tmp/build.log 2>&1 || { tail -40 /tmp/build.log; exit 1; }
  echo "built for $1 in $((SECONDS - start)) s"
}
tests() { # LABEL SECONDS arguments of pytest
  local label=$1 limit=$2 start=$SECONDS; shift 2
  timeout $limit python3 -m pytest -n ${WORKERS:-15} -p no:cacheprovider "$@" > $OUT/$label.log 2>&1
  echo "$label: rc $? in $((SECONDS - start)) s: $(grep -E '(passed|failed|error).* in ' $OUT/$label.log | tail -1)"
  grep -E '^(FAILED|ERROR)' $OUT/$label.log | head -20
}
