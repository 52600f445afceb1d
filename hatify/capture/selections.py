"""Boolean masks of known values, ``x[:, self.keep]``: while tracing they become the integers that they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

from hatify.capture.effects import is_random
from hatify.errors import CallError

DETACHED = torch.ops.aten.detach_.default
"""In place by name, but it changes no value: ``torch.tensor([...])`` ends with it."""


@contextlib.contextmanager
def known_selections(root: nn.Module, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While ``root`` (the traced twin of ``model``) runs, an index by a boolean constant selects a known number of elements.

    Gives the buffers whose values were so used, by name.
    """
    used: dict[str, Tensor] = {}
    reader = _Reader(root, dict(model.named_buffers(remove_duplicate=False)), used)
    original = torch.Tensor.__getitem__

    def getitem(self: Tensor, index: Any) -> Tensor:
        return original(self, reader.integers(index))

    torch.Tensor.__getitem__ = getitem
    try:
        yield used
    finally:
        del torch.Tensor.__getitem__  # it was inherited


def check_selections(selections: dict[str, Tensor], buffers: Callable[[str], Tensor]) -> None:
    """That the buffers still hold what the capture took for granted.

    Raises:
        CallError: one does not.
    """
    for name, value in selections.items():
        now = buffers(name)
        if now.shape != value.shape or not torch.equal(now.detach().cpu(), value):
            raise CallError(
                f"the buffer {name} has other values than at the conversion",
                where=name,
                why="they decide which elements a boolean index picks, and the capture fixed these",
                fix="hatify.convert(model, ...) with the values that you need",
            )


def words(selections: dict[str, Tensor]) -> list[str]:
    """What was fixed, for the report."""
    return [
        f"a boolean index reads the buffer {name}: which elements it picks is fixed by its values at the conversion"
        for name in selections
    ]


class _Reader:
    """Actual values of tensors that the trace makes of buffers and constants alone."""

    def __init__(self, root: nn.Module, held: dict[str, Tensor], used: dict[str, Tensor]) -> None:
        self.root, self.held, self.used = root, held, used
        self.literals: nn.Module | None = None  # where the tracer keeps tensors that no module holds

    def integers(self, index: Any) -> Any:
        """``index`` with boolean tensors of known value replaced by the positions where they are true."""
        parts = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(p, FakeTensor) and p.dtype == torch.bool and p.dim() for p in parts):
            return index
        found: list[Any] = []
        for part in parts:
            value = self._value(part) if isinstance(part, FakeTensor) and part.dtype == torch.bool and part.dim() else None
            if value is None:
                found.append(part)
            else:
                with _disable_current_modes():
                    positions = [p.tolist() for p in value.nonzero(as_tuple=True)]
                found += [torch.tensor(p, dtype=torch.int64, device=part.device) for p in positions]
        return tuple(found)

    def _value(self, mask: FakeTensor) -> Tensor | None:
        mode = get_proxy_mode()
        slot = None if mode is None else get_proxy_slot(mask, mode.tracer, None)
        if slot is None:
            return None
        self.literals = mode.tracer.root
        names: dict[fx.Node, str] = {}
        for name, buffer in self.root.named_buffers(remove_duplicate=False):
            own = get_proxy_slot(buffer, mode.tracer, None) if isinstance(buffer, Tensor) else None
            if own is not None:
                names.setdefault(own.proxy.node, name)
        read: set[str] = set()
        with _disable_current_modes():
            value = self._evaluate(slot.proxy.node, names, {}, read)
            if value is not None:
                self.used.update({name: self.held[name].detach().cpu().clone() for name in read})
            return value

    def _evaluate(self, node: fx.Node, names: dict[fx.Node, str], done: dict, read: set[str]) -> Any:
        """The node's actual value, or None where it depends on an input, a parameter, a size or chance, or is written in place."""
        if node in done:
            return done[node]
        done[node] = None
        if any(_writes(user, node) for user in node.users):
            return None
        if node in names:
            read.add(names[node])
            done[node] = self.held[names[node]]
        elif node.op == "get_attr":
            held = getattr(self.literals, node.target, None)
            done[node] = held if isinstance(held, Tensor) and not isinstance(held, FakeTensor | nn.Parameter) else None
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            operands = [self._evaluate(n, names, done, read) for n in node.all_input_nodes]
            pure = node.target is DETACHED or not is_random(node.target) and not node.target._schema.is_mutable
            if pure and all(o is not None for o in operands):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: done[n])
                done[node] = node.target(*args, **kwargs)
        return done[node]


def _writes(user: fx.Node, node: fx.Node) -> bool:
    if not isinstance(user.target, torch._ops.OpOverload) or user.target is DETACHED:
        return False
    return any(
        a.alias_info is not None and a.alias_info.is_write and value is node
        for a, value in zip(user.target._schema.arguments, user.args)
    )
