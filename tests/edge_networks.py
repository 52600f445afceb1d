"""The smallest networks that fall over each sharp edge of the mask algebra."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Between(nn.Module):
    """A sum of two layers (a materialised value), then ``what``, then a layer whose input must be dead where it is said to be."""

    def __init__(self, what: Callable[[Tensor], Tensor] | nn.Module, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.what = what
        self.after, self.head = nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.after(self.what(self.a(x) + self.b(x)))))


class ParameterBetween(nn.Module):
    """An operator of an activation and a raw parameter."""

    def __init__(self, what: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what
        self.parameter = nn.Parameter(torch.rand(8) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x, self.parameter)


class TokensNormed(nn.Module):
    """Normalisation over gated features: channels of the norm are tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, 8), norm, nn.Linear(8, 3)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.after(self.norm(self.embed(x)))).mean(1))


class HeadsInBatch(nn.Module):
    """Two heads folded into the batch of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(4)
        self.after, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2))
        b, c, n = x.shape
        x = self.norm(x.reshape(b * 2, c // 2, n)).reshape(b, c, n)
        return self.head(torch.tanh(self.after(x)).mean(-1))


class ClassTokenAfterMixing(nn.Module):
    """Gates vary along tokens, then a constant class token joins them: the next layer reads it for every task."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(6, 8), nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.after, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.relu(self.embed(x)).transpose(1, 2)).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(torch.relu(self.after(x)).mean(1))


class ConstantsUnderACommonGate(nn.Module):
    """Channels with one gate in common, and constant ones, are summed over: the sum is not zero where that gate is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = nn.Linear(6, 8), nn.Linear(6, 4)
        self.register_buffer("mixing", torch.randn(10, 5))
        self.register_buffer("coordinates", torch.randn(2))
        self.after, self.head = nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        gated = torch.cat([self.a(x) * gate[:, :1], self.coordinates.expand(x.shape[0], 2)], 1)
        return self.head(torch.relu(self.after(torch.cat([gated @ self.mixing, gate], -1))))


class MixesTokens(nn.Module):
    """A layer along tokens, over a sum of two feature layers (``clean``) or over one whose mask is still pending."""

    def __init__(self, clean: bool, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.clean = nn.Linear(6, 8), nn.Linear(6, 8), clean
        self.mix, self.head = nn.Linear(4, 5, bias=bias), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x) if self.clean else self.a(x)
        return self.head(torch.sin(self.mix(x.transpose(1, 2)).transpose(1, 2)).mean(1))


class UniformAttention(nn.Module):
    """Queries and keys that are dead as a whole still attend, uniformly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.other = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 5)
        self.after, self.head = nn.Linear(11, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.a(x) + self.b(x))[..., :1]
        seen = F.scaled_dot_product_attention(q, q, x)
        other = torch.relu(self.other(x)) + x[..., :5]
        return self.head(torch.tanh(self.after(torch.cat([seen, other], -1))).mean(1))


class Coordinates(nn.Module):
    """CoordConv: two input channels that no task gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
        self.register_buffer("grid", torch.randn(1, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.stem(x)), self.grid.expand(x.shape[0], -1, -1, -1)], 1)
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Chosen(nn.Module):
    """Comparisons, argmax and indices that were computed from gated activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.after, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        best = self.table[x.argmax(-1)]
        sign = (x > 0.1).to(x.dtype) + (x * 3).long().to(x.dtype)
        top = x.topk(2, dim=-1).values.sum(-1, keepdim=True)
        return self.head(torch.relu(self.after(x.gather(1, x.argsort(-1)) + best * sign + top)))


class Seen(nn.Module):
    """Counts what it saw: a buffer that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return self.head(x - self.mean)


class WritesThroughViews(nn.Module):
    """In-place leaves and writes through views, into values that are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.act = nn.Linear(6, 8), nn.ReLU(inplace=True)
        self.after, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.embed(x)
        y = self.after(self.act(first))  # `first` is rectified too
        y += first
        y[:, 4] = y[:, 5] + 0.5
        y[:, :2].sigmoid_()  # last: its backward needs what it wrote
        return self.head(y)


class TwoLayers(nn.Module):
    """Linear, tanh, linear: for what surrounds a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class LowRank(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
