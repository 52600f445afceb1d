"""What torch does around a computation, and a trace leaves aside: looks at data that change nothing, recomputation, hooks on gradients."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hatify.capture.questions import line_of, of_a_model
from hatify.errors import CaptureError


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Inside, torch's transformer takes the caller's word for what a mask is, and distributions do not check their arguments; what a model
    computes requires a gradient if it asks, as in training; hooks on gradients and derivatives within forward are refused.

    Raises:
        CaptureError: a model registers a hook on a computed tensor, or differentiates.
    """
    room, distribution = torch.nn.modules.transformer, torch.distributions.Distribution
    kept = room._detect_is_causal_mask, distribution._validate_args, Tensor.register_hook, torch.autograd.grad
    Tensor.requires_grad = property(_requires_grad, _REQUIRES_GRAD.__set__)
    room._detect_is_causal_mask = _here(lambda mask, is_causal=None, size=None: bool(is_causal), kept[0])
    distribution._validate_args = False
    Tensor.register_hook, torch.autograd.grad = _here(_refuse_hook, kept[2]), _here(_refuse_derivative, kept[3])
    try:
        yield
    finally:
        room._detect_is_causal_mask, distribution._validate_args, Tensor.register_hook, torch.autograd.grad = kept
        del Tensor.requires_grad


def _here(function: Callable, otherwise: Callable) -> Callable:
    """``function`` for the thread that traces, ``otherwise`` for those that train beside it."""
    tracing = threading.get_ident()
    return lambda *args, **kwargs: (function if threading.get_ident() == tracing else otherwise)(*args, **kwargs)


_REQUIRES_GRAD = torch._C.TensorBase.requires_grad


def _requires_grad(tensor: Tensor) -> bool:
    """A traced tensor does not know: layers are markers, which have no gradient. Inputs do."""
    known = _REQUIRES_GRAD.__get__(tensor)
    computed = isinstance(tensor, FakeTensor | FunctionalTensor) and tensor.is_leaf and not isinstance(tensor, nn.Parameter)
    computed = computed and not getattr(tensor, "is_given", False)
    return known or (computed and tensor.is_floating_point() and torch.is_grad_enabled() and of_a_model(sys._getframe(1)))


def hooks_left(model: nn.Module, leaves: Mapping[str, nn.Module]) -> list[str]:
    """Notes of the hooks on gradients that a conversion leaves behind: of modules that are traced through, and of parameters."""
    inside = tuple(f"{path}." for path in leaves)
    modules = [
        path or "the model itself"
        for path, module in model.named_modules()
        if (module._backward_hooks or module._backward_pre_hooks) and path not in leaves and not path.startswith(inside)
    ]
    tensors = [n for n, p in model.named_parameters() if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]
    notes = [f"backward hooks of modules that are traced through do not run\n{', '.join(modules)}"] if modules else []
    return notes + ([f"hooks of parameters stay with the original's\n{', '.join(tensors)}"] if tensors else [])


def kept_tensors(root: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Attributes of modules that a traced forward has put tensors into, by path; ``before`` are the attributes by the module's path."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if value is not before.get(path, {}).get(name) and isinstance(value, FakeTensor | FunctionalTensor)
    ]


def _refuse_hook(tensor: Tensor, hook: Any) -> NoReturn:
    raise CaptureError(
        "forward registers a hook on a gradient",
        where=line_of(sys._getframe(2)),
        why="a graph has no place for it: the gradient would pass unchanged",
        fix="a torch.autograd.Function whose backward does the same; hooks that only look belong on hat's parameters and modules",
    )


def _refuse_derivative(*args: Any, **kwargs: Any) -> NoReturn:
    raise CaptureError(
        "forward differentiates",
        where=line_of(sys._getframe(2)),
        why="a layer is one operator in the graph, and has no derivative there",
        fix="convert the part that is differentiated, and take its derivative outside: model.energy = hatify.convert(model.energy, ...)",
    )
