#!/bin/sh
# The pool's C++ core under AddressSanitizer + UndefinedBehaviorSanitizer and under ThreadSanitizer, side by side.
# usage: tests/sanitize_pool.sh [effort, 1 as a rule]    CXX chooses the compiler
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
jobs=
for sanitizers in address,undefined thread; do
  {
    echo "$sanitizers:"
    "${CXX:-c++}" -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=$sanitizers \
      -fno-sanitize-recover=all "$here/sanitize_pool.cpp" "$here/../csrc/quantile_pool.cpp" \
      -pthread -o "$build/$sanitizers"
    "$build/$sanitizers" "${1:-1}"
  } >"$build/$sanitizers.log" 2>&1 &
  jobs="$jobs $!"
done
status=0
for job in $jobs; do wait "$job" || status=1; done
cat "$build"/*.log
exit $status
