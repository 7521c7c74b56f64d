from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from kiloq.model import PackedAttend, Transformer
from kiloq.train.row_attend import PieceAttend, RowAttend

PIECES = [0, 5, 16, 17, 30, 32, 48]  # rows of 16


def row_attend(windows: tuple[int | None, ...], block: int | None) -> RowAttend:
    return RowAttend(PIECES, windows, seq_len=16, dtype=torch.float32, device="cpu", block=block)


@pytest.mark.parametrize("block", [None, 4, 5, 16, 64])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_attend_as_packed_sequences_do(block: int | None, num_kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(48, heads, 8) for heads in (4, num_kv_heads, num_kv_heads))
    expected = PackedAttend(PIECES, (None, window))(1, q, k, v)
    torch.testing.assert_close(row_attend((None, window), block)(1, q, k, v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_pieces_one_by_one_attend_as_packed_sequences_do(window: int | None) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(200, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    pieces = [0, 5, 70, 134, 200]
    results = []
    for attend in (PackedAttend(pieces, (None, window)), PieceAttend(pieces, (None, window))):
        out = attend(1, *tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [None, 8])
def test_a_packed_document_gives_the_logits_of_the_document_alone(
    make_model: Callable[..., Transformer], block: int | None
) -> None:
    model = make_model(num_kv_heads=2, window=6)
    ids = torch.randint(0, 64, (48,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(PIECES)])
    with torch.no_grad():
        packed = model.head(model(ids, model.rotation(positions), row_attend(model.config.windows, block)))
        for start, stop in pairwise(PIECES):
            torch.testing.assert_close(packed[start:stop], model.logits(ids[start:stop]), rtol=1e-5, atol=1e-5)
