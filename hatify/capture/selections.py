"""Constants of known values that decide what code does: boolean masks, ``x[:, self.keep]``, which while tracing become the integers that
they stand for, and branches, ``if self.ready``."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

from hatify.capture.effects import is_random
from hatify.errors import CallError, CaptureError

READERS = ("item", "tolist", "__int__", "__index__")
"""Methods that read booleans and whole numbers; a real number that they read may be one that the network computes with."""
DETACHED = torch.ops.aten.detach_.default
"""In place by name, but it changes no value: ``torch.tensor([...])`` ends with it."""


@contextlib.contextmanager
def known_selections(root: nn.Module, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While ``root`` (the traced twin of ``model``) runs, an index by a boolean constant selects a known number of elements, and a branch
    on a constant goes the way that it goes for its value.

    Gives the buffers whose values were so used, by name.
    """
    used: dict[str, Tensor] = {}
    reader = _Reader(root, dict(model.named_buffers(remove_duplicate=False)), used)
    getitem, ask, *readers = (getattr(torch.Tensor, name) for name in ("__getitem__", "__bool__", *READERS))

    def index(self: Tensor, index: Any) -> Tensor:
        return getitem(self, reader.integers(index))

    def boolean(self: Tensor) -> bool:
        value = reader.value(self)
        return ask(self if value is None else value)

    def reading(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def known(self: Tensor) -> Any:
            counts = not (self.dtype.is_floating_point or self.dtype.is_complex)
            value = reader.value(self) if counts else None
            return read(self if value is None else value)

        return known

    methods = {"__getitem__": index, "__bool__": boolean, **{n: reading(read) for n, read in zip(READERS, readers)}}
    with replaced_methods(methods):
        yield used


@contextlib.contextmanager
def replaced_methods(methods: dict[str, Callable]) -> Iterator[None]:
    """Inside, ``torch.Tensor`` has these methods; afterwards what it had, which mostly is inherited."""
    own = {name: vars(torch.Tensor)[name] for name in methods if name in vars(torch.Tensor)}
    for name, method in methods.items():
        setattr(torch.Tensor, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(torch.Tensor, name)
        for name, method in own.items():
            setattr(torch.Tensor, name, method)


def check_selections(selections: dict[str, Tensor], buffers: Callable[[str], Tensor]) -> None:
    """That the buffers still hold what the capture took for granted.

    Raises:
        CallError: one does not.
    """
    for name, value in selections.items():
        now = buffers(name).detach().cpu()
        then = value.to(now.dtype)  # the network may have been cast
        if now.shape != then.shape or not bool(((now == then) | (now.isnan() & then.isnan())).all()):
            raise CallError(
                f"the buffer {name} has other values than at the conversion",
                where=name,
                why="they decide a branch or which elements a boolean index picks, and the capture fixed that",
                fix="hatify.convert(model, ...) with the values that you need",
            )


def words(selections: dict[str, Tensor]) -> list[str]:
    """What was fixed, for the report."""
    return [
        f"a branch or a boolean index reads the buffer {name}: which way it goes is fixed by its values at the conversion"
        for name in selections
    ]


def check_not_written(selections: dict[str, Tensor], written: Collection[str], model: nn.Module) -> None:
    """That forward does not write what it decides by: the first call would decide otherwise than the next.

    Raises:
        CaptureError: it does.
    """
    names = sorted(selections.keys() & set(written))
    if names:
        raise CaptureError(
            f"{type(model).__name__} decides by the buffer {names[0]}, and writes it",
            where=names[0],
            why="a graph has one way to go, and the next call would go another",
            fix="convert after the calls that set it, or take the decision out of forward (torch.where instead of if)",
        )


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
        known = False
        for part in parts:
            value = self.value(part) if isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() else None
            if value is None:
                found.append(part)
            else:
                known = True
                with _disable_current_modes():
                    positions = [p.tolist() for p in value.nonzero(as_tuple=True)]
                found += [torch.tensor(p, dtype=torch.int64, device=part.device) for p in positions]
        return tuple(found) if known else index

    def value(self, mask: Tensor) -> Tensor | None:
        """The actual value of a traced tensor, noted; None where it depends on more than constants."""
        mode = get_proxy_mode() if isinstance(mask, FakeTensor) else None
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
        elif node.op == "call_function" and node.target is operator.getitem:
            several, place = node.args
            found = self._evaluate(several, names, done, read)
            done[node] = None if found is None else found[place]
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
