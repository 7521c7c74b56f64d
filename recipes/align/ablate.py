"""Which parts of PPO matter on small sums: the recipe beside itself with one part changed, over several seeds.

    python recipes/align/make_sums.py runs/align
    python recipes/mini/make_chat.py --out runs/mini --samples 1000
    python recipes/align/ablate.py --out runs/align/ablate --seeds 0 1

From the repository's root. Runs that are finished are not begun again.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean

import matplotlib

from kiloq.train.ppo import PpoConfig, ppo
from kiloq.train.recipe import load_recipe

RECIPE = Path(__file__).parent / "ppo.toml"
WARMUP = 10
"""Steps in which the recipe's policy stands still."""
TEXT = "text=[{path='runs/mini/chat.jsonl'}]"
VARIATIONS = {
    "the recipe": [],
    # The same number of steps that move the policy.
    "no value warm-up": ["value_warmup=0", f"optim.steps={60 - WARMUP}"],
    "top_p 1": ["rollout.top_p=1.0"],
    "no KL": ["kl=0"],
    "pre-training gradient": [TEXT],
    "pre-training gradient, no KL": [TEXT, "kl=0"],
}


def main() -> None:
    """Writes runs, ablate.json (means over seeds by step of the policy) and ablate.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/align/ablate"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--model", default="kiloq/assets/mini/kiloq-mini-chat")
    parser.add_argument("--rate", type=float, default=1e-4, help="The policy's; what holds at one may not at another.")
    args = parser.parse_args()
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in VARIATIONS}
    for seed in args.seeds:
        for name, changes in VARIATIONS.items():
            folder = args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            common = [f"out='{folder}'", f"seed={seed}", f"model='{args.model}'", f"optim.lr={args.rate}"]
            config = load_recipe(PpoConfig, RECIPE, [*common, "loop.eval_every=10", *changes])
            if not (folder / "model").exists():
                ppo(config)
            found[name].append(curve(folder / "log.jsonl", config.value_warmup))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ablate.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(found, args.out / "ablate.png")
    for name, runs in found.items():
        ends = [{key: value for one in run for key, value in one.items()} for run in runs]
        print(name, {key: [round(end[key], 3) for end in ends] for key in ("reward", "held", "kl", "perplexity")})


def curve(log: Path, warmup: int) -> list[dict[str, float]]:
    """What the log says, with steps counted from where the policy begins to move; what lies before is left out."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        row = {
            "reward": said.get("reward"),
            "kl": said.get("kl"),
            "held": said.get("eval/sums"),
            "perplexity": math.exp(said["eval/chat"]) if "eval/chat" in said else None,
        }
        kept = {key: value for key, value in row.items() if value is not None}
        if kept and said["step"] >= warmup:
            rows.append({"step": said["step"] - warmup, **kept})
    return rows


def draw(found: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Four panels over the policy's steps: a thin line for each seed, a thick one for their mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "reward": "reward of a round",
        "held": "reward on held-out sums, greedy",
        "kl": "KL to the start, nats a token",
        "perplexity": "perplexity of held-out chats",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for number, (name, runs) in enumerate(found.items()):
            lines = [{row["step"]: row[key] for row in run if key in row} for run in runs]
            steps = sorted(set.intersection(*map(set, lines)))
            for line in lines:
                axis.plot(steps, [line[step] for step in steps], color=f"C{number}", alpha=0.3, linewidth=0.8)
            axis.plot(steps, [mean(line[step] for line in lines) for step in steps], color=f"C{number}", label=name)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("steps of the policy")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
