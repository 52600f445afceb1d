"""Sizes that a model's code spells out: text made of a size is made of the example's, and ``len(x)`` is ``x.shape[0]``."""

from __future__ import annotations

import ast
import builtins
import contextlib
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import uninteresting_files

from hatify.capture.questions import of_a_model

_SPELLINGS = [
    (kind, name, number)
    for kind, number in ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool))
    for name in ("__repr__", "__str__", "__format__")
]
uninteresting_files().add(__file__)  # torch names the frame below ours as the one that asked
_READERS = re.compile("assert|check|warn|log|print|debug|info|error|exception|critical", re.IGNORECASE)
"""In the names of functions that show a text to people."""


@contextlib.contextmanager
def spelled_sizes() -> Iterator[None]:
    """Inside, the text of an open size in a traced model's own code (``self.tables[str(n)]``) fixes it, for the text has one number in it
    and leaves no guard; messages leave it open. So does ``len`` of a traced tensor, which with Python's own fixes it."""
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


def _text_of(spell: Callable[..., str], number: type) -> Callable[..., str]:
    spelled = getattr(number, spell.__name__)

    def text(size: Any, *form: str) -> str:
        frame = sys._getframe(1)
        if of_a_model(frame):
            # what a message shows is the number, too, but nothing that the graph has to ask for
            return spelled(_hint(size, number) if _in_a_message(frame) else number(size), *form)
        return spell(size, *form)

    return text


def _hint(size: Any, number: type) -> Any:
    """The example's size, with no question asked."""
    return number(size.node.hint if size.node.has_hint() else 0)


def _in_a_message(frame: FrameType) -> bool:
    """Whether a text is made for people: in ``raise``, in ``assert``, or in a call of what asserts, warns or prints, whose result nobody
    takes. Messages are made whether or not they are shown."""
    statement = _statement(frame.f_code.co_filename, frame.f_lineno)
    if isinstance(statement, ast.Raise | ast.Assert):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    function = statement.value.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return False  # the model's own method may keep it
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return _READERS.search(name) is not None


def _statement(file: str, line: int) -> ast.stmt | None:
    """The innermost statement that a line is in; None where there is no source, or where several are."""
    found, within = None, _parsed("".join(linecache.getlines(file))).body
    while within:
        inside = [n for n in within if getattr(n, "lineno", line) <= line <= getattr(n, "end_lineno", line)]
        statements = [n for n in inside if isinstance(n, ast.stmt)]
        if len(statements) > 1:
            return None
        found = next(iter(statements), found)
        within = [child for n in inside for child in ast.iter_child_nodes(n)]
    return found


@lru_cache(maxsize=64)
def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # what a notebook holds beside Python
        return ast.Module([], [])


def _length_of(length: Callable[[Any], int]) -> Callable[[Any], int]:
    def len(value: Any) -> int:
        traced = isinstance(value, FakeTensor | FunctionalTensor) and value.dim()
        return value.shape[0] if traced and of_a_model(sys._getframe(1)) else length(value)

    return len
