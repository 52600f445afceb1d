"""State beyond parameters: buffers written in forward, tensors cached on the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import floats, network


@network("mutating_buffer", floats(10))
class RunningCentering(nn.Module):
    """A running mean updated in train mode (DINO's centering) and subtracted in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.register_buffer("center", torch.randn(16) * 0.1)
        self.register_buffer("spread", torch.ones(1, 16))
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean(0), 0.1)
                self.spread.copy_(0.9 * self.spread + 0.1 * x.std(0, keepdim=True))
        return self.fc2((x - self.center) / (self.spread + 0.1))


@network("step_counter_buffer", floats(10))
class StepCounter(nn.Module):
    """Counts its train-mode calls and lets the count change the result (a warm-up)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        warmup = torch.clamp(self.steps.to(x.dtype) / 100.0 + 0.5, max=1.0)
        return self.fc2(torch.tanh(self.fc1(x)) * warmup)


@network("buffer_reassigned", floats(10))
class ReassignedBuffer(nn.Module):
    """An EMA written by assignment instead of in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.register_buffer("average", torch.randn(16) * 0.1)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.fc2(x + self.average)


@network("cached_attribute", floats(3, 8, 8))
class CachedGrid(nn.Module):
    """Caches a grid on self, keyed on the image size: capture must not leave its own one there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)
        self.cache: dict[tuple[int, int], Tensor] = {}
        self.last_features: Tensor | None = None

    def grid(self, x: Tensor) -> Tensor:
        key = (int(x.shape[2]), int(x.shape[3]))
        if key not in self.cache:
            self.cache[key] = torch.linspace(0.5, 1.5, key[0] * key[1], device=x.device).view(key)
        return self.cache[key]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        self.last_features = x.detach()
        return self.fc((x * self.grid(x)).mean((2, 3)))


@network("unread_auxiliary_head", floats(3, 8, 8))
class AuxiliaryHead(nn.Module):
    """A head whose result only a loss inside the model would read: in train mode its statistics move all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.auxiliary = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        features = torch.relu(self.body(x))
        auxiliary = self.auxiliary(features)
        out = self.head(features).mean((2, 3))
        return out if labels is None else out + nn.functional.cross_entropy(auxiliary, labels)


@network("unread_chance", floats(10))
class UnreadChance(nn.Module):
    """Random numbers that nobody reads, drawn by a layer and by a function: those behind them are others without them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.side, self.fc2 = nn.Linear(10, 16), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3)), nn.Linear(16, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        self.side(x)
        nn.functional.dropout(x, 0.2, self.training)
        return self.fc2(self.drop(x))
