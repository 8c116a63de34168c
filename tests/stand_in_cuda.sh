#!/bin/sh
# Whole runs on a CUDA device without a GPU: builds it against the installed torch, and runs test_stand_in_cuda.py on it.
# usage: tests/stand_in_cuda.sh [options of pytest]    CXX chooses the compiler, PYTHON the interpreter; Linux alone
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -r "$build"' EXIT
python=${PYTHON:-python}
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
abi=$("$python" -c 'import torch; print(int(torch.compiled_with_cxx11_abi()))')
"${CXX:-c++}" -std=c++20 -O0 -shared -fPIC -D_GLIBCXX_USE_CXX11_ABI="$abi" "$here/stand_in_cuda.cpp" \
  -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -lc10 -ltorch_cpu -o "$build/stand_in_cuda.so"
cd "$here/.."
LD_PRELOAD="$build/stand_in_cuda.so" STAND_IN_CUDA="$build/stand_in_cuda.so" \
  "$python" -m pytest -q -n 0 tests/test_stand_in_cuda.py "$@"
