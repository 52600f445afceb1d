"""Functions that know their signature, for :meth:`torch.autograd.Function.apply`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

F = TypeVar("F", bound=Callable)


class _Bound(NamedTuple):
    """Arguments as they were given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _AllGiven(inspect.Signature):
    """The signature of a function that is called with all its arguments, in order: there is nothing to bind."""

    def bind(self, /, *args: Any, **kwargs: Any) -> _Bound:
        return _Bound(args, kwargs)


def signed(function: F) -> F:
    """``function``, whose signature is made once: ``apply`` asks for that of ``forward`` at every call, and binds the arguments to it,
    which takes as long as masking a small tensor does. It must be called with all its arguments, in order."""
    function.__signature__ = _AllGiven(inspect.signature(function).parameters.values())
    return function
