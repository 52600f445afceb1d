"""What the layers of other libraries compute, found by capturing each kind once, and proved on the spot."""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import map_arg
from torch.utils import _pytree as pytree

from ..capture import Captured, capture
from ..capture.captured import ByMode, Typed
from ..capture.regions import SWITCHES
from ..errors import HatifyError
from ..facts import Sizes
from ..gates.layers import MixingNorm
from ..model import HATModel
from ..modules import HATLayer, HATRecurrent, LiveMask, Mask, TaskIndexed
from ..modules.task_indexed import write_buffer
from ..modules.types import by_dtype, limit
from ..proof.differences import difference
from ..registry import describe_as
from ..rewrite.graph import by_mode
from .graphs import graph_to
from .layers import OURS, class_of
from .lowered import Lowered, Recipe
from .resizing import Family, family_of, resized
from .torch_layers import LAYERS, attributes_of, empty_layer, plain_class

__all__ = ["Lowering", "lower_layers", "read_recipe"]


RAISED = (HATLayer, HATRecurrent, TaskIndexed)

_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple, list]] = weakref.WeakKeyDictionary()
"""What was found of the layers of each conversion: the next checkpoint of a training run needs no captures."""


@dataclass
class Lowering:
    """``recipes`` by the id of each layer: a recipe, or the name of the class of torch that computes the same; ``refusals`` say by path
    why a layer has none."""

    recipes: dict[int, Recipe | str]
    refusals: dict[str, str]


def lower_layers(hat: HATModel) -> Lowering:
    """Recipes for all layers that are not torch's own. Each kind of layer is captured in both modes on the inputs that the model's own
    capture saw, and compared with the layer to the last bit."""
    nodes = {n.target: n for n in reversed(hat._facts.values) if n.op == "call_module"}
    found = Lowering({}, {})
    known = _KNOWN.setdefault(hat._facts, {})
    for path, module in hat.named_modules():
        raised = isinstance(module, RAISED)
        cls = class_of(module)
        if not (raised or path in nodes) or isinstance(module, Lowered | Mask | LiveMask) or plain_class(module, cls) is not None:
            continue
        if path not in nodes:
            found.refusals[path] = "it is never called, so what it computes was not seen"
            continue
        for copied in (module, *(module.tasks if isinstance(module, TaskIndexed) else ())):
            try:
                found.recipes[id(copied)] = _recipe(copied, cls, nodes[path], known)
            except (HatifyError, ValueError, NotImplementedError) as error:
                found.refusals[path] = f"what it computes cannot be stored: {getattr(error, 'why', None) or error}"
                break
    return found


def _real(val: Any) -> Any:
    if isinstance(val, Tensor):
        shape = [_size(s) for s in val.shape]
        if val.dtype.is_floating_point:
            return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(val.dtype)
        return torch.zeros(shape, dtype=val.dtype)
    return pytree.tree_map(lambda v: _real(v) if isinstance(v, Tensor) else _size(v), val)


