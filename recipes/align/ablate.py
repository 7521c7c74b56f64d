"""Which parts of PPO matter on small sums: the recipe beside itself with one part changed, over several seeds.

    python recipes/align/make_sums.py runs/align
    python recipes/mini/make_chat.py --out runs/mini --samples 4000
    python recipes/align/ablate.py --out runs/align/ablate --seeds 0 1

From the repository's root. The claims are those of Qwen's report (arXiv 2309.16609, 3.2.2): a value network that learns
first steadies training, answers drawn with top_p 0.9 earn more than with 1, the pre-training gradient lessens what
alignment costs elsewhere. Without KL, language may collapse: the control. The policy's rate is constant, so that its
steps count the same whether or not others went before. Finished runs are not begun again, stopped ones go on; a folder
keeps to one model, rate and number of steps.
"""

import argparse
import hashlib
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import mean

import matplotlib

from kiloq.checkpoint import open_checkpoint
from kiloq.errors import ConfigError
from kiloq.train.ppo import PpoConfig, ppo
from kiloq.train.recipe import load_recipe

RECIPE = Path(__file__).parent / "ppo.toml"
WARMUP = 10
"""Steps in which the recipe's policy stands still."""
TEXT = "text=[{path='runs/mini/chat.jsonl'}]"
NO_KL = "kl=1e-9"
"""Too small to matter. With 0 no reference is kept, and the distance from it could not be told."""
VARIATIONS = {
    "the recipe": [],
    "no value warm-up": ["value_warmup=0"],
    "top_p 1": ["rollout.top_p=1.0"],
    "no KL": [NO_KL],
    "pre-training gradient": [TEXT],
    "pre-training gradient, no KL": [TEXT, NO_KL],
}
PANELS = {
    "reward": "reward of a round",
    "held": "reward on held-out sums, greedy",
    "kl": "KL to the start, nats a token",
    "perplexity": "perplexity of held-out chats",
    "explained": "share of the returns' variance foreseen",
    "entropy": "entropy of a token, nats",
}

Run = list[dict[str, float]]


def main() -> None:
    """Writes a log for each run, ablate.json (by step of the policy, and a summary) and ablate.png as runs finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/align/ablate"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--model", default="kiloq/assets/mini/kiloq-mini-chat")
    parser.add_argument("--rate", type=float, default=1e-4, help="The policy's; what holds at one may not at another.")
    parser.add_argument("--steps", type=int, default=50, help="Of the policy.")
    parser.add_argument("--only", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS))
    args = parser.parse_args()
    asked = {"model": args.model, "weights": weights(args.model), "rate": args.rate, "steps": args.steps}
    claim(args.out, asked)
    found: dict[str, list[Run]] = {name: [] for name in args.only}
    for seed in args.seeds:  # every variation of a seed first: a whole table of one seed beats half a table of two
        for name, runs in found.items():
            runs.append(run(name, seed, args))
            report(args.out, found, asked)
    for name, runs in found.items():
        print(json.dumps({name: [summary(one) for one in runs]}))


def weights(model: str) -> str:
    """Which weights these are: a path says little, a bundled model has editions."""
    told = hashlib.sha256()
    for path in sorted(open_checkpoint(model).folder.glob("*.safetensors")):
        told.update(path.read_bytes())
    return told.hexdigest()[:16]


def claim(out: Path, asked: dict[str, object]) -> None:
    """ConfigError where the folder's runs are of something else: their logs would be taken for these."""
    path = out / "asked.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != asked:
        raise ConfigError(f"{out} holds runs of {before}, and {asked} is asked for. Use another --out.")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asked), encoding="utf-8")
    unfinished.replace(path)


def run(name: str, seed: int, args: argparse.Namespace) -> Run:
    """One run by step of the policy, made if its log is not there."""
    stem = f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    folder, log = args.out / stem, args.out / f"{stem}.jsonl"
    warmup = 0 if "value_warmup=0" in VARIATIONS[name] else WARMUP
    if not log.exists():
        own = [f"out='{folder}'", f"seed={seed}", f"model='{args.model}'", f"optim.lr={args.rate}"]
        same = [f"value_warmup={WARMUP}", f"optim.steps={args.steps + warmup}", "optim.floor=1.0", "loop.eval_every=10"]
        if ppo(load_recipe(PpoConfig, RECIPE, [*own, *same, *VARIATIONS[name]])) != "finished":
            raise SystemExit(f"{folder} was stopped; the same command goes on with it.")
        (folder / "log.jsonl").replace(log)
        shutil.rmtree(folder)  # weights and moments, a hundred megabytes
    return curve(log, warmup)


def curve(log: Path, warmup: int) -> Run:
    """What the log says, with steps counted from where the policy begins to move; what lies before is left out."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        row = {key: said[key] for key in ("reward", "kl", "explained", "entropy") if key in said}
        if "eval/sums/reward" in said:
            row["held"] = said["eval/sums/reward"]
        if "eval/chat" in said:
            row["perplexity"] = math.exp(said["eval/chat"])
        if row and said["step"] >= warmup:
            rows.append({"step": said["step"] - warmup, **row})
    return rows


def summary(rows: Run) -> dict[str, float]:
    """First and last. `fall` is how far the held-out reward ever lies below its best before, `jitter` the mean
    change of a round's reward from the one before."""
    lines = {key: [row[key] for row in rows if key in row] for key in PANELS}
    held, sampled = lines["held"], lines["reward"]
    found = {f"{key}_first": line[0] for key, line in lines.items()} | {key: line[-1] for key, line in lines.items()}
    found["held_mean"] = mean(held)
    found["fall"] = max(max(held[: i + 1]) - one for i, one in enumerate(held))
    found["jitter"] = mean(abs(after - before) for before, after in pairwise(sampled))
    return {key: round(value, 4) for key, value in found.items()}


def report(out: Path, found: dict[str, list[Run]], asked: dict[str, object]) -> None:
    """Write and draw what is there so far."""
    ends = {name: [summary(one) for one in runs] for name, runs in found.items()}
    text = json.dumps({"asked": asked, "changed": VARIATIONS, "summary": ends, "runs": found})
    unfinished = out / "ablate.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(out / "ablate.json")
    draw({name: runs for name, runs in found.items() if runs}, out / "ablate.png")


def draw(found: dict[str, list[Run]], path: Path) -> None:
    """A panel for each figure over the policy's steps: a thin line for each seed, a thick one for their mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), sharex=True)
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (name, runs) in enumerate(found.items()):
            lines = [{row["step"]: row[key] for row in one if key in row} for one in runs]
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
    pyplot.close(figure)


if __name__ == "__main__":
    main()
