#!/bin/sh
# The C++ cores under libFuzzer, ASan and UBSan: inputs are bred for the branches that they reach.
# usage: tests/libfuzzer.sh [seconds for each core, 60 as a rule]
# Needs clang++ with its runtime (Debian: clang, libclang-rt-14-dev), so it is no part of .ci/run.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
flags="-std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DQUARK_LIBFUZZER"
rows="levels.cpp quark_loss.cpp quark_loss_rows.cpp rows.cpp sampling.cpp sampling_rows.cpp threads.cpp"
for core in loss sampling; do
  (cd "$here/../csrc" && clang++ $flags -fopenmp-simd -Wno-pass-failed -DQUARK_LEVEL=generic \
    "$here/sanitize_$core.cpp" $rows -pthread -ldl -o "$build/$core")
done
clang++ $flags "$here/sanitize_pool.cpp" "$here/../csrc/quantile_pool.cpp" -pthread -o "$build/pool"
for core in loss sampling pool; do
  mkdir "$build/corpus-$core"
  "$build/$core" "$build/corpus-$core" -max_total_time="${1:-60}" -max_len=512 -timeout=60 \
    -verbosity=0 -print_funcs=0 -print_final_stats=1 -artifact_prefix="${TMPDIR:-/tmp}/$core-"
done
