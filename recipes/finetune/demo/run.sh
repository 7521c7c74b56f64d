#!/usr/bin/env bash
# A new identity for the bundled model: data, adapter, merge, int8, and the questions asked before and after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
demo=recipes/finetune/demo out=runs/finetune-demo
rm -rf "$out"

python "$demo/make_data.py" --out "$out"
python "$demo/ask.py" "$out/questions.jsonl" -m kiloq-mini-chat
kiloq train check "$out/chat.jsonl"
kiloq train sft "$demo/lora.toml"
kiloq convert --merge "$out/run/adapter" -o "$out/merged"
kiloq quantize -m "$out/merged" -o "$out/int8" --bits 8 --calibration "$out/chat.jsonl"
python "$demo/ask.py" "$out/questions.jsonl" -m "$out/int8"
kiloq "Who are you?" -m "$out/int8"
