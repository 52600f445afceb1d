"""``torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype)``, as attention masks are filled.

To the exporter that is a constant, of the type that it had then; ``torch.full`` gives the same and follows the type. Of other numbers
code may ask the value, which only a constant tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class TypeLimits(TorchFunctionMode):
    """Inside, a tensor of a type's largest number, or of its least, follows the type."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        alone = func is torch.tensor and len(args) == 1 and kwargs.keys() <= {"dtype", "device"}
        if alone and _is_limit(args[0], kwargs.get("dtype")):
            return torch.full((), args[0], **kwargs)
        return func(*args, **kwargs)


def _is_limit(number: Any, dtype: torch.dtype | None) -> bool:
    return type(number) is float and dtype is not None and dtype.is_floating_point and abs(number) == torch.finfo(dtype).max
