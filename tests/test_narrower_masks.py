"""Narrower masks give the numbers that the wide ones give, whoever else reads what they mask, and at every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tasks import converted, draw_masks, finish, in_training, outputs, same, uncarried
from torch import Tensor, fx, nn

import hatify
from hatify import HATModel
from hatify.analysis import places
from hatify.analysis.heads import operator_name
from hatify.analysis.needs import _Needs
from hatify.gates.rules import contractions
from hatify.gates.rules.contractions import Contraction
from hatify.modules import Mask


class Product(nn.Module):
    """A value that is masked before it meets a clean partner, and read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.b, self.c = (nn.Linear(6, 16) for _ in range(3))
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def ended(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.down(x)))

    def both(self, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> tuple[Tensor, Tensor]:
        u = act(self.u(x))
        return u, self.ended(u * (self.b(x) + self.c(x)))


class Returned(Product):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, y = self.both(x)
        return y, u


class Dropped(Product):
    def forward(self, x: Tensor) -> Tensor:
        u, y = self.both(x)
        return y + F.dropout(u, 0.5, self.training).sum(-1, keepdim=True)


class Logarithm(Product):
    def forward(self, x: Tensor) -> Tensor:
        u, y = self.both(x, torch.sigmoid)
        return y + self.ended(u.log())


class Divisor(Product):
    def forward(self, x: Tensor) -> Tensor:
        u, y = self.both(x, torch.sigmoid)
        return y + self.ended(self.b(x) / u)


class OtherType(Product):
    """``type_as`` a tensor of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        like = self.like(x)
        return self.ended(self.u(x).double().type_as(like) * F.silu(self.c(x))) + self.head(like)


class Scored(nn.Module):
    """Values behind scores that a gate for each head, or for each token, makes zero: a softmax of zeros is not zero."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens, self.gate = tokens, nn.Linear(16, 4)
        self.a, self.b, self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = (self.a(x) + self.b(x)).reshape(-1, 4, 4), self.gate(x).unsqueeze(-1)
        x = x.reshape(-1, 4, 4)
        if self.tokens:
            x = F.scaled_dot_product_attention(x + 1, x * gate, value)
        else:
            parts = (t.unsqueeze(2) for t in (x * gate, x + 1, value))
            x = F.scaled_dot_product_attention(*parts)
        return self.head(F.silu(self.out(x.reshape(-1, 16))))


class GroupedHeads(nn.Module):
    """Four heads of queries for two of keys, all of them sums, which are clean when they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.also_q, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 8)
        self.k, self.also_k, self.v, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.reshape(*x.shape[:2], -1, 4).transpose(1, 2)

        q, k = heads(self.q(x) + self.also_q(x)), heads(self.k(x) + self.also_k(x))
        x = F.scaled_dot_product_attention(q, k, heads(self.v(x)), enable_gqa=True)
        return self.head(F.silu(self.out(x.transpose(1, 2).flatten(2))).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "returned": (Returned, (5, 6)),
    "dropped in train mode": (Dropped, (5, 6)),
    "logarithm": (Logarithm, (5, 6)),
    "divisor": (Divisor, (5, 6)),
    "type of another": (OtherType, (5, 6)),
    "a gate for each head": (lambda: Scored(tokens=False), (3, 16)),
    "a gate for each token": (lambda: Scored(tokens=True), (3, 16)),
    "grouped heads": (GroupedHeads, (3, 5, 6)),
}


class TwoHalves(Product):
    """Places of two kinds, told apart by a gate ``left`` and a gate ``right``."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16)

    def places(self, front: Tensor, rest: Tensor, dim: int) -> Tensor:
        return torch.cat([self.b(front) + self.c(front), self.c(rest) + self.b(rest)], dim)


class SplitByAnother(TwoHalves):
    """Twelve places, split where the number of ``y``'s tokens says."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = y.shape[1]
        front, rest = self.places(x[:, :4], x[:, 4:], 1).split([first, 12 - first], 1)
        gated = front * F.silu(self.left(y[:, :1])), rest * F.silu(self.right(y[:, :1]))
        return sum(self.ended(part).mean(1) for part in gated)


class Regrouped(TwoHalves):
    """Twelve places of each token, of which a reshape makes tokens of each place without moving anything."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        places = self.places(x[:, :, :6], x[:, :, 6:], 2).reshape(batch, 12, tokens, 16)
        mean = x.mean((1, 2))
        left, right = F.silu(self.left(mean)), F.silu(self.right(mean))
        return self.ended(places * torch.stack([left, left, right, right] * 3, 1).unsqueeze(2)).mean((1, 2))


def _split(tokens: int) -> tuple[Tensor, ...]:
    return torch.randn(3, 12, 6), torch.randn(3, tokens, 6)


def _regrouped(tokens: int) -> tuple[Tensor, ...]:
    return (torch.randn(4, tokens, 12, 6),)


SIZED = {"split": (SplitByAnother, _split, 5), "regrouped": (Regrouped, _regrouped, 3)}


def _pairs(make: Callable[[], nn.Module], example: tuple[Tensor, ...]) -> Iterator[tuple[HATModel, HATModel]]:
    """The same network with narrow masks and with wide ones, a task finished in both, with several draws of masks."""
    hats = []
    for locking in ("exact", "paper"):
        torch.manual_seed(0)
        hats.append(converted(make(), example, locking=locking))
    for seed in range(4):
        for hat in hats:
            draw_masks(hat, seed)
            finish(hat, 0)
        yield hats[0], hats[1]


def _differ(make: Callable[[], nn.Module], example: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> bool:
    return not all(same(outputs(n, inputs, task=0), outputs(w, inputs, task=0)) for n, w in _pairs(make, example))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_are_the_same_whoever_else_reads(name: str) -> None:
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    assert not _differ(make, (x,), (x,))


@pytest.mark.parametrize(("kind", "sizes"), [("split", (2, 5, 9)), ("regrouped", (3, 5, 24))])
def test_the_numbers_are_the_same_at_every_size(kind: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    make, draw, example = SIZED[kind]
    assert not any(_differ(make, draw(example), draw(size)) for size in sizes)
    monkeypatch.setattr(places, "_regrouped", lambda *sizes: [])  # the control: places as the example has them
    monkeypatch.setattr(places, "open_places", lambda call: [])
    assert any(_differ(make, draw(example), draw(size)) for size in sizes)


@pytest.mark.parametrize(
    ("name", "overlooked"),
    [
        ("returned", lambda user: user.op == "output"),
        ("dropped in train mode", lambda user: "by_mode" in user.meta),
        ("logarithm", lambda user: operator_name(user) == "log"),
    ],
)
def test_a_reader_that_is_overlooked_reads_other_numbers(
    name: str, overlooked: Callable[[fx.Node], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETWORKS[name]
    x, read_by = torch.randn(shape), _Needs._read_by
    monkeypatch.setattr(_Needs, "_read_by", lambda self, user, *rest: [] if overlooked(user) else read_by(self, user, *rest))
    assert _differ(make, (x,), (x,))


@pytest.mark.parametrize("name", ["a gate for each head", "a gate for each token"])
def test_values_are_no_factors_of_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETWORKS[name]
    spelled = contractions.SPELLED["scaled_dot_product_attention"]

    def wrong(call) -> Contraction:
        found = spelled(call)
        return Contraction(found.operands, found.out, found.operands)

    monkeypatch.setitem(contractions.SPELLED, "scaled_dot_product_attention", wrong)
    x = torch.randn(shape)
    assert _differ(make, (x,), (x,))


@pytest.mark.parametrize("name", ["returned", "divisor"])
def test_soft_masks_are_those_of_the_value_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partner's soft factor is in the partner: were it multiplied in here as well, it would count twice."""
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    narrow, wide = next(_pairs(make, (x,)))
    expected = in_training(uncarried(wide), x)
    assert same(in_training(uncarried(narrow), x), expected)
    for found, value in zip(in_training(narrow, x), expected):
        assert torch.allclose(found, value, 1e-4, 1e-5)
    monkeypatch.setattr(Mask, "gates", lambda self, hard: self)  # the control: the least of both
    assert not same(in_training(uncarried(narrow), x), expected)


@pytest.mark.parametrize("name", ["returned", "divisor"])
def test_a_directory_holds_both_kinds_of_gates(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    hat, _ = next(_pairs(make, (x,)))
    loaded = hatify.load(hatify.save(hat, tmp_path / "saved"))
    assert [m.extra_repr() for m in loaded.modules() if isinstance(m, Mask)] == [
        m.extra_repr() for m in hat.modules() if isinstance(m, Mask)
    ]
    assert same(outputs(loaded, (x,), task=0), outputs(hat, (x,), task=0))
    assert same(in_training(loaded, x), in_training(hat, x))
