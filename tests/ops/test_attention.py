"""Paged attention of the kernels against its slow twin, over everything that can vary in a step."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kiloq.model.attend import PackedAttend
from kiloq.ops import cpu, paged
from kiloq.ops.paged import PagedLayer, PagedNorms, PagedPlaces, PagedSpan, paged_attention

BLOCK = 16
CACHES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
MATRIX_UNIT = 1e-2  # of the largest output: queries and softmax weights in bf16, where a span has many queries


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: how many tokens each sequence has behind it and computes now, over heads of some shape."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rotary_dim: int = 64
    parts: tuple[tuple[int, int], ...] = ((0, 5), (37, 1))  # start, stop - start
    window: int | None = None
    q_scale: bool = False
    norms: bool = False
    biased_pairs: int = 0  # pairs of channels of each kv head whose keys have a bias
    block_size: int = BLOCK
    magnitude: float = 1.0  # of the tables of angles, as YaRN scales them


CASES = {
    "decode": Case(parts=((37, 1),)),
    "first token of all": Case(parts=((0, 1),)),
    "decode over several parts": Case(parts=((700, 1), (255, 1), (256, 1), (511, 1))),
    "batch of odd lengths": Case(parts=((1, 1), (15, 1), (16, 1), (17, 1), (31, 1), (100, 1))),
    "a whole prompt": Case(parts=((0, 141),)),
    "a later chunk": Case(parts=((130, 67),)),
    "chunks and decodes": Case(parts=((0, 40), (90, 1), (33, 30), (5, 1), (270, 1))),
    "a few rows across a border of parts": Case(parts=((253, 5), (509, 7))),
    "one head a key": Case(heads=3, kv_heads=3, parts=((0, 33), (40, 1), (300, 3))),
    "seven heads a key": Case(heads=14, parts=((0, 33), (40, 1), (300, 2), (300, 12))),
    "many heads a key": Case(heads=24, kv_heads=1, dim=32, rotary_dim=32, parts=((0, 33), (300, 1), (40, 3))),
    "head_dim 8": Case(dim=8, rotary_dim=8),
    "head_dim 24": Case(dim=24, rotary_dim=24, parts=((0, 40), (50, 1))),
    "head_dim 80": Case(dim=80, rotary_dim=80, parts=((0, 40), (50, 1))),
    "head_dim 88": Case(dim=88, rotary_dim=88, parts=((0, 40), (50, 1))),
    "head_dim 96": Case(dim=96, rotary_dim=96, parts=((0, 40), (50, 1))),
    "head_dim 128": Case(dim=128, rotary_dim=128, parts=((0, 40), (300, 1))),
    "head_dim 256": Case(dim=256, rotary_dim=256, parts=((0, 40), (300, 1))),
    "half of each head turns": Case(dim=80, rotary_dim=32, parts=((0, 40), (50, 1)), biased_pairs=3),
    "a block of rows over several parts": Case(parts=((1015, 20), (2040, 12))),
    "window": Case(parts=((0, 90), (37, 1), (300, 1), (600, 50), (290, 3)), window=33),
    "window of one": Case(parts=((0, 20), (37, 1)), window=1),
    "window of a part and more": Case(parts=((700, 1), (600, 20)), window=300),
    "scaled queries": Case(q_scale=True),
    "normed queries and keys": Case(norms=True),
    "large blocks": Case(block_size=64, parts=((0, 90), (300, 1))),
    "biased keys": Case(parts=((0, 90), (300, 1), (40, 40), (290, 3)), biased_pairs=5),
    "biased keys, all pairs": Case(parts=((0, 90), (300, 1)), biased_pairs=32, magnitude=1.2),
}


def each_backend() -> list[str]:
    native = [name for name in cpu.available() if name != cpu.REFERENCE]
    return native or pytest.skip("no kernels here")


def angles(case: Case, length: int) -> tuple[Tensor, Tensor]:
    speeds = 10_000.0 ** -(torch.arange(0, case.rotary_dim, 2) / case.rotary_dim)
    turned = torch.outer(torch.arange(length).float(), speeds)
    return turned.cos() * case.magnitude, turned.sin() * case.magnitude


def empty_layer(case: Case, kind: str, num_blocks: int) -> PagedLayer:
    generator = torch.Generator().manual_seed(2)
    shape = (num_blocks * case.block_size, case.kv_heads, case.dim)
    # Slots that nobody wrote hold what nobody may see.
    filler = torch.full(shape, 77 if kind == "int8" else torch.nan).to(CACHES[kind])
    layer = PagedLayer(
        num_heads=case.heads,
        rotary_dim=case.rotary_dim,
        keys=filler,
        values=filler.clone(),
        block_size=case.block_size,
    )
    if kind != "int8":
        return layer
    scales = torch.full(shape[:2], torch.nan, dtype=torch.float16)
    bias = None
    if case.biased_pairs:
        bias = torch.zeros(case.kv_heads, case.dim)
        for head in range(case.kv_heads):
            pairs = torch.randperm(case.rotary_dim // 2, generator=generator)[: case.biased_pairs]
            for channels in (pairs, pairs + case.rotary_dim // 2):
                bias[head, channels] = 20 * torch.randn(case.biased_pairs, generator=generator)
        bias[:, case.rotary_dim :] = 3.0
    return replace(layer, key_scales=scales, value_scales=scales.clone(), key_bias=bias)


def copy_of(layer: PagedLayer) -> PagedLayer:
    names = ("keys", "values", "key_scales", "value_scales")
    kept = {name: getattr(layer, name) for name in names}
    return replace(layer, **{name: None if x is None else x.clone() for name, x in kept.items()})


def keys_with_bias(case: Case, layer: PagedLayer, qkv: Tensor) -> Tensor:
    if layer.key_bias is not None:
        first, last = case.heads * case.dim, (case.heads + case.kv_heads) * case.dim
        qkv[:, first:last] += layer.key_bias.flatten()
    return qkv


@dataclass(frozen=True)
class Step:
    layer: PagedLayer
    spans: list[PagedSpan]
    places: PagedPlaces
    qkv: Tensor
    norms: PagedNorms | None


def make_step(case: Case, kind: str) -> Step:
    """The step's arguments, with the sequences' pasts in the cache already; no two blocks of one are neighbours."""
    generator = torch.Generator().manual_seed(1)
    width = (case.heads + 2 * case.kv_heads) * case.dim
    lengths = [start + count for start, count in case.parts]
    tables = [-(-length // case.block_size) for length in lengths]
    order = torch.randperm(sum(tables), generator=generator).to(torch.int32)
    layer = empty_layer(case, kind, sum(tables))
    cos, sin = angles(case, max(*lengths, 16))
    spans = [
        PagedSpan(blocks=blocks.contiguous(), start=start, stop=start + count, cos=cos, sin=sin)
        for blocks, (start, count) in zip(order.split(tables), case.parts, strict=True)
    ]
    gains = [1 + 0.2 * torch.randn(case.dim, generator=generator) for _ in range(2)]
    norms = PagedNorms(q=gains[0], k=gains[1], eps=1e-6) if case.norms else None
    for span in spans:
        if span.start:
            past = keys_with_bias(case, layer, torch.randn(span.start, width, generator=generator))
            paged.paged_attention_reference(
                layer,
                [replace(span, start=0, stop=span.start)],
                PagedPlaces(cos=cos[: span.start], sin=sin[: span.start]),
                past,
                norms=norms,
            )
    rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    scale = 1 + torch.rand(len(rows), generator=generator) if case.q_scale else None
    places = PagedPlaces(cos=cos[rows], sin=sin[rows], q_scale=scale)
    qkv = keys_with_bias(case, layer, torch.randn(len(rows), width, generator=generator))
    return Step(layer, spans, places, qkv, norms)


def run(case: Case, step: Step) -> Tensor:
    return paged_attention(step.layer, step.spans, step.places, step.qkv, norms=step.norms, window=case.window)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_write_and_read_as_the_twin_does(name, kind):
    case = CASES[name]
    step = make_step(case, kind)
    twin = copy_of(step.layer)
    paged.paged_attention_reference(twin, step.spans, step.places, step.qkv, norms=step.norms, window=case.window)
    for backend in each_backend():
        found = replace_layer(step, copy_of(step.layer))
        with cpu.using(backend):
            out = run(case, found)
        assert_same_cache(found.layer, twin)
        # Against the cache as the kernel wrote it, so that no rounding of a key hides an error of reading.
        q, _, _ = paged._turned(step.layer, step.places, step.qkv, step.norms)
        wanted = paged.read_reference(found.layer, step.spans, q, case.window)
        tolerance = MATRIX_UNIT if backend == "amx" and kind != "fp32" else 2e-4 if kind == "int8" else 1e-5
        assert (out - wanted).abs().max() <= tolerance * wanted.abs().max(), (backend, (out - wanted).abs().max())


def replace_layer(step: Step, layer: PagedLayer) -> Step:
    return replace(step, layer=layer)


def assert_same_cache(found: PagedLayer, twin: PagedLayer) -> None:
    """Equal but for roundings that a last bit of fp32 decides."""
    for one, other in ((found.keys, twin.keys), (found.values, twin.values)):
        assert torch.equal(one.isnan(), other.isnan())
        step = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5, torch.int8: 0}[one.dtype]
        slack = 1 if one.dtype == torch.int8 else 1e-6
        difference = (one.float() - other.float()).nan_to_num().abs()
        assert (difference <= step * other.float().nan_to_num().abs() + slack).all()
        if one.dtype != torch.float32:
            assert (difference > 0).float().mean() < 0.01
    if found.key_scales is None:
        return
    for one, other in ((found.key_scales, twin.key_scales), (found.value_scales, twin.value_scales)):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.allclose(one.float().nan_to_num(), other.float().nan_to_num(), rtol=1e-3)


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_in_chunks_attends_as_packed_tokens_do(window):
    case = Case(heads=6, kv_heads=2, parts=((0, 100),))
    whole = make_step(case, "fp32")
    q, k, v = paged._turned(whole.layer, whole.places, whole.qkv, None)
    wanted = PackedAttend([0, 100], [window])(0, q, k, v).flatten(1)
    for backend in cpu.available():
        layer, out = copy_of(whole.layer), []
        with cpu.using(backend):
            for first, last in ((0, 37), (37, 90), (90, 91), (91, 92), (92, 97), (97, 100)):
                span = replace(whole.spans[0], start=first, stop=last)
                places = PagedPlaces(cos=whole.places.cos[first:last], sin=whole.places.sin[first:last])
                out.append(paged_attention(layer, [span], places, whole.qkv[first:last], window=window))
        assert torch.allclose(torch.cat(out), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_sequences_share_a_prefix(kind):
    case = Case(parts=((48, 1), (64, 9), (64, 1)))
    step = make_step(case, kind)
    spans = [replace(span, blocks=torch.cat((step.spans[0].blocks[:3], span.blocks[3:]))) for span in step.spans]
    twin = copy_of(step.layer)
    wanted = paged.paged_attention_reference(twin, spans, step.places, step.qkv)
    for backend in each_backend():
        with cpu.using(backend):
            out = paged_attention(copy_of(step.layer), spans, step.places, step.qkv)
        assert torch.allclose(out, wanted, rtol=0, atol=1e-5 if kind == "fp32" else 5e-3)


@pytest.mark.parametrize("kind", CACHES)
def test_a_row_does_not_depend_on_the_batch_or_on_the_threads(kind):
    case = Case(heads=6, parts=((700, 1), (40, 60), (299, 2), (20, 1)), biased_pairs=4)
    step = make_step(case, kind)
    row = 0
    for backend in each_backend():
        with cpu.using(backend):
            together, row = run(case, replace(step, layer=copy_of(step.layer))), 0
            for span in step.spans:
                rows = slice(row, row + span.stop - span.start)
                row = rows.stop
                places = PagedPlaces(cos=step.places.cos[rows], sin=step.places.sin[rows])
                library = cpu.library()
                library.kq_set_threads(1)
                alone = paged_attention(copy_of(step.layer), [span], places, step.qkv[rows].contiguous())
                library.kq_set_threads(2)
                assert torch.equal(alone, together[rows])


def test_values_that_no_row_sees_do_not_matter():
    """Slots beyond a sequence's end hold NaN in these caches: see empty_layer."""
    step = make_step(Case(parts=((3, 1), (17, 20))), "bf16")
    assert step.layer.keys.isnan().any()
    for backend in each_backend():
        with cpu.using(backend):
            assert run(Case(), replace(step, layer=copy_of(step.layer))).isfinite().all()