def _size(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size


def _plain_copy(layer: nn.Module, cls: type) -> nn.Module:
    """The layer as it was in the original, on the CPU, sharing nothing."""
    memo: dict[int, Any] = {id(layer._modules[name]): None for name in _added(layer) if layer._modules.get(name) is not None}
    plain = copy.deepcopy(layer, memo).cpu()
    for name in _added(layer):
        plain._modules.pop(name, None)
    for name in OURS:
        plain.__dict__.pop(name, None)
    plain.__class__ = cls
    for part in plain.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # the same values; a stored graph has no writes but those of buffers
    return plain


def _added(layer: nn.Module) -> tuple[str, ...]:
    return ("tasks", "masker", "maskers") if isinstance(layer, RAISED) else ()


def _recipe(layer: nn.Module, cls: type, node: fx.Node, known: dict[tuple, list]) -> Recipe | str:
    values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    key = _kind(layer, cls, values)
    sizes = pytree.tree_map(lambda v: [_size(s) for s in v.shape] if isinstance(v, Tensor) else v, values)
    for recipe, seen in known.setdefault(key, []):
        if isinstance(recipe, Exception):
            raise recipe
        if isinstance(recipe, str) or seen == sizes or _fits(recipe, values):
            return recipe
    plain, call, family = _plain_copy(layer, cls), _real(values), family_of(key)
    relatives = known.setdefault(family.kind, [])
    recipe = _of_relatives(relatives, family, plain, call)
    if recipe is None:
        try:
            recipe = _captured(plain, call)
        except (HatifyError, ValueError, NotImplementedError) as error:
            known[key].append((error, sizes))
            raise
        relatives.append((recipe, family))
    known[key].append((recipe, sizes))
    return recipe


def _of_relatives(relatives: list[tuple[Recipe | str, Family]], family: Family, plain: nn.Module, call: tuple) -> Recipe | None:
    """What was captured of a layer that differs in its sizes alone, proved on this one."""
    for recipe, other in relatives:
        if isinstance(recipe, str):
            continue
        made = resized(recipe, other, family, call, describe_as(plain, type(plain)))
        if made is not None:
            with suppress(ValueError, RuntimeError, HatifyError):  # it does not serve: this one is captured, too
                _prove(plain, made, *call)
                return made
    return None


def _fits(recipe: Recipe, values: Any) -> bool:
    def empty(v: Any) -> Any:
        return torch.empty([_size(s) for s in v.shape], dtype=v.dtype, device="meta") if isinstance(v, Tensor) else _size(v)

    args, kwargs = pytree.tree_map(empty, values)
    return recipe.sizes.fit(recipe.signature.bind(args, kwargs))


def _captured(plain: nn.Module, call: tuple[tuple, dict]) -> Recipe | str:
    args, kwargs = call
    meaning = describe_as(plain, type(plain))
    with torch.random.fork_rng(devices=[]):
        evaluated, trained, _ = capture(plain, args, kwargs)
        name = _as_torch(plain, args, kwargs, evaluated, trained)
        if name is not None:
            return name
        if isinstance(meaning, MixingNorm):
            raise ValueError("a norm over live channels that computes something else than torch's")
        recipe = read_recipe(plain, evaluated, trained, meaning)
        _prove(plain, recipe, args, kwargs)
    return recipe


def _kind(layer: nn.Module, cls: type, values: Any) -> tuple:
    """Layers of one kind compute the same: class, settings, shapes of the tensors, all the way down; inputs of the same rank and type."""
    internal = {*vars(nn.Module()), *OURS, "inplace"} - {"forward"}
    parts: list[Any] = []

    def visit(part: nn.Module, path: str, cls: type, left_out: tuple[str, ...]) -> None:
        settings = tuple(sorted((k, repr(v)) for k, v in vars(part).items() if k not in internal))
        held = tuple((n, None if t is None else (t.shape, t.dtype)) for n, t in (*part._parameters.items(), *part._buffers.items()))
        parts.append((path, cls, settings, held))
        for name, child in part._modules.items():
            if child is not None and name not in left_out:
                visit(child, f"{path}.{name}", type(child), ())

    visit(layer, "", cls, _added(layer))
    inputs = [(v.dim(), v.dtype) if isinstance(v, Tensor) else repr(_size(v)) for v in pytree.tree_leaves(values)]
    return (*parts, *inputs)


def _as_torch(plain: nn.Module, args: tuple, kwargs: dict, evaluated: Captured, trained: Captured | None) -> str | None:
    """The name of a class of torch whose graphs are the very same, or None."""
    base = next((b for b in type(plain).__mro__ if b.__module__.startswith("torch.nn.modules.") and b.__name__ in LAYERS), None)
    if base is None or plain._modules:
        return None
    try:
        twin = empty_layer(base.__name__, attributes_of(plain, base.__name__))
    except ValueError:
        return None
    for shelf in ("_parameters", "_buffers"):
        twin.__dict__[shelf].update(plain.__dict__[shelf])
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    try:
        others = capture(twin, tuple(tensors), {})[:2]
    except HatifyError:
        return None
    same = [_shape_of(a) == _shape_of(b) for a, b in zip((evaluated, trained), others)]
    return base.__name__ if all(same) else None


def _shape_of(captured: Captured | None) -> Any:
    """A graph without its names."""
    if captured is None:
        return None
    numbers = {node: i for i, node in enumerate(captured.graph.nodes)}
    rows = [
        (node.op, None if node.op == "placeholder" else str(node.target), repr(map_arg((node.args, node.kwargs), lambda n: numbers[n])),
         repr(node.meta.get("by_mode") and map_arg(node.meta["by_mode"], lambda n: numbers[n])))
        for node in numbers
    ]  # fmt: skip
    return rows, {name: numbers[node] for name, node in captured.writes.items()}, captured.output


def read_recipe(plain: nn.Module, evaluated: Captured, trained: Captured | None, meaning: Any) -> Recipe:
    """What was captured, as a recipe.

    Raises:
        ValueError: it needs more than its inputs, parameters and buffers.
        ArtifactError: it calls what cannot be stored.
    """
    captures = {"eval": evaluated, **({} if trained is None else {"train": trained})}
    if any(c.constants for c in captures.values()):
        raise ValueError("its code makes tensors of its own; hold them in buffers")
    if evaluated.selections:
        raise ValueError("its code decides by the values of its buffers")
    if evaluated.eval_only:
        raise ValueError("its train mode cannot be traced")
    graphs = {mode: _Transcriber(c, plain).run() for mode, c in captures.items()}
    recipe = Recipe(
        was=type(plain).__name__,
        graphs=graphs,
        outputs={mode: c.output for mode, c in captures.items()},
        signature=evaluated.signature,
        sizes=Sizes([*captures.values()]),
        meaning=None if meaning is None else replace(meaning),
    )
    for mode, graph in graphs.items():
        graph_to(graph, f"{recipe.was}, {mode}")  # what cannot be stored is refused now
    return recipe


class _Transcriber:
    """A captured graph of one layer as a graph to run: buffers are written, constants follow the mode, device and type."""

    def __init__(self, captured: Captured, plain: nn.Module) -> None:
        self.captured, self.plain = captured, plain
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.made: dict[str, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.captured.graph.nodes:
            if node.op == "output":
                for name, value in self.captured.writes.items():
                    buffer = self.graph.create_node("get_attr", name)
                    self.graph.call_function(write_buffer, (buffer, self.new[value]))
                self.graph.output(tuple(map_arg(node.args, self.new.__getitem__)[0]))
            elif node.op == "placeholder":
                self.new[node] = self.graph.placeholder(node.target)
            else:
                self.new[node] = self._copied(node)
        kept = (write_buffer, *SWITCHES)
        # what nobody reads, the capture has kept on purpose
        unread = {new for node, new in self.new.items() if not node.users}
        self.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in kept or n in unread
        )
        self.graph.lint()
        return self.graph

    def _copied(self, node: fx.Node) -> fx.Node:
        chosen = node.meta.get("by_mode")
        args, kwargs = (node.args, node.kwargs) if chosen is None else (tuple(chosen[0]), chosen[1])
        args, kwargs = pytree.tree_map(self._argument, (args, dict(kwargs)), is_leaf=lambda a: isinstance(a, fx.Node | ByMode))
        args, kwargs = list(args), dict(kwargs)
        for place, typed in node.meta.get("typed", {}).items():
            (args if isinstance(place, int) else kwargs)[place] = self._typed(typed)
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = self._once("device", lambda: self.graph.call_function(getattr, (self._first(), "device")))
            kwargs.pop("pin_memory", None)
        return self.graph.create_node(node.op, node.target, tuple(args), kwargs, name=node.name)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            return self.new[a]
        if isinstance(a, ByMode):
            training = self._once("training", lambda: self.graph.create_node("get_attr", "training"))
            return self.graph.call_function(by_mode, (training, a.train, a.eval))
        return a

    def _typed(self, typed: Typed) -> fx.Node:
        read = self._first() if typed.source is None else self.new[typed.source]
        name = "dtype" if typed.source is None else f"{read.name}_dtype"
        dtype = self._once(name, lambda: self.graph.call_function(getattr, (read, "dtype")))
        if typed.choices:
            return self.graph.call_function(by_dtype, (dtype, *typed.choices))
        return self.graph.call_function(limit, (dtype, typed.limit)) if typed.limit else dtype

    def _first(self) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op == "placeholder")

    def _once(self, name: str, make: Any) -> fx.Node:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def _prove(plain: nn.Module, recipe: Recipe, args: tuple, kwargs: dict) -> None:
    """Both modes, the layer against its recipe: outputs and buffers equal to the bit."""
    for training in (False, True):
        found = []
        for lowered in (False, True):
            layer = copy.deepcopy(plain).train(training)
            if lowered:
                layer.__class__ = Lowered
                layer.__dict__.pop("forward", None)
                layer.__dict__["recipe"] = recipe
            given = pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (args, kwargs))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                out = layer(*given[0], **given[1])
            found.append([t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)] + list(layer.buffers()))
        if difference(*found) != 0.0:
            raise ValueError(f"its graph does not give what the layer gives in {'train' if training else 'eval'} mode")
