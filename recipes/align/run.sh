#!/bin/sh
# All of learning from preferences and rewards on one model: data, four runs, who wins, figures.json and two plots.
#   sh recipes/align/run.sh MODEL OUT [FLAG ...]
# Flags go to every run, so "--set optim.steps=6" is a quick look. About 15 minutes on one core; stopped, the same command
# goes on, and what is finished is not begun again, so another model wants another OUT. Runs are in OUT/runs/align.
set -eu
[ $# -ge 2 ] || { echo "usage: sh recipes/align/run.sh MODEL OUT [FLAG of kiloq train ...]" >&2; exit 2; }
model=$1 out=$2
shift 2
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/recipes/align
[ ! -d "$model" ] || model=$(cd "$model" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
cd "$out"

$python "$root/recipes/mini/make_chat.py" --out runs/mini --samples 4000 >&2
$python "$here/make_sums.py" runs/align
$python "$here/make_pairs.py" runs/mini runs/align >&2
for method in reward dpo grpo ppo; do
    $python -m kiloq train $method "$here/$method.toml" -m "$model" "$@" >&2
done
$python "$here/judge.py" "$model" runs/align/dpo/model --count 300 > runs/align/judge.part
mv runs/align/judge.part runs/align/judge.jsonl
$python "$here/plot.py" runs/align
