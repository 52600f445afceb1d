"""Numbers and types that a model's code takes from the type of a tensor, read when the network runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hatify.errors import CallError

LIMITS = ("min", "max", "eps", "tiny")
"""What :func:`limit` gives."""


def type_of_parameters(module: nn.Module) -> torch.dtype | None:
    """The type that a model is taken to have: that of its first parameter of real numbers."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def limit(dtype: torch.dtype, name: str) -> float:
    """``torch.finfo(dtype).min`` and the like."""
    return getattr(torch.finfo(dtype), name)


def by_dtype(dtype: torch.dtype, *choices: tuple[torch.dtype, Any]) -> Any:
    """A constant that the original's forward chose by ``dtype``.

    Raises:
        CallError: it was not traced in this type.
    """
    for known, value in choices:
        if known == dtype:
            return value
    raise CallError(
        f"the model's code takes a value from a type, and was not traced in {dtype}",
        why=f"known are {', '.join(str(known) for known, _ in choices)}",
        fix="cast the model to one of these, or convert it in the type that you need",
    )
