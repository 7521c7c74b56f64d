"""trl's DPOTrainer, with peft for LoRA, as a contender of finetune_peers.py. Runs in a venv of its own.

It computes the reference's log-probabilities once before the first step, as kiloq does, and its logits in chunks; its
padding-free mode is unavailable in 1.16.
"""

import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from train_worker import PLAN, Turns
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

STEPS = json.loads(Path(PLAN["data"]).read_text())
turns = Turns()


class Told(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):  # after each step: logging_steps is 1
        if "loss" in logs:
            turns.stepped(float(logs["loss"]))


class Grouped(DPOTrainer):
    """The trainer over given pairs of ids: the same in each step as the other contenders."""

    def _prepare_dataset(self, dataset, *rest):
        return dataset

    def get_train_dataloader(self):
        pairs = iter(self.train_dataset)  # with the reference's log-probabilities
        steps = [[next(pairs) for _ in step] for step in STEPS]
        return torch.utils.data.DataLoader(steps * 100, batch_size=None, collate_fn=self.data_collator)


def main() -> None:
    torch.set_num_threads(PLAN["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        PLAN["model"],
        dtype=torch.bfloat16 if PLAN["lora"] and PLAN["bf16"] else torch.float32,
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    adapter = None
    if PLAN["lora"]:
        from peft import LoraConfig

        adapter = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = DPOConfig(
        tempfile.mkdtemp(),
        beta=0.1,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=2,
        gradient_checkpointing=PLAN["setting"] == "recomputing",
        max_length=None,
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
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"pad": 0})), pad_token="pad")
    Grouped(
        model=model,
        args=arguments,
        processing_class=words,  # only its padding is used
        train_dataset=Dataset.from_list([pair for step in STEPS for pair in step]),
        peft_config=adapter,
        callbacks=[Told()],
    ).train()


main()
