#!/bin/sh
# Builds and runs the example: ./build.sh [folder] [more compiler flags, e.g. -DWITHOUT_FENCE to see a report]
set -e
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-/tmp/emulator_example}
[ $# -gt 0 ] && shift
mkdir -p "$folder"
cxx="${CXX:-g++} -std=c++20 -O2 -g -DHOPPER_EMULATED -ffp-contract=off -Wno-psabi"

# The emulator, once.
for source in "$here"/../*.cpp; do
  object="$folder/$(basename "$source" .cpp).o"
  [ "$object" -nt "$source" ] || $cxx -c "$source" -o "$object"
done

# The kernel: -fsanitize=thread makes the compiler call the emulator for every load and store. It is a compile flag only;
# the sanitizer's library is not linked. The emulator's objects come first on the link line.
$cxx "$@" -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -x c++ -c "$here/reverse.cu" -o "$folder/reverse.kernel"
$cxx -c "$here/main.cpp" -o "$folder/main.host"
$cxx "$folder"/*.o "$folder/main.host" "$folder/reverse.kernel" -ldl -o "$folder/example"
exec "$folder/example"
