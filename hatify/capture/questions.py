"""Whether a model's own code asks for gradients, or whether it is traced: a graph has one answer in it, the code may act on another."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

QUESTIONS = ((torch, "is_grad_enabled"), (torch, "is_inference_mode_enabled"), (torch.overrides, "has_torch_function"))
"""What is asked before another path is taken; the last one guards the fused kernels of torch's own transformer layers."""
ABOUT_TRACING = ((torch.compiler, "is_compiling"), (torch.compiler, "is_exporting"))
"""What code asks that leaves out what a trace cannot follow, or keeps more sizes open than an ordinary call needs."""

ABOUT_TYPES = tuple(
    (torch, name)
    for name in ("is_autocast_enabled", "get_autocast_dtype", "is_autocast_cpu_enabled", "get_autocast_cpu_dtype",
                 "get_autocast_gpu_dtype", "get_autocast_device")
    if hasattr(torch, name)
) + ((torch, "result_type"), (torch.Tensor, "element_size"), (torch.Tensor, "type"))  # fmt: skip
"""What code asks that computes otherwise in another type, or under autocast; it also reads ``dtype`` and ``itemsize``."""
_ITEMSIZE = torch._C.TensorBase.itemsize

_TORCH = os.path.dirname(torch.__file__) + os.sep
_LAYERS = os.path.join(_TORCH, "nn", "modules") + os.sep
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep


@contextlib.contextmanager
def noted_questions() -> Iterator[list[str]]:
    """The places, as ``Class.method``, where a model that is traced inside the block asks whether gradients are on.

    torch's own inside asks all the time and is not meant; its layers are.
    """
    places: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            _note(sys._getframe(1), places)
            return function(*args, **kwargs)

        return ask

    with _replaced(QUESTIONS, noting):
        yield places


@contextlib.contextmanager
def answered(traced: bool, places: list[str]) -> Iterator[None]:
    """A model that is traced inside the block and asks whether it is, is answered ``traced``; ``places`` gets those where it asks.

    torch's own code is told the truth.
    """

    def answering(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if is_inside(frame.f_code.co_filename):
                return function(*args, **kwargs)
            _note(_asker(frame), places)
            return function(*args, **kwargs) and traced

        return ask

    with _replaced(ABOUT_TRACING, answering):
        yield


@contextlib.contextmanager
def noted_types() -> Iterator[tuple[list[str], list[str]]]:
    """The source lines where a model that is traced inside the block looks at the type of a tensor, or at autocast.

    What a layer that stays one does inside is not meant: it looks again in each call. Neither is torch's own code, which takes types from
    a tensor, and no branch on one. Looks at types of whole numbers and truth values are in the second list.
    """
    lines: dict[str, None] = {}
    whole: dict[str, None] = {}
    read, tracing = torch._C.TensorBase.dtype, threading.get_ident()

    def note(frame: FrameType, real: bool = True) -> None:
        if not _INSIDE_LAYERS and threading.get_ident() == tracing and not is_inside(frame.f_code.co_filename):
            (lines if real else whole)[line_of(frame)] = None

    def dtype(tensor: Any) -> torch.dtype:
        found = read.__get__(tensor)
        note(sys._getframe(1), found.is_floating_point)
        return found

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            note(sys._getframe(1))
            return function(*args, **kwargs)

        return ask

    found: tuple[list[str], list[str]] = ([], [])
    torch.Tensor.dtype = property(dtype)
    torch.Tensor.itemsize = property(lambda tensor: (note(sys._getframe(1)), _ITEMSIZE.__get__(tensor))[1])
    try:
        with _replaced(ABOUT_TYPES, noting):
            yield found
    finally:
        del torch.Tensor.dtype, torch.Tensor.itemsize
        found[0].extend(lines)
        found[1].extend(whole)


@contextlib.contextmanager
def inside_a_layer() -> Iterator[None]:
    """Looks at types inside the block are those of a layer that stays one."""
    _INSIDE_LAYERS.append(True)
    try:
        yield
    finally:
        _INSIDE_LAYERS.pop()


_INSIDE_LAYERS: list[bool] = []


@contextlib.contextmanager
def _replaced(questions: tuple, answering: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    kept = [(room, name, vars(room).get(name)) for room, name in questions]
    for room, name, _ in kept:
        setattr(room, name, answering(getattr(room, name)))
    try:
        yield
    finally:
        for room, name, function in kept:
            if function is None:  # inherited
                delattr(room, name)
            else:
                setattr(room, name, function)


def _note(frame: FrameType, places: list[str]) -> None:
    if not of_a_model(frame):
        return
    owner = frame.f_locals.get("self")
    place = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
    if place not in places:
        places.append(place)


def _asker(frame: FrameType) -> FrameType:
    """The method of a module that asks, also where it has a function ask."""
    caller: FrameType | None = frame
    while caller is not None and not isinstance(caller.f_locals.get("self"), nn.Module):
        caller = caller.f_back
    return frame if caller is None else caller


def of_a_model(frame: FrameType) -> bool:
    """Whether a model's own code runs in ``frame``, or one of torch's layers."""
    file = frame.f_code.co_filename
    return file.startswith(_LAYERS) or not is_inside(file)


def is_inside(file: str) -> bool:
    """Whether a file is torch's or this package's."""
    return file.startswith((_TORCH, _OWN))


def line_of(frame: FrameType) -> str:
    """``file:number: code`` of what a frame is at."""
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"
