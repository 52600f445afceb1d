"""The tree of a converted model: plain containers under the original's paths."""

from __future__ import annotations

from typing import Any

from torch import nn

from hatify.registry import describe


class Scope(nn.Module):
    """A container of the original model, without its forward: what it computed is in the graph."""

    def __init__(self, was: str = "") -> None:
        super().__init__()
        self._was = was  # a child may have any name

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, int) and key < 0:
            key += len(self._modules)
        return getattr(self, str(key))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self):
        return iter(self._modules.values())

    def _get_name(self) -> str:
        return self._was or "Scope"


def scoped(model: nn.Module) -> Scope:
    """``model`` (which is taken over) with every container replaced by a :class:`Scope`; leaves stay as they are."""
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        if module is not model and describe(module) is not None:
            done[id(module)] = module
            return module
        scope = done[id(module)] = Scope(type(module).__name__)
        scope.training = module.training
        scope._parameters.update(module._parameters)
        scope._buffers.update(module._buffers)
        scope._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            scope._modules[name] = None if child is None else visit(child)
        return scope

    root = visit(model)
    assert isinstance(root, Scope)
    return root
