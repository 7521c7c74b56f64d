"""The flags of the first Qwen's finetune.py, and of the trainer below it, as a recipe.

What a flag asked for is done, or said not to be; none is passed over in silence.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kiloq.errors import ConfigError
from kiloq.train.recipe import parse_config
from kiloq.train.sft import SftConfig

_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit",
}

# Flags of scripts in use that ask for nothing here, and why.
_IDLE = {
    "lazy_preprocess": "data is read once, quickly",
    "cache_dir": "models lie where the hub's library keeps them",
    "per_device_eval_batch_size": "held-out rows are packed as training's are",
    "save_total_limit": "the newest state is kept",
    "local_rank": "torchrun says it",
    "overwrite_output_dir": "a run goes on, or its folder is refused",
    "fsdp_transformer_layer_cls_to_wrap": "every block is shared out",
    "ddp_find_unused_parameters": "there are none",
    "remove_unused_columns": "fields that are not known are faults",
    "dataloader_num_workers": "batches are laid out before they are asked for",
    "tf32": "products are bf16 where that is fast",
}


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A run, and what of the flags it does otherwise than they say."""

    config: SftConfig
    notes: tuple[str, ...]


def translate(flags: Sequence[str], *, world: int = 1) -> Translation:
    """The run that finetune.py's flags ask for, on `world` processes. ConfigError for flags that are not its, or ask
    for what is not here."""
    flags = [_underscored(flag) for flag in flags]
    asked, rest = _parser().parse_known_args(flags)
    if unknown := [flag for flag in rest if flag.startswith("--")] or rest:
        raise ConfigError(
            f"{unknown[0]} is not a flag of finetune.py that is known here. `kiloq train sft RECIPE --set a.b=value` "
            "reaches every setting."
        )
    notes = [f"--{name} changes nothing: {why}" for name, why in _IDLE.items() if getattr(asked, name) is not None]
    if asked.fp16:
        notes.append("--fp16: products are bf16 where that is fast, else fp32; neither needs a scaled loss")
    if asked.lr_scheduler_type is None:
        notes.append(
            "the learning rate falls by a cosine to zero, as finetune.py's scripts asked; its own default was linear"
        )
    table: dict[str, object] = {
        "out": asked.output_dir,
        "model": asked.model_name_or_path,
        "seed": asked.seed,
        "data": [{"path": asked.data_path}],
        "epochs": asked.num_train_epochs,
        "batch": {
            "seq_len": asked.model_max_length,
            "tokens": asked.model_max_length * asked.per_device_train_batch_size,
            "accumulate": asked.gradient_accumulation_steps * world,
        },
        "optim": _optim(asked),
        "loop": _loop(asked),
        "parallel": _parallel(asked, world, notes),
    }
    if asked.eval_data_path and asked.eval_strategy != "no":
        table["held"] = [{"name": Path(asked.eval_data_path).stem, "path": asked.eval_data_path}]
    elif asked.eval_data_path:
        notes.append("--eval_data_path is not scored: --evaluation_strategy is no")
    if asked.use_lora:
        table["adapter"] = _adapter(asked)
    elif asked.q_lora:
        raise ConfigError("--q_lora is set and --use_lora is not; a quantised model is trained by an adapter only.")
    return Translation(config=parse_config(SftConfig, table), notes=tuple(notes))


def _optim(asked: argparse.Namespace) -> dict[str, object]:
    table: dict[str, object] = {
        "kind": _OPTIMIZERS[asked.optim],
        "lr": asked.learning_rate,
        "steps": max(asked.max_steps, 0),
        "floor": 0.0,
        "betas": [asked.adam_beta1, asked.adam_beta2],
        "eps": asked.adam_epsilon,
        "weight_decay": asked.weight_decay,
        "clip": asked.max_grad_norm,
    }
    # As there, a number of steps goes before a share of them.
    if asked.warmup_steps:
        return {**table, "warmup_steps": asked.warmup_steps}
    return {**table, "warmup_ratio": asked.warmup_ratio}


def _loop(asked: argparse.Namespace) -> dict[str, object]:
    reports = [one for one in asked.report_to if one in ("tensorboard", "wandb")]
    return {
        "checkpointing": "full" if asked.gradient_checkpointing else "none",
        "report": ["tensorboard", "wandb"] if "all" in asked.report_to else reports,
        "log_every": asked.logging_steps,
        "eval_every": asked.eval_steps,
        "save_every": asked.save_steps,
    }


def _parallel(asked: argparse.Namespace, world: int, notes: list[str]) -> dict[str, object]:
    if asked.deepspeed and world == 1:
        notes.append("--deepspeed changes nothing: one process needs none of it")
    elif asked.deepspeed:
        return {"kind": "deepspeed", "config": asked.deepspeed}
    return {"kind": "fsdp" if asked.fsdp else "auto"}


def _adapter(asked: argparse.Namespace) -> dict[str, object]:
    table: dict[str, object] = {
        "rank": asked.lora_r,
        "alpha": asked.lora_alpha,
        "dropout": asked.lora_dropout,
        "targets": asked.lora_target_modules,
    }
    # A quantised model keeps its own codes; one of 16 bits is rounded while it is loaded.
    return {**table, "quantization": "int4"} if asked.q_lora else table


def _underscored(flag: str) -> str:
    """--data-path is --data_path, as the trainer below finetune.py had it."""
    name, equals, value = flag.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else flag


def _truth(word: str) -> bool:
    if word.lower() in ("true", "1", "yes"):
        return True
    if word.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("model_name_or_path", "data_path", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("eval_data_path", "deepspeed", "fsdp"):
        parser.add_argument(f"--{name}", default="")
    for name in ("use_lora", "q_lora", "bf16", "fp16", "gradient_checkpointing"):
        parser.add_argument(f"--{name}", type=_truth, nargs="?", const=True, default=False)
    # The defaults of finetune.py, and of transformers' TrainingArguments where it has none.
    whole = {
        "model_max_length": 8192,
        "lora_r": 64,
        "seed": 42,
        "max_steps": -1,
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "logging_steps": 500,
        "save_steps": 500,
        "eval_steps": 250,
    }
    real = {
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_ratio": 0.0,
    }
    for name, default in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in real.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    # None is every linear layer of the blocks, which is what finetune.py's own names are in the first generation.
    parser.add_argument("--lora_target_modules", nargs="+", default=[])
    parser.add_argument("--lora_bias", choices=["none"], default="none")
    parser.add_argument("--lora_weight_path", choices=[""], default="")  # finetune.py never read it
    parser.add_argument("--optim", choices=list(_OPTIMIZERS), default="adamw_torch")
    parser.add_argument("--lr_scheduler_type", choices=["cosine"])
    parser.add_argument("--evaluation_strategy", "--eval_strategy", dest="eval_strategy", choices=["no", "steps"])
    parser.add_argument("--save_strategy", choices=["steps"], default="steps")
    parser.add_argument("--report_to", nargs="+", default=["tensorboard"])
    for name in _IDLE:
        parser.add_argument(f"--{name}", nargs="?", const="")
    return parser
