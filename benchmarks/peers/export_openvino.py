"""Writes OpenVINO models of a named shape with random weights: export_openvino.py SHAPE.json FOLDER int4|int8.

Compressed by optimum-intel and NNCF exactly as `optimum-cli export openvino --weight-format int4 --sym
--group-size 128 --ratio 1.0` (or `--weight-format int8`) does it: embedding and head stay int8 in the int4 model.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def main() -> None:
    shape = json.loads(Path(sys.argv[1]).read_text())
    folder, kind = Path(sys.argv[2]), sys.argv[3]
    source = folder.parent / f"{shape['name']}-bf16"
    if not (source / "config.json").exists():
        torch.set_default_dtype(torch.bfloat16)
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
            tie_word_embeddings=shape["tie_embeddings"],
            rope_theta=shape["rope_theta"],
            max_position_embeddings=8192,
        )
        transformers.Qwen2ForCausalLM(config).save_pretrained(source)
        torch.set_default_dtype(torch.float32)
    if kind == "int4":
        quant = OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0)
    else:
        quant = OVWeightQuantizationConfig(bits=8)
    model = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=quant, compile=False)
    model.save_pretrained(folder)


main()
