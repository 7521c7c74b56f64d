"""Training beside a frozen model. Oracle: peft on transformers, for values, gradients, steps and files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kiloq.checkpoint import Checkpoint, GenerationDefaults, load_dense, open_checkpoint, read_adapter
from kiloq.checkpoint.adapter import read_stored_adapter
from kiloq.checkpoint.fingerprint import Base
from kiloq.checkpoint.weights import empty_model
from kiloq.engine import Engine, EngineConfig, SamplingParams
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.model.trained_lora import Slice, TrainedLinear, as_adapter, frozen_alone
from kiloq.quant.frozen import FrozenLinear
from kiloq.quant.nf4 import quantize_nf4
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig, attach, counts, describe, export, stored, targeted
from kiloq.train.data import Batch
from kiloq.train.forward import Forward, Runtime
from kiloq.train.losses import IGNORE
from kiloq.train.run_folder import export as export_model
from kiloq.train.settings import LoopConfig
from tests.train.peft_peers import VOCAB, as_checkpoint, peer, saved_tensors, with_adapter

LENGTHS = (20, 12)  # of the rows of a batch
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [3, 257, 258]
# What peft is asked for, by method.
METHODS: dict[str, dict[str, object]] = {
    "lora": {"target_modules": LINEARS},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "some": {
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"k_proj": 9},
    },
    "some-dora": {"target_modules": ["v_proj", "gate_proj"], "use_dora": True, "use_rslora": True},
    "rows": {"target_modules": ["q_proj"]},  # and the tokens' rows, by kind
    "full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def settings_for(method: str, kind: str) -> dict[str, object]:
    more: dict[str, object] = {}
    if method == "rows":
        tokens = TOKENS if kind == "qwen2" else {"embed_tokens": TOKENS, "lm_head": TOKENS}
        more = {"trainable_token_indices": tokens}
    if method == "full" and kind == "qwen2":
        more = {"ensure_weight_tying": True}
    return METHODS[method] | more


def batch() -> Batch:
    """Rows of 32 places; what is over of a row is a piece of its own, untrained."""
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (64,), generator=random)
    ids[torch.tensor([2, 9, 36])] = torch.tensor(TOKENS)
    targets = torch.full((64,), IGNORE)
    pieces, positions = [0], []
    for row, length in enumerate(LENGTHS):
        start = 32 * row
        targets[start : start + length - 1] = ids[start + 1 : start + length]
        pieces += [start + length, start + 32]
        positions += [torch.arange(length), torch.arange(32 - length)]
    return Batch(ids, targets, torch.cat(positions), pieces)


def forward_of(model: Transformer, **loop: object) -> Forward:
    runtime = Runtime.choose(LoopConfig(device="cpu", precision="fp32", compile="off"))
    return Forward(model.train(), runtime, seq_len=32, **loop)


def their_loss(model: nn.Module) -> torch.Tensor:
    one = batch()
    rows = [slice(32 * row, 32 * row + length) for row, length in enumerate(LENGTHS)]
    logits = torch.cat([model(one.ids[None, row]).logits[0] for row in rows])
    targets = torch.cat([one.targets[row] for row in rows])
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_gradients_steps_and_files_are_pefts(method: str, kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = as_checkpoint(peer(kind), tmp_path / "base", tokenizer)
    theirs = with_adapter(peer(kind), tmp_path / "begun", **settings_for(method, kind)).train()
    config = AdapterConfig(start=str(tmp_path / "begun"), dropout=0.0)
    ours = load_dense(checkpoint)
    attach(ours, checkpoint, config)
    forward = forward_of(ours)
    steppers = [
        torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2) for model in (ours, theirs)
    ]
    for _ in range(3):
        losses = [forward.cross_entropy(batch()), their_loss(theirs)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        for loss, stepper in zip(losses, steppers, strict=True):
            stepper.zero_grad()
            (loss / 30).backward()
            stepper.step()
    export(tmp_path / "done", ours, config)
    found, wanted = load_file(tmp_path / "done" / "adapter_model.safetensors"), saved_tensors(theirs)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text)
    again = peft.PeftModel.from_pretrained(peer(kind), tmp_path / "done").eval()
    ids = batch().ids[:20]
    with torch.no_grad():
        torch.testing.assert_close(again(ids[None]).logits[0], ours.eval().logits(ids), rtol=1e-5, atol=1e-5)
    trained = sum(one.numel() for one in theirs.parameters() if one.requires_grad)
    assert counts(ours)[0] == trained


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_begins_as_the_model_itself_and_is_written_for_peft(
    kind: str, dora: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer(kind), tmp_path / "base", tokenizer)
    ours, ids = load_dense(checkpoint), batch().ids[:20]
    plain = ours.logits(ids)
    config = AdapterConfig(rank=3, dropout=0.0, dora=dora)
    attach(ours, checkpoint, config, seed=1)
    torch.testing.assert_close(ours.logits(ids), plain)
    disturb(ours)
    export(tmp_path / "adapter", ours, config, base=Base.of(checkpoint.folder))
    theirs = peft.PeftModel.from_pretrained(peer(kind), tmp_path / "adapter").eval()
    torch.testing.assert_close(ours.logits(ids), theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    with frozen_alone(ours):
        torch.testing.assert_close(ours.logits(ids), plain)
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    control = [tokenizer.im_start_id, tokenizer.im_end_id]
    assert raw["target_modules"] == sorted(LINEARS)
    assert raw["trainable_token_indices"] == (
        control if kind == "qwen2" else dict.fromkeys(["embed_tokens", "lm_head"], control)
    )
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "adapter").glob("*.json"))


def disturb(model: Transformer) -> None:
    """Every trained number away from where it begins."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_begins_as_kaimings_uniform_and_repeats_by_seed(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = as_checkpoint(peer(kind), tmp_path / "base", tokenizer)
    drawn = []
    for seed in (1, 1, 2):
        model = load_dense(checkpoint)
        attach(model, checkpoint, AdapterConfig(rank=64, targets=("q_proj",)), seed=seed)
        drawn.append(model.blocks[0].attn.qkv.down.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    bound = 32**-0.5
    assert bound * 0.99 < drawn[0].abs().max() <= bound
    assert abs(float(drawn[0].var()) - bound**2 / 3) < bound**2 / 30


def qwen1_checkpoint(make_model: Callable[..., Transformer], tokenizer: Tokenizer, folder: Path) -> Checkpoint:

    end = tokenizer.end_of_text_id
    generation = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=64)
    model = make_model(tokenizer.size)
    model.config = dataclasses.replace(model.config, dtype="float32")
    export_model(folder, model, tokenizer, generation)
    return open_checkpoint(folder)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"embeddings": "full"}, {"targets": ("attn.c_proj", "w1")}])
