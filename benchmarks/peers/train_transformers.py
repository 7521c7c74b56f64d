"""transformers' Trainer, with peft for LoRA, as a contender of finetune_peers.py. Runs in a venv of its own."""

import json
import tempfile
from pathlib import Path

import torch
from train_worker import PLAN, Turns
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

STEPS = json.loads(Path(PLAN["data"]).read_text())
turns = Turns()


class Told(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):  # after each step: logging_steps is 1
        if "loss" in logs:
            turns.stepped(logs["loss"])


class Grouped(Trainer):
    """The Trainer over given batches: the same samples in each step as the other contenders."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(STEPS * 100, batch_size=None, collate_fn=self.data_collator)


def padded(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """As DataCollatorForSeq2Seq does it: to the longest of the batch."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

    mask = [[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples]
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": torch.tensor(mask)}


def main() -> None:
    lora = PLAN["lora"]
    torch.set_num_threads(PLAN["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        PLAN["model"], dtype=torch.bfloat16 if lora and PLAN["bf16"] else torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=len(STEPS) * 100,
        learning_rate=PLAN["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=PLAN["bf16"],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    collator = DataCollatorWithFlattening() if PLAN["setting"] == "padding-free" else padded
    Grouped(model=model, args=arguments, train_dataset=STEPS, data_collator=collator, callbacks=[Told()]).train()


main()
