#!/usr/bin/env bash
# What docs/quantization.md says of the bundled models, measured anew: both tables, in Markdown, into a folder that is
# named by the hash of the chat model's weights. A stopped run goes on with the same command.
#   recipes/quantize/measure.sh [FOLDER OF make_corpus.py, for kiloq-mini] [merging: seeds] [merging: conversations]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
texts=${1:-runs/mini} seeds=${2:-3} conversations=${3:-200} models=kiloq/assets/mini
hash=$(python -c "from kiloq.checkpoint.fingerprint import fingerprint as of; print(of('$models/kiloq-mini-chat')[7:15])")
out=runs/quantization/$hash
mkdir -p "$out"

[ -e "$out/merges/questions.jsonl" ] || python recipes/finetune/demo/make_data.py --out "$out/merges"
python recipes/quantize/measure_quality.py --out "$out/quality" --texts "$texts"/{train,heldout}.{en,zh,ko}.jsonl \
    --model "$models/kiloq-mini-chat" --model "$models/kiloq-mini"
python recipes/quantize/measure_merges.py "$out/merges" --seeds "$seeds" --conversations "$conversations"
echo "$out/quality/table.md"
echo "$out/merges/table.md"
