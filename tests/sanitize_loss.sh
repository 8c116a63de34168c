#!/bin/sh
# The C++ cores of loss and sampling under AddressSanitizer + UndefinedBehaviorSanitizer, at every level of this
# machine, side by side. usage: tests/sanitize_loss.sh [problems a level, 1000 as a rule] [seed]    CXX chooses the compiler
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
flags="-std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
kernels="-fopenmp-simd -ftree-vectorize -ffp-contract=fast -fno-math-errno -fno-trapping-math"
case $(uname -m) in
  x86_64) levels="v2 v3 v4" x86=-DQUARK_X86_64 ;;
  *) levels=generic x86= ;;
esac
compile() { "${CXX:-c++}" $flags "$@"; }
jobs=
for level in $levels; do
  march=
  [ "$level" = generic ] || march=-march=x86-64-$level
  for core in quark_loss sampling; do
    compile $kernels $march -DQUARK_LEVEL="$level" -c "$here/../csrc/${core}_rows.cpp" -o "$build/$core-$level.o" &
    jobs="$jobs $!"
  done
done
for core in levels quark_loss rows sampling threads; do
  compile $x86 -c "$here/../csrc/$core.cpp" -o "$build/$core.o"
done
for job in $jobs; do wait "$job"; done
for driver in loss sampling; do
  compile $x86 "$here/sanitize_$driver.cpp" "$build"/*.o -pthread -ldl -o "$build/$driver"
done
jobs=
for level in $levels; do
  if QUARK_FAST_ISA=$level "$build/loss" isa >"$build/$level.log"; then
    rm "$build/$level.log"  # the drivers name their level themselves
    for driver in loss sampling; do
      QUARK_FAST_ISA=$level "$build/$driver" "${1:-1000}" "${2:-1}" >>"$build/$level-$driver.log" 2>&1 &
      jobs="$jobs $!"
    done
  fi
done
status=0
for job in $jobs; do wait "$job" || status=1; done
cat "$build"/*.log
exit $status
