"""transformers in PyTorch: peer_transformers.py SHAPE.json THREADS bfloat16|float32."""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
import transformers
from worker import serve


@torch.inference_mode()
def main() -> None:
    shape = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(sys.argv[2]))
    torch.set_default_dtype(getattr(torch, sys.argv[3]))
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=shape["tie_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        max_position_embeddings=8192,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> list[float]:
        seconds, past, ids = [], transformers.DynamicCache(), torch.tensor(prompts)
        for _ in range(new_tokens):
            begin = perf_counter()
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.tolist()
            seconds.append(perf_counter() - begin)
        return seconds

    with torch.inference_mode():
        serve({"transformers": transformers.__version__, "torch": torch.__version__}, run)


main()
