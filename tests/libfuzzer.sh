#!/bin/sh
# The C++ cores under libFuzzer, ASan and UBSan: inputs are bred for the branches that they reach.
# usage: tests/libfuzzer.sh [seconds for each core, 60 as a rule]
# Needs clang++ with its runtime (Debian: clang, libclang-rt-14-dev), so it is no part of .ci/run.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
flags="-std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DQUARK_LIBFUZZER"
clang++ $flags -fopenmp-simd -Wno-pass-failed -DQUARK_LOWEST=generic -DQUARK_LEVEL=generic "$here/sanitize_loss.cpp" \
  "$here"/../csrc/quark_loss*.cpp -pthread -ldl -o "$build/loss"
clang++ $flags "$here/sanitize_pool.cpp" "$here/../csrc/quantile_pool.cpp" -pthread -o "$build/pool"
for core in loss pool; do
  mkdir "$build/corpus-$core"
  "$build/$core" "$build/corpus-$core" -max_total_time="${1:-60}" -max_len=512 -timeout=60 \
    -verbosity=0 -print_funcs=0 -print_final_stats=1 -artifact_prefix="${TMPDIR:-/tmp}/$core-"
done
