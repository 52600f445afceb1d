"""Whether a model's own code asks for gradients: a graph has one answer in it, the code may act on another."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

QUESTIONS = ((torch, "is_grad_enabled"), (torch, "is_inference_mode_enabled"), (torch.overrides, "has_torch_function"))
"""What is asked before another path is taken; the last one guards the fused kernels of torch's own transformer layers."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_LAYERS = os.path.join(_TORCH, "nn", "modules") + os.sep
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep


@contextlib.contextmanager
def noted_questions() -> Iterator[list[str]]:
    """The places, as ``Class.method``, where a model that is traced inside the block asks whether gradients are on.

    torch's own inside asks all the time and is not meant; its layers are.
    """
    places: list[str] = []
    kept = [(room, name, getattr(room, name)) for room, name in QUESTIONS]
    for room, name, function in kept:
        setattr(room, name, _noting(function, places))
    try:
        yield places
    finally:
        for room, name, function in kept:
            setattr(room, name, function)


def _noting(function: Callable[..., Any], places: list[str]) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        if _of_a_model(frame):
            owner = frame.f_locals.get("self")
            place = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
            if place not in places:
                places.append(place)
        return function(*args, **kwargs)

    return ask


def _of_a_model(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_LAYERS) or not file.startswith((_TORCH, _OWN))
