"""Blocks that are called with the like of what another one got: traced once, then copied.

A deep network is one block over and over. A block is traced between two marks; where another one is alike (its classes, attributes,
shapes and values of buffers, and what it is given), one operator stands for all of it while tracing, and the graph that is read from the
trace has a copy of the first block there, with the other one's weights. Attributes by which blocks are told apart (``layer_idx``) count if
code reads them (watched.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from hatify.capture.alike import again, likeness, looks
from hatify.capture.names import telling_name
from hatify.capture.watched import Watched, differing, read_again, reads, told, watching
from hatify.gates.layers import Elementwise
from hatify.registry import Traced, describe

_LIBRARY = torch.library.Library("hatify", "FRAGMENT")
_LIBRARY.define("mark(Tensor[] values, str key) -> ()")
_LIBRARY.define("repeat(Tensor[] inputs, str key) -> Tensor[]")
MARK = torch.ops.hatify.mark.default
"""Where a block begins, with its inputs, or ends, with its results."""
REPEAT = torch.ops.hatify.repeat.default
"""A block that is not traced."""
fx.node.has_side_effect(MARK)

_NUMBERS = itertools.count()
_TRACED: dict[Hashable, list[_Result]] = {}
_WATCHED: Watched = []
_REPEATS: dict[str, tuple[str, _Result]] = {}


class NotRepeatable(Exception):
    """A block reads what is neither its own nor given to it: every block has to be traced by itself."""


@dataclass
class _Result:
    """What a block gave: the number of its marks, its path, its watched attributes, its results' structure, what else than tensors is
    among them, and how the tensors look and whether they ask for gradients."""

    number: str
    path: str
    block: nn.Module
    attributes: dict[tuple[str, str], Any]
    spec: Any
    flat: list[Any]
    tensors: list[tuple[Any, ...]]
    gradients: list[bool]


def mark_blocks(root: nn.Module, leaves: Mapping[str, nn.Module]) -> None:
    """Lets every block of a copied tree, whose leaves are marked, be traced only if none before was alike.

    A block that holds what has other names too is always traced.
    """
    shared = {key for key, count in Counter(map(id, _named(root))).items() if count > 1}
    marked = {id(leaf) for leaf in leaves.values()}
    whole = {id(m) for leaf in leaves.values() for m in leaf.modules()}
    elementwise = {id(leaf) for leaf in leaves.values() if isinstance(describe(leaf), Elementwise)}
    inside_leaves = {type(m) for leaf in leaves.values() for m in leaf.modules()}
    _WATCHED.extend(differing(root.modules(), elementwise, besides=inside_leaves))
    blocks: list[_Block] = []
    for path, block in root.named_modules():
        if not path or id(block) in whole:
            continue
        if sum(id(m) in marked for m in block.modules()) < 2:
            continue  # as soon traced as compared
        inside = [m for m in block.modules() if id(m) not in whole]
        replaced = any("forward" in vars(m) and not isinstance(vars(m)["forward"], Traced) for m in inside)
        values = {id(m): _values(m) for m in inside if any(b is not None for b in m._buffers.values())}
        if replaced or None in values.values() or any(id(t) in shared for t in _held(block)):
            continue
        blocks.append(_Block(path, block, values))
    with watched_blocks(root):
        keys = [block.alike([], []) for block in blocks]
    like_it = Counter(keys)
    for block, key in zip(blocks, keys):
        if key is not None:
            block.called = like_it[key] > 1
            block.block.__dict__["forward"] = block


def _named(root: nn.Module) -> Iterator[Tensor]:
    for _, tensor in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)):
        yield tensor


def watched_blocks(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Notes, while the marked blocks of a tree are traced, which of the attributes that tell them apart code reads."""
    return watching(root, _WATCHED)


def may_have_looked(error: BaseException) -> bool:
    """Whether a trace may have failed because watched attributes are not in the dictionaries of their objects."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return any(isinstance(cause, KeyError | AttributeError) for cause in causes)


def repeated_paths() -> set[str]:
    """The paths of the blocks that stand for another's trace."""
    return {path for path, _ in _REPEATS.values()}


def clear_repeats() -> None:
    """Drops the records (they hold fake tensors' sizes)."""
    _TRACED.clear()
    _REPEATS.clear()
    _WATCHED.clear()


