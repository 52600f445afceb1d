"""The registry that the families of test networks fill: name -> how to build it, how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hatify.zoo.weights import randomise

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
