#!/usr/bin/env bash
# Builds the fuzz targets and runs them for FUZZ_SECONDS in all (default 1500), two at a time: the index on every instruction set,
# with sanitizers and, for volume, without; damaged files. First a build without slack, which has to be caught. What was found
# worth keeping stays in .cache/fuzz; a failing input is printed and kept there.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-1500}
build=build/fuzz
corpus=$PWD/.cache/fuzz

command -v clang++ >/dev/null || { echo "fuzzing needs clang; on Debian: apt-get install clang libclang-rt-14-dev" >&2; exit 1; }
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }' >"${TMPDIR:-/tmp}/louver-probe.cpp"
clang++ -fsanitize=fuzzer,address "${TMPDIR:-/tmp}/louver-probe.cpp" -o /dev/null 2>/dev/null ||
  { echo "clang has no libFuzzer; on Debian: apt-get install libclang-rt-14-dev" >&2; exit 1; }
rm -f "${TMPDIR:-/tmp}/louver-probe.cpp"

echo "==> fuzz targets in $build (the first build takes some minutes)"
mkdir -p .cache "$corpus"
{ cmake -G Ninja -S . -B $build -DLOUVER_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
    -DPython_EXECUTABLE="$PWD/.venv/bin/python" && cmake --build $build --target fuzz -j 2; } >.cache/fuzz-build.log 2>&1 ||
  { tail -n 30 .cache/fuzz-build.log >&2; exit 1; }

echo "==> negative control: without slack, at most 60 s"
start=$SECONDS
if timeout -k 5 90 $build/fuzz_index_zero_slack -max_total_time=60 -seed=1 -artifact_prefix="$corpus/zero-slack-" >.cache/fuzz-control.log 2>&1; then
  echo "a build without slack was not caught: the check cannot fail" >&2
  exit 1
fi
grep -h WRONG .cache/fuzz-control.log || { echo "the control ended, but not by a wrong answer:" >&2; tail -n 5 .cache/fuzz-control.log >&2; exit 1; }
echo "caught after $((SECONDS - start)) s"

isas=$(.venv/bin/python -c "from louver_llama._index import available_isas; print(*available_isas())")
jobs=()
for isa in $isas; do
  jobs+=("fuzz_index $isa" "fuzz_index_sanitized $isa")
done
jobs+=("fuzz_load_sanitized $(echo "$isas" | cut -d' ' -f1)" "fuzz_load_sanitized scalar")
each=$((seconds * 2 / ${#jobs[@]}))

run() {
  local target=$1 isa=$2 log=.cache/$1-$2.log
  mkdir -p "$corpus/$target-$isa"  # each its own: a run that begins with another's finds only replays that
  LOUVER_ISA=$isa $build/"$target" "$corpus/$target-$isa" -max_total_time="$each" -max_len=512 -len_control=0 -timeout=60 -rss_limit_mb=4096 \
    -print_final_stats=1 -artifact_prefix="$corpus/$target-$isa-" >"$log" 2>&1
}
export -f run
export build corpus each
echo "==> ${#jobs[@]} runs of $each s, two at a time"
failed=0
printf '%s\n' "${jobs[@]}" | xargs -P 2 -L 1 bash -c 'run "$0" "$1"' || failed=1

printf '\n%-22s %-8s %12s %16s %s\n' target isa runs pairs misses
total=0
for job in "${jobs[@]}"; do
  set -- $job
  log=.cache/$1-$2.log
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  line=$(grep -a 'checked pairs' "$log" | tail -n 1 || true)
  pairs=$(echo "$line" | sed -n 's/checked pairs: \([0-9]*\).*/\1/p')
  result=$(echo "$line" | sed -n 's/.*pairs: [0-9]*, //p')
  printf '%-22s %-8s %12s %16s %s\n' "$1" "$2" "${runs:-?}" "${pairs:-?}" "${result:-see $log}"
  total=$((total + ${pairs:-0}))
done
echo "checked pairs in all: $total"
if [ "$failed" != 0 ]; then
  echo "a run failed: its log and its input are in .cache" >&2
  exit 1
fi
