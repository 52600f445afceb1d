"""The smallest networks that fall into each trap of capture and surgery."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """Aliased, shared, unused and non-persistent entries, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.randn(3))
        self.fc1 = nn.Linear(6, 8)
        self.alias = self.fc1
        self.register_buffer("counter", torch.arange(4))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.never = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.tied = nn.Linear(6, 8)
        self.tied.weight = self.fc1.weight
        self.scale = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.alias(x)) * self.scale + self.tied(x))


class Caching(nn.Module):
    """Code that keeps tensors on itself: an attribute, a list, a dict, a buffer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("positions", torch.zeros(1), persistent=False)
        self.last, self.seen, self.named = None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.fc(x)))
        self.last = x
        self.seen.append(x)
        self.named["features"] = x
        if self.positions.numel() != x.shape[-1]:
            self.positions = torch.arange(8.0)
        return self.head(F.dropout(x + self.positions, 0.2, self.training))


class BatchBaked(nn.Module):
    """Code that looks at the batch size and at the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.drop(torch.tanh(self.fc(x))).view(n, 2, 4).transpose(0, 1).reshape(2 * n, 4)
        noise = torch.rand(n, 8) if self.training else torch.zeros(n, 8)
        return self.head(x.reshape(2, n, 4).transpose(0, 1).reshape(n, 8) + noise) / n


class Branching(nn.Module):
    """Another path for wide inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.shape[-1] > x.shape[-2]:
            x = x.flip(-1).relu()
        return self.head(x.mean((2, 3)))


class Optional(nn.Module):
    """Arguments that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, features: bool = False) -> Tensor:
        x = torch.tanh(self.fc(x)) * scale
        x = x if mask is None else x * mask
        return x if features else self.head(x)


class ClipsItsWeight(nn.Module):
    """Forward writes into a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.gain.clamp_(min=0.1)
        return self.head(torch.tanh(self.fc(x)) * self.gain)


class Looks(nn.Module):
    """A table whose rows are renormalised by the function that looks them up."""

    def __init__(self, lookup: Callable[..., Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 5))
        self.head, self.lookup = nn.Linear(5, 3), lookup

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lookup(tokens, self.table, max_norm=0.5))


class Typed(nn.Module):
    """Constants made on the spot, in the device and dtype of the operands."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("frequencies", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        steps = torch.arange(8, device=x.device, dtype=x.dtype) / 7
        angles = torch.arange(8, device=x.device) * self.frequencies.float()
        x = x + steps + torch.ones(8).to(x) + angles.cos().to(x.dtype)
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.head(x + torch.zeros(x.shape, dtype=x.dtype, device=x.device))


class Named(nn.Module):
    """One layer under a name of the user's choosing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(6, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self._modules[self.name](x)))


class NamedBelow(nn.Module):
    """The same one level down."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.below, self.last = Named(name), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.below(x)))


class NamedParameter(nn.Module):
    """A raw parameter under a name of the user's choosing, used as a weight and as it is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self._parameters[name] = nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(8, 3)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters[self.name]
        return self.last(torch.tanh(self.fc(x) @ own) * own[0])


class NamedBuffer(nn.Module):
    """A buffer that forward writes, under a name of the user's choosing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self._buffers[name] = torch.randn(8)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        own = self._buffers[self.name]
        x = torch.tanh(self.fc(x) + own)
        if self.training:
            own.lerp_(x.detach().mean(0), 0.5)
        return self.last(x)


class ManyNames(nn.Module):
    """Layers, raw parameters and buffers, one of each name."""

    def __init__(self, layers: list[str], parameters: list[str], buffers: list[str]) -> None:
        super().__init__()
        self.names = layers, parameters, buffers
        for name in layers:
            self._modules[name] = nn.Linear(6, 6)
        for name in parameters:
            self._parameters[name] = nn.Parameter(torch.randn(6))
        for name in buffers:
            self._buffers[name] = torch.randn(6)

    def forward(self, x: Tensor) -> Tensor:
        layers, parameters, buffers = self.names
        for name in layers:
            x = torch.tanh(self._modules[name](x))
        for name in parameters:
            x = torch.tanh(x * self._parameters[name])
        for name in buffers:
            x = x + self._buffers[name]
        return x


class Scale(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Underscored(nn.Module):
    """Names that are equal once dots have become underscores, or suffixes have gone."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scale(2.0)
        self.block_scale = nn.Parameter(torch.tensor([5.0]))
        self.q = nn.Linear(6, 8)
        self.q_weight = nn.Parameter(torch.randn(5, 8))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.block(self.q(x)) * self.block_scale)
        return self.head(torch.tanh(F.linear(x, self.q_weight)))


class LookupAndLinear(nn.Module):
    """A table of 5 rows of 8, used by function as the weight of a layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(self.table(x)))
        return self.head(torch.tanh(F.linear(x, self.table.weight)).mean(1))