def test_v1_merged_matrices_compute_what_the_trained_network_does(
    changes: dict[str, object], make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    checkpoint = qwen1_checkpoint(make_model, tokenizer, tmp_path / "base")
    config = AdapterConfig(rank=3, **changes)
    model = load_dense(checkpoint)
    attach(model, checkpoint, config)
    disturb(model)
    export(tmp_path / "adapter", model, config)
    adapter = read_stored_adapter(tmp_path / "adapter", checkpoint.config)
    merged = load_dense(checkpoint)
    for updates in adapter.updates.values():
        for update in updates:
            part = update.part
            rows = merged.get_parameter(part.parameter).data[part.start : part.start + part.shape[0]]
            rows.copy_(update.merged(rows))
    for table, rows in adapter.rows.items():
        merged.get_parameter(f"{table}.weight").data[list(rows.ids)] = rows.values
    for table, whole in adapter.tables.items():
        merged.get_parameter(f"{table}.weight").data.copy_(whole)
    ids = torch.arange(10, 40)
    torch.testing.assert_close(merged.logits(ids), model.logits(ids), rtol=1e-4, atol=1e-5)
    again = load_dense(checkpoint)
    attach(again, checkpoint, AdapterConfig(start=str(tmp_path / "adapter")))
    torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=1e-5, atol=1e-6)


