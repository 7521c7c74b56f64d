"""The engine with an int8 cache: as close to the exact model as its rounding allows, however requests come and go."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kiloq.cache import KVCache, PagedAttend, Span
from kiloq.checkpoint import load_model, open_checkpoint, save_checkpoint
from kiloq.engine import Engine, EngineConfig
from kiloq.engine.params import SamplingParams
from kiloq.model import ModelConfig, Transformer, ntk_alpha

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GREEDY = {"temperature": 0.0, "ignore_eos": True}
KINDS = ("v1", "gqa", "qk-norm", "windows")


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def biased(model: Transformer, size: float) -> Transformer:
    """The same model with biases as trained ones are: two channels of every key dwarf the rest."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        if block.attn.qkv.bias is not None:
            block.attn.qkv.bias.normal_(0, 0.3, generator=generator)
            keys = block.attn.key_bias  # a view
            keys[:, :2] += size
    return model


def logits_through(model: Transformer, cache: KVCache, ids: Tensor) -> Tensor:
    """All logits of one sequence whose attention reads the cache."""
    alpha = ntk_alpha(model.config, len(ids))
    span = Span(range(-(-len(ids) // 16)), 0, len(ids), alpha)
    attend = PagedAttend(cache, [span], model.config.windows)
    with torch.no_grad():
        return model.head(model(ids, model.rotation(torch.arange(len(ids)), alpha), attend))


def golden_model(stretched: bool) -> Transformer:
    """The tiny v1 model whose outputs the original code wrote down."""
    hf = json.loads((GOLDEN / "config.json").read_text())
    config = ModelConfig.from_hf(hf | {"model_type": "qwen", "use_dynamic_ntk": stretched, "use_logn_attn": stretched})
    theirs = load_file(GOLDEN / "weights.safetensors")
    model = Transformer(config)
    state = {"embed.weight": theirs["transformer.wte.weight"], "norm.weight": theirs["transformer.ln_f.weight"]}
    state["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        old, new = f"transformer.h.{layer}", f"blocks.{layer}"
        state[f"{new}.attn_norm.weight"] = theirs[f"{old}.ln_1.weight"]
        state[f"{new}.mlp_norm.weight"] = theirs[f"{old}.ln_2.weight"]
        state |= {f"{new}.attn.qkv.{kind}": theirs[f"{old}.attn.c_attn.{kind}"] for kind in ("weight", "bias")}
        state[f"{new}.attn.out.weight"] = theirs[f"{old}.attn.c_proj.weight"]
        gate, up = theirs[f"{old}.mlp.w2.weight"], theirs[f"{old}.mlp.w1.weight"]
        state[f"{new}.mlp.gate_up.weight"] = torch.cat([gate, up])
        state[f"{new}.mlp.down.weight"] = theirs[f"{old}.mlp.c_proj.weight"]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize(("length", "most"), [(20, 0.0045), (48, 0.0025)])
def test_logits_are_far_closer_than_those_of_the_original_int8_cache(stretched: bool, length: int, most: float) -> None:
    # Rounding errors of many tokens average out; the original truncates, and its errors do not.
    model = golden_model(stretched)
    ids = load_file(GOLDEN / "outputs.safetensors")[f"ids.{length}"][0]
    theirs = load_file(GOLDEN / "int8_cache.safetensors")[f"int8kv.ntklogn{int(stretched)}.len{length}.logits"][0]
    exact = model.logits(ids)
    ours = logits_through(model, KVCache.for_model(model, 8, torch.int8), ids)
    assert relative_error(theirs, exact[:, ::8]) > 0.02
    assert relative_error(ours, exact) <= most


@pytest.mark.parametrize("kind", ["v1", "gqa", "windows"])
def test_large_key_biases_ruin_only_a_cache_that_keeps_them(lab, kind: str) -> None:
    model = biased(lab.model(kind), 30.0)
    ids = torch.tensor(lab.ids(100))
    exact = model.logits(ids)
    cache = KVCache.for_model(model, 8, torch.int8)
    without = relative_error(logits_through(model, cache, ids), exact)
    cache.key_biases, cache.angles = [None] * 3, None
    whole = relative_error(logits_through(model, cache, ids), exact)
    assert without < 0.012
    assert whole > 4 * without


def test_a_model_without_key_bias_keeps_whole_keys(lab) -> None:
    assert KVCache.for_model(lab.model("qk-norm"), 1, torch.int8).angles is None
    assert KVCache.for_model(lab.model("v1"), 1, torch.int8).angles is None  # all of its biases are zero
    assert KVCache.for_model(biased(lab.model("v1"), 1.0), 1, torch.bfloat16).angles is None


def test_packed_models_keep_bf16_unless_asked_and_know_their_biases(lab, checkpoint: Path, tmp_path: Path) -> None:
    model, known = biased(lab.model("v1"), 10.0), open_checkpoint(checkpoint)
    parts = {"config": known.config, "tokenizer": known.tokenizer, "generation": known.generation}
    save_checkpoint(tmp_path / "model", model_state=model.state_dict(), **parts)
    packed = load_model(open_checkpoint(tmp_path / "model"), quantization="int8")
    assert Engine(packed).kv_dtype == torch.bfloat16
    for found, bias in zip(packed.key_biases(), model.key_biases(), strict=True):
        torch.testing.assert_close(found, bias, rtol=0.01, atol=0.01)
    ids = torch.tensor(lab.ids(60))
    exact = logits_through(packed, KVCache.for_model(packed, 8, torch.float32), ids)
    assert relative_error(logits_through(packed, KVCache.for_model(packed, 8, torch.int8), ids), exact) < 0.03


def run_int8(lab, model: Transformer, prompts: list[list[int]], count: int, **limits: object) -> tuple[dict, dict]:
    """Greedy answers of all prompts in one engine, and the logits they were drawn from."""
    observed = lab.Observed()
    engine = Engine(model, EngineConfig(kv_dtype="int8", **limits), logits_observer=observed)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=count, **GREEDY), request_id=str(i))
    return lab.answers(engine), observed.rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [{}, {"step_tokens": 16, "max_batch": 3}], ids=["whole", "chunked"])
def test_a_row_in_any_batch_and_any_chunks_equals_the_model_within_the_rounding(lab, kind: str, limits: dict) -> None:
    # 20 and 31 cross the trained length of 32 while decoding: their cache is computed again under another angle.
    model = biased(lab.model(kind), 10.0)
    prompts = [lab.ids(n, seed=n) for n in (3, 20, 31, 50, 90)]
    prompts.append(prompts[-1][:64] + lab.ids(9))  # shares a prefix
    answers, rows = run_int8(lab, model, prompts, 16, **limits)
    assert len(rows) == 6 * 16
    for (request_id, _, length), row in rows.items():
        ids = [*prompts[int(request_id)], *answers[request_id, 0]][:length]
        assert relative_error(row, model.logits(torch.tensor(ids))[-1]) < 0.03


def test_a_shared_prefix_is_found_and_gives_the_same_answer(lab) -> None:
    model = biased(lab.model("gqa"), 10.0)
    engine = Engine(model, EngineConfig(kv_dtype="int8"))
    prompt, params = lab.ids(70), SamplingParams(max_tokens=12, **GREEDY)
    answers, cached = [], []
    for _ in range(2):
        engine.add(prompt, params, request_id="same")
        events = lab.run(engine)["same", 0]
        answers.append([i for event in events for i in event.token_ids])
        cached.append(events[-1].usage.cached_tokens)
    assert answers[0] == answers[1]
    assert cached == [0, 64]


def test_a_cancelled_neighbour_changes_nothing(lab) -> None:
    model = biased(lab.model("v1"), 10.0)
    alone, _ = run_int8(lab, model, [lab.ids(40)], 20)
    engine = Engine(model, EngineConfig(kv_dtype="int8"))
    engine.add(lab.ids(40), SamplingParams(max_tokens=20, **GREEDY), request_id="0")
    engine.add(lab.ids(50, seed=1), SamplingParams(max_tokens=20, **GREEDY), request_id="other")
    tokens = [event for _ in range(4) for event in engine.step()]
    engine.cancel("other")
    tokens += [event for events in lab.run(engine).values() for event in events]
    assert tuple(i for event in tokens if event.request_id == "0" for i in event.token_ids) == alone["0", 0]


def test_the_same_memory_holds_more_tokens(lab) -> None:
    sizes = {}
    for kv_dtype in ("fp32", "bf16", "int8"):
        engine = Engine(lab.model("v1"), EngineConfig(kv_dtype=kv_dtype, kv_memory=2**16, max_context=10**6))
        sizes[kv_dtype] = engine.stats.blocks
    # Heads of 8 dimensions: 32, 16 and 10 bytes each.
    assert sizes == {"fp32": 2**16 // 12288, "bf16": 2**16 // 6144, "int8": 2**16 // 3840}
