"""The network against oracles nobody here wrote: transformers' Qwen2 and Qwen3, and the original v1 code's outputs."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from kiloq.model import ModelConfig, PackedAttend, Transformer, ntk_alpha

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

QWEN2_SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no_grouping": {"num_key_value_heads": 4},
    "yarn": {"rope_parameters": YARN},
    "yarn_mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "dynamic": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0},
    },
    "sliding": SLIDING,
    "sliding_by_layer": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
QWEN3_SHAPES = {
    "plain": {"head_dim": 32},
    "head_dim_not_hidden_over_heads": {"head_dim": 24, "tie_word_embeddings": True},
    "no_grouping": {"head_dim": 16, "num_key_value_heads": 4},
    "yarn": {"head_dim": 32, "rope_parameters": YARN},
}


def ours_from(oracle: nn.Module) -> Transformer:
    """Our model with the oracle's weights, mapped here by hand so that the test does not lean on the reader."""
    model = Transformer(ModelConfig.from_hf(oracle.config.to_dict()))
    theirs = oracle.state_dict()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.cat([theirs[source] for source in hf_names(name)]))
    return model.eval()


def hf_names(name: str) -> list[str]:
    roots = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in roots:
        return [roots[name]]
    _, layer, *part, kind = name.split(".")
    parts = {
        "attn_norm": ["input_layernorm"],
        "mlp_norm": ["post_attention_layernorm"],
        "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.out": ["self_attn.o_proj"],
        "attn.q_norm": ["self_attn.q_norm"],
        "attn.k_norm": ["self_attn.k_norm"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    return [f"model.layers.{layer}.{their}.{kind}" for their in parts[".".join(part)]]


def randomise(oracle: nn.Module) -> nn.Module:
    """Weights large enough that a wrong norm, bias or angle shows."""
    torch.manual_seed(0)
    for name, parameter in oracle.named_parameters():
        near_one = name.endswith("norm.weight")
        nn.init.normal_(parameter, mean=1.0 if near_one else 0.0, std=0.1)
    return oracle.eval()


def assert_same_logits(oracle: nn.Module, lengths: tuple[int, ...] = (1, 7, 48)) -> None:
    model = ours_from(oracle)
    for length in lengths:
        ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            theirs = oracle(ids[None]).logits[0]
            ours = model.logits(ids)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=length: f"{n} tokens: {m}")


@pytest.mark.parametrize("shape", QWEN2_SHAPES)
def test_equals_transformers_qwen2(shape: str) -> None:
    config = transformers.Qwen2Config(**(TINY | QWEN2_SHAPES[shape]), attn_implementation="eager")
    assert_same_logits(randomise(transformers.Qwen2ForCausalLM(config)))


@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_equals_transformers_qwen3(shape: str) -> None:
    config = transformers.Qwen3Config(**(TINY | QWEN3_SHAPES[shape]), attn_implementation="eager")
    assert_same_logits(randomise(transformers.Qwen3ForCausalLM(config)))


def golden_model(**changes: object) -> Transformer:
    """The tiny v1 model whose outputs the original code wrote down; mapping as QWenLMHeadModel names its weights."""
    config = ModelConfig.from_hf(json.loads((GOLDEN / "config.json").read_text()) | {"model_type": "qwen"} | changes)
    theirs = load_file(GOLDEN / "weights.safetensors")
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.cat([theirs[source] for source in v1_names(name)]))
    return model.eval()


def v1_names(name: str) -> list[str]:
    roots = {"embed.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight"}
    if name in roots or name == "head.weight":
        return [roots.get(name, "lm_head.weight")]
    _, layer, *part, kind = name.split(".")
    parts = {
        "attn_norm": ["ln_1"],
        "mlp_norm": ["ln_2"],
        "attn.qkv": ["attn.c_attn"],
        "attn.out": ["attn.c_proj"],
        "mlp.gate_up": ["mlp.w2", "mlp.w1"],
        "mlp.down": ["mlp.c_proj"],
    }
    return [f"transformer.h.{layer}.{their}.{kind}" for their in parts[".".join(part)]]


