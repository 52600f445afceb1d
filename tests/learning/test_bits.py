"""Choosing elements by their bits is choosing elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hatify.learning import bits
from hatify.learning.protection import Locked

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int8, torch.int64, torch.bool]
ODD = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42, -3.0]


def tensor(dtype: torch.dtype, layout: str) -> Tensor:
    torch.manual_seed(0)
    made = torch.randn(4, 7, 3, 5) * 3
    if dtype.is_floating_point or dtype.is_complex:
        made[0, :, 0, 0] = torch.tensor(ODD)
        made[1, :, 1, 1] = torch.tensor(ODD)
    made = made.to(dtype) if dtype.is_floating_point or dtype.is_complex else made.round().to(dtype)
    return {"dense": made, "last": made.to(memory_format=torch.channels_last), "strided": made.transpose(0, 3)}[layout]


def words(data: Tensor) -> Tensor:
    return data.view(bits.WORDS[data.element_size()])


@pytest.mark.parametrize("piece", [bits.PIECE, 256], ids=["whole", "pieces"])
@pytest.mark.parametrize("layout", ["dense", "last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clearing_and_putting_is_filling_and_choosing(
    dtype: torch.dtype, layout: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "PIECE", piece)
    data, other = tensor(dtype, layout), tensor(dtype, layout).flip(0)
    lock = torch.rand(data.shape) < 0.5
    free = bits.cleared(lock, like=data)
    assert free.stride() == data.stride() and free.dtype is torch.int8
    assert torch.equal(words(bits.clear_(data.clone(), free)), words(data.masked_fill(lock, 0)))
    kept = bits.clear_(other.clone(), ~free)
    merged = bits.put_(data.clone(), free, kept)
    assert torch.equal(words(merged), torch.where(lock, words(other), words(data)))  # -0, NaN and their payloads included


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_restoring_is_to_the_bit_and_leaves_the_rest(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(tensor(dtype, "dense"))
    lock = torch.rand(parameter.shape) < 0.5
    before = parameter.detach().clone()
    entry = Locked.of("weight", parameter, lock)
    with torch.no_grad():
        parameter.copy_(tensor(dtype, "dense").flip(1))
    moved = parameter.detach().clone()
    assert entry.moved() > 0 and entry.written
    entry.restore()
    assert torch.equal(words(parameter.detach()), torch.where(lock, words(before), words(moved)))
    assert entry.moved() == 0 and not entry.written
    assert torch.equal(words(entry.values()), words(before[lock]))


def test_a_narrowed_lock_goes_back_to_the_wide_one() -> None:
    parameter = nn.Parameter(tensor(torch.float32, "dense"))
    before = parameter.detach().clone()
    wide = torch.rand(parameter.shape) < 0.7
    narrow = wide & (torch.rand(parameter.shape) < 0.5)
    entry = Locked.of("weight", parameter, wide)
    entry.narrow(narrow)
    parameter.data.fill_(5.0)
    entry.restore()
    assert torch.equal(words(parameter.detach()), torch.where(narrow, words(before), words(torch.full_like(before, 5.0))))
    gradient = entry.mask_gradient(torch.full_like(before, torch.nan))
    assert torch.equal(gradient == 0, narrow)
    entry.return_to_old()
    assert torch.equal(words(parameter.detach()), torch.where(wide, words(before), words(torch.full_like(before, 5.0))))
