"""Locks hold what a task needs: a unit whose partner is dead is free, and nothing that counts is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from controls import assert_checks_can_fail
from tasks import converted, draw_masks, finish, in_training, outputs, same, uncarried
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.analysis import places
from hatify.modules import Mask
from hatify.verification import prove_by_gradients


class Gated(nn.Module):
    """``up(x) * act(gate(x))``, as in feed-forward layers of language models."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(6, 32 if fused else 16)
        self.gate = None if fused else nn.Linear(6, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1) if self.gate is None else (self.up(x), self.gate(x))
        return self.head(F.silu(self.down(a * F.silu(b))))


class Sized(Gated):
    """The size and the type of a factor are asked for, which reads none of its numbers."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x), self.gate(x)
        return self.head(F.silu(self.down(a * F.silu(b))) / a.shape[1] + torch.zeros_like(a[..., :8]) * b.new_ones(b.shape[1], 8))


class Attention(nn.Module):
    """Queries, keys and values of one layer; scores by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.qkv, self.out, self.head = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            x = torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(8)).softmax(-1), v)
        else:
            x = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1) @ v
        return self.head(F.silu(self.out(x.transpose(1, 2).reshape(batch, tokens, width))).mean(1))


class Rotary(nn.Module):
    """Queries and keys turned by their place before they meet: a sum of two units, clean when it reaches the scores.

    ``prefix`` tokens in front are not turned, nor is what is behind the first ``turned`` numbers of a head.
    """

    def __init__(self, prefix: int = 0, turned: int = 8) -> None:
        super().__init__()
        self.prefix, self.turned = prefix, turned
        self.embed, self.qkv, self.out, self.head = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 8), nn.Linear(8, 3)

    def rotated(self, x: Tensor) -> Tensor:
        front, x = x[:, :, : self.prefix], x[:, :, self.prefix :]
        x, rest = x[..., : self.turned], x[..., self.turned :]
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.linspace(1.0, 0.1, self.turned // 2).repeat(2)
        first, second = x.chunk(2, -1)
        x = x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
        x = x if self.turned == 8 else torch.cat([x, rest], -1)
        return torch.cat([front, x], 2) if self.prefix else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        return self.head(F.silu(self.out(x.transpose(1, 2).reshape(batch, tokens, width))).mean(1))


class CleanProduct(nn.Module):
    """A sum, which is masked on its way, times a gate that is not masked yet: each is zero where it is dead itself only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.down((self.a(x) + self.b(x)) * F.silu(self.gate(x)))))


class Factored(nn.Module):
    """Attention whose keys meet the values first: a query counts where its key does, and a key where its query does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = q @ (k.softmax(2).transpose(-2, -1) @ v)
        return self.head(F.silu(self.out(x.transpose(1, 2).reshape(batch, tokens, width))).mean(1))


class Pooled(nn.Module):
    """A gate for each channel of an image, pooled in two ways: where its partner is dead, nobody reads what was pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.small = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).mean((2, 3), keepdim=True) * F.avg_pool2d(self.small(x), 2)
        return self.head(F.silu(self.down((F.avg_pool2d(self.a(x), 2) * gate).sum((2, 3)))))


NETWORKS = {
    "gated": (lambda: Gated(), (5, 6), ["up.weight", "gate.weight", "up.bias"]),
    "gated, one layer": (lambda: Gated(fused=True), (5, 6), ["up.weight", "up.bias"]),
    "fused attention": (lambda: Attention("fused"), (3, 5, 6), ["qkv.weight", "qkv.bias"]),
    "einsum": (lambda: Attention("einsum"), (3, 5, 6), ["qkv.weight"]),
    "matmul": (lambda: Attention("matmul"), (3, 5, 6), ["qkv.weight"]),
    "sizes asked for": (lambda: Sized(), (3, 5, 6), ["up.weight", "gate.weight"]),
    "rotary": (lambda: Rotary(), (3, 5, 6), ["qkv.weight", "qkv.bias"]),
    "rotary behind a prefix": (lambda: Rotary(prefix=2), (3, 5, 6), ["qkv.weight", "qkv.bias"]),
    "rotary on a part": (lambda: Rotary(turned=4), (3, 5, 6), ["qkv.weight", "qkv.bias"]),
    "keys meet values first": (lambda: Factored(), (3, 5, 6), ["qkv.weight", "qkv.bias"]),
    "pooled": (lambda: Pooled(), (3, 3, 6, 6), ["a.weight", "gate.weight", "small.weight"]),
    "clean product": (lambda: CleanProduct(), (5, 6), ["a.weight", "b.weight", "gate.weight"]),
}


def _network(name: str, **options) -> tuple[HATModel, Tensor, list[str]]:
    make, shape, narrowed = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    return converted(make(), x, **options), x, narrowed


@pytest.mark.parametrize("name", NETWORKS)
def test_every_locked_weight_counts(name: str) -> None:
    hat, _, narrowed = _network(name)
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and proof.tightness > 0.95  # a head whose values are all dead needs no scores
    assert prove_by_gradients(_network(name, locking="paper")[0]).tightness < 0.9
    for parameter in narrowed:
        assert prove_by_gradients(hat, without_locks=[parameter]).leak > 0
    assert hatify.verify(hat).ok
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_locked_than_is_live(name: str) -> None:
    hat, _, narrowed = _network(name)
    paper = _network(name, locking="paper")[0]  # the paper's rule asks what is live; for one task it is the exact one but for this
    for one in (hat, paper):
        draw_masks(one)
    tight, wide = hat.locks([0]), paper.locks([0])
    assert all(bool((tight[n] <= wide[n]).all()) for n in wide)
    assert {n for n in wide if not torch.equal(tight[n], wide[n])} >= set(narrowed)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_free_may_hold_any_number(name: str, number: float) -> None:
    """A dead partner is a mask, not a product with zero: the rows that it frees reach the task by no number."""
    hat, x, narrowed = _network(name)
    paper = _network(name, locking="paper")[0]
    draw_masks(hat)
    draw_masks(paper)
    finish(hat, 0)
    before = outputs(hat, (x,), task=0)
    needed, live = hat.locks([0]), paper.locks([0])
    with torch.no_grad():
        for parameter in narrowed:
            freed = live[parameter] & ~needed[parameter]
            assert freed.any()
            hat.get_parameter(parameter)[freed] = number
    assert same(outputs(hat, (x,), task=0), before)
    with torch.no_grad():  # and a needed one does
        hat.get_parameter(narrowed[0])[needed[narrowed[0]]] = number
    assert not same(outputs(hat, (x,), task=0), before)


class ReadTwice(Gated):
    """The first factor is read by the product and by itself."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x), self.gate(x)
        return self.head(F.silu(self.down(a * F.silu(b)))) + a.square().sum(-1, keepdim=True)


class QueriesReadTwice(nn.Module):
    """The queries are compared with keys, and read by a layer of their own before that or after."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.q, self.k = first, nn.Linear(6, 8), nn.Linear(6, 8)
        self.alone, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        alone = self.alone(q) if self.first else None
        out = (q @ k.transpose(-2, -1)).softmax(-1) @ k
        alone = self.alone(q) if alone is None else alone
        return self.head((F.silu(alone) + out).mean(1))


@pytest.mark.parametrize("first", [True, False])
def test_a_value_is_masked_by_its_own_gates_where_it_is_read_alone(first: bool) -> None:
    """With its partner's too where they meet: one mask does not stand for the other."""
    hat = converted(QueriesReadTwice(first), torch.randn(3, 5, 6))
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].fill_(1.0)
        hat.maskers["k"].embeddings[0][:4] = -1.0  # queries that have a dead partner
    args, _ = hat.example_inputs
    before = outputs(hat, args, task=0)
    with torch.no_grad():
        hat.get_parameter("q.weight")[:4] += 1.0
    assert bool(hat.locks([0])["q.weight"].all()) and not same(outputs(hat, args, task=0), before)
    assert hatify.verify(hat).ok