@pytest.mark.parametrize("length", [20, 48, 100])
@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize("ntk", [False, True])
def test_equals_the_original_v1_code(ntk: bool, logn: bool, length: int) -> None:
    golden = load_file(GOLDEN / "outputs.safetensors")
    model = golden_model(use_dynamic_ntk=ntk, use_logn_attn=logn)
    with torch.no_grad():
        logits = model.logits(golden[f"ids.{length}"][0])
    expected = golden[f"logits.ntk{int(ntk)}.logn{int(logn)}.len{length}.last"][0]
    torch.testing.assert_close(logits[-2:, ::4], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rotary_pct05", {"rotary_pct": 0.5}),
        ("base1e6", {"rotary_emb_base": 1e6, "use_dynamic_ntk": False, "use_logn_attn": False}),
    ],
)
def test_equals_the_original_v1_code_in_its_variants(name: str, changes: dict[str, object]) -> None:
    golden = load_file(GOLDEN / "outputs.safetensors")
    with torch.no_grad():
        logits = golden_model(**changes).logits(golden["ids.48"][0])
    torch.testing.assert_close(logits[-2:, ::4], golden[f"{name}.len48.logits.last"][0], atol=1e-5, rtol=0)


def test_equals_every_logit_of_the_original_v1_code(shared_data: Path) -> None:
    golden = load_file(shared_data / "golden" / "golden_outputs.safetensors")
    for ntk, logn, length in [(n, g, t) for n in (0, 1) for g in (0, 1) for t in (20, 48, 100)]:
        model = golden_model(use_dynamic_ntk=bool(ntk), use_logn_attn=bool(logn))
        with torch.no_grad():
            logits = model.logits(golden[f"ids.{length}"][0])
        expected = golden[f"logits.ntk{ntk}.logn{logn}.len{length}"][0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def packed_and_alone(model: Transformer, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    with torch.no_grad():
        alone = torch.cat([model.logits(part) for part in ids.split(lengths)])
        return model.logits(ids, starts), alone


@pytest.mark.parametrize("lengths", [[5, 40, 1, 33, 80], [16, 16, 16]])
def test_packed_sequences_equal_each_alone_beyond_the_trained_length_too(lengths: list[int]) -> None:
    packed, alone = packed_and_alone(golden_model(), lengths)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_padded_attention_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, windows = [3, 9, 1, 6], (None, 4)
    attend = PackedAttend([0, 3, 12, 13, 19], windows)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    for layer, window in enumerate(windows):
        torch.testing.assert_close(attend._padded(q, k, v, window), attend(layer, q, k, v))


def test_checkpointing_changes_memory_not_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = golden_model().train()
        model.checkpointing = checkpointing
        model.logits(torch.arange(24) % 1024).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_initial_weights_repeat_by_seed_and_narrow_the_residual_stream() -> None:
    models = [Transformer(golden_model().config) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    weights = dict(models[0].named_parameters())
    assert weights["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 * 2 layers)
    assert weights["blocks.1.attn.qkv.bias"].abs().sum() == 0


def test_ntk_factor_grows_at_powers_of_two() -> None:
    config = ModelConfig.from_hf({**golden_model().config.to_hf(), "seq_length": 2048})
    values = {n: ntk_alpha(config, n) for n in (1, 2048, 2049, 4096, 4097, 8192, 8193)}
    assert values == {1: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15}  # QWEN1: get_ntk_alpha


def test_position_beyond_the_original_table_works() -> None:
    # The original's LogN table ends at 32,767 tokens and raises there; ours is a function.
    rotation = golden_model().rotation(torch.tensor([32_766, 32_767, 100_000]), 3.0)
    assert torch.isfinite(rotation.cos).all()
    assert torch.isfinite(rotation.q_scale).all()
