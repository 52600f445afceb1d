"""The rewritten graph: the captured one with mask nodes, task-indexed reads and live masks."""

from __future__ import annotations

import contextlib
import keyword
import operator
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hatify.analysis import Analysis, Masked, Step
from hatify.analysis.heads import operator_name
from hatify.analysis.plan import Ratio, Size, node_of
from hatify.analysis.sizes import open_dims, period
from hatify.capture import Captured
from hatify.capture.captured import ByMode, Typed
from hatify.capture.regions import SWITCHES, closes, enter_autocast, opens
from hatify.gates import Value
from hatify.modules import Mask, live_norms
from hatify.modules.task_indexed import write_buffer
from hatify.modules.types import by_dtype, limit
from hatify.rewrite.surgery import Surgery

aten = torch.ops.aten
OPERATORS = {
    "aten.add.Tensor": operator.add, "aten.sub.Tensor": operator.sub, "aten.mul.Tensor": operator.mul,
    "aten.div.Tensor": operator.truediv, "aten.view.default": torch.reshape, "aten._unsafe_view.default": torch.reshape,
    "aten.reshape.default": torch.reshape,
}  # fmt: skip
"""Operators that read better as Python's or torch's own: the same kernels. A mask may change strides, so views become reshapes."""
EFFECTS = (write_buffer, *SWITCHES)
LIVE = {"layer_norm": live_norms.layer_norm, "rms_norm": live_norms.rms_norm, "group_norm": live_norms.group_norm}
LIVE_ARGUMENTS = {
    "layer_norm": (("shape", 1, None), ("weight", 2, None), ("bias", 3, None), ("eps", 4, 1e-5)),
    "rms_norm": (("shape", 1, None), ("weight", 2, None), ("eps", 3, None)),
    "group_norm": (("groups", 1, None), ("weight", 2, None), ("bias", 3, None), ("eps", 4, 1e-5)),
}


def by_mode(training: bool, train: Any, evaluate: Any) -> Any:
    """A constant that the original's forward chose by ``self.training``."""
    return train if training else evaluate


def rewrite_graph(captured: Captured, analysis: Analysis, surgery: Surgery) -> fx.Graph:
    """The graph of a HAT model: one argument per input tensor, then ``task`` (a context, or None)."""
    return _Rewriter(captured, analysis, surgery).run()