def test_names_on_disk_are_v1s_and_end_as_short_as_peft_takes(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    checkpoint = qwen1_checkpoint(make_model, tokenizer, tmp_path / "base")
    for targets, written in (((), ["c_attn", "c_proj", "w1", "w2"]), (("attn.c_proj", "w1"), ["attn.c_proj", "w1"])):
        model = load_dense(checkpoint)
        config = AdapterConfig(rank=2, targets=targets, embeddings="none")
        attach(model, checkpoint, config)
        export(tmp_path / "adapter", model, config)
        raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert raw["target_modules"] == written
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.transformer.h.1.attn.c_proj.lora_A.weight" in names


def test_an_unknown_target_is_refused_with_what_there_is(make_model: Callable[..., Transformer]) -> None:
    with pytest.raises(ConfigError, match=r"'q_proj'.*attn\.c_attn, attn\.c_proj, mlp\.w2, mlp\.w1, mlp\.c_proj"):
        targeted(make_model().config, ["q_proj"])
    assert targeted(make_model().config, ["all-linear"]) == targeted(make_model().config, [])


SEVEN = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "intermediate_size": 11_008,
    "qkv_bias": True,
    "rope": RopeConfig(rotary_dim=128, kind="plain", original_length=8192),
    "windows": (None,) * 32,
    "max_length": 8192,
}


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("qwen", "trains 143,130,624 of 7,864,455,168 parameters (1.82 %)"),
        ("qwen2", "trains 159,907,840 of 7,881,232,384 parameters (2.03 %)"),
    ],
)
def test_of_seven_billion_rank_64_trains_what_the_shapes_add_up_to(
    family: str, line: str, tokenizer: Tokenizer
) -> None:
    model = empty_model(ModelConfig(family=family, **SEVEN))
    end = tokenizer.im_end_id
    generation = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="chatml", max_window=64)
    with torch.device("meta"):
        attach(model, Checkpoint(Path(), model.config, generation, tokenizer), AdapterConfig())
    assert describe(model) == line


