"""Locks hold at every size: which place a movement shows may depend on a size that the example does not fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tasks import converted, draw_masks, finish, outputs, same
from torch import Tensor, nn

import hatify
from hatify.analysis import places


class TwoHalves(nn.Module):
    """Twelve places, the first of them behind one layer of each channel alone and the rest behind another; two gates read them."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.left, self.right = (nn.Linear(6, 16) for _ in range(3))
        self.front, self.rest = nn.Conv1d(16, 16, 1, groups=16), nn.Conv1d(16, 16, 1, groups=16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def halves(self, x: Tensor) -> Tensor:
        u = self.u(x).mT
        return torch.cat([self.front(u[:, :, :6]), self.rest(u[:, :, 6:])], 2)

    def ended(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.down(x)))


class SplitByAnother(TwoHalves):
    """Split where the number of ``y``'s tokens says."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = y.shape[1]
        front, rest = self.halves(x).split([first, 12 - first], 2)
        gated = front * self.left(y[:, 0]).unsqueeze(-1), rest * self.right(y[:, 0]).unsqueeze(-1)
        return sum(self.ended(part.mT).mean(1) for part in gated)


class Regrouped(TwoHalves):
    """Places of each token, of which a reshape makes tokens of each place without moving anything."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        places = self.halves(x.flatten(0, 1)).mT.reshape(batch, tokens, 12, 16).reshape(batch, 12, tokens, 16)
        mean = x.mean((1, 2))
        gates = torch.stack([self.left(mean), self.left(mean), self.right(mean), self.right(mean)] * 3, 1)
        return self.ended(places * gates.unsqueeze(2)).mean((1, 2))


def _split(tokens: int) -> tuple[Tensor, ...]:
    return torch.randn(3, 12, 6), torch.randn(3, tokens, 6)


def _regrouped(tokens: int) -> tuple[Tensor, ...]:
    return (torch.randn(4, tokens, 12, 6),)


def _drifts(make: Callable[[], nn.Module], draw: Callable[[int], tuple[Tensor, ...]], example: int, other: int) -> bool:
    """Whether what is free at one size changes a finished task at another."""
    torch.manual_seed(0)
    hat, inputs = converted(make(), draw(example)), draw(other)
    for seed in range(6):
        draw_masks(hat, seed)
        hat.finished_tasks.clear()
        finish(hat, 0)
        before = outputs(hat, inputs, task=0)
        with torch.no_grad():
            for name, lock in hat.locks([0]).items():
                hat.get_parameter(name)[~lock] += 1.0
        if not same(outputs(hat, inputs, task=0), before):
            return True
    return False


@pytest.mark.parametrize(("make", "draw", "sizes"), [(SplitByAnother, _split, (7, 2)), (Regrouped, _regrouped, (3, 5))])
def test_locks_hold_wherever_a_place_may_be(make, draw, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    example, other = sizes
    assert not _drifts(make, draw, example, example) and not _drifts(make, draw, example, other)
    monkeypatch.setattr(places, "open_places", lambda call: [])  # the control: places as the example has them
    monkeypatch.setattr(places, "_regrouped", lambda *sizes: [])
    assert not _drifts(make, draw, example, example) and _drifts(make, draw, example, other)


class OtherType(nn.Module):
    """``type_as`` a tensor of another width: of that nothing but the type is read."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.gate, self.like = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 8)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        like = self.like(x)
        return self.head(F.silu(self.down(self.u(x).double().type_as(like) * F.silu(self.gate(x)))) + like)


def test_a_tensor_that_lends_its_type_may_have_another_width() -> None:
    assert hatify.verify(converted(OtherType(), torch.randn(5, 6))).ok
