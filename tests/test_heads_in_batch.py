"""Heads that are put next to the batch keep their gates: these repeat along a size that is open."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from controls import assert_checks_can_fail
from tasks import converted, draw_masks, finish, in_training, outputs, same, uncarried
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.analysis import analyst, places, sizes
from hatify.rewrite import graph
from hatify.verification import prove_by_gradients

HEADS, WIDTH = 4, 8


class Attention(nn.Module):
    """Queries, keys and values of one layer. ``folded`` heads stand next to the batch; ``inside`` is what happens to them there."""

    def __init__(self, folded: bool = True, inside: str = "") -> None:
        super().__init__()
        self.folded, self.inside = folded, inside
        self.embed, self.qkv, self.out, self.head = nn.Linear(6, 16), nn.Linear(16, 96), nn.Linear(32, 8), nn.Linear(8, 3)
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def fold(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x.view(batch, tokens, HEADS, WIDTH)
        return x.permute(0, 2, 1, 3).reshape(batch * HEADS, tokens, WIDTH) if self.folded else x.permute(0, 2, 1, 3)

    def changed(self, x: Tensor) -> Tensor:
        if self.inside == "norm":
            return self.norm(x)
        if self.inside == "conv":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.inside == "mix":
            return self.mix(x)
        if self.inside == "turned":
            return x.flip(0).roll(1, 0)
        if self.inside == "scaled":
            return F.silu(x) * x.new_full((x.shape[0], 1, 1), 0.5)
        if self.inside == "once more":
            return torch.cat([x, x])[: x.shape[0]]
        return x

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (self.changed(self.fold(part)) for part in self.qkv(self.embed(x)).chunk(3, -1))
        x = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        x = x.view(batch, HEADS, tokens, WIDTH) if self.folded else x
        return self.head(F.silu(self.out(x.permute(0, 2, 1, 3).reshape(batch, tokens, HEADS * WIDTH))).mean(1))


class OfTorch(nn.Module):
    """torch's own attention: the fused kernel, the weights asked for, a mask added to the scores."""

    def __init__(self, how: str, batch_first: bool = True) -> None:
        super().__init__()
        self.how, self.embed, self.head = how, nn.Linear(6, 32), nn.Linear(8, 3)
        self.attention, self.down = nn.MultiheadAttention(32, HEADS, batch_first=batch_first), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.how == "masked" else None
        x = self.attention(x, x, x, need_weights=self.how != "fused", attn_mask=ahead)[0]
        return self.head(F.silu(self.down(x)).mean(1))


NETWORKS = {
    "torch's, fused": lambda: OfTorch("fused"),
    "torch's, with weights": lambda: OfTorch("weights"),
    "torch's, masked": lambda: OfTorch("masked"),
    "torch's, batch second": lambda: OfTorch("weights", batch_first=False),
    "by hand": lambda: Attention(),
    "a norm in each head": lambda: Attention(inside="norm"),
    "a convolution in each head": lambda: Attention(inside="conv"),
    "a layer in each head": lambda: Attention(inside="mix"),
    "turned along the batch": lambda: Attention(inside="turned"),
    "scaled": lambda: Attention(inside="scaled"),
    "doubled and halved": lambda: Attention(inside="once more"),
}
TIGHT = tuple(name for name in NETWORKS if "torch" in name or name in ("by hand", "a convolution in each head", "scaled"))


def made(name: str, **options) -> HATModel:
    torch.manual_seed(0)
    return converted(NETWORKS[name](), torch.randn(3, 5, 6), **options)


