"""The steps that a drawn network is made of: how they are registered, and what they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, WIDEST = 4, 24
"""Images are SIZE by SIZE; no value gets more channels than WIDEST."""

STEPS: dict[str, tuple[int, Callable]] = {}
TWO: set[str] = set()
"""Steps that read two values of one shape."""


def step(rank: int, two: bool = False) -> Callable:
    """Registers a step on images (rank 4) or tokens (rank 3): ``(network, x, y, number) -> new values``."""

    def register(run: Callable) -> Callable:
        STEPS[run.__name__] = rank, run
        TWO.update({run.__name__} if two else ())
        return run

    return register


def channels(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else x.shape[2]


def width(number: int) -> int:
    return (4, 6, 8, 12)[number % 4]


def divisor(size: int, number: int) -> int:
    fitting = [g for g in (1, 2, 3, 4, 6) if size % g == 0]
    return fitting[number % len(fitting)]


ACTIVATIONS = (torch.relu, F.gelu, torch.sigmoid, torch.tanh, F.softplus, F.hardswish, lambda x: torch.log1p(x.abs()),
               lambda x: torch.sqrt(x.square() + 0.1), lambda x: x.abs() + 0.5, lambda x: x.clamp(0.2, 1.0))  # fmt: skip
