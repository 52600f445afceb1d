"""One graph and its twins in other types: what differs between them, and what that is taken from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hatify.capture.captured import Captured, Typed, Way, with_numbers_by_mode
from hatify.capture.casts import is_cast, place_of_type, type_of
from hatify.capture.layouts import spelled_out
from hatify.capture.regions import closes, opens
from hatify.capture.tree import FunctionCall
from hatify.modules.types import LIMITS

aten = torch.ops.aten
NORMS = {
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    aten.instance_norm.default,
    aten.batch_norm.default,
}
"""Operators that become modules, whose settings are numbers."""
MOST_CASTS = 2
"""Casts in a row that are told apart."""
NEAREST = 64
"""Among so many values before a constant, one is looked for whose type it is taken from."""


class Unlike(Exception):
    """The graphs differ by more than casts and constants; says where."""


@dataclass(frozen=True)
class Twin:
    """The same model's graph in another type: its nodes by those of the graph, and back."""

    nodes: dict[fx.Node, fx.Node]
    mine: dict[fx.Node, fx.Node]

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        return _dtype(self.nodes.get(node))


class Follower:
    """One graph and its twins."""

    def __init__(self, captured: Captured, own: Way) -> None:
        self.captured, self.own = captured, own
        self.nodes = [n for n in captured.graph.nodes if not is_cast(n)]
        self.twins: dict[Way, Twin] = {own: Twin(dict(zip(self.nodes, self.nodes)), dict(zip(self.nodes, self.nodes)))}
        self.order = {n: i for i, n in enumerate(captured.graph.nodes)}
        self.regions = _regions(captured.graph)
        self.made: dict[tuple, fx.Node] = {}

    def add(self, way: Way, twin: Captured) -> None:
        """Pairs the nodes.

        Raises:
            Unlike: they are others, or otherwise connected.
        """
        if twin.output != self.captured.output:
            raise Unlike(_place(self.nodes[-1]))
        pairs: dict[fx.Node, fx.Node] = {}
        held = {n.target: n for n in twin.graph.nodes if n.op == "get_attr"}
        for node in self.nodes:
            if node.op == "get_attr":
                other = held.get(node.target)
                if node.target in self.captured.constants and not _same(self.captured.constants, twin.constants, node.target):
                    raise Unlike(next((_place(user) for user in node.users), _place(node)))
                if other is not None:
                    pairs[node] = other
        mine, others = ([n for n in nodes if n.op != "get_attr"] for nodes in (self.nodes, twin.graph.nodes))
        others = [n for n in others if not is_cast(n)]
        for node, other in itertools.zip_longest(mine, others):
            if node is None or other is None or _kind(node) != _kind(other):
                raise Unlike(_place(other or node))
            pairs[node] = other
            if len(node.args) != len(other.args) or node.kwargs.keys() != other.kwargs.keys():
                (node.args, node.kwargs), (other.args, other.kwargs) = spelled_out(node, other), spelled_out(other, node)
                if "by_mode" in node.meta:
                    node.meta["by_mode"] = with_numbers_by_mode((node.args, node.kwargs), node.meta["by_mode"])
        found = Twin(pairs, {b: a for a, b in pairs.items()})
        for node in mine:
            self._check(node, pairs[node], found)
        if {n: found.mine.get(_base(v)) for n, v in twin.writes.items()} != {n: _base(v) for n, v in self.captured.writes.items()}:
            raise Unlike(_place(mine[-1]))
        self.twins[way] = found

    def _check(self, node: fx.Node, other: fx.Node, twin: Twin) -> None:
        a, b = _leaves(node), _leaves(other)
        if len(a) != len(b):
            raise Unlike(_place(other))
        for x, y in zip(a, b):
            if isinstance(x, fx.Node) != isinstance(y, fx.Node):
                raise Unlike(_place(other))
            if isinstance(x, fx.Node):
                if twin.mine.get(_base(y)) is not _base(x):
                    raise Unlike(_place(other))
            elif not _equal(x, y) and not (type(x) is type(y) and isinstance(x, float | torch.dtype)):
                raise Unlike(_place(other))

    # what differs, and what it is taken from

    def settle(self) -> None:
        """Writes what was found into the graph."""
        for node in self.nodes:
            if len(self.twins) > 1:
                self._settled(node)
        sources = {typed.source for node in self.captured.graph.nodes for typed in node.meta.get("typed", {}).values()}
        written = {*self.captured.writes.values(), *sources}
        for cast in reversed([n for n in self.captured.graph.nodes if is_cast(n)]):
            if not cast.users and cast not in written:
                self.captured.graph.erase_node(cast)

    def _settled(self, node: fx.Node) -> None:
        others = {way: twin.nodes[node] for way, twin in self.twins.items() if node in twin.nodes}
        places = [*enumerate(node.args), *node.kwargs.items()]
        typed: dict[int | str, Typed] = {}
        for place, argument in places:
            values = {way: other.args[place] if isinstance(place, int) else other.kwargs[place] for way, other in others.items()}
            if isinstance(argument, float | torch.dtype):
                if any(not _equal(argument, v) for v in values.values()):
                    found = None if _kind(node)[1] in NORMS else self._source(values, node)
                    if found is None:
                        self._refuse(node, [w for w, v in values.items() if not _equal(argument, v)])
                    else:
                        typed[place] = found
                continue
            flat, spec = pytree.tree_flatten(argument)
            leaves = {way: pytree.tree_leaves(value) for way, value in values.items()}
            for i, a in enumerate(flat):
                inner = {way: found[i] for way, found in leaves.items()}
                if isinstance(a, fx.Node):
                    flat[i] = self._operand(node, a, inner)
                elif any(not _equal(a, v) for v in inner.values()):
                    self._refuse(node, [w for w, v in inner.items() if not _equal(a, v)])
            argument = pytree.tree_unflatten(flat, spec)
            if isinstance(place, int):
                node.update_arg(place, argument)
            else:
                node.update_kwarg(place, argument)
        if typed:
            node.meta["typed"] = typed
        if "by_mode" in node.meta:  # the same operands there
            node.meta["by_mode"] = with_numbers_by_mode((node.args, node.kwargs), node.meta["by_mode"])

    def _operand(self, node: fx.Node, operand: fx.Node, values: dict[Way, fx.Node]) -> fx.Node:
        """The operand behind the casts that the code puts before ``node`` in every type. A cast that does nothing leaves no trace:
        ``x.float()`` is ``x`` in float32, and its later uses look like uses of the cast."""
        base, chain = _base(operand), _chain(operand)
        starts = {
            way: _dtype(base) if self._is_made(base) else twin.dtype(base) for way, twin in self.twins.items() if way in values
        }
        wanted = {way: _run([type_of(c) for c in _chain(v)], starts[way], self.twins[way].dtype(base)) for way, v in values.items()}
        if all(_run([self._type_in(way, c) for c in chain], starts[way]) == wanted[way] for way in values):
            for cast in chain:
                cast.meta.setdefault("typed", {})
            return operand
        steps = self._explained(wanted, starts, chain[0]) if chain else None  # read before the cast, where there is one
        steps = self._explained(wanted, starts, node) if steps is None else steps
        if steps is None:
            self._refuse(node, [w for w in values if wanted[w] != wanted[self.own]] or [*values])
            return operand
        done, key = base, (base, self.regions[node])
        for i, step in enumerate(steps):
            key = (*key, step)
            if key not in self.made:
                self.made[key] = self._cast(done, step, node, chain[i - len(steps)] if len(chain) >= len(steps) else None)
            done = self.made[key]
        return done

    def _type_in(self, way: Way, cast: fx.Node) -> torch.dtype:
        """The type of a cast of the graph's, in another way."""
        typed = next(iter(cast.meta.get("typed", {}).values()), None)
        return type_of(cast) if typed is None else self._value(typed, way)

    def _value(self, typed: Typed, way: Way) -> Any:
        dtype = self._dtype_of(typed.source, way)
        return dict(typed.choices)[dtype] if typed.choices else getattr(torch.finfo(dtype), typed.limit) if typed.limit else dtype

    def _dtype_of(self, source: fx.Node | None, way: Way) -> torch.dtype | None:
        if source is not None and self._is_made(source):
            return _dtype(source)  # it stays as it was made
        return way.dtype if source is None else self.twins[way].dtype(source)

    def _is_made(self, node: fx.Node) -> bool:
        """Whether a node reads a tensor that the code made."""
        return node.op == "get_attr" and node.target in self.captured.constants

    def _explained(
        self, wanted: dict[Way, list[torch.dtype]], starts: dict[Way, Any], node: fx.Node
    ) -> list[Typed | torch.dtype] | None:
        """The casts that come to what is wanted in each way, where those to the type that is there already do nothing."""
        most = max(map(len, wanted.values()))
        if most == 0:
            return []
        if most == 1:
            step = self._step({way: found[0] if found else starts[way] for way, found in wanted.items()}, node)
            return None if step is None else [step]
        if most > MOST_CASTS:
            return None
        seen = list(dict.fromkeys(d for found in wanted.values() for d in found))
        options: list[Typed | torch.dtype] = [*seen, *(Typed(s) for s in self._sources(node, wanted))]
        for steps in itertools.product(options, repeat=most):
            types = {w: [s if isinstance(s, torch.dtype) else self._value(s, w) for s in steps] for w in wanted}
            if all(_run(types[way], starts[way]) == found for way, found in wanted.items()):
                return list(steps)
        return None

    def _step(self, values: dict[Way, torch.dtype], node: fx.Node) -> Typed | torch.dtype | None:
        return values[self.own] if len(set(values.values())) == 1 else self._source(values, node)

    def _source(self, values: Mapping[Way, Any], node: fx.Node) -> Typed | None:
        """What a constant, that has these values, is taken from."""
        of_types = all(isinstance(v, torch.dtype) for v in values.values())
        sources = self._sources(node, values, own_first=of_types)
        for source in sources:
            for name in (None,) if of_types else LIMITS:
                typed = Typed(source, name)
                if all(_equal(self._value(typed, way), v) for way, v in values.items()):
                    return typed
        for source in sources:
            choices: dict[torch.dtype, Any] = {}
            if all(_equal(choices.setdefault(self._dtype_of(source, way), v), v) for way, v in values.items()):
                return Typed(source, choices=tuple(choices.items()))
        return None

    def _sources(self, node: fx.Node, ways: Mapping[Way, Any], own_first: bool = True) -> list[fx.Node | None]:
        """What a type may be read from: the parameters (None), operands, values before them; those of the same types once."""
        before = [n for n in self.nodes if self.order[n] < self.order[node]]
        operands = [_base(n) for n in node.all_input_nodes]
        found: dict[tuple, fx.Node | None] = {}
        for source in ([None, *operands] if own_first else [*operands, None]) + before[: -NEAREST - 1 : -1]:
            types = tuple(self._dtype_of(source, way) for way in ways)
            if all(t is not None and t.is_floating_point for t in types):
                found.setdefault(types, source)
        return list(found.values())

    def _cast(self, value: fx.Node, step: Typed | torch.dtype, node: fx.Node, reused: fx.Node | None) -> fx.Node:
        """A cast of ``value`` before ``node``: the one that the graph has there, where nothing else is meant by that."""
        dtype = step if isinstance(step, torch.dtype) else self._value(step, self.own)
        free = reused is not None and "typed" not in reused.meta and type_of(reused) == dtype
        needed = [value, *([step.source] if isinstance(step, Typed) and step.source is not None else [])]
        if free and all(self.order.get(n, len(self.order)) < self.order[reused] for n in needed):
            reused.replace_input_with(reused.args[0], value)
        else:
            with self.captured.graph.inserting_before(node):
                reused = self.captured.graph.call_function(aten.to.dtype, (value, dtype))
            val = value.meta["val"]
            reused.meta.update(node.meta, val=val if val.dtype == dtype else val.to(dtype))
            reused.meta.pop("by_mode", None)
        reused.meta["typed"] = {} if isinstance(step, torch.dtype) else {place_of_type(reused): step}
        return reused

    def _refuse(self, node: fx.Node, ways: list[Way]) -> None:
        for way in ways:
            self.captured.unlike.setdefault(way, _place(node))


