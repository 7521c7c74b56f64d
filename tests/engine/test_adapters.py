"""LoRA adapters beside each other on one model. Oracle: peft on transformers, and weights with the update added."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from kiloq.checkpoint import load_dense, open_checkpoint, read_adapter
from kiloq.checkpoint.adapter import read_stored_adapter
from kiloq.checkpoint.names import parts
from kiloq.engine import LLM, Engine, EngineConfig, SamplingParams
from kiloq.errors import CheckpointError, RequestError
from kiloq.model import ModelConfig, Transformer
from tests.engine.conftest import Lab

LENGTHS = {"": 9, "first": 21, "second": 5}  # of each adapter's prompt
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, object]] = {
    "first": {
        "r": 4,
        "lora_alpha": 7,
        "target_modules": ALL,
        "alpha_pattern": {"q_proj": 3},
        "rank_pattern": {"v_proj": 2},
    },
    "second": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
}


def oracle(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=16)).eval()
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).eval()


def adapted_by_peft(kind: str, name: str, folder: Path) -> nn.Module:
    """The oracle with random updates, which are saved to the folder as peft saves them."""
    torch.manual_seed(len(name))
    model = peft.get_peft_model(oracle(kind), peft.LoraConfig(**SETTINGS[name], init_lora_weights=False))
    model.save_pretrained(folder)
    return model.eval()


def ours(theirs: nn.Module) -> Transformer:
    config = ModelConfig.from_hf(theirs.config.to_dict())
    model = Transformer(config)
    state = theirs.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for part in parts(config, shapes):
        model.get_parameter(part.parameter).data[part.start : part.start + part.shape[0]] = state[part.tensor]
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("step_tokens", [None, 7])
def test_each_request_of_a_batch_gets_the_logits_of_its_own_adapter_as_peft_computes_them(
    kind: str, step_tokens: int | None, lab: Lab, tmp_path: Path
) -> None:
    peers = {"": oracle(kind)} | {name: adapted_by_peft(kind, name, tmp_path / name) for name in SETTINGS}
    model = ours(oracle(kind))
    adapters = {name: read_adapter(tmp_path / name, model.config) for name in SETTINGS}
    seen = lab.Observed()
    limits = EngineConfig(max_context=64, max_batch=8, step_tokens=step_tokens)
    engine = Engine(model, limits, adapters=adapters, logits_observer=seen)
    prompts = {name: torch.randint(0, 97, (length,)).tolist() for name, length in LENGTHS.items()}
    for name, prompt in prompts.items():
        engine.add(prompt, SamplingParams(max_tokens=4, temperature=0), request_id=name or "none", adapter=name)
    answers = lab.answers(engine)
    for name, prompt in prompts.items():
        with torch.no_grad():
            theirs = peers[name](torch.tensor([[*prompt, *answers[name or "none", 0]]])).logits[0]
        for length in range(len(prompt), len(prompt) + 4):
            row = seen.rows[name or "none", 0, length]
            torch.testing.assert_close(row, theirs[length - 1], atol=2e-5, rtol=1e-4)


def test_a_prefix_is_shared_under_one_adapter_and_never_with_another(lab: Lab) -> None:
    model = lab.model("gqa")
    adapters = {name: lab.adapter(model, seed) for seed, name in enumerate(("a", "b"))}
    engine = Engine(model, EngineConfig(max_context=128), adapters=adapters)
    prompt, params = lab.ids(70), SamplingParams(max_tokens=3, temperature=0)
    cached = []
    for name in ("a", "b", "", "a", "b", ""):
        engine.add(prompt, params, request_id=name or "none", adapter=name)
        events = lab.run(engine)[name or "none", 0]
        usage = events[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached == [0, 0, 0, 64, 64, 64]


def test_an_unknown_adapter_is_refused_by_name(lab: Lab) -> None:
    engine = Engine(lab.model("gqa"), adapters={"known": lab.adapter(lab.model("gqa"), 0)})
    with pytest.raises(RequestError, match=r"'other'.*known"):
        engine.add([1], SamplingParams(max_tokens=1), adapter="other")


def v1_adapter(checkpoint: Path, folder: Path) -> None:
    """An adapter of the reference's LoRA targets, written by hand in peft's names."""
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith((".c_attn.weight", ".attn.c_proj.weight", ".w1.weight", ".w2.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=random) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], 4, generator=random) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_a_v1_adapter_gives_what_weights_with_the_update_added_give(checkpoint: Path, tmp_path: Path) -> None:
    v1_adapter(checkpoint, tmp_path / "adapter")
    updates = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in checkpoint.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in updates:
            weights[name] += 2 * updates[f"{stem}.lora_B.weight"] @ updates[f"{stem}.lora_A.weight"]
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=0)
    with_update = LLM(checkpoint, dtype="float32", adapters={"tuned": tmp_path / "adapter"})
    whole = LLM(merged, dtype="float32").generate([[5, 6, 7, 8]], params)[0].choices[0]
    tuned = with_update.generate([[5, 6, 7, 8]], params, adapter="tuned")[0].choices[0]
    plain = with_update.generate([[5, 6, 7, 8]], params)[0].choices[0]
    assert tuned.token_ids == whole.token_ids != plain.token_ids
    assert tuned.logprobs is not None
    assert whole.logprobs is not None
    for one, other in zip(tuned.logprobs, whole.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


BROKEN = {
    "dora": ({"use_dora": True}, "use_dora"),
    "another method": ({"peft_type": "IA3"}, "IA3"),
    "biases": ({"bias": "all"}, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "no alpha": ({"lora_alpha": "x"}, "lora_alpha"),
    "other depths": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "changed weights": ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
    "no finite scale": ({"lora_alpha": 1e300}, "not finite"),
    "another rank": ({"r": 8}, "has rank 4, but adapter_config.json says r 8"),
    "a rank of no number": ({"r": 2.5}, "r is 2.5; a rank is a whole number"),
    "ranks of no numbers": ({"rank_pattern": {"c_attn": "4"}}, "rank_pattern.c_attn is '4'"),
    "no rank by module": ({"rank_pattern": 5}, "rank_pattern is no object"),
    "a flag of no truth": ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
    "a costly pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_served_is_refused_with_its_reason(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    change, word = BROKEN[fault]
    v1_adapter(checkpoint, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=word):
        read_adapter(tmp_path / "adapter", open_checkpoint(checkpoint).config)


@pytest.mark.parametrize(
    "change",
    [{"trainable_token_indices": [1, 2]}, {"modules_to_save": ["lm_head"]}],
    ids=lambda change: next(iter(change)),
)
def test_what_the_settings_name_and_the_weights_lack_is_refused(
    change: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    v1_adapter(checkpoint, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"lacks what .* names in {next(iter(change))}"):
        read_stored_adapter(tmp_path / "adapter", open_checkpoint(checkpoint).config)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_an_update_is_refused(half: str, checkpoint: Path, tmp_path: Path) -> None:
    v1_adapter(checkpoint, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if half in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    with pytest.raises(CheckpointError, match="only one of lora_A and lora_B"):
        read_adapter(tmp_path / "adapter", open_checkpoint(checkpoint).config)


def test_an_update_of_what_is_no_matrix_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    v1_adapter(checkpoint, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stem = "base_model.model.transformer.h.0.ln_1"
    more = {f"{stem}.lora_A.weight": torch.ones(1, 1), f"{stem}.lora_B.weight": torch.ones(1, 1)}
    save_file(load_file(file) | more, file)
    with pytest.raises(CheckpointError, match=r"ln_1.*belongs to no linear layer"):
        read_adapter(tmp_path / "adapter", open_checkpoint(checkpoint).config)


def test_an_adapter_of_another_model_is_refused(lab: Lab, checkpoint: Path, tmp_path: Path) -> None:
    v1_adapter(checkpoint, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"belongs to no linear layer|holds no LoRA update"):
        read_adapter(tmp_path / "adapter", lab.model("gqa").config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, file)
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter(tmp_path / "adapter", open_checkpoint(checkpoint).config)
    assert load_dense(open_checkpoint(checkpoint)) is not None
