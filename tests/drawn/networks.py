"""Small networks drawn at random: a program of steps, each of which reads earlier values and appends its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import images, tokens  # noqa: F401  # they register their steps
from .steps import SIZE, STEPS, TWO, WIDEST, channels


@dataclass(frozen=True)
class Step:
    """``name`` of :data:`STEPS`; ``x`` and ``y`` count back to the values that it reads; ``number`` is for its own choices."""

    name: str
    x: int = 0
    y: int = 0
    number: int = 0


class Drawn(nn.Module):
    """Runs a program of steps on an image. A step that finds no value to read is skipped.

    The result is a linear layer over the pooled values that nothing has read; with ``features`` these values too.
    """

    def __init__(self, program: list[Step], features: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.program, self.features, self.building = program, features, True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self(inputs(2))
            self.building = False
            for module in self.modules():  # neither scales nor shifts nor statistics are those of a fresh network
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
        self.eval()

    def layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The layer ``name`` of the step at work, made when the network is built."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.add_module(name, make())
        return getattr(self, name)

    def parameter(self, name: str, *shape: int) -> Tensor:
        """A raw parameter of the step at work."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        return getattr(self, name)

    def constant(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        """A buffer of the step at work."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.register_buffer(name, value())
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.step = "in"
        values, read = [self.layer("conv", lambda: nn.Conv2d(3, 8, 3, padding=1))(x)], set()
        for number, step in enumerate(self.program):
            self.step = number
            rank, run = STEPS[step.name]
            of_rank = [i for i, v in enumerate(values) if v.dim() == rank][::-1]
            if not of_rank:
                continue
            i = of_rank[step.x % len(of_rank)]
            alike = [j for j in of_rank if values[j].shape == values[i].shape and j != i] or [i]
            j = alike[step.y % len(alike)]
            new = [v for v in run(self, values[i], values[j], step.number) if channels(v) <= WIDEST]
            read |= {i, j} if new and step.name in TWO else {i} if new else set()
            values += new
        self.step = "out"
        ends = [v for i, v in enumerate(values) if i not in read]
        pooled = torch.cat([v.mean((2, 3)) if v.dim() == 4 else v.mean(1) for v in ends], 1)
        out = self.layer("head", lambda: nn.Linear(pooled.shape[1], 3))(pooled)
        return (out, *ends) if self.features else out

    def __repr__(self) -> str:
        return f"Drawn([{', '.join(map(repr, self.program))}], features={self.features})"


def inputs(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


ORDER = sorted(STEPS, key=lambda name: (name not in ("conv", "batch_norm", "activation", "to_tokens", "linear"), name))
"""Simple ones first: what a failure shrinks to."""

programs = st.lists(
    st.builds(
        Step,
        st.sampled_from(ORDER),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 11),
    ),
    min_size=1,
    max_size=9,
)
