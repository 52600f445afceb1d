"""What a finished task's evaluation reads: the protected values themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hatify.learning.protection import Locked
from hatify.modules.shards import sharded
from hatify.modules.task_indexed import write_buffer


class Reading:
    """Protected values in the places of the tensors that they protect, for one pass; a context manager.

    A look at every weight, whether it is still what it was, costs as much as reading it once more. Where no gradients are taken and no
    statistics written, a finished task's pass reads the kept values instead: whatever was done to the tensors themselves, it cannot
    see it. What no finished task needs is zero there, which meets zeros only, or comes out where it is masked.

    Args:
        module: the network.
        needed: what a pass of the task reads.
        plain: names of shared parameters whose elements are used one by one, none of which a normaliser or a formula joins with others:
            only these may hold zeros for what is not protected.

    Attributes:
        fixed: the ids of the protected values that are read.
        rest: what has to be looked at as ever: tensors that something else holds too, or that are not ``plain``.
    """

    def __init__(self, module: nn.Module, needed: Iterable[Locked], plain: set[str]) -> None:
        values = {id(e.tensor): e for e in needed if e.free is None or e.name in plain}
        modules = list(module.modules())
        held = {id(t) for m in modules for t in _beside(m)}
        held |= {id(t) for t in _written(module)}
        values = {key: e for key, e in values.items() if key not in held and not sharded(e.tensor)}
        self.rest = [e for e in needed if id(e.tensor) not in values]
        self._places = [
            (shelf, name, tensor, as_learned(values[id(tensor)].kept, tensor))
            for m in modules
            for shelf in (m._parameters, m._buffers)
            for name, tensor in shelf.items()
            if id(tensor) in values
        ]
        self.fixed = frozenset(id(value) for *_, value in self._places)

    def __enter__(self) -> None:
        for shelf, name, tensor, value in self._places:
            if shelf[name] is tensor:  # not what ``functional_call`` has put there
                shelf[name] = value

    def __exit__(self, *error: Any) -> None:
        for shelf, name, tensor, value in self._places:
            if shelf[name] is value:
                shelf[name] = tensor


def as_learned(value: Tensor, tensor: Tensor) -> Tensor:
    """``value`` in its own memory, asking for gradients as ``tensor`` does: torch's products of three dimensions and more take another
    kernel, with other last bits, where nothing asks, also where none are taken."""
    if not tensor.requires_grad:
        return value
    with torch.inference_mode(False):
        return value.detach().requires_grad_()


def _written(module: nn.Module) -> Iterator[Tensor]:
    """Buffers that a converted network's own code writes in eval mode: the kept value must not be what it writes to."""
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        if node.target is write_buffer:
            place = node.args[0]
            yield from (
                module.get_submodule(place.target).buffers() if place.op == "call_module" else [module.get_buffer(place.target)]
            )


def _beside(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds outside its shelves too, as recurrent layers do, so that a place on a shelf is not the only one."""
    shelves = ("_parameters", "_buffers", "_modules")
    own = [v for k, v in vars(module).items() if k not in shelves and isinstance(v, Tensor | list | tuple | dict)]
    return [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor)]


def evaluates(module: nn.Module) -> bool:
    """Whether a pass now leaves nothing behind: no gradients, no statistics, and nobody looks on who expects the tensors themselves."""
    return not (torch.is_grad_enabled() or module.training or torch.compiler.is_compiling() or _get_current_dispatch_mode_stack())
