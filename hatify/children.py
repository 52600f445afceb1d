"""Children of any name: what a network calls its layers never meets what the class has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hatify.rewrite.scope import check_setting


class ChildrenByName(nn.Module):
    """The part of a HAT model that finds the original's children, parameters and buffers, whatever these are called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name) or self._is_hidden(name):  # never a child, even if a child is called so
            object.__setattr__(self, name, value)
        else:
            check_setting(self, self.__dict__.get("_numbers", {}), name, value)
            super().__setattr__(name, value)

    def _is_hidden(self, name: str) -> bool:
        """Whether a child is called like what torch.fx keeps on every graph module."""
        held = self.__dict__
        return name in held and any(name in held.get(shelf, ()) for shelf in ("_modules", "_parameters", "_buffers"))

    def __getitem__(self, key: int | str) -> nn.Module | Tensor:
        """A child, parameter or buffer by its name, or a child by its number as in a sequential model."""
        name = str(key)
        for shelf in (self._modules, self._parameters, self._buffers):
            if name in shelf:
                return shelf[name]
        raise KeyError(name)

    def get_submodule(self, target: str) -> nn.Module:
        """A module of the original by its path; see :meth:`torch.nn.Module.get_submodule`."""
        name, _, below = target.partition(".")
        child = self._modules.get(name)
        return super().get_submodule(target) if child is None else child.get_submodule(below)

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter of the original by its path."""
        found = self._parameters.get(target)
        return super().get_parameter(target) if found is None else found

    def get_buffer(self, target: str) -> Tensor:
        """A buffer of the original by its path."""
        found = self._buffers.get(target)
        return super().get_buffer(target) if found is None else found
