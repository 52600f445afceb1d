"""Locks no wider than what outputs depend on: sums over branches, fixed filters, gates of whole heads, pieces of nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hatify
from hatify.verification import prove_by_gradients


class Branches(nn.Module):
    """Two branches that are summed with weights of their own, computed from both (a selective kernel, split attention)."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.reduction = reduction
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.select = nn.Conv2d(12, 24, 1)
        self.out = nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = torch.stack([self.a(x), self.b(x)], 1).tanh()
        both = getattr(x, self.reduction)(1)
        weights = self.select(both.mean((2, 3), keepdim=True)).view(-1, 2, 12, 1, 1).softmax(1)
        return self.head(self.out((x * weights).sum(1)).mean((2, 3)))


class Blurred(nn.Module):
    """A blur of each channel before the stride, with a filter that is no parameter; ``grouped`` is not of each channel alone."""

    def __init__(self, transposed: bool = False, grouped: bool = False) -> None:
        super().__init__()
        self.transposed, self.groups = transposed, 4 if grouped else 12
        self.stem, self.out, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.Linear(8, 2)
        self.register_buffer("filter", torch.rand(12, 12 // self.groups, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.stem(x).tanh(), (1, 1, 1, 1), "reflect")
        filtered = F.conv_transpose2d if self.transposed else F.conv2d
        return self.head(self.out(filtered(x, self.filter, None, 2, groups=self.groups)).mean((2, 3)))


class MixedHeads(nn.Module):
    """Attention whose maps are mixed across heads by weights, so that whole heads may be dead: their values are read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(6, 8), nn.Linear(8, 96)
        self.mix, self.proj, self.head = nn.Linear(4, 4), nn.Linear(32, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.proj((scores @ v).transpose(1, 2).flatten(2)).mean(1))


class Rotated(nn.Module):
    """Queries and keys are rotated but for the first ``prefix`` tokens, which may be none."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed, self.qkv, self.proj, self.head = nn.Linear(6, 8), nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 2)

    def rotated(self, x: Tensor) -> Tensor:
        tokens = x[:, :, self.prefix :]
        a, b = tokens.chunk(2, -1)
        turned = tokens * torch.linspace(0.1, 1, 8) + torch.cat([-b, a], -1) * torch.linspace(1, 0.2, 8)
        return torch.cat([x[:, :, : self.prefix], turned], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        return self.head(self.proj(x.transpose(1, 2).flatten(2)).mean(1))


class Pooled(nn.Module):
    """Queries are added to what attention gives, in place, but for the first token; the number of tokens is open."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj, self.head = nn.Linear(6, 8), nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).transpose(1, 3).unbind(2)
        x = (q @ k.transpose(2, 3)).softmax(-1) @ v
        x[:, :, 1:] += q[:, :, 1:]
        return self.head(self.proj(x.transpose(1, 2).flatten(2)).mean(1))


IMAGE, TOKENS = torch.randn(2, 3, 16, 16), torch.randn(2, 5, 6)
NETWORKS = [
    *((Branches(reduction), IMAGE) for reduction in ("sum", "mean", "amax")),
    (Blurred(), IMAGE),
    (Blurred(transposed=True), IMAGE),
    (MixedHeads(), TOKENS),
    (Rotated(0), TOKENS),
    (Rotated(1), TOKENS),
    (Pooled(), TOKENS),
]


@pytest.mark.parametrize(("model", "inputs"), NETWORKS)
def test_every_lock_is_needed_and_nothing_drifts(model: nn.Module, inputs: Tensor) -> None:
    hat = hatify.convert(model, 3, example_inputs=inputs, verify=False)
    proof = hatify.verify(hat, tightness=True)
    assert proof.ok and proof.tightness > 0.999 and proof.unreached == 0.0
    for seed in range(1, 4):  # of narrow layers a live path may end here and there
        proof = hatify.verify(hat, tightness=True, seed=seed)
        assert proof.ok and proof.drift == proof.leak == 0.0 and proof.tightness > 0.94


@pytest.mark.parametrize(
    ("model", "inputs", "lock"),
    [(Branches(), IMAGE, "select.weight"), (Blurred(), IMAGE, "out.weight"), (MixedHeads(), TOKENS, "qkv.weight")],
)
def test_without_its_lock_it_drifts(model: nn.Module, inputs: Tensor, lock: str) -> None:
    hat = hatify.convert(model, 3, example_inputs=inputs, verify=False)
    proof = hatify.verify(hat, tightness=True, without_locks=[lock])
    assert proof.drift > 0 and proof.leak > 0


@pytest.mark.parametrize(("model", "inputs"), NETWORKS)
def test_every_mask_is_needed(model: nn.Module, inputs: Tensor) -> None:
    hat = hatify.convert(model, 3, example_inputs=inputs, verify=False)
    names = [name for name, _ in hat.room.masks.named_children()]
    drifts = [max(hatify.verify(hat, without_masks=[name], seed=seed).drift for seed in range(3)) for name in names]
    assert names and sum(drift > 0 for drift in drifts) > len(names) / 2


def test_a_filter_that_mixes_channels_is_live_everywhere() -> None:
    hat = hatify.convert(Blurred(grouped=True), 3, example_inputs=IMAGE)
    assert hat.verification.drift == 0.0
    assert prove_by_gradients(hat).leak == 0.0
    assert hat.locks([0])["out.weight"].all(dim=1)[..., 0, 0].any(), "some output of the layer behind it reads all channels"


def test_a_sum_of_many_channels_is_live_everywhere() -> None:
    """An OR of all channels of a layer says nothing, and is not carried along."""

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.out(self.stem(x).tanh().sum(1, keepdim=True)).mean((2, 3)))

    hat = hatify.convert(Total(), 3, example_inputs=IMAGE)
    assert hat.verification.drift == 0.0
    live = hat.maskers["out"](0, None) > 0
    assert torch.equal(hat.locks([0])["out.weight"][:, 0, 0, 0], live)
