#!/usr/bin/env bash
# Run the kernels' tests with a build that notices bad memory accesses and undefined
# behaviour. Needs GCC with its sanitizers. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export SCIPY_ARRAY_API=1
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r sknode tests pyproject.toml "$copy"
rm -f "$copy"/sknode/ode/kernels/_native*
include=$(python -c "import sysconfig; print(sysconfig.get_path('include'))")
echo "building"
${CXX:-g++} -std=c++17 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all \
    -fsanitize=address,undefined -ffp-contract=fast -fno-math-errno -Wno-psabi \
    -fPIC -shared -pthread -I"$include" "$copy"/sknode/ode/kernels/src/*.cpp \
    -o "$copy/sknode/ode/kernels/_native.abi3.so"
cd "$copy"
# Python and torch keep memory until the end: leaks cannot be told from that. A child
# made by fork inherits memory that the sanitizer's threads may hold locks of. Reports
# go to stderr itself, which pytest must leave alone.
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 \
    LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
    python -m pytest -q --capture=sys -p no:cacheprovider tests/ode/kernels \
    --deselect tests/ode/kernels/test_processes.py::test_a_forked_child_solves_too "$@"