class _Block(Traced):
    """The forward of a block while tracing. The first call of one that is like no other is not looked at closely."""

    def __init__(self, path: str, block: nn.Module, values: dict[int, Hashable]) -> None:
        self.path, self.block, self.own, self.values = path, block, block.forward, values
        self.called = False

    def alike(self, tensors: Sequence[Tensor], others: Sequence[Any]) -> Hashable | None:
        return likeness(self.block, tensors, others, self.values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [a for a in flat if isinstance(a, Tensor)]
        others = [*(Tensor if isinstance(a, Tensor) else a for a in flat), repr(spec)]
        mode = detect_fake_mode(tensors)
        looked_at, self.called = self.called, True
        key = self.alike(tensors, others) if looked_at and mode is not None else None
        if key is None:
            return self.own(*args, **kwargs)
        attributes = told(self.block)
        for known in _TRACED.get((mode, key), ()):
            places = reads(known.block) | reads(self.block)
            if all(known.attributes.get(place) == attributes.get(place) for place in places):
                return self._repeat(known, tensors)
        number = str(next(_NUMBERS))
        before = _state(mode, self.block, tensors)
        torch.ops.hatify.mark(tensors, number)
        out = self.own(*args, **kwargs)
        result, given = self._result(number, attributes, out)
        again, _ = pytree.tree_flatten((args, kwargs))
        unwritten = len(again) == len(flat) and all(map(operator.is_, again, flat)) and told(self.block) == attributes
        unwritten = unwritten and self.alike(tensors, others) == key
        if result is not None and unwritten and _state(mode, self.block, tensors) == before:
            torch.ops.hatify.mark(given, number)
            _TRACED.setdefault((mode, key), []).append(result)
        return out

    def _result(self, number: str, attributes: dict[tuple[str, str], Any], out: Any) -> tuple[_Result | None, list[Tensor]]:
        """What can be repeated of a result: plain values and tensors."""
        flat, spec = pytree.tree_flatten(out)
        tensors = [t for t in flat if isinstance(t, Tensor)]
        gradients = [t.requires_grad for t in tensors]
        plain = all(isinstance(v, Tensor | torch.SymInt | bool | int | float | str | type(None)) for v in flat)
        if not tensors or not plain:
            return None, tensors
        others = [Tensor if isinstance(v, Tensor) else v for v in flat]
        return _Result(number, self.path, self.block, attributes, spec, others, [looks(t) for t in tensors], gradients), tensors

    def _repeat(self, known: _Result, tensors: list[Tensor]) -> Any:
        key = f"{self.path}#{next(_NUMBERS)}"
        _REPEATS[key] = self.path, known
        read_again(self.block, reads(known.block))
        with _gradients_off():
            made = torch.ops.hatify.repeat(tensors, key)
        given = iter([t.requires_grad_() if grad else t for t, grad in zip(made, known.gradients)])
        return pytree.tree_unflatten([next(given) if v is Tensor else v for v in known.flat], known.spec)


@contextlib.contextmanager
def _gradients_off() -> Iterator[None]:
    """What an operator gives asks for no gradients; unlike ``torch.no_grad``, a trace does not see it."""
    with torch._C.DisableTorchFunction():
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(before)


def _state(mode: Any, block: nn.Module, tensors: Sequence[Tensor]) -> Hashable:
    """What must be as it was after a block has run: memory that it was given or holds is not written to, and no size depends on data."""
    unknown = mode.shape_env.unbacked_symint_counter if mode.shape_env is not None else 0
    with torch._C.DisableTorchFunction():
        return unknown, tuple((id(t), t._version) for t in (*tensors, *_held(block)))


def _held(block: nn.Module) -> list[Tensor]:
    return [t for m in block.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _values(module: nn.Module) -> Hashable | None:
    """The values of a module's own buffers, which may decide what a trace takes for known; None where they cannot be read."""
    digest = hashlib.sha256()
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        if buffer.layout is not torch.strided:
            return None
        digest.update(repr((name, tuple(buffer.shape), buffer.dtype)).encode())
        if buffer.device.type != "meta" and not isinstance(buffer, FakeTensor) and buffer.numel():  # others have none
            digest.update(buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.library.register_fake("hatify::mark", lib=_LIBRARY)
def _mark_on_fakes(values: list[Tensor], key: str) -> None:
    return None


@torch.library.register_fake("hatify::repeat", lib=_LIBRARY)
def _repeat_on_fakes(inputs: list[Tensor], key: str) -> list[Tensor]:
    return [again(look) for look in _REPEATS[key][1].tensors]


Read = Callable[[], fx.Node]
"""Gives a node of the new graph; a parameter or buffer is read where it is first needed."""


@dataclass
class _Template:
    """A block of the graph that is being read: what it is given, the node before it, its nodes in order, what it gives."""

    given: list[Read]
    before: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    results: list[Read] = field(default_factory=list)


class Copier:
    """Puts copies of blocks into the graph that is read from a trace.

    Args:
        graph: the new graph.
        held: gives the node that reads a parameter or buffer, by name.
    """

    def __init__(self, graph: fx.Graph, held: Callable[[str], fx.Node]) -> None:
        self.graph, self.held = graph, held
        self.templates: dict[str, _Template] = {}
        self._repeated: set[str] = set()

    def mark(self, values: list[Read], number: str) -> None:
        """A mark has been read: the first of a number begins a block, the second ends it."""
        last = next(iter(reversed(self.graph.nodes)))
        template = self.templates.setdefault(number, _Template(values, last))
        if template.given is values:
            return
        node = template.before
        while node is not last:
            node = node.next
            template.nodes.append(node)
        template.results = values

    def repeat(self, inputs: list[Read], key: str) -> list[fx.Node]:
        """Copies the block that a repetition stands for; returns the nodes of its results.

        Raises:
            NotRepeatable: the block read something from elsewhere.
        """
        path, known = _REPEATS[key]
        template = self.templates[known.number]
        self._repeated.add(known.number)
        given: dict[fx.Node, Read] = {}
        for own, other in zip(template.given, inputs):
            if given.setdefault(own(), other) is not other and given[own()]() is not other():
                raise NotRepeatable(f"{known.path} is given {own()} twice, {path} is not")
        copies: dict[fx.Node, fx.Node] = {}

        def moved(name: str) -> str:
            own = name == known.path or name.startswith(f"{known.path}.")
            return f"{path}{name[len(known.path) :]}" if own else name

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:
                if node in given:
                    copies[node] = given[node]()
                elif node.op == "get_attr":
                    target = moved(node.target)
                    copies[node] = node if target == node.target else self.held(target)
                elif isinstance(node.meta.get("val"), torch.SymInt):
                    copies[node] = node  # sizes are equal
                else:
                    raise NotRepeatable(f"{known.path} reads {node}")
            return copies[node]

        for node in template.nodes:
            if node.op == "get_attr" or node in given or isinstance(node.meta.get("val"), torch.SymInt):
                continue  # where it is needed
            copies[node] = self._copy(node, moved, copy_of)
        return [copy_of(read()) for read in template.results]

    def check(self) -> None:
        """The whole graph was read.

        Raises:
            NotRepeatable: a value of a block that has copies is used elsewhere, and is none of its results (a list of all blocks' losses).
        """
        for template in (self.templates[number] for number in self._repeated):
            inside, results = set(template.nodes), {read() for read in template.results}
            for node in inside - results:
                held = node.op == "get_attr" or isinstance(node.meta.get("val"), torch.SymInt)
                if not held and any(user not in inside for user in node.users):
                    raise NotRepeatable(f"{node} is used past the block that it is in")

    def _copy(self, node: fx.Node, moved: Callable[[str], str], copy_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
        target = moved(node.target) if node.op == "call_module" else node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), copy_of)
        scope = moved(node.meta.get("scope", ""))
        told = node.name.startswith(re.sub(r"\W+", "_", _name(node, node.target, node.meta.get("scope", ""))))  # as fx spells it
        new = self.graph.create_node(node.op, target, args, kwargs, name=_name(node, target, scope) if told else None)
        new.meta = {**node.meta, **({"scope": scope} if "scope" in node.meta else {})}
        if "aliases" in new.meta:
            new.meta["aliases"] = [copy_of(alias) for alias in node.meta["aliases"]]
        return new


def _name(node: fx.Node, target: Any, scope: str) -> str:
    """What a node is called that has a telling name; others have one that fx gives."""
    return target.replace(".", "_") if node.op == "call_module" else telling_name(target, scope)
