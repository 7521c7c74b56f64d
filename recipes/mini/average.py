"""The weighted mean of two checkpoints of one shape, as a third (Wortsman et al., arXiv 2109.01903).

python recipes/mini/average.py runs/mini/first/kiloq-mini runs/mini/base/model --share 0.6 --out runs/mini/mean
"""

import argparse
from pathlib import Path

import torch

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.train.run_folder import export


def main() -> None:
    """Writes a checkpoint with the settings of the second one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.6, help="of the second")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.second)
    model = load_dense(checkpoint, dtype=torch.float32)
    before = load_dense(open_checkpoint(args.first), dtype=torch.float32).state_dict()
    model.load_state_dict({name: torch.lerp(before[name], w, args.share) for name, w in model.state_dict().items()})
    export(args.out, model, checkpoint.tokenizer, checkpoint.generation)


if __name__ == "__main__":
    main()
