"""One task's network as a plain graph: the task's copies under the original paths, every mask an ordinary ``where``.

Nothing is folded yet: the same kernels on the same values as in the converted network.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.capture.regions import enter_autocast, exit_autocast
from hatify.gates import evaluate
from hatify.lifecycle.calls import placeholders, put_together
from hatify.model import HATModel
from hatify.modules import HATLayer, HATRecurrent, LiveMask, Mask, TaskIndexed, TaskIndexedParameter, live_norms
from hatify.modules.task_indexed import write_buffer
from hatify.modules.types import by_dtype, limit
from hatify.rewrite.graph import by_mode
from hatify.rewrite.scope import Scope

aten = torch.ops.aten
MASK = aten.where.ScalarOther
"""What a mask node calls, ``where(live, x, fill)``; the model's own code may, too: see :func:`is_mask`."""
LIVE_NORMS = (live_norms.layer_norm, live_norms.rms_norm, live_norms.group_norm)
"""Placeholders of the statistics over live channels, until the graph is lowered."""


@dataclass
class Plain:
    """A plain graph in the making.

    ``root`` holds what the graph names; ``dead`` says for each parameter which of its elements the task does not use (they may
    be anything: nothing that the task gives depends on them), ``leaves`` are the layers by path, ``room`` is the path of what the
    original's state dict does not have (masks, constants).
    """

    root: nn.Module
    graph: fx.Graph
    room: str
    dead: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, nn.Module] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name."""
        owner, _, attribute = name.rpartition(".")
        return getattr(self.root.get_submodule(owner), attribute)

    def parameter_name(self, path: str, name: str) -> str:
        """The canonical name of a layer's parameter: tied parameters have one."""
        return self._named(self.leaves[path].get_parameter(name))

    def canonical(self, name: str) -> str:
        """The name that a tied parameter has, for any of its names; buffers have one."""
        tensor = self.tensor(name) if name != "training" else None
        return self._named(tensor) if isinstance(tensor, nn.Parameter) else name

    def _named(self, parameter: Tensor) -> str:
        if not self._names:
            self._names.update({id(p): n for n, p in self.root.named_parameters()})
        return self._names[id(parameter)]

    def add_buffer(self, name: str, value: Tensor, *, persistent: bool) -> str:
        """A new tensor of the graph; returns its name."""
        if self.room not in self.root._modules:
            self.root.add_module(self.room, nn.Module())
        room = self.root.get_submodule(self.room)
        unique, number = name, 1
        while hasattr(room, unique):
            unique, number = f"{name}_{number}", number + 1
        room.register_buffer(unique, value, persistent=persistent)
        return f"{self.room}.{unique}"

    def drop_unused_buffers(self) -> None:
        """Masks and constants that no node reads any more."""
        named = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        if self.room in self.root._modules:
            room = self.root.get_submodule(self.room)
            for name in [n for n in room._buffers if f"{self.room}.{n}" not in named]:
                delattr(room, name)
            if not room._buffers:
                delattr(self.root, self.room)


def is_mask(node: fx.Node) -> bool:
    """Whether a node applies one of the task's masks."""
    return node.meta.get("mask", False)


def specialise(hat: HATModel, task: int) -> Plain:
    """The eval graph of ``hat`` for one task. The tensors are the result's own."""
    memo: dict[int, Any] = {}
    leaves: dict[str, nn.Module] = {}
    root = _tree(hat, hat, task, "", memo, leaves)
    for name, path in hat._facts.indexed_paths.items():
        _put(root, name, hat.get_submodule(path).of(task))
    room = "extracted"
    while hasattr(root, room):
        room += "_"
    root.cpu().eval()
    plain = Plain(root, fx.Graph(), room, leaves=leaves)
    _Specialiser(hat, task, plain).run()
    locks = hat.locks([task])
    # an element that is normalised with others before use is not free, even where its product is not read
    plain.dead = {n: ~lock for n, lock in locks.items() if not any(use.grouped for use in hat._facts.uses[n])}
    return plain


