#!/usr/bin/env bash
# All CPU benchmarks and their plots into one folder, in under 8 minutes on two cores.
# THREADS=1 where other work shares the cores: threads that wait for each other time the others.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results/cpu}
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
for name in retrieve attention contrastive cmml_step; do
  python "$here/$name.py" --device cpu --threads "${THREADS:-2}" --out "$out" 2> >(grep -v ^USDT >&2)
done
python "$here/plot.py" "$out"
