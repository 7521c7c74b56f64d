"""The plan of a packed model computes what the model computes op by op, and leaves to it what it cannot."""

from dataclasses import replace

import pytest
import torch

from kiloq import ops
from kiloq.checkpoint import bundled, load_model, open_checkpoint
from kiloq.checkpoint.load import round_rows
from kiloq.engine import Engine, EngineConfig, SamplingParams
from kiloq.model import Transformer
from kiloq.ops import cpu
from kiloq.quant.linear import QuantEmbedding, QuantLinear

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no kernels here")

NATIVE = [name for name in cpu.available() if name != "reference"]
WEIGHTS = ("bf16", "int8", "int4")
LENGTHS = (70, 1, 17, 40)  # of prompts: beyond the trained length, one token, beyond a block


def packed(model: Transformer, kind: str) -> Transformer:
    """The same weights, rounded and packed."""
    state = model.state_dict()

    def rounded(name: str) -> ops.PackedWeight:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return ops.pack(weight if kind == "bf16" else round_rows(weight, kind), bias)

    twin = Transformer(
        model.config,
        linear=lambda name, *_: QuantLinear(rounded(name)),
        embedding=lambda name, *_: QuantEmbedding(rounded(name)),
    )
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin.eval().requires_grad_(False)


def engines(model: Transformer, observed, *, adapters=None, **limits: object) -> tuple[Engine, Engine]:
    """One engine that runs the plan, and one that runs the model op by op."""
    pair = []
    for observer in observed:
        engine = Engine(model, EngineConfig(max_context=256, **limits), adapters=adapters, logits_observer=observer)
        assert engine._runner._native is not None
        pair.append(engine)
    pair[1]._runner._native = None
    return tuple(pair)


def differences(seen, answers, lengths: tuple[int, ...]) -> torch.Tensor:
    """How far the logits of two engines are from each other, row by row, as long as both saw the same tokens."""
    found = []
    for number, length in enumerate(lengths):
        ours, theirs = (each[str(number), 0] for each in answers)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours) - 1)
        for at in range(length, length + same + 1):
            a, b = (observed.rows[str(number), 0, at] for observed in seen)
            found.append((a - b).norm() / b.norm())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["v1", "gqa", "qk-norm", "windows"])
@pytest.mark.parametrize(
    ("weights", "kv_dtype"), [*((kind, "fp32") for kind in WEIGHTS), ("int8", "int8"), ("int4", "bf16")]
)
def test_prompts_and_answers_mixed_in_a_step_come_out_as_op_by_op(lab, kind: str, weights: str, kv_dtype: str) -> None:
    model = packed(lab.model(kind), weights)
    seen = lab.Observed(), lab.Observed()
    answers = []
    for engine in engines(model, seen, step_tokens=24, max_batch=3, kv_dtype=kv_dtype):
        for number, length in enumerate(LENGTHS):
            params = SamplingParams(max_tokens=12, temperature=0.0)
            engine.add(lab.ids(length, number), params, request_id=str(number))
        answers.append(lab.answers(engine))
    errors = differences(seen, answers, LENGTHS)
    # Sums in another order may round an activation to the neighbouring code: coarse in 32 channels, and it stays in the
    # cache for all rows that follow. Rows before the first such code are equal; a wrong op is off by far more.
    assert errors.min() < 1e-4
    assert errors.max() < 0.05


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("backend", NATIVE)
def test_rows_of_several_adapters_come_out_as_op_by_op(lab, backend: str, weights: str) -> None:
    plain = lab.model("gqa")
    adapters = {
        "all": lab.adapter(plain, 0, strength=0.1),
        "mlp": lab.adapter(plain, 1, matrices=("gate_up", "down"), strength=0.1),
        "attention": lab.adapter(plain, 2, matrices=("qkv", "out"), strength=0.1),
    }
    asked = ("mlp", "", "all", "attention", "mlp", "")
    lengths = (40, 70, 1, 17, 9, 33)
    seen, answers = (lab.Observed(), lab.Observed()), []
    with cpu.using(backend):
        model = packed(plain, weights)
        for engine in engines(model, seen, adapters=adapters, step_tokens=48, max_batch=4):
            for number, (name, length) in enumerate(zip(asked, lengths, strict=True)):
                params = SamplingParams(max_tokens=12, temperature=0.0)
                engine.add(lab.ids(length, number), params, request_id=str(number), adapter=name)
            answers.append(lab.answers(engine))
    errors = differences(seen, answers, lengths)
    assert errors.median() < 0.02
    assert errors.max() < 0.06