def _tree(hat: HATModel, module: nn.Module, task: int, path: str, memo: dict, leaves: dict[str, nn.Module]) -> nn.Module:
    """A copy of the tree with one task's modules; tied tensors stay tied."""
    if not isinstance(module, Scope | HATModel):
        if id(module) not in memo:
            memo[id(module)] = _leaf(module, task, memo)
        leaves[path] = memo[id(module)]
        return leaves[path]
    scope = nn.Module()
    scope.training = module.training
    for name, parameter in module._parameters.items():
        scope.register_parameter(name, copy.deepcopy(parameter, memo))
    for name, buffer in module._buffers.items():
        scope.register_buffer(name, copy.deepcopy(buffer, memo), name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if module is hat and child is hat.room:
            continue
        inside = f"{path}.{name}" if path else name
        scope._modules[name] = None if child is None else _tree(hat, child, task, inside, memo, leaves)
    return scope


def _leaf(module: nn.Module, task: int, memo: dict) -> nn.Module:
    if isinstance(module, TaskIndexed):
        return copy.deepcopy(module.tasks[task], memo)
    if not isinstance(module, HATLayer | HATRecurrent):
        return copy.deepcopy(module, memo)
    own = {k: v for k, v in module.__dict__.items() if k not in ("seen", "masker_path", "carries")}
    bare = module.plain_class.__new__(module.plain_class)
    bare.__dict__ = {**own, "_modules": {n: m for n, m in module._modules.items() if n not in ("masker", "maskers")}}
    return copy.deepcopy(bare, memo)


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    holder = root.get_submodule(owner)
    if attribute in holder._parameters:
        holder._parameters[attribute] = nn.Parameter(value.detach().clone(), value.requires_grad)
    else:
        holder._buffers[attribute] = value.detach().clone()


class _Specialiser:
    """Writes the plain graph, node by node."""

    def __init__(self, hat: HATModel, task: int, plain: Plain) -> None:
        self.hat, self.task, self.plain, self.graph = hat, task, plain, plain.graph
        self.new: dict[fx.Node, Any] = {}
        self.masks = hat.binary_masks(task)
        self.evaluated: dict = {}

    def run(self) -> None:
        nodes = list(self.hat.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"][:-1]  # the last is the task
        self.new.update(zip(inputs, placeholders(self.graph, self.hat.signature)))
        for node in nodes:
            if node.op in ("get_attr", "call_module", "call_function"):
                new = getattr(self, f"_{node.op}")(node)
                self.new[node] = new
                if isinstance(new, fx.Node):
                    new.meta.setdefault("scope", node.meta.get("scope", ""))
                    new.meta.setdefault("line", node.meta.get("line", ""))
            elif node.op == "output":
                results = iter([self.new[n] for n in node.args[0]])
                self.graph.output(put_together(self.graph, results, self.hat._facts.output))
        tidy(self.graph)

    def _get_attr(self, node: fx.Node) -> fx.Node:
        name = node.target
        if name.startswith(f"{self.hat._facts.room}."):
            value = self.hat.get_buffer(name)
            name = self.plain.add_buffer(name.rpartition(".")[2], value.detach().cpu().clone(), persistent=False)
        return self.graph.create_node("get_attr", name, name=node.name)

    def _call_module(self, node: fx.Node) -> Any:
        module = self.hat.get_submodule(node.target)
        if isinstance(module, Mask):
            return self._mask(node, module)
        if isinstance(module, LiveMask):
            return self._evaluated(module)
        if isinstance(module, TaskIndexedParameter):
            return self.new[node.args[0]]
        args, kwargs = self._operands(node)
        kwargs.pop("task", None)
        live = kwargs.pop("live", None)
        if live is not None and not bool(live.all()):
            return self._live_norm(node, self.plain.leaves[node.target], args[0], live)
        return self.graph.create_node("call_module", node.target, args, kwargs, name=node.name)

    def _evaluated(self, mask: Mask | LiveMask) -> Tensor:
        return (evaluate(mask.program, self.masks.__getitem__, self.evaluated) > 0).reshape(mask.shape)

    def _mask(self, node: fx.Node, module: Mask) -> fx.Node:
        x, live = self.new[node.args[0]], self._evaluated(module)
        if bool(live.all()):
            return x
        buffer = self._buffer(f"{x.name}_live", live)
        mask = self.graph.create_node("call_function", MASK, (buffer, x, float(module.fill)), name=node.name)
        mask.meta["mask"] = True
        return mask

    def _buffer(self, name: str, value: Tensor) -> fx.Node:
        # part of the state: without it the weights alone would give other outputs
        return self.graph.create_node("get_attr", self.plain.add_buffer(name, value, persistent=True), name=name)

    def _live_norm(self, node: fx.Node, norm: nn.Module, x: fx.Node, live: Tensor) -> fx.Node:
        read = {
            n: None if getattr(norm, n, None) is None else self.graph.create_node("get_attr", f"{node.target}.{n}")
            for n in ("weight", "bias")
        }
        mask = self._buffer(f"{node.name}_live", live)
        if isinstance(norm, nn.GroupNorm):
            args: tuple = (x, norm.num_groups, read["weight"], read["bias"], norm.eps)
            target = live_norms.group_norm
        elif isinstance(norm, nn.RMSNorm):
            args, target = (x, norm.normalized_shape, read["weight"], norm.eps), live_norms.rms_norm
        else:
            args, target = (x, norm.normalized_shape, read["weight"], read["bias"], norm.eps), live_norms.layer_norm
        new = self.graph.create_node("call_function", target, args, {"live": mask}, name=node.name)
        new.meta["norm"] = node.target
        return new

    def _call_function(self, node: fx.Node) -> Any:
        args, kwargs = self._operands(node)
        target = node.target
        if target in LIVE_NORMS:
            live = kwargs.pop("live")
            names = ("groups" if "groups" in kwargs else "shape", "weight", "bias", "eps")
            given = tuple(kwargs[n] for n in names if n in kwargs)
            live = torch.ones(()) > 0 if live is None else live
            mask = self._buffer(f"{node.name}_live", live)
            return self.graph.create_node("call_function", target, (args[0], *given), {"live": mask}, name=node.name)
        if target is by_mode:
            training, train, evaluate_ = args
            return self.graph.call_function(operator.getitem, ((evaluate_, train), training))
        if target is write_buffer:
            value = self.graph.call_function(aten.detach.default, (args[1],))
            return self.graph.call_function(aten.copy_.default, (args[0], value))
        if target is enter_autocast:
            device, dtype, enabled, cache = args
            kind = self.graph.call_function(getattr, (device, "type")) if isinstance(device, fx.Node) else torch.device(device).type
            return self.graph.call_function(torch.amp.autocast_mode._enter_autocast, (kind, dtype, enabled, cache))
        if target is exit_autocast:
            return self.graph.call_function(torch.amp.autocast_mode._exit_autocast, args)
        if target is limit:
            return self.graph.call_function(getattr, (self.graph.call_function(torch.finfo, args[:1]), args[1]))
        if target is by_dtype:
            return self.graph.call_function(operator.getitem, (dict(args[1:]), args[0]))
        return self.graph.create_node("call_function", target, args, kwargs, name=node.name)

    def _operands(self, node: fx.Node) -> tuple[tuple, dict]:
        def old(n: fx.Node) -> Any:
            return self.new.get(n)  # the task is nothing here

        return tuple(fx.map_arg(node.args, old)), dict(fx.map_arg(node.kwargs, old))


EFFECTS = {aten.copy_.default, torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast,
           torch.amp.autocast_mode._exit_autocast}  # fmt: skip


def tidy(graph: fx.Graph) -> None:
    """Dead nodes go; writes and regions stay."""
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in EFFECTS)
    graph.lint()
