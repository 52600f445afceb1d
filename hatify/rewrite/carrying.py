"""The graph that runs for a task: masks moved into the weights of the layers and norms before them.

It is made from the generated graph when a task is first called (a model that is being loaded, or is on the meta device, has no weights
yet to try norms with), and nothing else reads it: what people see, what is stored and what is compiled is the generated one. That one
also runs where somebody has hooks on a module: he may look at a result that has no mask yet, or change it. Both give the same but for
rounding, as long as no dead channel overflows: a mask in a weight multiplies what one behind it chooses.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from hatify.capture.regions import SWITCHES
from hatify.gates import Program
from hatify.modules import HATLayer, Mask, Masker, TaskIndexed
from hatify.modules.carrying import ChannelMaskOf, norm_can_carry, torchs_own, watched
from hatify.modules.masking import Gated, Programs

HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)
OPERATORS = {"relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "dropout"}
"""Layers (exactly these classes) and operators with ``f(m x) = m f(x)`` for ``m >= 0``, channel by channel."""
MOVEMENT = {
    "reshape", "view", "permute", "transpose", "t", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone",
    "alias", "unbind", "split", "split_with_sizes", "chunk", "slice", "select", "narrow", "getitem", "roll", "flip",
}  # fmt: skip
"""Operators that give elements of one value in another order, or some of them; ``detach`` would keep gradients from the mask."""
ATTENTION = {"scaled_dot_product_attention": (2,)}
LINEAR = {"mul": (0, 1), "div": (0,), "truediv": (0,), "matmul": (0, 1), "bmm": (0, 1)}
"""Operators that are linear in each of these arguments, the others fixed. Behind the latter a zero may be -0."""
PYTHON = {operator.mul: "mul", operator.truediv: "truediv", operator.getitem: "getitem", torch.reshape: "reshape"}
"""Functions in generated code that are not operators of torch's dispatcher."""
MOST_NAMED = 1 << 24
"""Elements that may be looked at to find which rows a layer's masks are made of; where there are more, none is carried."""


@dataclass(frozen=True)
class Carried:
    """Code that carries masks, and what it was made by.

    ``code`` is None where there is nothing to carry; ``modules`` are those that the graph calls, with where they are found.
    """

    code: Callable | None
    modules: tuple[tuple[dict[str, Any], str, nn.Module, type], ...] = ()

    def holds(self) -> bool:
        """Whether every module is where it was, and computes as its class did."""
        return all(
            shelf.get(name) is module and type(module) is kind and "forward" not in vars(module)
            for shelf, name, module, kind in self.modules
        )

    def usable(self) -> bool:
        """Whether nobody has hooks on a module."""
        return self.code is not None and not any(watched(module) for _, _, module, _ in self.modules)


def modules_of(model: nn.Module, graph: fx.Graph) -> tuple[tuple[dict[str, Any], str, nn.Module, type], ...]:
    """Every module that a graph calls, masks aside, and those that they are in: the shelf that it is on, its name there, its class."""
    found: dict[str, tuple[dict[str, Any], str, nn.Module, type]] = {}
    for node in graph.find_nodes(op="call_module"):
        if isinstance(model.get_submodule(node.target), Gated):
            continue
        owner, path = model, ""
        for name in node.target.split("."):
            module, path = owner._modules[name], f"{path}.{name}"
            found[path] = owner._modules, name, module, type(module)
            owner = module
    return tuple(found.values())


def carrying(model: nn.Module, graph: fx.Graph, maskers: Mapping[str, Masker]) -> fx.Graph | None:
    """A copy of a model's graph in which masks are carried wherever they can be; None where none can.

    A layer carries the masks that all uses of its result end in, with nothing between but views and operators that are linear in it or
    homogeneous; a norm those that only homogeneous operators stand before, for a view may mix up its channels. What is left is carried by
    a layer that alone reads it.
    """
    names = {id(masker): name for name, masker in maskers.items()}
    made = copy.deepcopy(graph)
    task = made.find_nodes(op="placeholder")[-1]
    region = _regions(made)
    gone: set[fx.Node] = set()
    for node in made.find_nodes(op="call_module"):
        module = model.get_submodule(node.target)
        if isinstance(module, TaskIndexed):
            behind, carried = _of_norm(model, node, module)
        elif isinstance(module, HATLayer) and module.masker is not None and torchs_own(module):
            behind, carried = _of_layer(model, node, module, names[id(module.masker)])
        else:
            continue
        # what one factor of a product carries, the other must not; nor is a mask moved to where other gradients are taken
        if carried is None or any(mask in gone or region[mask] != region[node] for mask in behind):
            continue
        with made.inserting_before(node):
            node.update_kwarg("mask", made.call_function(carried, (task,)))
        gone.update(behind)
        if carried.soft_only:
            for mask in behind:
                mask.update_kwarg("hard_only", True)
    for node in made.find_nodes(op="call_module"):
        mask = model.get_submodule(node.target)
        if node in gone or not isinstance(mask, Mask) or mask.fill or len(node.users) != 1:
            continue
        reader = next(iter(node.users))
        carries = reader.op == "call_module" and _places(reader, node) == [0] and region[reader] == region[node]
        if carries and _is_input(model.get_submodule(reader.target), mask):
            dim = 1 - model.get_submodule(reader.target).weight.dim()
            with made.inserting_before(reader):
                reader.update_kwarg("inputs", made.call_function(ChannelMaskOf(mask.programs, mask.soft, dim), (task,)))
            gone.add(node)
    for mask in gone:
        if "hard_only" not in mask.kwargs:
            mask.replace_all_uses_with(mask.args[0])
            made.erase_node(mask)
    return made if gone else None


