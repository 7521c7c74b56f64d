#!/bin/sh
# All of learning from preferences and rewards on one model, from the repository's root: data, four runs, who wins, plots.
#   sh recipes/align/run.sh [MODEL]
# About 15 minutes on one core. Stopped, the same command goes on.
set -eu
model=${1:-kiloq/assets/mini/kiloq-mini-chat}
python=${PYTHON:-python}
here=recipes/align

[ -e runs/mini/chat.jsonl ] || $python recipes/mini/make_chat.py --out runs/mini --samples 4000
[ -e runs/align/sums.jsonl ] || $python $here/make_sums.py runs/align
[ -e runs/align/polite.jsonl ] || $python $here/make_pairs.py runs/mini runs/align
for method in reward dpo grpo ppo; do
    $python -m kiloq train $method $here/$method.toml -m "$model"
done
$python $here/judge.py "$model" runs/align/dpo/model --count 300 > runs/align/judge.txt
$python $here/plot.py runs/align
