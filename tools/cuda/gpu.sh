#!/usr/bin/env bash
# On a machine with a GPU: builds with CUDA, checks every kernel against float64, runs compute-sanitizer where there is one, and
# times Louver beside stock. Its last lines are a table. All of it is kept in build/cuda/gpu.
#
#   tools/cuda/gpu.sh [MODEL.gguf]     the model is embedded in the shape of Llama-3.2-3B; without one only our own kernels are timed
#
# BUILD=DIR   programs that are there already are not built again (build/cuda)
# TEXT=FILE   500 kB or more to fill the cache with (the manual and the docstrings of Python's standard library)
# DEPTHS="32768 131072"
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-build/cuda}
out=$build/gpu
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
mkdir -p "$out"

if [ ! -x "$build/louver_cuda_check" ] || [ -z "${BUILD:-}" ]; then
  echo "==> build in $build (llama.cpp's own CUDA kernels take a while)"
  cmake -G Ninja -S . -B "$build" -DLOUVER_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" >"$out/build.log"
  cmake --build "$build" --target louver_cuda_check louver_cuda_bench >>"$out/build.log" || { tail -n 30 "$out/build.log"; exit 1; }
fi
export LD_LIBRARY_PATH=$build/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

echo "==> kernels against float64"
"$build/louver_cuda_check" >"$out/check.txt" || { grep FAILED "$out/check.txt"; exit 1; }
tail -n 1 "$out/check.txt"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool "$build/louver_cuda_check" --quick >"$out/$tool.txt" || true
    grep SUMMARY "$out/$tool.txt"
  done
fi

echo "==> our kernels alone, random keys"
"$build/louver_cuda_bench" --random 12 --depth 131072 | tee "$out/random.txt"

if [ $# -gt 0 ]; then
  echo "==> $1 in the shape of Llama-3.2-3B"
  [ -f "$out/model.gguf" ] || "$python" tools/embed_model.py "$1" "$out/model.gguf"
  text=${TEXT:-$out/text.txt}
  [ -f "$text" ] || "$python" tools/cuda/long_text.py "$text"
  for depth in ${DEPTHS:-32768 131072}; do
    for cache in f16 q8_0; do
      echo "==> depth $depth, $cache cache"
      "$build/louver_cuda_bench" --model "$out/model.gguf" --text "$text" --depth "$depth" --cache $cache \
        --logits "$out/logits-$depth.bin" $([ $cache = f16 ] || echo --no-layers) 2>"$out/bench-$depth-$cache.log" |
        tee "$out/bench-$depth-$cache.txt" || { tail -n 5 "$out/bench-$depth-$cache.log"; exit 1; }
    done
  done
fi
