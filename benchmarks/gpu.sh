#!/usr/bin/env bash
# GPU tests, then all GPU benchmarks and their plots, into one folder, in under 9 minutes.
# Every part has a time limit, so that one slow part does not cost the others.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=${1:-$here/results/gpu}
mkdir -p "$out"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
python -m mmfusion.info | tee "$out/info.txt"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
status=0

tests() {  # name, seconds, pytest options
  local name=$1 limit=$2
  shift 2
  timeout "$limit" python -m pytest -q -W default -m gpu tests/kernels --durations=5 "$@" \
    > "$out/$name.txt" 2>&1 || status=$?
  tail -n 12 "$out/$name.txt"
}

workers=()
if python -c "import xdist" 2> /dev/null; then workers=(-n 8); fi
tests tests_parity 110 -k parity "${workers[@]}"
tests tests_rest 80 -k "not parity"
TRITON_INTERPRET=0 timeout 40 python "$here/compile_tiles.py" --only 'attention|pool' --jobs 8 \
  --out "$out/tiles.csv" > "$out/tiles.txt" 2>&1 || status=$?
for name in retrieve attention contrastive cmml_step; do
  timeout 65 python "$here/$name.py" --device cuda --out "$out" > "$out/$name.txt" 2>&1 \
    || status=$?
  tail -n 3 "$out/$name.txt"
done
if command -v compute-sanitizer > /dev/null; then
  timeout 30 compute-sanitizer --tool memcheck python -m pytest -q -W default -m gpu \
    tests/kernels -k "parity_over_lengths and 0-lengths0" > "$out/sanitizer.txt" 2>&1 || status=$?
fi
python "$here/plot.py" "$out" || status=$?
exit "$status"
