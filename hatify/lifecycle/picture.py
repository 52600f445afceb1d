"""What the nodes of a plain graph hold at the example inputs: shapes, types, sizes, and the values of constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hatify.capture.effects import is_random
from hatify.lifecycle.plain import Plain
from hatify.modules.copies import overlaps


@dataclass(frozen=True, eq=False)
class Seen:
    """One node's result. ``constant``: it depends on no input; ``known`` is its value then, if that does not depend on sizes
    either. ``size`` is the number, for arithmetic on sizes; ``parts`` are several results; ``other`` is a type, a device ... ``open`` are
    the dimensions that were seen to be longer or shorter at other inputs."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    constant: bool
    known: Any = None
    size: Any = None
    parts: tuple[Seen, ...] = ()
    other: Any = None
    open: frozenset[int] = frozenset()


def operator_of(node: fx.Node) -> str:
    """The operator's name without its overload; Python's own arithmetic has the names of ATen's."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    name = getattr(node.target, "__name__", str(node.target))
    return {"truediv": "div"}.get(name, name)


class Picture:
    """Runs ``plain`` once on ``inputs`` (one value per placeholder, structures included) and keeps what it saw, by node."""

    def __init__(self, plain: Plain, inputs: Sequence[Any]) -> None:
        self.seen: dict[fx.Node, Seen] = {}
        given = iter(inputs)
        env: dict[fx.Node, Any] = {}
        fixed: dict[fx.Node, bool] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in plain.graph.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        written = {id(b): (b, b.clone()) for b in plain.root.buffers() if not overlaps(b)}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for node in plain.graph.nodes:
                env[node] = self._run(plain, node, env, given)
                sources = [fixed[n] for n in node.all_input_nodes]
                constant = node.op == "get_attr" or (node.op == "call_function" and not is_random(node.target))
                sized = isinstance(env[node], int | float) and not isinstance(env[node], bool)
                fixed[node] = constant and all(sources) and not sized
                self.seen[node] = _look(env[node], self._constant(node), env[node] if fixed[node] else None)
                for used in node.all_input_nodes:
                    if last[used] is node:
                        env.pop(used, None)
        with torch.no_grad():
            for buffer, value in written.values():
                buffer.copy_(value)

    def __getitem__(self, node: fx.Node) -> Seen:
        return self.seen[node]

    def compare(self, plain: Plain, inputs: Sequence[Any]) -> None:
        """Looks at ``inputs`` of other sizes, too: which dimensions are open."""
        other = Picture(plain, inputs)
        self.seen = {node: _opened(seen, other.seen[node]) for node, seen in self.seen.items()}

    def _constant(self, node: fx.Node) -> bool:
        told = node.op not in ("placeholder", "call_module", "output")
        sources = [self.seen[n] for n in node.all_input_nodes]
        return told and all(seen.constant or seen.size is not None for seen in sources)

    def _run(self, plain: Plain, node: fx.Node, env: dict, given: Any) -> Any:
        if node.op == "placeholder":
            return next(given)
        if node.op == "get_attr":
            return plain.root.training if node.target == "training" else plain.tensor(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        if node.op == "call_module":
            leaf = plain.leaves[node.target]
            args = pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args) if _writes(leaf) else args
            return leaf(*args, **kwargs)
        return node.target(*args, **kwargs) if node.op == "call_function" else None


def _writes(leaf: nn.Module) -> bool:
    return any(getattr(m, "inplace", False) for m in leaf.modules())


def _opened(seen: Seen, other: Seen) -> Seen:
    parts = tuple(_opened(a, b) for a, b in zip(seen.parts, other.parts))
    moved = {d for d, (a, b) in enumerate(zip(seen.shape or (), other.shape or ())) if a != b}
    return replace(seen, parts=parts or seen.parts, open=seen.open | moved)


def _look(value: Any, constant: bool, known: Any) -> Seen:
    if isinstance(value, Tensor):
        return Seen(tuple(value.shape), value.dtype, constant, known)
    if isinstance(value, list | tuple):
        return Seen(None, None, constant, known, parts=tuple(_look(v, constant, None) for v in value))
    if isinstance(value, int | float | bool):
        return Seen(None, None, constant, size=value)
    return Seen(None, None, constant, other=value)
