"""Functions that know their signature, for :meth:`torch.autograd.Function.apply`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def signed(function: F) -> F:
    """``function``, whose signature is made once: ``apply`` asks for that of ``forward`` at every call, and making it takes as long as
    masking a small tensor does."""
    function.__signature__ = inspect.signature(function)
    return function
