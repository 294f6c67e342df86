#!/usr/bin/env bash
# GPU tests, then all GPU benchmarks, into one folder, in under 9 minutes:
#
#     COMMIT=$(git rev-parse --short HEAD) bash benchmarks/gpu.sh [FOLDER]
#
# COMMIT matters where the code travels without its history. Every part has a time limit and appends
# to log.txt as it goes, the CSVs are saved after each case: what is slow or hangs costs only itself.
# Plots need no GPU: python benchmarks/plot.py FOLDER.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if (($#)); then mkdir -p "$1" && set -- "$(cd "$1" && pwd)" || exit 1; fi
cd "$root"
gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') \
  || exit 1
out=${1:-$here/results/$gpu}
mkdir -p "$out"
log=$out/log.txt
status=0

part() {  # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  echo "== $name" >> "$log"
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1 || code=$?
  ((code == 0)) || status=$code
  tail -n 8 "$log"
  echo "== $name ended with $code after $((SECONDS - start)) s" | tee -a "$log"
}

has() { python3 -c "import $1" 2> /dev/null; }

date -u +%FT%TZ > "$log"
part info 25 python3 -m mmfusion.info
part nvidia-smi 5 nvidia-smi
tests=(python3 -m pytest -v -rf --tb=short -W default -p no:cacheprovider -m gpu)
tests+=(tests/kernels/test_kernel_gpu.py)
options=()
if has xdist; then options+=(-n "$(nproc)" --dist worksteal); fi
if has pytest_timeout; then options+=(--timeout 100 --timeout-method thread); fi
part tests 150 "${tests[@]}" "${options[@]}"
part retrieve 100 python3 "$here/retrieve.py" --device cuda --out "$out"
part attention 140 python3 "$here/attention.py" --device cuda --out "$out"
part contrastive 50 python3 "$here/contrastive.py" --device cuda --out "$out"
part cmml_step 25 python3 "$here/cmml_step.py" --device cuda --out "$out"
if command -v compute-sanitizer > /dev/null; then  # without torch's cache it sees every allocation
  small="lengths and 1-lengths1-dtype1 or test_retrieve_parity and 17-1000-64-32-16-dtype1"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 40 compute-sanitizer --tool memcheck \
    "${tests[@]}" -k "$small"
fi
exit "$status"
