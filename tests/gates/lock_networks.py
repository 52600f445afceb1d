"""Networks small enough to try every element, and smooth, so that no element of a live path is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

LOCKED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}


def case(name: str, inputs: Tensor):
    """Registers a factory of a module; its weights are the same at each call."""

    def keep(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make() -> tuple[nn.Module, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(name.encode()))
                return factory(), inputs

        LOCKED[name] = make
        return factory

    return keep


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Pooled(nn.Module):
    """Layers with tanh between them, averaged over space, and a head."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.flatten(2).mean(-1) if x.dim() > 2 else x)


@case("linear", _randn(3, 4))
def linear() -> nn.Module:
    return Pooled(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), width=5)


@case("grouped", _randn(2, 4, 6))
def grouped() -> nn.Module:
    return Pooled(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.Conv1d(6, 9, 1, groups=3), width=9)


@case("transposed", _randn(2, 3, 3, 3))
def transposed() -> nn.Module:
    return Pooled(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.Conv2d(8, 4, 1), width=4)


@case("depthwise", _randn(2, 3, 4, 4))
def depthwise() -> nn.Module:
    """On the raw input with a masker of its own, on gated channels without, with a channel multiplier."""
    raw, gated = nn.Conv2d(3, 3, 2, groups=3), nn.Conv2d(4, 8, 2, groups=4)
    return Pooled(raw, nn.Conv2d(3, 4, 1), gated, nn.Conv2d(8, 4, 1), width=4)


@case("norms", _randn(4, 4, 5))
def norms() -> nn.Module:
    return Pooled(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1), nn.GroupNorm(1, 6), nn.Conv1d(6, 5, 1), width=5)


@case("embedding", torch.arange(10).view(2, 5))
class Embedded(nn.Module):
    """Every row of the table is read; a weight is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(self.table(x)))).mean(1))


@case("residual", _randn(3, 4))
class Residual(nn.Module):
    """A sum, a product and a concatenation in front of the layer whose inputs are judged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)
        self.hidden = nn.Linear(15, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, gate = self.a(x), torch.tanh(self.b(x)), torch.sigmoid(self.gate(x))
        return self.head(torch.tanh(self.hidden(torch.cat([a + b, a * gate, gate], 1))))


@case("tied", _randn(3, 5))
class Tied(nn.Module):
    """One layer called twice on different gates, and a weight that is used transposed too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.there = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x))))))
        return self.head(torch.tanh(F.linear(torch.tanh(self.there(x)), self.there.weight.t())))


@case("sliced", _randn(2, 4, 5))
class Sliced(nn.Module):
    """Slices of one raw parameter as weights of two layers, a bias from another, and a transposed product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 5))
        self.bias = nn.Parameter(torch.randn(9))
        self.out = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(x, self.weight[:4], self.bias[:4])
        b = F.linear(x, self.weight[4:8])
        return self.head(torch.tanh(torch.tanh(a + torch.tanh(b)) @ self.out).mean(1))


@case("row locks", _randn(2, 3, 5))
def row_locks() -> nn.Module:
    """Normalised per output: one element moves its whole filter; on a transposed convolution, its whole input channel."""
    return Pooled(
        parametrizations.weight_norm(nn.Conv1d(3, 5, 3)),
        parametrizations.weight_norm(nn.ConvTranspose1d(5, 4, 2)),
        parametrizations.weight_norm(nn.Conv1d(4, 6, 1, groups=2)),
        nn.Conv1d(6, 4, 1),
        width=4,
    )


@case("token mixing", _randn(2, 4, 5))
class TokenMixing(nn.Module):
    """A linear layer over tokens behind one over features: gates along two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.tokens, self.after = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.features(x)).transpose(1, 2)
        x = torch.tanh(self.tokens(x)).transpose(1, 2)
        return self.head(torch.tanh(self.after(x)).mean(1))


@case("recurrent", _randn(2, 4, 5))
class Recurrent(nn.Module):
    """Two layers in both directions; every output and the last states count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.gru = nn.GRU(4, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.after, self.head = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.gru(torch.tanh(self.embed(x)))
        return self.head(torch.tanh(self.after(outputs)).mean(1) + last[0])


@case("projected", _randn(2, 4, 5))
class Projected(nn.Module):
    """A projection of the units, then a plain one whose first state is the other's last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, proj_size=4, batch_first=True)
        self.rnn = nn.RNN(4, 6, batch_first=True, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (_, memory) = self.lstm(x)
        return self.head(self.rnn(outputs, memory)[0].mean(1))


@case("cells", _randn(2, 4, 5))
class Cells(nn.Module):
    """Cells step after step; each state is read by the next step and by another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTMCell(5, 5), nn.GRUCell(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, top, total = None, None, 0
        for step in range(3):
            states = self.lower(x[:, step], states)
            top = self.upper(states[0], top)
            total = total + self.head(top)
        return total


class Computed(nn.Module):
    """A convolution over positions whose weight is computed from a parameter by ``how``, and whose gain is one too."""

    def __init__(self, inputs: int, outputs: int, how: Callable[[Tensor, Tensor], Tensor], groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs // groups, 2))
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.how, self.groups = how, groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.how(self.weight, self.gain), self.bias, groups=self.groups)


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    variance, mean = torch.var_mean(weight, dim=[1, 2], keepdim=True, unbiased=False)
    return gain * (weight - mean) * torch.rsqrt(variance + 1e-3)


def by_batch_norm(weight: Tensor, gain: Tensor) -> Tensor:
    flat = weight.reshape(1, len(weight), -1)
    return F.batch_norm(flat, None, None, (gain * 0.7).view(-1), training=True, momentum=0.0, eps=1e-3).reshape_as(weight)


@case("computed rows", _randn(2, 3, 6))
def computed_rows() -> nn.Module:
    return Pooled(Computed(3, 6, standardised), Computed(6, 6, by_batch_norm, groups=2), nn.Conv1d(6, 4, 1), width=4)


@case("computed columns", _randn(2, 3, 6))
def computed_columns() -> nn.Module:
    """Coupled along the outputs, and, turned around, along rows that are columns by then."""
    return Pooled(
        Computed(3, 6, lambda w, g: F.normalize(w, dim=(0, 2)) * g),
        Computed(6, 6, lambda w, g: g * w.transpose(0, 1).softmax(-1).transpose(0, 1)),
        nn.Conv1d(6, 4, 1),
        width=4,
    )


@case("computed elements", _randn(2, 3, 6))
def computed_elements() -> nn.Module:
    """Functions of single elements, and pairs of elements of one row."""
    return Pooled(
        Computed(3, 6, lambda w, g: torch.tanh(w) * g.abs() + w.square()),
        Computed(6, 6, lambda w, g: g * (w + w.flip(2)) / 2 + w),
        nn.Conv1d(6, 4, 1),
        width=4,
    )


class Affine(nn.Module):
    """A scale and a shift per channel in one call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.scale, x)


@case("affine", _randn(3, 4))
def affine() -> nn.Module:
    return Pooled(nn.Linear(4, 6), Affine(6), nn.Linear(6, 5), width=5)
