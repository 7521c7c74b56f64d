"""Tiny models of transformers with peft around them, and the same weights as a checkpoint of ours."""

from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from kiloq.checkpoint import Checkpoint, GenerationDefaults
from kiloq.model import ModelConfig
from kiloq.tokenizer import Tokenizer

VOCAB = 256 + 208 + 4  # bytes, control tokens, spare rows


def peer(kind: str) -> nn.Module:
    """Random and the same every time: "qwen2" ties embedding and head, "qwen3" does not."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
    }
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=8, tie_word_embeddings=False))
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # they begin as zeros, which would hide a fault
    return model


def as_checkpoint(model: nn.Module, folder: Path, tokenizer: Tokenizer, *, chat: bool = False) -> Checkpoint:
    """Its weights as a folder that our readers take."""
    model.save_pretrained(folder)
    end = tokenizer.im_end_id if chat else tokenizer.end_of_text_id
    generation = GenerationDefaults(
        stop_ids=(end,), pad_id=end, chat_format="chatml" if chat else "raw", max_window=128
    )
    return Checkpoint(folder, ModelConfig.from_hf(model.config.to_dict()), generation, tokenizer)


def with_adapter(model: nn.Module, folder: Path, **settings: object) -> nn.Module:
    """An adapter of random values around it, which is also saved to the folder as peft saves it."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(folder)
    return adapted


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What peft would write of it now."""
    return {name: tensor.detach() for name, tensor in peft.get_peft_model_state_dict(model).items()}
