#!/bin/sh
# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, then a small run under valgrind.
#
# Builds into build/sanitize, so the module that is installed stays as it is. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
base=build/sanitize
# Sanitizers lower the optimisation, where gcc warns that it does not unroll as told.
export SYSMT_WERROR=0

SYSMT_SANITIZE=address,undefined "$python" setup.py -q build --build-base "$base" --build-lib "$base/lib" >"$base.log" 2>&1 ||
    { cat "$base.log"; exit 1; }

# -P: the working directory must not shadow the sanitized build.
echo "ASan + UBSan: tests of the kernels on every path"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    PYTHONPATH="$base/lib" "$python" -P -m pytest -q -p no:cacheprovider tests/hw/test_fast.py tests/hw/test_kernels.py \
    tests/hw/test_forced_paths.py

if ! command -v valgrind >/dev/null; then
    echo "valgrind is not installed: skipped"
    exit 0
fi
echo "valgrind: a small run (it knows no AVX-512, so the paths below that)"
"$python" setup.py -q build --build-base "$base/plain" --build-lib "$base/plain/lib" >"$base.log" 2>&1 ||
    { cat "$base.log"; exit 1; }
PYTHONMALLOC=malloc PYTHONPATH="$base/plain/lib" OPENBLAS_NUM_THREADS=1 valgrind --quiet --num-callers=30 \
    --log-file="$base/valgrind.log" "$python" -P tests/valgrind_run.py
# Python and numpy have oddities of their own; ours must not appear in any report.
if grep -n "_native" "$base/valgrind.log"; then
    echo "valgrind: reports above name the kernels; see $base/valgrind.log"
    exit 1
fi
echo "valgrind: clean"