@pytest.mark.parametrize("rows", [1, 40])
def test_int8_keys_without_their_bias_lose_a_fraction_of_what_whole_keys_lose(rows):
    """A head whose keys have a few channels that dwarf all else, as those of Qwen v1 to 2.5: docs/decisions/0014."""
    case = Case(heads=4, kv_heads=4, dim=128, rotary_dim=128, parts=((500, rows),), biased_pairs=4)
    step = make_step(case, "int8")
    assert step.layer.key_bias is not None

    def attend(layer: PagedLayer) -> Tensor:
        generator, span = torch.Generator().manual_seed(3), step.spans[0]
        past = keys_with_bias(case, step.layer, torch.randn(500, step.qkv.shape[1], generator=generator))
        places = PagedPlaces(cos=span.cos[:500], sin=span.sin[:500])
        paged_attention(layer, [replace(span, start=0, stop=500)], places, past)
        return paged_attention(layer, step.spans, step.places, step.qkv)

    exact = attend(empty_layer(case, "fp32", len(step.spans[0].blocks)))
    for backend in cpu.available():
        with cpu.using(backend):
            errors = []
            for bias in (None, step.layer.key_bias):
                found = attend(replace(copy_of(step.layer), key_bias=bias))
                errors.append(float((found - exact).norm() / exact.norm()))
        whole, without = errors
        assert without < 0.015 < 3 * 0.015 < whole