# graphs


def _chain(node: fx.Node) -> list[fx.Node]:
    """The casts between a value and its base, the first one first."""
    found: list[fx.Node] = []
    while is_cast(node):
        found.insert(0, node)
        node = node.args[0]
    return found


def _base(node: fx.Node) -> fx.Node:
    while is_cast(node):
        node = node.args[0]
    return node


def _run(types: list[torch.dtype], start: torch.dtype | None, first: torch.dtype | None = None) -> list[torch.dtype]:
    """The casts that do something to a value of type ``start``; ``first`` is that which it has before them."""
    done: list[torch.dtype] = []
    for dtype in types if first is None else [first, *types]:
        if dtype != (done[-1] if done else start):
            done.append(dtype)
    return done


def _dtype(node: fx.Node | None) -> torch.dtype | None:
    val = None if node is None else node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else None


def _kind(node: fx.Node) -> tuple:
    target = node.target
    return node.op, None if node.op == "placeholder" else target.function if isinstance(target, FunctionCall) else target


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def dtypes_of(node: fx.Node) -> list[torch.dtype]:
    return [a for a in _leaves(node) if isinstance(a, torch.dtype)]


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or a != a and b != b)


def _same(mine: Mapping[str, Tensor], others: Mapping[str, Tensor], name: str) -> bool:
    a, b = mine[name], others.get(name)
    return b is not None and a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _place(node: fx.Node) -> str:
    return node.meta.get("line") or node.meta.get("scope") or node.name


def _regions(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The regions that each node is in."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inside: tuple[fx.Node, ...] = ()
    for node in graph.nodes:
        inside = inside[:-1] if closes(node) else (*inside, node) if opens(node) else inside
        found[node] = inside
    return found
