"""Sizes that a model's code spells out: text made of a size is made of the example's, and ``len(x)`` is ``x.shape[0]``."""

from __future__ import annotations

import builtins
import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hatify.capture.questions import of_a_model

_SPELLINGS = [
    (kind, name, number) for kind, number in ((torch.SymInt, int), (torch.SymFloat, float)) for name in ("__repr__", "__str__")
]


@contextlib.contextmanager
def spelled_sizes() -> Iterator[None]:
    """Inside, the text of an open size in a traced model's own code (``self.tables[str(n)]``) fixes it, for the text has one number in it
    and leaves no guard (f-strings are taken for messages); ``len`` of a traced tensor leaves its size open, which Python's own fixes."""
    kept = [(kind, name, kind.__dict__.get(name)) for kind, name, _ in _SPELLINGS]
    for kind, name, number in _SPELLINGS:
        setattr(kind, name, _text_of(getattr(kind, name), number))
    length = builtins.len
    builtins.len = _length_of(length)
    try:
        yield
    finally:
        builtins.len = length
        for kind, name, method in kept:
            if method is None:
                delattr(kind, name)
            else:
                setattr(kind, name, method)


def _text_of(spell: Callable[[Any], str], number: type) -> Callable[[Any], str]:
    def text(size: Any) -> str:
        frame = sys._getframe(1)
        return str(number(size)) if of_a_model(frame) and not _in_f_string(frame) else spell(size)

    return text


def _in_f_string(frame: FrameType) -> bool:
    """Whether an f-string is put together: nearly all are messages, which are made whether or not they are shown."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("FORMAT")


def _length_of(length: Callable[[Any], int]) -> Callable[[Any], int]:
    def len(value: Any) -> int:
        traced = isinstance(value, FakeTensor | FunctionalTensor) and value.dim()
        return value.shape[0] if traced and of_a_model(sys._getframe(1)) else length(value)

    return len
