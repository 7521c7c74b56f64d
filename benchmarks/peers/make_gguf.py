"""Writes a GGUF file of a named shape with random weights, quantised as llama.cpp quantises: run in the llama venv.

Usage: make_gguf.py SHAPE.json FILE Q4_0|Q8_0 [CHECKPOINT]
With a checkpoint, the file gets the vocabulary of its tokenizer.json, so that a server reads and writes text.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

# llama.cpp keeps the output matrix, and a tied embedding, in Q6_K when it makes a Q4_0 file. numpy's gguf cannot write
# Q6_K by itself, but any bytes are some weights: 210 bytes hold 256 values (128 + 64 of codes, 16 scales, one fp16).
_Q6_K_BLOCK = 210


def q6_k(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random Q6_K blocks with a standard deviation of about 0.02: codes -32..31, scales +-40..60, d chosen to match."""
    blocks = rng.integers(0, 256, (rows, columns // 256, _Q6_K_BLOCK), dtype=np.uint8)
    blocks[..., 192:208] = rng.integers(40, 60, blocks[..., 192:208].shape, dtype=np.uint8)  # int8 scales
    blocks[..., 208:210] = np.array([0.02 / (18.5 * 50)], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def add_vocabulary(writer: gguf.GGUFWriter, size: int, checkpoint: Path | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    if checkpoint is None:
        tokens, kinds, merges, eos = [f"t{i}" for i in range(size)], [gguf.TokenType.NORMAL] * size, ["t 0"], 0
    else:
        described = json.loads((checkpoint / "tokenizer.json").read_text())
        special = {entry["id"]: entry["content"] for entry in described["added_tokens"]}
        pieces = {number: piece for piece, number in described["model"]["vocab"].items()}
        tokens = [pieces.get(i) or special.get(i) or f"<|unused_{i}|>" for i in range(size)]
        plain, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
        kinds = [plain if i in pieces else control if i in special else unused for i in range(size)]
        merges = [" ".join(merge) for merge in described["model"]["merges"]]
        eos = next(number for number, name in special.items() if name == "<|im_end|>")
        settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
        writer.add_chat_template(settings["chat_template"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(eos)


def main() -> None:
    shape = json.loads(Path(sys.argv[1]).read_text())
    path, kind = Path(sys.argv[2]), gguf.GGMLQuantizationType[sys.argv[3]]
    rng = np.random.default_rng(0)
    hidden, ff, layers, vocab = (shape[k] for k in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"))
    q_width, kv_width = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen2", use_temp_file=True)
    writer.add_name(shape["name"])
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    add_vocabulary(writer, vocab, Path(sys.argv[4]) if len(sys.argv) > 4 else None)

    def matrix(name: str, rows: int, columns: int) -> None:
        if kind.name == "Q4_0" and name == ("token_embd.weight" if shape["tie_embeddings"] else "output.weight"):
            # A row must divide into blocks of 256; llama.cpp falls back to Q8_0 where it does not (896 columns).
            if columns % 256 == 0:
                writer.add_tensor(name, q6_k(rows, columns, rng), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
                return
            quant = gguf.GGMLQuantizationType.Q8_0
        else:
            quant = kind
        weights = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, gguf.quants.quantize(weights, quant), raw_dtype=quant)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", vocab, hidden)
    for i in range(layers):
        for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            matrix(f"blk.{i}.attn_{part}.weight", width, hidden)
            if shape["qkv_bias"]:
                vector(f"blk.{i}.attn_{part}.bias", width, 0.01)
        matrix(f"blk.{i}.attn_output.weight", hidden, q_width)
        matrix(f"blk.{i}.ffn_gate.weight", ff, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ff, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ff)
        vector(f"blk.{i}.attn_norm.weight", hidden, 1.0)
        vector(f"blk.{i}.ffn_norm.weight", hidden, 1.0)
    vector("output_norm.weight", hidden, 1.0)
    if not shape["tie_embeddings"]:
        matrix("output.weight", vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


main()
