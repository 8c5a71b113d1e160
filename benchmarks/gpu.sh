#!/bin/bash
# Everything to know about GPUs, in one unattended run of under 8 minutes on one GPU:
#
#     bash benchmarks/gpu.sh                   (on the GPU)
#     bash benchmarks/gpu.sh --device cpu      (a dry run, of small trainings)
#
# Writes gpu.json and gpu.log to build/gpu, or to what --out names.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/../src:$here:$here/peers${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c "from samestep.kernels.library import load_kernels as load; load()" ||
    "$python" -m samestep.kernels.compiling
exec "$python" -m gpu "$@"