def _without_repeats(ids: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    """Gates with each of the dimensions ``(dim, length)`` taken apart: one for how often they repeat, one for what does."""
    for dim, length in reversed(parts):
        ids = ids.narrow(dim, 0, min(length, ids.shape[dim])).unsqueeze(dim)
    return ids


class _Rewriter:
    def __init__(self, captured: Captured, analysis: Analysis, surgery: Surgery) -> None:
        self.captured, self.analysis, self.surgery = captured, analysis, surgery
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.masks: dict[tuple, fx.Node] = {}
        self.training: fx.Node | None = None
        self.device: fx.Node | None = None
        self.dtype: fx.Node | None = None
        self.dtypes: dict[fx.Node, fx.Node] = {}
        self.task: fx.Node | None = None
        self.open: tuple[fx.Node, ...] = ()
        self.within: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def run(self) -> fx.Graph:
        nodes = list(self.captured.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        for node in inputs:
            self.new[node] = self._noted(self.graph.placeholder(node.target), node)
        name = "task" if all(n.target != "task" for n in inputs) else "hat_task"
        self.task = self.graph.placeholder(name, default_value=None)
        written = {node: name for name, node in self.captured.writes.items()}
        for node in nodes:
            if node.op in ("get_attr", "call_module", "call_function"):
                self.new[node] = self._noted(getattr(self, f"_{node.op}")(node), node)
                self.open = self.open[:-1] if closes(node) else (*self.open, self.new[node]) if opens(node) else self.open
                self.within[self.new[node]] = self.open
            elif node.op == "output":
                for value, name in written.items():
                    self._write(name, self.analysis.steps[value, "write"])
                results = self._operands(self.analysis.steps[node].args)[0]
                self.graph.output(tuple(results))
        # what nobody reads, the capture has kept on purpose
        unread = {self.new[node] for node in nodes if node.op != "output" and not node.users}
        self.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in EFFECTS or n in unread
        )
        self._settle_inplace()
        self.graph.lint()
        return self.graph

    def _settle_inplace(self) -> None:
        """A layer may go on working in place only on a value that a layer made and nobody else reads."""
        for node in self.graph.nodes:
            if node.op != "call_module":
                continue
            layer = self.surgery.root.get_submodule(node.target)
            if not getattr(layer, "inplace", False) or not node.all_input_nodes:
                continue
            value = node.all_input_nodes[0]
            made = value.op == "call_module" and not isinstance(self.surgery.root.get_submodule(value.target), Mask)
            if not made or len(value.users) > 1:
                for part in layer.modules():
                    if hasattr(part, "inplace"):
                        part.inplace = False

    def _get_attr(self, node: fx.Node) -> fx.Node:
        name = node.target
        if name in self.captured.constants:
            path = self.surgery.add_constant(name, self.captured.constants[name])
            return self.graph.create_node("get_attr", path, name=name)
        shared = self.graph.create_node("get_attr", name, name=node.name)
        plan = self.analysis.parameters.get(self._canonical(name))
        if name in self.analysis.buffers or (plan is not None and plan.role == "task-indexed"):
            path = self.surgery.indexed_paths[name if name in self.analysis.buffers else self._canonical(name)]
            self._noted(shared, node)
            return self.graph.create_node("call_module", path, (shared, self.task), name=f"{node.name}_of_task")
        return shared

    def _canonical(self, name: str) -> str:
        held = self.surgery.root.get_parameter(name) if self._is_parameter(name) else None
        if held is None:
            return name
        return next(n for n, p in self.surgery.root.named_parameters() if p is held)

    def _is_parameter(self, name: str) -> bool:
        owner, _, attribute = name.rpartition(".")
        return attribute in self.surgery.root.get_submodule(owner)._parameters

    def _call_module(self, node: fx.Node) -> fx.Node:
        step = self.analysis.steps[node]
        args, kwargs = self._operands(step.args), self._operands(step.kwargs)
        plan = self.analysis.layers[node.target]
        if not args and kwargs:  # raised layers take their input by position
            first = next(iter(kwargs))
            args, kwargs = (kwargs[first],), {k: v for k, v in kwargs.items() if k != first}
        if plan.role in ("head", "norm", "recurrent", "task-indexed"):
            kwargs = {**kwargs, "task": self.task}
            if step.live is not None:
                kwargs["live"] = self._live(step.live, node)
        return self.graph.create_node("call_module", node.target, args, kwargs, name=node.name)

    def _call_function(self, node: fx.Node) -> fx.Node:
        step = self.analysis.steps.get(node)
        if step is None:  # picks one result of several
            return self.graph.call_function(operator.getitem, (self.new[node.args[0]], node.args[1]))
        args, kwargs = self._mode_arguments(node, step)
        name = operator_name(node)
        if step.live is not None:
            live = self._live(step.live, node)
            given = {n: (args[i] if i < len(args) else kwargs.get(n, default)) for n, i, default in LIVE_ARGUMENTS[name]}
            return self.graph.create_node("call_function", LIVE[name], (args[0],), {**given, "live": live}, name=node.name)
        if node.target is enter_autocast:
            args = (self._device(), *args[1:])
        if isinstance(kwargs.get("device"), torch.device):
            kwargs = {**kwargs, "device": self._device()}
            kwargs.pop("pin_memory", None)
        for place, typed in node.meta.get("typed", {}).items():
            if isinstance(place, int):
                args = (*args[:place], self._typed(typed), *args[place + 1 :])
            else:
                kwargs = {**kwargs, place: self._typed(typed)}
        plain = OPERATORS.get(str(node.target)) if not kwargs and len(args) == 2 else None
        return self.graph.create_node("call_function", plain or node.target, args, kwargs, name=node.name)

    def _mode_arguments(self, node: fx.Node, step: Step) -> tuple[tuple, dict]:
        """Operands, with a choice by ``self.training`` where the modes differ."""
        args, kwargs = list(self._operands(step.args)), dict(self._operands(step.kwargs))
        chosen = node.meta.get("by_mode")
        if chosen is None:
            return tuple(args), kwargs

        def choose(a: Any, old: Any) -> Any:
            if not isinstance(a, ByMode):
                return old
            if (a.train, a.eval) == (True, False):
                return self._training()
            return self.graph.call_function(by_mode, (self._training(), a.train, a.eval))

        for i, a in enumerate(chosen[0]):
            args[i] = choose(a, args[i])
        for key, a in chosen[1].items():
            kwargs[key] = choose(a, kwargs[key])
        return tuple(args), kwargs

    def _training(self) -> fx.Node:
        if self.training is None:
            after = self.task
            with self.graph.inserting_after(after):
                self.training = self.graph.create_node("get_attr", "training")
        return self.training

    def _device(self) -> fx.Node:
        if self.device is None:
            first = next(n for n in self.graph.nodes if n.op == "placeholder")
            with self.graph.inserting_after(self.task):
                self.device = self.graph.call_function(getattr, (first, "device"))
        return self.device

    def _typed(self, typed: Typed) -> fx.Node:
        """A constant that is taken from a type."""
        if typed.source is None:
            dtype = self._dtype()
        else:
            dtype = self.dtypes.get(typed.source)
            if dtype is None:
                read = self.new[typed.source]
                with self.graph.inserting_after(self.task if read.op == "placeholder" else read):
                    dtype = self.graph.create_node("call_function", getattr, (read, "dtype"), name=f"{read.name}_dtype")
                self.dtypes[typed.source] = self._noted(dtype, typed.source)
        if typed.choices:
            return self.graph.call_function(by_dtype, (dtype, *typed.choices))
        return self.graph.call_function(limit, (dtype, typed.limit)) if typed.limit else dtype

    def _dtype(self) -> fx.Node:
        """The model's own type: that of its first floating-point parameter."""
        if self.dtype is None:
            name = next(n for n, p in self.surgery.root.named_parameters() if p.is_floating_point())
            with self.graph.inserting_after(self.task):
                parameter = self.graph.create_node("get_attr", name)
                with self.graph.inserting_after(parameter):
                    self.dtype = self.graph.call_function(getattr, (parameter, "dtype"), name="dtype")
        return self.dtype

    def _write(self, name: str, step: Step) -> None:
        shared = self.graph.create_node("get_attr", name)
        path = self.surgery.indexed_paths[name]
        current = self.graph.call_module(path, (shared, self.task))
        self.graph.call_function(write_buffer, (current, self._operands(step.args)[0]))

    def _operands(self, tree: Any) -> Any:
        return pytree.tree_map(
            lambda a: self._node(a.data) if isinstance(a, Value) else self.new[a.node] if isinstance(a, Size | Ratio) else a,
            tree,
            is_leaf=lambda a: isinstance(a, Value),
        )

    def _node(self, handle: fx.Node | Masked) -> fx.Node:
        if isinstance(handle, fx.Node):
            return self.new[handle]
        base = self._node(handle.value.data)
        home = tuple(region for region, own in zip(self.open, self.within.get(base, ())) if region is own)
        # a factor may be masked with its partner's gates in one place and with its own in another
        ids, own = self.analysis.mask_ids(handle), handle.value.ids
        key = (base, home, handle.soft, handle.fill, *((gates.shape, gates.numpy().tobytes()) for gates in (ids, own)))
        if key not in self.masks:
            self.masks[key] = self._masked(base, home, handle)
        return self.masks[key]

    def _masked(self, base: fx.Node, home: tuple[fx.Node, ...], handle: Masked) -> fx.Node:
        """A mask node in the regions of ``home``, at the end or before the next region that is open: what is read after a region too must
        not be made in it, without gradients or in another type.

        Where gates repeat along an open size, that is taken apart for the mask.
        """
        ids, own = self.analysis.mask_ids(handle), handle.value.ids
        val = node_of(handle.value).meta["val"]
        parts = [(dim, period(val.shape[dim])) for dim in sorted({*open_dims(ids, val), *open_dims(own, val)})]
        path = self.surgery.add_mask(base.name, *(_without_repeats(gates, parts) for gates in (ids, own)), handle.soft, handle.fill)
        place = self.graph.inserting_before(self.open[len(home)]) if len(home) < len(self.open) else contextlib.nullcontext()
        node = base
        with place:
            for dim, length in reversed(parts):
                node = self._beside(base, self.graph.call_function(aten.unflatten.int, (node, dim, [-1, length])))
            name = f"{base.name}_{'masked' if not handle.fill else 'safe'}"
            node = self._beside(base, self.graph.create_node("call_module", path, (node, self.task), name=name))
            node.meta["gates"] = path.rpartition(".")[2]
            for dim, _ in parts:
                node = self._beside(base, self.graph.call_function(aten.flatten.using_ints, (node, dim, dim + 1)))
        self.within[node] = home
        return node

    def _beside(self, base: fx.Node, node: fx.Node) -> fx.Node:
        """A node that belongs to ``base``."""
        node.meta.update(base.meta, scope=_container(base))
        return node

    def _live(self, value: Value, node: fx.Node) -> fx.Node:
        path = self.surgery.add_live(f"{node.name}_live", value.ids)
        return self._noted(self.graph.create_node("call_module", path, (self.task,), name=f"{node.name}_live"), node)

    def _noted(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta["scope"] = old.meta.get("scope", "")
        new.meta["line"] = old.meta.get("line", "")
        return new


PATH = r'self(?:\.\w+|\[\d+\]|\["\w+"\])*'
NUMBERED = re.compile(rf'getattr\(({PATH}), "(\d+)"\)')
KEYWORD = re.compile(rf"({PATH}?|\))\.({'|'.join(keyword.kwlist)})\b")  # behind a bracket: that of a getattr


def spelled(lines: list[str], hidden: Collection[str] = ()) -> list[str]:
    """Executable code as a person would write it: ``self.layer1[0].conv1(x)``.

    Names that Python takes for words of its own, and those of ``hidden`` (children whose name the model itself has another use for),
    are written ``self["context"](x)``.
    """
    own = re.compile(rf"\bself\.({'|'.join(map(re.escape, sorted(hidden)))})\b") if hidden else None
    out = []
    for line in lines:
        if own is not None:
            line = own.sub(r'self["\1"]', line)
        previous = None
        while previous != line:
            previous, line = line, KEYWORD.sub(r'\1["\2"]', NUMBERED.sub(r"\1[\2]", line))
        out.append(line)
    return out


def readable(source: str, graph: fx.Graph) -> str:
    """The generated code for people: scope comments, short operator names, no lines that only free memory."""
    scopes = {node.name: _container(node) for node in graph.nodes if node.op in ("call_module", "call_function")}
    out: list[str] = []
    current = None
    for line in source.strip().splitlines():
        line = re.sub(r";  (?:\w+ = )+None", "", line)
        line = line.replace("torch.ops.aten.", "aten.").replace("hatify_modules_live_norms_", "live_")
        line = re.sub(r"hatify_(?:modules_task_indexed|rewrite_graph)_", "", line)
        assigned = re.match(r"    (\w+) = ", line)
        scope = scopes.get(assigned.group(1)) if assigned else None
        if scope is not None and scope != current:
            out.append(f"    # {scope}" if scope else "    # (top)")
            current = scope
        out.append(line.rstrip())
    return "\n".join(line for line in out if line.strip() and not line.strip().endswith("= None;")) + "\n"


def _container(node: fx.Node) -> str:
    scope = node.meta.get("scope", "")
    return scope.rpartition(".")[0] if node.op == "call_module" and scope == node.target else scope
