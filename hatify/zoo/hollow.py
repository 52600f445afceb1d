"""Models whose weights take no time and no memory: what a conversion without a proof needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SMALL = 2**16
"""Elements up to which parameters are initialised as ever."""


def build_hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, without the initialisation of large parameters: they are memory that nobody writes to, so that it takes none.

    Buffers have their own values: they may be tables of indices, which decide what a model computes.
    """
    with _Unwritten() as mode, mode.hears_of_parameters():
        return build()


class _Unwritten(TorchFunctionMode):
    """Leaves out what is written into large parameters, whether by name, through ``data`` or through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}  # by the address of their memory, which stays theirs as long as they are held

    @contextmanager
    def hears_of_parameters(self) -> Iterator[None]:
        register = nn.Module.register_parameter

        def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if type(parameter) is nn.Parameter and parameter.numel() > _SMALL:
                self.held[parameter.untyped_storage().data_ptr()] = parameter
            register(module, name, parameter)

        nn.Module.register_parameter = registered  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        written = next(iter((*args, *(kwargs or {}).values())), None)  # torch.nn.init hands its tensor on by its name
        if writes and isinstance(written, Tensor) and self._holds(written):
            return written
        return func(*args, **(kwargs or {}))

    def _holds(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self.held
