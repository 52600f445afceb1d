"""What torch does around a computation, and a trace leaves aside: looks at data that change nothing, recomputation, hooks on gradients."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hatify.capture.questions import of_a_model
from hatify.errors import CaptureError


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Inside, torch's transformer takes the caller's word for what a mask is, and distributions do not check their arguments; what a model
    computes requires a gradient if it asks, as in training, and a hook on one is refused.

    Raises:
        CaptureError: a model registers a hook on a computed tensor.
    """
    room, distribution = torch.nn.modules.transformer, torch.distributions.Distribution
    kept = room._detect_is_causal_mask, distribution._validate_args, Tensor.register_hook
    Tensor.requires_grad = property(_requires_grad, _REQUIRES_GRAD.__set__)
    room._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    distribution._validate_args = False
    Tensor.register_hook = _refuse_hook
    try:
        yield
    finally:
        room._detect_is_causal_mask, distribution._validate_args, Tensor.register_hook = kept
        del Tensor.requires_grad


_REQUIRES_GRAD = torch._C.TensorBase.requires_grad


def _requires_grad(tensor: Tensor) -> bool:
    """A traced tensor does not know: layers are markers, which have no gradient."""
    known = _REQUIRES_GRAD.__get__(tensor)
    computed = isinstance(tensor, FakeTensor | FunctionalTensor) and tensor.is_leaf and not isinstance(tensor, nn.Parameter)
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


def _refuse_hook(tensor: Tensor, hook: Any) -> NoReturn:
    frame = sys._getframe(1)
    file, line = frame.f_code.co_filename, frame.f_lineno
    raise CaptureError(
        "forward registers a hook on a gradient",
        where=f"{file}:{line}: {linecache.getline(file, line).strip()}",
        why="a graph has no place for it: the gradient would pass unchanged",
        fix="a torch.autograd.Function whose backward does the same; hooks that only look belong on hat's parameters and modules",
    )
