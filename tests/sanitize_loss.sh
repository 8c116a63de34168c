#!/bin/sh
# The loss's C++ core under AddressSanitizer + UndefinedBehaviorSanitizer, at every level of this machine, side by side.
# usage: tests/sanitize_loss.sh [problems a level, 1000 as a rule] [seed]    CXX chooses the compiler
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
flags="-std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
kernels="-fopenmp-simd -ftree-vectorize -ffp-contract=fast -fno-math-errno -fno-trapping-math"
case $(uname -m) in
  x86_64) levels="v2 v3 v4" lowest="-DQUARK_LOWEST=v2 -DQUARK_X86_64" ;;
  *) levels=generic lowest=-DQUARK_LOWEST=generic ;;
esac
jobs=
for level in $levels; do
  march=
  [ "$level" = generic ] || march=-march=x86-64-$level
  "${CXX:-c++}" $flags $kernels $march -DQUARK_LEVEL="$level" \
    -c "$here/../csrc/quark_loss_rows.cpp" -o "$build/$level.o" &
  jobs="$jobs $!"
done
"${CXX:-c++}" $flags $lowest -c "$here/sanitize_loss.cpp" -o "$build/driver.o"
"${CXX:-c++}" $flags $lowest -c "$here/../csrc/quark_loss.cpp" -o "$build/core.o"
for job in $jobs; do wait "$job"; done
"${CXX:-c++}" $flags "$build"/*.o -pthread -ldl -o "$build/run"
jobs=
for level in $levels; do
  if QUARK_FAST_ISA=$level "$build/run" isa >"$build/$level.log"; then
    QUARK_FAST_ISA=$level "$build/run" "${1:-1000}" "${2:-1}" >>"$build/$level.log" 2>&1 &
    jobs="$jobs $!"
  fi
done
status=0
for job in $jobs; do wait "$job" || status=1; done
cat "$build"/*.log
exit $status
