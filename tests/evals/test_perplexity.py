"""Perplexity agrees with the definition, and with any way to cut the work."""

import math

import pytest
import torch

from kiloq.errors import RequestError
from kiloq.evals import perplexity as room
from kiloq.evals.perplexity import Perplexity, Row, perplexity, perplexity_of_rows
from kiloq.model import Transformer
from tests.tiny import tiny_config

CONFIG = tiny_config("qwen", original_length=16, vocab_size=97, num_heads=2, num_kv_heads=2, head_dim=16, max_length=64)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


IDS = torch.randint(0, 97, (203,), generator=torch.Generator().manual_seed(1)).tolist()


def by_definition(model: Transformer, rows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        scores = model.logits(torch.tensor(row)).log_softmax(-1)
        total -= sum(scores[i, row[i + 1]].item() for i in range(len(row) - 1))
        count += len(row) - 1
    return math.exp(total / count)


def test_is_the_definition(model: Transformer) -> None:
    rows = [IDS[i : i + 20] for i in range(0, 203, 20)]  # beyond 16 tokens: NTK and LogN count too
    found = perplexity(model, IDS, window=20)
    assert found.value == pytest.approx(by_definition(model, rows), rel=1e-4)
    assert found.tokens == sum(len(row) - 1 for row in rows)


def test_batches_and_pieces_of_logits_change_nothing(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = [IDS[:30], IDS[30:60], IDS[60:75], IDS[75:90], [5], IDS[90:120]]
    rows = [Row(ids, [i % 3 > 0 for i in range(len(ids))]) for ids in cut]
    whole = perplexity_of_rows(model, rows)
    monkeypatch.setattr(room, "_TOKENS", 1)
    monkeypatch.setattr(room, "_LOGITS", 500)
    pieces = perplexity_of_rows(model, rows)
    assert pieces.tokens == whole.tokens
    assert pieces.value == pytest.approx(whole.value, rel=1e-5)


def test_only_scored_tokens_count(model: Transformer) -> None:
    row = Row(IDS[:40], [True] + [7 <= i < 12 or i == 30 for i in range(1, 40)])
    scores = model.logits(torch.tensor(row.ids)).log_softmax(-1)
    losses = [-scores[i - 1, row.ids[i]].item() for i in (7, 8, 9, 10, 11, 30)]
    unscored = Row(IDS[:5], [True, False, False, False, False])  # nothing foretells the first
    found = perplexity_of_rows(model, [unscored, row])
    assert found.tokens == 6
    assert found.value == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)


def test_a_change_has_the_standard_error_of_its_rows() -> None:
    before = Perplexity(math.exp(1.0), 400, tuple((4.0, 4) for _ in range(100)))
    added = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    rows = tuple((4.0 + 4 * one, 4) for one in added.tolist())
    change, error = before.change(Perplexity(math.exp(1 + added.mean().item()), 400, rows))
    assert change == pytest.approx(100 * (math.exp(added.mean().item()) - 1))
    assert error == pytest.approx(100 * (added.std() / 10).item())
    one = Perplexity(2.0, 4, ((4 * math.log(2), 4),))
    assert math.isnan(one.change(one)[1])


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    assert perplexity(model.eval(), IDS).value == pytest.approx(97, rel=1e-5)


def test_too_little_text_is_an_error(model: Transformer) -> None:
    with pytest.raises(RequestError, match="no two tokens"):
        perplexity(model, [3])
    with pytest.raises(RequestError, match="window is 1"):
        perplexity(model, IDS, window=1)