@pytest.mark.parametrize(
    ("chat", "is_chat", "changes", "tokens"),
    [
        (False, True, {}, ["<|im_start|>", "<|im_end|>"]),
        (True, True, {}, []),  # its own files say that it chats
        (False, False, {}, []),  # plain text teaches no control token
        (True, True, {"tokens": ("<|extra_0|>",)}, ["<|extra_0|>"]),
        (True, True, {"embeddings": "rows"}, ["<|im_start|>", "<|im_end|>"]),
        (False, True, {"embeddings": "none"}, []),
    ],
)
def test_rows_of_control_tokens_are_trained_where_the_models_own_files_lack_them(
    chat: bool, is_chat: bool, changes: dict[str, object], tokens: list[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer("qwen3"), tmp_path / "a-chat-model", tokenizer, chat=chat)
    model, config = load_dense(checkpoint), AdapterConfig(rank=2, **changes)
    attach(model, checkpoint, config, is_chat=is_chat)
    ids = tuple(tokenizer.vocabulary.special[token] for token in tokens)
    rows = stored(model, config).rows
    assert {table: one.ids for table, one in rows.items()} == ({"embed": ids, "head": ids} if ids else {})


def test_an_added_token_that_is_none_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = as_checkpoint(peer("qwen2"), tmp_path / "base", tokenizer)
    with pytest.raises(ConfigError, match="'<tool>', which is no added token"):
        attach(load_dense(checkpoint), checkpoint, AdapterConfig(tokens=("<tool>",)))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_recomputing_blocks_changes_no_gradient_under_dropout(
    recompute: str, dora: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer("qwen2"), tmp_path / "base", tokenizer)

    def gradients(recompute: str) -> dict[str, torch.Tensor]:
        model = load_dense(checkpoint)
        attach(model, checkpoint, AdapterConfig(rank=3, dropout=0.3, dora=dora))
        disturb(model)
        forward = forward_of(model, checkpointing=recompute)
        torch.manual_seed(7)
        forward.cross_entropy(batch()).backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    plain, again = gradients("none"), gradients(recompute)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_a_compiled_step_has_the_same_loss_and_gradients(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = as_checkpoint(peer("qwen2"), tmp_path / "base", tokenizer)
    model = load_dense(checkpoint)
    attach(model, checkpoint, AdapterConfig(rank=3, dropout=0.0))
    disturb(model)
    results = []
    for compiled in (False, True):
        forward = forward_of(model)
        if compiled:  # all of the compiler but the code that it writes, which takes a minute
            forward._hidden = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        loss = forward.cross_entropy(batch())
        wanted = [one for one in model.parameters() if one.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embeddings", ["rows", "full"])
def test_in_bf16_the_trained_numbers_are_fp32_and_the_rest_is_not(
    embeddings: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer("qwen3"), tmp_path / "base", tokenizer)
    losses = []
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = load_dense(checkpoint, dtype=dtype)
        attach(model, checkpoint, AdapterConfig(rank=3, dropout=0.0, embeddings=embeddings))
        disturb(model)
        kinds = {one.requires_grad: one.dtype for one in model.parameters()}
        assert kinds == {True: torch.float32, False: dtype}
        runtime = Runtime.choose(LoopConfig(device="cpu", precision=precision, compile="off"))
        loss = Forward(model.train(), runtime, seq_len=32).cross_entropy(batch())
        loss.backward()
        assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
        assert model.eval().logits(batch().ids).dtype == dtype  # as an engine runs it, without autocast
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_an_engine_runs_the_training_network_and_serves_its_adapter_live(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = as_checkpoint(peer("qwen3"), tmp_path / "base", tokenizer, chat=True)
    model = load_dense(checkpoint)
    attach(model, checkpoint, AdapterConfig(rank=3, dropout=0.5))
    disturb(model)
    model.eval()
    frozen = load_dense(checkpoint)
    limits, params = EngineConfig(max_context=64), SamplingParams(max_tokens=8, temperature=0)
    answers = []
    for engine, adapter in (
        (Engine(model, limits), ""),
        (Engine(frozen, limits, adapters={"live": as_adapter(model)}), "live"),
        (Engine(frozen, limits), ""),
    ):
        engine.add([5, 6, 7], params, adapter=adapter)
        found: list[int] = []
        while engine.has_work:
            found += [token for event in engine.step() for token in event.token_ids]
        answers.append(found)
    assert answers[0] == answers[1] != answers[2]
    ids = torch.tensor([5, 6, 7, *answers[0]])
    assert model.logits(ids)[2:-1].argmax(-1).tolist() == answers[0]


@pytest.mark.parametrize("changes", [{"dora": True}, {"embeddings": "rows"}, {"embeddings": "full"}])
def test_what_is_no_update_beside_a_model_is_not_served(
    changes: dict[str, object], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer("qwen2"), tmp_path / "base", tokenizer, chat=True)
    model, config = load_dense(checkpoint), AdapterConfig(rank=2, **changes)
    attach(model, checkpoint, config)
    with pytest.raises(ConfigError, match=r"merge it|Serve the trained network"):
        as_adapter(model)
    export(tmp_path / "adapter", model, config)
    with pytest.raises(CheckpointError, match="cannot serve"):
        read_adapter(tmp_path / "adapter", model.config)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    """y = 0 + B A drop(x) with A and B the identity: what comes out is what dropout made of x."""
    shared = nn.Linear(512, 512, bias=False)
    layer = TrainedLinear(shared, [Slice(start=0, rows=512, rank=512, scale=1.0)], (512, 512), dropout=0.3)
    with torch.no_grad():
        for matrix in (layer.down, layer.ups[0]):
            matrix.copy_(torch.eye(512))
        shared.weight.zero_()
    torch.manual_seed(3)
    out = layer(torch.ones(400, 512))
    zeros = float((out == 0).float().mean())
    assert abs(zeros - 0.3) < 4 * (0.21 / out.numel()) ** 0.5  # four standard deviations
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.7), rtol=1e-4, atol=0)
    rows = (out == 0).float()
    assert (rows[1:] == rows[:-1]).float().mean() < 0.6  # 0.58 where rows are independent
    torch.manual_seed(3)
    assert torch.equal(layer(torch.ones(400, 512)), out)
    assert torch.equal(layer.eval()(torch.ones(400, 512)), torch.ones(400, 512))


def test_dora_beside_codes_whose_bias_is_fp32_computes_in_bf16() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(5, 64)
    frozen = FrozenLinear(quantize_nf4(weight), bias)
    layer = TrainedLinear(frozen, [Slice(start=16, rows=32, rank=4, scale=2.0)], (48, 64), dora=True)
    with torch.no_grad():
        layer.down.normal_()
        layer.ups[0].normal_()
    dense = frozen.dense()
    dense[16:] += 2 * layer.ups[0] @ layer.down
    assert layer.magnitude is not None
    dense[16:] *= (layer.magnitude / dense[16:].norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ dense.t() + bias, rtol=1e-4, atol=1e-4)
    rounded = layer(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), layer(x), rtol=0.02, atol=0.5)
