"""Branches on sizes that the exporter takes for decided: every open size is two or more to it, so ``if length > 1`` leaves no guard."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from hatify.capture.captured import is_true
from hatify.capture.questions import line_of, of_a_model

SMALLEST = (0, 1)
"""The sizes that the exporter never thinks of."""
MOST_SYMBOLS = 4
"""A question about more sizes than this is kept as a condition without a look at whether small ones change its answer."""


@dataclass(frozen=True)
class Branch:
    """A condition on symbolic sizes that a model's code asked for and was told to be true, with the line that asked."""

    condition: Any
    line: str


uninteresting_files().add(__file__)  # torch names the frame below ours as the one that asked


@contextlib.contextmanager
def noted_branches() -> Iterator[list[Branch]]:
    """The conditions on sizes that a model, traced inside the block, branches on and that sizes of zero or one would change.

    torch's own inside asks all the time and is not meant; its layers are.
    """
    branches: list[Branch] = []
    known: set[Any] = set()
    ask, ask_size = torch.SymBool.__bool__, torch.SymInt.__bool__

    def note(node: Any, condition: Any, answer: bool, frame: FrameType) -> bool:
        if of_a_model(frame) and (condition, answer) not in known:
            known.add((condition, answer))
            held = condition if answer else sympy.Not(condition)
            if _small_sizes_change(held, node.shape_env):
                branches.append(Branch(held, line_of(frame)))
        return answer

    def boolean(value: torch.SymBool) -> bool:
        return note(value.node, value.node.expr, ask(value), sys._getframe(1))

    def size(value: torch.SymInt) -> bool:
        return note(value.node, sympy.Ne(value.node.expr, 0), ask_size(value), sys._getframe(1))

    with _replaced(torch.SymBool, boolean), _replaced(torch.SymInt, size):
        yield branches


@contextlib.contextmanager
def _replaced(owner: type, asking: Callable[[Any], bool]) -> Iterator[None]:
    original = owner.__bool__
    owner.__bool__ = asking
    try:
        yield
    finally:
        owner.__bool__ = original


def _small_sizes_change(condition: Any, environment: ShapeEnv) -> bool:
    """Whether a condition that is true of the example's sizes is not where some of them are zero or one."""
    hints = {s: environment.backed_var_to_val.get(s) for s in getattr(condition, "free_symbols", ())}
    if not hints or None in hints.values():  # a constant, or a size that depends on data
        return False
    if len(hints) > MOST_SYMBOLS:
        return True
    sizes = itertools.product(*((*SMALLEST, hint) for hint in hints.values()))
    return any(not is_true(condition, dict(zip(hints, some))) for some in sizes)
