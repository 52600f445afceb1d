"""The registry that the families of test networks fill: name -> how to build it, how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
Factory = Callable[[], nn.Module]

NETWORKS: dict[str, Network] = {}


@dataclass(frozen=True)
class Network:
    """A small network as a user would write it.

    Attributes:
        make: builds the module, in train mode; the same weights at each call, whatever the global seed.
        inputs: example inputs of a given batch size, as `example_inputs` takes them: a tuple of positional
            arguments or a dict of keywords; the same values at each call.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


def network(name: str, inputs: Callable[[int], Inputs]) -> Callable[[Factory], Factory]:
    """Register a module class (or factory without arguments) under `name`, called with `inputs(batch)`."""

    def register(factory: Factory) -> Factory:
        if name in NETWORKS:
            raise ValueError(f"two networks are called {name!r}")

        def make() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(name.encode()))
                return randomise(factory())

        NETWORKS[name] = Network(make, inputs)
        return factory

    return register


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Add noise to what initialisation leaves constant: norm scales, zero biases, running statistics.

    With a zero shift a normalisation keeps dead channels at zero by accident, and with identity statistics
    a leak through them cannot be seen; a test on such a network would pass for the wrong reason.
    """
    for parameter in model.parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        first = parameter.flatten()[0]
        # A scalar is what its author wrote, unless it switches a branch off.
        if bool((parameter == first).all()) and (parameter.numel() > 1 or first == 0):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def floats(*shape: int) -> Callable[[int], Inputs]:
    """Inputs of one normal tensor, `(batch, *shape)`."""
    return lambda batch: (randn(batch, *shape),)


def tokens(length: int, vocabulary: int) -> Callable[[int], Inputs]:
    """Inputs of one tensor of token ids, `(batch, length)`, int64."""
    return lambda batch: (randint(vocabulary, batch, length),)


def randn(*shape: int, key: int = 0) -> Tensor:
    """Normal values, the same for the same shape and `key`."""
    return torch.randn(shape, generator=_generator(key, *shape))


def randint(high: int, *shape: int, key: int = 0) -> Tensor:
    """Integers below `high`, int64, the same for the same shape and `key`."""
    return torch.randint(high, shape, generator=_generator(key, high, *shape))