class CalledTwice(nn.Module):
    """One layer, once gated by another and once not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.gate = nn.Linear(6, 6), nn.Linear(6, 16), nn.Linear(6, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        return self.head(F.silu(gated)) + self.head(F.silu(self.down(self.up(x + 1))))


class Squeezed(nn.Module):
    """Both factors are clean by the time they meet: nothing masks the product, so a dead factor must not meet an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.up(x)), torch.relu(self.gate(x))
        first = a.sum() + b.sum()
        return self.head(F.silu(self.down(a * b))) + first


@pytest.mark.parametrize(
    ("make", "kept"),
    [(ReadTwice, ["up.weight"]), (CalledTwice, ["up.weight", "up.bias"]), (Squeezed, ["up.weight", "gate.weight"])],
)
def test_what_anything_else_reads_stays_locked(make, kept: list[str]) -> None:
    x = torch.randn(5, 6)
    torch.manual_seed(0)
    hat, paper = converted(make(), x), converted(make(), x, locking="paper")
    for one in (hat, paper):
        draw_masks(one)
    for parameter in kept:
        assert torch.equal(hat.locks([0])[parameter], paper.locks([0])[parameter])
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and hatify.verify(hat).ok


class CastLike(nn.Module):
    """``type_as`` reads a type: the gates of what is cast stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(F.silu(self.b(x.double().type_as(x))))


def test_a_cast_to_the_type_of_a_gated_tensor_keeps_the_gates() -> None:
    hat = converted(CastLike(), torch.randn(4, 6))
    draw_masks(hat)
    dead = ~hat.maskers["a"].live(0)
    assert dead.any() and not hat.locks([0])["b.weight"][:, dead].any()
    assert prove_by_gradients(hat).tightness == 1.0


class Table(nn.Module):
    """A table read by a function, and scores far beyond what a softmax can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 16))
        self.q, self.k, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        return self.head(((100.0 * self.q(x)) @ (100.0 * self.k(x)).transpose(-2, -1)).softmax(-1) @ F.gelu(x - 9.0)).mean(1)


