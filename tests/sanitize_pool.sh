#!/bin/sh
# The pool's C++ core under AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer.
# usage: tests/sanitize_pool.sh [effort, 1 as a rule]    CXX chooses the compiler
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
for sanitizers in address,undefined thread; do
  "${CXX:-c++}" -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=$sanitizers \
    -fno-sanitize-recover=all "$here/sanitize_pool.cpp" "$here/../csrc/quantile_pool.cpp" \
    -pthread -o "$build/run"
  echo "$sanitizers:"
  "$build/run" "${1:-1}"
done
