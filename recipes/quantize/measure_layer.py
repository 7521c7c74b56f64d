"""Seconds and memory of one quantised layer with random weights, by stage.

python recipes/quantize/measure_layer.py --tokens 16384 --hidden 2048 --intermediate 5504 --heads 16
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from kiloq.model import ModelConfig, RopeConfig
from kiloq.quant import calibrate
from kiloq.quant.calibration_data import choose_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 16_384), ("hidden", 2048), ("intermediate", 5504), ("heads", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = ModelConfig(
        family="qwen",
        vocab_size=151_936,
        hidden_size=args.hidden,
        num_layers=1,
        num_heads=args.heads,
        num_kv_heads=args.heads,
        head_dim=args.hidden // args.heads,
        intermediate_size=args.intermediate,
        qkv_bias=True,
        rope=RopeConfig(rotary_dim=args.hidden // args.heads, kind="qwen1", original_length=8192),
        windows=(None,),
        max_length=8192,
    )
    rows, columns = 3 * args.hidden, args.hidden
    shapes = {
        "embed.weight": (config.vocab_size, columns),
        "blocks.0.attn_norm.weight": (columns,),
        "blocks.0.mlp_norm.weight": (columns,),
        "blocks.0.attn.qkv.weight": (rows, columns),
        "blocks.0.attn.qkv.bias": (rows,),
        "blocks.0.attn.out.weight": (columns, columns),
        "blocks.0.mlp.gate_up.weight": (2 * args.intermediate, columns),
        "blocks.0.mlp.down.weight": (columns, args.intermediate),
    }
    weights = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    ids = torch.randint(0, config.vocab_size, (args.tokens // 512, 512)).tolist()
    data = choose_rows(ids, samples=len(ids), max_length=512, seed=0)
    before = peak()
    solving = 0.0
    solve = calibrate.quantize_matrix

    def timed(*arguments: object) -> object:
        nonlocal solving
        start = time.perf_counter()
        found = solve(*arguments)
        spent = time.perf_counter() - start
        solving += spent
        print(f"  a matrix of {tuple(found[0].codes.shape)}: {spent:.1f} s")
        return found

    calibrate.quantize_matrix = timed
    wanted = calibrate.QuantizeConfig(group_size=128)
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        calibrate.quantize_layers(config, weights.__getitem__, data, wanted, work=Path(work), digest="")
        spent = time.perf_counter() - start
    print(f"{args.tokens:,} tokens, {torch.get_num_threads()} threads: {spent:.1f} s, of which solving {solving:.1f} s")
    print(
        f"memory: peak {peak():,} MiB, {before:,} MiB of it before the first layer (the embedding, the layer, Python)"
    )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