@pytest.fixture
def no_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: gates along an open size are lost."""
    for room in (sizes, places):
        monkeypatch.setattr(room, "repeats", lambda ids, dim, size: ids.shape[dim] == 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_finished_task_stays_at_every_size(name: str) -> None:
    """What is unlocked may hold any number, at batches and lengths that the capture did not see."""
    hat = made(name)
    draw_masks(hat)
    finish(hat, 0)
    inputs = [torch.randn(batch, tokens, 6) for batch, tokens in ((1, 5), (2, 5), (3, 5), (5, 2), (7, 9))]
    before = [outputs(hat, (x,), task=0) for x in inputs]
    locks = hat.locks([0])
    with torch.no_grad():
        for name, lock in locks.items():
            hat.get_parameter(name)[~lock] = 1e3
    assert all(same(outputs(hat, (x,), task=0), found) for x, found in zip(inputs, before))
    assert hatify.verify(hat).ok
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_unlocked_counts(name: str) -> None:
    assert prove_by_gradients(made(name)).leak == 0.0


@pytest.mark.parametrize("name", TIGHT)
def test_what_is_locked_counts(name: str) -> None:
    hat = made(name)
    assert prove_by_gradients(hat).tightness > 0.95
    shared = "attention.in_proj_weight" if "torch" in name else "qkv.weight"
    assert prove_by_gradients(hat, without_locks=[shared]).leak > 0


@pytest.mark.parametrize("name", TIGHT)
def test_lost_gates_lock_more(name: str, no_repeats: None) -> None:
    """The negative control."""
    assert prove_by_gradients(made(name)).tightness < 0.9


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("finished", [False, True])
def test_masks_are_those_of_heads_on_their_own(batch: int, finished: bool) -> None:
    """The same network with heads in a dimension of their own gives the same numbers and gradients, soft and binary."""
    torch.manual_seed(0)
    apart = Attention(folded=False)
    folded = Attention()
    folded.load_state_dict(apart.state_dict())
    hats = [converted(network, torch.randn(3, 5, 6)) for network in (apart, folded)]
    x = torch.randn(batch, 5, 6)
    for hat in hats:
        draw_masks(hat)
        finish(hat, *(0,) * finished)
    assert same(outputs(hats[0], (x,), task=0, mask_scale=2.0), outputs(hats[1], (x,), task=0, mask_scale=2.0))
    assert all(torch.equal(hats[0].locks([0])[name], lock) for name, lock in hats[1].locks([0]).items())
    if not finished:
        assert all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(*(in_training(hat, x, task=0) for hat in hats)))


@pytest.mark.parametrize("name", NETWORKS)
def test_carried_masks_are_the_same(name: str) -> None:
    hat = made(name)
    draw_masks(hat)
    x = torch.randn(2, 5, 6)
    for how in ({}, {"mask_scale": 2.0}):
        a, b = (outputs(one, (x,), task=0, **how) for one in (hat, uncarried(hat)))
        assert all(torch.allclose(p, q, 1e-4, 1e-5) for p, q in zip(a, b))


@pytest.mark.parametrize("name", ["torch's, with weights", "by hand", "a convolution in each head"])
def test_it_is_stored_and_extracted(name: str, tmp_path: Path) -> None:
    hat = made(name)
    draw_masks(hat)
    finish(hat, 0)
    x = torch.randn(2, 5, 6)
    expected = outputs(hat, (x,), task=0)
    hatify.save(hat, tmp_path / "net")
    assert same(outputs(hatify.load(tmp_path / "net").eval(), (x,), task=0), expected)
    for slim in (False, True):
        plain = hatify.extract(copy.deepcopy(hat), 0, slim=slim).eval()
        with torch.no_grad():
            assert torch.allclose(plain(x), expected[0], 1e-4, 1e-5)


class HeadsFirst(Attention):
    """Heads outside of the batch: their gates do not repeat."""

    def fold(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, HEADS, WIDTH).permute(2, 0, 1, 3).reshape(HEADS * batch, tokens, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (self.fold(part) for part in self.qkv(self.embed(x)).chunk(3, -1))
        x = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        x = x.view(HEADS, batch, tokens, WIDTH).permute(1, 2, 0, 3).reshape(batch, tokens, HEADS * WIDTH)
        return self.head(F.silu(self.out(x)).mean(1))


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_gates_that_do_not_repeat_are_none(batch: int) -> None:
    torch.manual_seed(0)
    hat = converted(HeadsFirst(), torch.randn(batch, 5, 6))
    assert "unflatten" not in hat.code and hatify.verify(hat).ok
    draw_masks(hat)
    finish(hat, 0)
    inputs = [torch.randn(n, 5, 6) for n in (1, 2, 3, 4)]
    before = [outputs(hat, (x,), task=0) for x in inputs]
    with torch.no_grad():
        for name, lock in hat.locks([0]).items():
            hat.get_parameter(name)[~lock] = 1e3
    assert all(same(outputs(hat, (x,), task=0), found) for x, found in zip(inputs, before))


def test_a_wrong_period_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: masks that take two of four heads for all."""
    for room in (sizes, graph):
        monkeypatch.setattr(room, "period", lambda size: 2)
    monkeypatch.setattr(sizes, "repeats", lambda ids, dim, size: True)
    hat = made("by hand")
    assert not hatify.verify(hat).ok


def test_what_knows_nothing_of_them_gets_a_live_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a norm's live mask has the example's batch."""
    monkeypatch.setattr(analyst, "open_dims", lambda ids, val: [])
    hat = made("a norm in each head")
    with pytest.raises(RuntimeError):
        hat(torch.randn(2, 5, 6), task=0)