def _regions(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many switches of gradients or autocast stand before each node."""
    found, switches = {}, 0
    for node in graph.nodes:
        switches += node.target in SWITCHES
        found[node] = switches
    return found


def _of_norm(model: nn.Module, node: fx.Node, norm: TaskIndexed) -> tuple[list[fx.Node], ChannelMaskOf | None]:
    """The masks that a norm can carry, and in which form."""
    behind, _ = _masks_behind(model, node, _keeps_channels)
    mask = _one(model, behind)
    sizes = [] if mask is None else [size for size in mask.shape if size > 1]
    if len(sizes) != 1:
        return [], None
    dim, rank = mask.shape.index(sizes[0]), len(mask.shape)
    carries = norm_can_carry(norm.tasks[0], sizes[0], rank, dim)
    return behind, ChannelMaskOf(mask.programs, mask.soft, dim - rank) if carries else None


def _of_layer(model: nn.Module, node: fx.Node, layer: HATLayer, masker: str) -> tuple[list[fx.Node], ChannelMaskOf | None]:
    """The masks that a layer can carry, and in which form."""
    weight = layer.weight
    behind, passed = _masks_behind(model, node, _keeps_factors)
    programs = _of_rows([model.get_submodule(m.target) for m in behind], masker, weight.shape[0])
    if programs is None:
        behind, passed = _masks_behind(model, node, _keeps_channels)
        mask = _one(model, behind)
        programs = mask.programs if mask is not None and mask.soft and _is_output(layer, mask) else None
    inplace = any(getattr(model.get_submodule(n.target), "inplace", False) for n in passed if n.op == "call_module")
    if programs is None or inplace:  # a layer's masked result is kept for the backward pass
        return [], None
    return behind, ChannelMaskOf(programs, True, 1 - weight.dim(), soft_only=any(_name(n) in LINEAR for n in passed))


def _of_rows(masks: list[Mask], masker: str, rows: int) -> Programs | None:
    """What masks have in common, soft and binary, that a layer's rows can be multiplied with."""
    if not masks or not all(m.soft for m in masks):
        return None
    soft, binary = (_common([m.gates(hard) for m in masks], masker, rows) for hard in (False, True))
    return None if soft is None or binary is None else Programs(soft, binary)


def _common(masks: list[Gated], masker: str, rows: int) -> Program | None:
    """What a layer's rows are to be multiplied with, so that their elements, wherever they went, have been multiplied by these masks.

    An element that a row gave has that row's own gate among its gates. So where all gates in which a row is named are one and the same,
    that is what the row is masked with.
    """
    gates = torch.cat([m.ids.reshape(-1) for m in masks])
    gate_of, place = torch.full((rows + 1,), -1), torch.full((rows + 1,), -1)  # one more, for what names no row
    channels = _Named(masker, rows)
    parts = [channels.of(m.program) for m in masks]
    if any(part is None for part in parts):
        return None
    for named in _stacked(parts):
        for reduce in ("amin", "amax"):
            found = gate_of.scatter_reduce(0, named, gates, reduce, include_self=False)
            if not torch.equal(torch.where(gate_of < 0, found, gate_of)[:rows], found[:rows]):
                return None
            gate_of = found
        place[named] = torch.arange(len(gates))
    if (place[:rows] < 0).any():
        return None
    return Program("pick", rows, index=tuple(place[:rows].tolist()), parts=tuple(m.program for m in masks))


class _Named:
    """The channels of a masker that each element of a program is made of, ``(some number, size)``; ``rows`` where there is none."""

    def __init__(self, masker: str, rows: int) -> None:
        self.masker, self.rows, self.left = masker, rows, MOST_NAMED
        self.found: dict[Program, torch.Tensor] = {}

    def of(self, program: Program) -> torch.Tensor | None:
        """None where more than ``MOST_NAMED`` elements would have to be looked at, those of earlier programs included."""
        for step in program.steps(self.found):
            parts = [self.found[part] for part in step.parts]
            self.left -= step.size * sum(len(part) for part in parts)
            if self.left < 0:
                return None
            self.found[step] = self._made(step, parts)
        return self.found[program]

    def _made(self, program: Program, parts: list[torch.Tensor]) -> torch.Tensor:
        if program.op == "atom" and program.masker == self.masker:
            return (torch.arange(program.size) if program.index is None else program.index_tensor).view(1, -1)
        if not parts:
            return torch.full((1, program.size), self.rows)
        if program.op != "pick":
            return torch.unique(torch.cat(parts), dim=0)
        joined = _stacked(parts)
        return joined if program.index is None else joined[:, program.index_tensor]


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """Side by side, the shorter ones with their last row again and again."""
    height = max(len(part) for part in parts)
    return torch.cat([torch.cat([part, part[-1:].expand(height - len(part), -1)]) for part in parts], dim=1)


def _masks_behind(
    model: nn.Module, node: fx.Node, keeps: Callable[[nn.Module, fx.Node, fx.Node], bool]
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The masks that all uses of a result end in, and what stands between, which is nothing but what ``keeps``; none where some use does
    not."""
    found: dict[fx.Node, None] = {}
    passed: set[fx.Node] = set()  # what two such values meet in would have the factor twice
    values = [node]
    while values:
        value = values.pop()
        for user in value.users:
            module = model.get_submodule(user.target) if user.op == "call_module" else None
            if isinstance(module, Mask):
                if module.fill:
                    return [], passed
                found[user] = None
            elif user not in passed and keeps(model, user, value):
                passed.add(user)
                values.append(user)
            else:
                return [], passed
        if not value.users:
            return [], passed
    return list(found), passed


def _keeps_channels(model: nn.Module, user: fx.Node, value: fx.Node) -> bool:
    """Whether a factor on a channel of ``value`` is one on that channel of the result."""
    if user.all_input_nodes != [value]:
        return False
    if user.op == "call_module":
        return type(model.get_submodule(user.target)) in HOMOGENEOUS
    return _name(user) in OPERATORS


def _keeps_factors(model: nn.Module, user: fx.Node, value: fx.Node) -> bool:
    """Whether a factor on elements of ``value`` is one on what these become."""
    if _keeps_channels(model, user, value):
        return True
    name, places = _name(user), _places(user, value)
    if name in MOVEMENT:
        return places == [0] and not any(isinstance(a, torch.dtype) for a in user.args)  # a view as another type moves nothing
    if name in LINEAR and user.kwargs:  # how a quotient is rounded
        return False
    return len(places) == 1 and places[0] in {**LINEAR, **ATTENTION}.get(name, ())


def _places(user: fx.Node, value: fx.Node) -> list[int | None]:
    """Where a call reads the value: the numbers of its arguments, None for any other place."""
    found: list[int | None] = [i for i, arg in enumerate(user.args) if arg is value]
    nested = [arg for arg in pytree.tree_leaves((user.args, user.kwargs)) if arg is value]
    return found + [None] * (len(nested) - len(found))


def _name(node: fx.Node) -> str:
    """The name of one of torch's own operators, without namespace and overload: ``relu``; empty for anything else."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname if node.target.namespace == "aten" else ""
    return PYTHON.get(node.target, "")


def _one(model: nn.Module, masks: list[fx.Node]) -> Mask | None:
    """The one mask that all of them are, if they are one."""
    modules = [model.get_submodule(m.target) for m in masks]
    alike = all(m.soft == modules[0].soft and _same_gates(m, modules[0]) for m in modules)
    return modules[0] if modules and alike else None


def _same_gates(a: Mask, b: Mask) -> bool:
    return all(torch.equal(a.gates(hard).ids, b.gates(hard).ids) for hard in (False, True))


def _is_output(layer: HATLayer, mask: Mask) -> bool:
    """Whether a mask is one of the output channels of a linear layer or convolution."""
    weight = layer.weight
    dim = len(mask.shape) + 1 - weight.dim()
    return dim >= 0 and all(size == (weight.shape[0] if i == dim else 1) for i, size in enumerate(mask.shape))


def _is_input(layer: nn.Module, mask: Mask) -> bool:
    """Whether a mask is one of the input channels of a linear layer or convolution that can carry it."""
    if not isinstance(layer, HATLayer) or not torchs_own(layer):
        return False
    channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
    dim = len(mask.shape) + 1 - layer.weight.dim()
    return dim >= 0 and all(size == (channels if i == dim else 1) for i, size in enumerate(mask.shape))