def test_rows_that_no_input_names_and_saturated_functions_hide_no_lock() -> None:
    hat = converted(Table(), torch.randint(0, 7, (3, 5)))
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and proof.by_parameter["table"] == 1.0
    assert proof.by_parameter["q.weight"] == proof.by_parameter["k.weight"] == 1.0


class Ends(nn.Module):
    """The first tokens are gated by one layer and the last ones by another; which token is both depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.rest = nn.Linear(6, 16), nn.Linear(6, 16)
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.front(x[:, :2]), self.rest(x)], 1)
        left, right = F.silu(self.left(x[:, :1])), F.silu(self.right(x[:, :1]))
        return self.head(F.silu(self.down(torch.cat([tokens[:, :3] * left, tokens[:, -3:] * right], 1))).mean(1))


def _numbers_differ_at(tokens: int) -> bool:
    """Whether narrower masks give other numbers on so many tokens; eight are the example."""
    found = []
    for locking in ("exact", "paper"):
        torch.manual_seed(0)
        hat = converted(Ends(), torch.randn(3, 8, 6), locking=locking)
        with torch.no_grad():
            for masker in hat.maskers.values():
                masker.embeddings[0].fill_(1.0)
            hat.maskers["left"].embeddings[0][:8] = -1.0  # of the first tokens the half is gated away, of the last ones nothing
        finish(hat, 0)
        found.append(outputs(hat, (torch.randn(3, tokens, 6),), task=0))
    return not same(*found)


def test_a_place_counts_wherever_it_may_be_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _numbers_differ_at(8) and not _numbers_differ_at(2)
    monkeypatch.setattr(places, "is_open_size", lambda size: False)  # the control: places as the example has them
    monkeypatch.setattr(places, "open_places", lambda call: [])
    assert not _numbers_differ_at(8) and _numbers_differ_at(2)


@pytest.mark.parametrize("name", NETWORKS)
def test_narrower_masks_give_the_same_numbers(name: str) -> None:
    hat, x, _ = _network(name)
    paper = _network(name, locking="paper")[0]
    for one in (hat, paper):
        draw_masks(one)
        finish(one, 0)
    assert same(outputs(hat, (x,), task=0), outputs(paper, (x,), task=0))


@pytest.mark.parametrize("name", ["rotary", "rotary behind a prefix", "rotary on a part", "clean product"])
def test_soft_masks_are_no_narrower(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft factor of a partner is in the partner; carried in weights, they are the same but for rounding."""
    hat, x, _ = _network(name)
    paper = _network(name, locking="paper")[0]
    for one in (hat, paper):
        draw_masks(one)
    expected = in_training(uncarried(paper), x)
    assert same(in_training(uncarried(hat), x), expected)
    assert all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(in_training(hat, x), expected))
    monkeypatch.setattr(Mask, "gates", lambda self, hard: self)  # the control: the least of both
    assert not same(in_training(uncarried(hat), x), expected)


@pytest.mark.parametrize("tokens", [3, 5, 9])
def test_a_prefix_is_free_of_the_rest_at_every_size(tokens: int) -> None:
    hat, _, narrowed = _network("rotary behind a prefix")
    paper = _network("rotary behind a prefix", locking="paper")[0]
    draw_masks(hat)
    draw_masks(paper)
    finish(hat, 0)
    x = torch.randn(3, tokens, 6)
    before, locks, live = outputs(hat, (x,), task=0), hat.locks([0]), paper.locks([0])
    with torch.no_grad():
        for parameter in narrowed:
            hat.get_parameter(parameter)[live[parameter] & ~locks[parameter]] = float("nan")
    assert same(outputs(hat, (x,), task=0), before)
