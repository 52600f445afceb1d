"""Networks that end a sweep's process in every way there is."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hatify.zoo.entry import Entry

SIZE = 8


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


class Undecided(Good):
    """Control flow that depends on data cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if x.sum() > 0 else -x


class Forgetful(Good):
    """Another function in the process that checks than in the one that captures: no parity."""

    def forward(self, x: Tensor) -> Tensor:
        capturing = isinstance(x, FakeTensor)
        return super().forward(x) + (0.0 if capturing else 1.0)


def crash() -> nn.Module:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Good()


def leave() -> nn.Module:
    print("a last word", flush=True)
    os._exit(3)


def hang() -> nn.Module:
    time.sleep(600)
    return Good()


def hoard() -> nn.Module:
    model = Good()
    model.register_buffer("hoard", torch.ones(8 * 2**30 // 4))
    return model


def broken() -> nn.Module:
    raise ValueError("no such size")


def entry(name: str) -> Entry:
    return Entry("timm", name, "invented", globals()[name], size=SIZE)
