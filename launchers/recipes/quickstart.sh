#!/usr/bin/env bash
# Train the quickstart recipe on all GPUs, or on two CPU ranks, and evaluate it. Arguments go to train.py's --set.
# make quickstart sets BIN (the environment's bin folder) and MODELS (the folder of the embedded models).
set -euo pipefail
BIN=${BIN:-$(dirname "$(command -v deepspeed)")}
MODELS=${MODELS:-.cache/models}
gpus=$("$BIN/python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
ranks=$((gpus > 0 ? gpus : 2))
ep_size=$((ranks % 2 == 0 ? 2 : 1))
recipe=launchers/recipes/quickstart.yaml
settings=(
    "model.path=$MODELS/SmolLM2-135M-Instruct" "profiles.encoder=$MODELS/all-MiniLM-L6-v2"
    "parallel.ep_size=$ep_size" "$@"
)
find_folder='import sys
sys.path.insert(0, "launchers")
from _cli import run_main
from cuma_ds.recipe import load_config
run_main(lambda: print(load_config(sys.argv[1], sys.argv[2:]).run_dir))'
folder=$("$BIN/python" -c "$find_folder" "$recipe" "${settings[@]}")

echo "== training: what people of 68 countries answered, on $ranks ranks, into $folder"
# The ranks say what goes wrong; DeepSpeed's launcher would add how it was called.
"$BIN/deepspeed" --log_level critical --num_accelerators "$ranks" launchers/train.py \
    --config "$recipe" --set "${settings[@]}" || {
    code=$?
    echo "training ended with code $code; what libraries printed is in $folder/logs" >&2
    exit "$code"
}
echo "== evaluation: on people and countries that were not learned from"
"$BIN/python" launchers/evaluate.py --run "$folder"

python=${BIN#"$PWD/"}/python
cat <<END

Open the report:
  $folder/evaluation/report.html
It is a good one where "trained" is near "own training answers", and "profiles swapped" far from it.

Ask it as two people, in the terminal or in a browser:
  $python launchers/generate.py --run $folder --profile '{"country": "Norway"}' --profile '{"country": "Jordan"}'
  $python launchers/playground.py --run $folder
Take it elsewhere:
  $python launchers/export.py --run $folder --format hf --out exported
Train on answers of your own, like tests/data/opinions.jsonl:
  $python launchers/train.py --config tests/data/opinions.yaml
Survey in SPSS or Stata: docs/surveys.md. Pairs of answers: docs/preferences.md. All pages: docs/getting_started.md.
END
