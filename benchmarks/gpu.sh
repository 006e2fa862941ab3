#!/usr/bin/env bash
# Build, check and time on a machine with a CUDA GPU, in one call: bash benchmarks/gpu.sh [python]
# The operators, the commands on the GPU against the CPU, and training steps of an 8B model's shapes.
# Needs torch with CUDA, nvcc and this package's dependencies, PEFT too. Exit code: of the first thing that failed; the
# rest still runs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0
step() {
    echo "== $*"
    "$@" || { code=$?; echo "== failed with $code: $*"; [ "$failed" -ne 0 ] || failed=$code; }
}
major_minor=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))' 2>/dev/null) || {
    echo "gpu.sh: no CUDA GPU that the torch of $python sees" >&2
    exit 2
}
step env CUMA_DS_CUDA=1 CUMA_DS_CUDA_ARCHITECTURES="$major_minor" "$python" setup.py --quiet build_ext --inplace
step "$python" -m cuma_ds.ops
step "$python" -m pytest -q -p no:cacheprovider tests/ops/test_ops.py tests/launchers/test_gpu.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_ops.py \
            -k "cuda and (33 or 65 or 4100)"
    done
else
    echo "== no compute-sanitizer here"
fi
for dtype in float32 bfloat16; do
    step "$python" benchmarks/gate.py --device cuda --dtype "$dtype" --tokens 65536
    step "$python" benchmarks/gate_scale.py --device cuda --dtype "$dtype" --tokens 65536
done
# The attention projections of an 8B model.
step "$python" benchmarks/layer.py --device cuda --dtypes bfloat16 --width 4096 --tokens 16384
step "$python" benchmarks/layer.py --device cuda --dtypes bfloat16 --fit --rounds 5
for rank in 8 64; do
    step "$python" benchmarks/training_step.py --device cuda --dtype bfloat16 --model launchers/model_configs/llama-8b.json \
        --layers 8 --length 2048 --lora-r "$rank"
done
exit "$failed"