@pytest.mark.parametrize("backend", NATIVE)
def test_every_backend_answers_as_op_by_op(lab, backend: str) -> None:
    for weights in WEIGHTS:
        seen = lab.Observed(), lab.Observed()
        with cpu.using(backend):
            for engine in engines(packed(lab.model("gqa"), weights), seen):
                engine.add(lab.ids(50), SamplingParams(max_tokens=3, temperature=0.0), request_id="a")
                lab.run(engine)
        for key, ours in seen[0].rows.items():
            assert (ours - seen[1].rows[key]).norm() < 0.03 * ours.norm(), (weights, key)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_bundled_model_answers_as_op_by_op(lab, weights: str | None) -> None:
    checkpoint = open_checkpoint(bundled())
    model = load_model(checkpoint, quantization=weights)
    prompts = [
        checkpoint.tokenizer.encode(x)
        for x in ("Once upon a time, there was a small fox named", "1, 2, 3, 4, 5, 6, 7, 8,")
    ]
    seen, answers = (lab.Observed(), lab.Observed()), []
    for engine in engines(model, seen):
        for number, prompt in enumerate(prompts):
            engine.add(prompt, SamplingParams(max_tokens=16, temperature=0.0), request_id=str(number))
        answers.append(lab.answers(engine))
    errors = differences(seen, answers, tuple(map(len, prompts)))
    assert len(errors) > 16
    assert errors.median() < 0.04
    assert errors.max() < 0.1  # a neighbouring code early on, in all that follows


def test_an_answer_does_not_depend_on_its_neighbours(lab) -> None:
    model = packed(lab.model("v1"), "int8")
    alone, together = lab.Observed(), lab.Observed()
    for observer, numbers in ((alone, (0,)), (together, (0, 1, 2, 3))):
        engine = Engine(model, EngineConfig(max_context=256), logits_observer=observer)
        for number in numbers:
            params = SamplingParams(max_tokens=8, temperature=0.0)
            engine.add(lab.ids(LENGTHS[number], number), params, request_id=str(number))
        lab.run(engine)
    for key, row in alone.rows.items():
        assert (row - together.rows[key]).norm() < 1e-3 * row.norm(), key


def test_a_model_with_one_plain_matrix_runs_op_by_op(lab) -> None:
    model = packed(lab.model("gqa"), "int8")
    plain = torch.nn.Linear(32, 32, bias=False)
    model.blocks[1].attn.out = plain.requires_grad_(False)
    engine = Engine(model, EngineConfig(max_context=256))
    assert engine._runner._native is None
    engine.add(lab.ids(5), SamplingParams(max_tokens=2), request_id="a")
    assert lab.answers(engine)


def test_without_kernels_a_packed_model_runs_op_by_op(lab) -> None:
    with cpu.using("reference"):
        model = packed(lab.model("gqa"), "int4")
        engine = Engine(model, EngineConfig(max_context=256))
        assert engine._runner._native is None
        engine.add(lab.ids(5), SamplingParams(max_tokens=2), request_id="a")
        assert lab.answers(engine)


@pytest.mark.parametrize("kv_dtype", ["int8", "bf16"])
def test_heads_wider_than_the_kernels_know_run_op_by_op(lab, kv_dtype: str) -> None:
    model = Transformer(replace(lab.model("gqa").config, head_dim=264))
    model.init_weights(torch.Generator().manual_seed(0))
    engine = Engine(packed(model, "bf16"), EngineConfig(max_context=256, kv_dtype=kv_dtype))
    assert engine._runner._native is None
    engine.add(lab.ids(20), SamplingParams(max_tokens=3), request_id="a")
    assert lab.answers(engine)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_prompt_in_parts_asks_for_no_logits_of_the_first(lab, weights: str) -> None:
    answers = []
    with cpu.using("reference"):
        for step_tokens in (16, 256):
            engine = Engine(packed(lab.model("gqa"), weights), EngineConfig(max_context=256, step_tokens=step_tokens))
            engine.add(lab.ids(40), SamplingParams(max_tokens=3, temperature=0.0), request_id="a")
            answers.append(lab.answers(engine))
    assert answers[0] == answers[1]


def test_a_cancelled_request_leaves_the_others_as_they_were(lab) -> None:
    model = packed(lab.model("windows"), "int8")
    answers = []
    for cancels in (False, True):
        engine = Engine(model, EngineConfig(max_context=256))
        engine.add(lab.ids(30), SamplingParams(max_tokens=10, temperature=0.0), request_id="kept")
        engine.add(lab.ids(60, 1), SamplingParams(max_tokens=40, temperature=0.0), request_id="other")
        engine.step()
        engine.step()
        if cancels:
            engine.cancel("other")
        answers.append([answer for (name, _), answer in lab.answers(engine).items() if name == "kept"])
    assert answers[0] == answers[1]
