"""Networks whose code looks at types, and how they are tried in other ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from tasks import draw_masks
from torch import Tensor, nn

import hatify
from hatify.capture.captured import Way

HALF, BRAIN, DOUBLE = torch.float16, torch.bfloat16, torch.float64
WAYS = [Way(HALF), Way(BRAIN), Way(DOUBLE), Way(torch.float32, BRAIN), Way(torch.float32, HALF)]


class Tokens(nn.Module):
    """Tokens ``x`` of shape (batch, 3, 4), and a mask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.body(x, mask))

    def scores(self, x: Tensor) -> Tensor:
        return self.query(x) @ x.transpose(1, 2)


class MaskedFill(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min).softmax(-1) @ x


class Additive(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return (scores + (1 - mask[:, None].to(scores.dtype)) * torch.finfo(scores.dtype).min).softmax(-1) @ x


class HalfOfTheLimit(Tokens):
    """A number that is no limit itself."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min / 2).softmax(-1) @ x


class Eps(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(x)
        return torch.log(x + torch.finfo(x.dtype).eps)


class ThereAndBack(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.scores(x).float().softmax(-1).to(x.dtype) @ x


class Twice(Tokens):
    """Two casts in a row."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.scores(x).float().to(x.dtype) @ x


class LikeTheValues(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, 8).to(x)


class LikeTheWeights(Tokens):
    """T5's norm: in float32 it has no cast at all."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.gain.dtype in (HALF, BRAIN):
            x = x.to(self.gain.dtype)
        return self.gain * x


class OwnTable(Tokens):
    """A tensor of the forward's own, in a type of its own: ``.half()`` does not reach it."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * (torch.tensor([3.0, 5.0, 7.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float32) * 3.3).sqrt().to(x.dtype)


class Picks(Tokens):
    """It picks by the values of a buffer, which a trace on empty ones does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor([True, False, True]))

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.log(F.relu(x[:, self.kept]) + torch.finfo(x.dtype).eps)


class Clamped(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = 100 * x
        if x.dtype == HALF:
            x = torch.clamp(x, min=-50, max=50)
        return x


class AsksAutocast(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.sin() if torch.is_autocast_enabled("cpu") else x.cos()


class InTraining(Tokens):
    """In train mode another graph, with a number of its own."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return (
            (x.sin() + 0.01 * torch.finfo(x.dtype).eps ** 0.5).float().to(x.dtype)
            if self.training
            else x + torch.finfo(x.dtype).eps
        )


class DroppedOut(Tokens):
    """A cast before what takes a number by mode."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        p = F.dropout(self.scores(x).float().to(x.dtype), 0.5, self.training)
        return F.dropout(p.float(), 0.25, self.training).softmax(-1).to(x.dtype) @ x


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 1, 0], [0, 0, 0]])


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, hatify.HATModel]:
    torch.manual_seed(0)
    model = make().eval()
    return model, hatify.convert(copy.deepcopy(model), 2, example_inputs=given()).eval()


def within(way: Way) -> AbstractContextManager:
    return nullcontext() if way.autocast is None else torch.autocast("cpu", dtype=way.autocast)


def seeded(model: nn.Module, *given: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(*given)


def checked(model: nn.Module, hat: hatify.HATModel, way: Way) -> None:
    """Equal to the original without a task, its type and finite with one."""
    x, mask = given()
    model, hat, x = copy.deepcopy(model).to(way.dtype), copy.deepcopy(hat).to(way.dtype), x.to(way.dtype)
    draw_masks(hat)
    for training in (False, True):
        with within(way):
            wanted, found = (seeded(m.train(training), x, mask) for m in (model, hat))
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
            for scale in (None, 20.0):
                found = hat(x, mask, task=0, mask_scale=scale)
                assert found.dtype == wanted.dtype and found.isfinite().all()
                found.float().sum().backward()
            wanted.float().sum().backward()
