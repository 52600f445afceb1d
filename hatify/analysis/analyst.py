"""The dry interpreter: runs the rules over a captured graph, on shapes and gate ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hatify.analysis.contracted_weights import contracted_weight, contraction
from hatify.analysis.coupling import DERIVABLE, NORMS
from hatify.analysis.functional import is_parameter, weighted_call
from hatify.analysis.heads import Heads, operator_name
from hatify.analysis.leaf_calls import leaf_call
from hatify.analysis.needs import narrow_to_needs
from hatify.analysis.operators import FINITE, FRESH, KEEPING_REPEATS, SWITCHES, ZEROS
from hatify.analysis.origins import CASTS, MOVES, result_origins
from hatify.analysis.plan import TASK_INDEXED, Analysis, LayerPlan, Masked, Ratio, Size, Step, node_of
from hatify.analysis.raw_parameters import surely_indexed
from hatify.analysis.sizes import all_finite, concrete, open_dims, tensors_of, varies_where_open
from hatify.analysis.ties import ties
from hatify.analysis.weight_calls import weight_call
from hatify.capture import Captured
from hatify.capture.captured import ByMode
from hatify.capture.effects import is_random, written_statistics
from hatify.errors import ConversionError
from hatify.gates import State, Use, Value
from hatify.gates.rules import RULES, Call, Gates, Outcome, unknown
from hatify.gates.rules.base import clean, clean_call
from hatify.gates.rules.movement import JOINS, WRITES_PART, pads_with_value
from hatify.gates.table import CONST, TOP
from hatify.gates.value import Origin, Part, constants, ones
from hatify.registry import describe


def analyse(
    graphs: list[Captured],
    model: nn.Module,
    heads: str = "task-indexed",
    norms: str = "live",
    residuals: str = "or",
    locking: str = "exact",
) -> Analysis:
    """Decides what becomes of every layer, raw parameter and node of ``graphs`` (the modes of one model).

    ``heads`` is ``task-indexed`` or ``hat``, ``norms`` is ``live`` or ``plain``, ``residuals`` is ``or`` or ``tied``,
    ``locking`` is ``exact`` (a weight is needed where its output is) or ``paper`` (where that is live).

    A raw parameter whose use can only be told at its last node may turn out to be used in a way that tasks cannot share; the
    analysis then starts again with that known. So it does where maskers meet on a residual stream and are to be tied.
    """
    roles = Heads(graphs, model)
    indexed, whole = surely_indexed(graphs, model), set()
    tied: dict[str, str] = {}
    head_weights: set[str] = set()
    while True:
        analyst = Analyst(graphs, model, roles, heads, indexed, whole, norms == "live", tied)
        analysis = analyst.run()
        head_weights |= analyst.head_weights
        if not analyst.other_use - indexed - whole:
            found = ties(analysis, analyst.untied, tied) if residuals == "tied" else tied
            if found == tied:
                if locking == "exact":
                    narrow_to_needs(analyst)
                analyst.finish(head_weights)
                return analysis
            tied = found
        for name in sorted(analyst.other_use - indexed - whole):
            (whole if analyst.layer_owned(name) else indexed).add(name)


class Analyst:
    """One pass. ``indexed`` are raw parameters known to need a copy per task, ``whole`` those locked as a whole; ``live`` says whether
    norms across channels count live ones only, ``tied`` which masker another one stands for."""

    def __init__(
        self,
        graphs,
        model: nn.Module,
        roles: Heads,
        heads: str,
        indexed: set[str],
        whole: set[str],
        live: bool,
        tied: dict[str, str],
    ) -> None:
        self.graphs, self.model, self.roles, self.heads = graphs, model, roles, heads
        self.indexed, self.whole, self.live, self.tied = indexed, whole, live, tied
        self.untied: set[str] = set()
        self.analysis = Analysis()
        self.table = self.analysis.table
        self.other_use: set[str] = set()
        self.head_weights: set[str] = set()
        self.owners: dict[str, str] = {}
        self.canonical: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.canonical.setdefault(id(parameter), name)
        self.held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        for captured in graphs:
            self.analysis.buffers.update(n for n in captured.writes if n in self.held)
            for node in captured.graph.nodes:
                statistics = [a for a in written_statistics(node) if a.op == "get_attr"]
                self.analysis.buffers.update(a.target for a in statistics if a.target in self.held)
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node | None = None
        self.captured: Captured | None = None
        called = [g.leaves[path] for g in graphs for path in {n.target for n in g.graph.nodes if n.op == "call_module"}]
        self._leaf_parameters = {id(p) for leaf in called if describe(leaf) is not None for p in leaf.parameters()}

    # what the rules ask for

    def masked(self, value: Value, *, soft: bool, fill: float) -> Value:
        cleaned = replace(value, state=State.CLEAN, data=Masked(value, soft, fill), known=None, origin=None)
        if fill == 0.0:  # later users read the materialised value too: once per path
            for node, held in self.env.items():
                if held is value:
                    self.env[node] = cleaned
        return cleaned

    # the pass

    def run(self) -> Analysis:
        for captured in self.graphs:
            self.captured = captured
            for node in captured.graph.nodes:
                self.node = node
                try:
                    self.env[node] = self._visit(node)
                except ConversionError as error:
                    error.where = error.where or node.meta.get("line") or node.name
                    raise
                if captured is self.graphs[0]:
                    self.analysis.values[node] = self.env[node]
            for value in captured.writes.values():
                self.analysis.steps[value, "write"] = Step((self._materialised(self.env[value]),), {})
        return self.analysis

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._value(node, ones(node.meta["val"].dim()))
        if node.op == "get_attr":
            return self._held(node)
        if node.op == "output":
            for value in pytree.tree_leaves([self.env[n] for n in node.all_input_nodes]):
                if isinstance(value, Value) and value.origin is not None:  # made of weights alone: whoever reads it, reads them all
                    self.other_use.update(value.origin.names)
            args = pytree.tree_map(lambda n: self._materialised(self.env[n]) if isinstance(n, fx.Node) else n, node.args)
            self.analysis.steps[node] = Step(args, {})
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.op == "call_module":
            return leaf_call(self, node, args, kwargs)
        return self._operator(node, args, kwargs)

    def _materialised(self, value: Any) -> Any:
        return clean(self, value) if isinstance(value, Value) else value

    def _value(self, node: fx.Node, ids: Tensor, state: State = State.CLEAN, val: Any = None, **more: Any) -> Value:
        val = node.meta["val"] if val is None else val
        shape = tuple(concrete(s) for s in val.shape)
        return Value(shape, ids, state, data=node, dtype=val.dtype, **more)

    def _held(self, node: fx.Node) -> Value:
        name = node.target
        if name in self.captured.constants:
            known = self.captured.constants[name]
            return self._value(node, constants(node.meta["val"].dim()), known=known, finite=all_finite(known))
        tensor = self.held[name]
        ids = constants(tensor.dim())
        if not isinstance(tensor, nn.Parameter):
            mutated = name in self.analysis.buffers
            known = None if mutated or tensor.is_meta else tensor
            return self._value(node, ids, known=known, finite=known is None or all_finite(known))
        name = self.canonical[id(tensor)]
        if name in self.indexed or name in self.whole:
            return self._value(node, ids)
        return self._value(node, ids, origin=Origin((Part(name, tensor.numel()),)))

    def _operator(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        val = node.meta.get("val")
        name = operator_name(node)
        if name in SWITCHES:
            self.analysis.steps[node] = Step(args, kwargs)
            return Size(1, node) if name in ("is_grad_enabled", "enter_autocast") else None
        if name == "getitem" and isinstance(args[0], list | tuple | dict):
            picked = args[0][args[1]]
            return self._widened(replace(picked, data=node)) if isinstance(picked, Value) else picked
        if not tensors_of(val):
            return self._number(node, args, kwargs)
        self.analysis.operators[name] += 1
        call = Call(name, node.target, args, kwargs)
        found = weighted_call(call)
        if found is not None and is_parameter(found.weight):
            return weight_call(self, node, call, found)
        if name not in KEEPING_REPEATS or any(v.origin is not None for v in call.values()):
            call = Call(name, node.target, *self.unrepeated((args, kwargs)))
        contracted = contraction(call)
        if contracted is not None:
            return contracted_weight(self, node, call, contracted)
        values = call.values()
        if name in FRESH:
            return self.constant_call(node, call, known=False)
        self.check_origins(call)
        if not any(v.gated for v in values):
            if all(v.constant for v in values):
                return self.constant_call(node, call)
            self.analysis.steps[node] = Step(call.args, call.kwargs)
            return self.results(node, val, None)
        outcome = self._ruled(node, call)
        return self.settled(node, outcome, call)

    def _ruled(self, node: fx.Node, call: Call) -> Outcome:
        """The rule's outcome, in both modes where an argument depends on the mode."""
        if call.name not in RULES:
            self.analysis.unknown[call.name] += 1
        rule = RULES[call.name]
        by_mode = node.meta.get("by_mode")
        if by_mode is None:
            return rule(self, call)
        outcomes = []
        for mode in ("train", "eval"):
            args, kwargs = pytree.tree_map(lambda a, mode=mode: getattr(a, mode) if isinstance(a, ByMode) else a, by_mode)
            args, kwargs = fx.map_arg((args, kwargs), lambda n: self.env[n])
            outcomes.append(rule(self, replace(call, args=tuple(args), kwargs=dict(kwargs))))
        return outcomes[0] if _same_gates(*outcomes) else unknown(self, call)

    def settled(self, node: fx.Node, outcome: Outcome, call: Call, weighted: bool = False) -> Any:
        """Results of a node as its rule decided, widened or made conservative where gates cannot be kept.

        A ``weighted`` call has gates of its own, which its operands' masks cannot stand for: they are applied to its results at once.
        """
        val = node.meta["val"]
        outs = outcome.out if isinstance(outcome.out, list) else [outcome.out]
        vals = tensors_of(val)
        lost = any(g.ids is not None and varies_where_open(g.ids, v) for g, v in zip(outs, vals))
        if lost and not weighted:
            outcome = self._joined_along_open(call, outs[0].ids, vals[0]) or unknown(self, call)
            outs = [outcome.out]
        self.analysis.steps[node] = Step(outcome.args, outcome.kwargs, live=outcome.live if self.live else None)
        results = self.results(node, val, outs)
        if lost and weighted:
            results = pytree.tree_map(lambda v: clean(self, v).top(), results, is_leaf=lambda v: isinstance(v, Value))
        return results

    def _joined_along_open(self, call: Call, ids: Tensor, val: Tensor) -> Outcome | None:
        """Tensors of different gates behind each other along an open dimension, or one written into a part of another: materialised, and
        live where any of them is (rotated tokens behind others that are not, a residual that leaves out the class token). None for
        other calls, and where a constant is among them, which is not zero."""
        position = 1 if call.name in JOINS else 2 if call.name in WRITES_PART else None
        if position is None or bool((ids == CONST).any()):
            return None
        ids = self.table.or_along(ids, call.argument(position, "dim", 0) % val.dim())
        if varies_where_open(ids, val) or self.table.too_large(ids):
            return None
        call = clean_call(self, call)
        return Outcome(call.args, call.kwargs, Gates(ids))

    def results(self, node: fx.Node, val: Any, outs: list[Gates] | None) -> Any:
        """A node's results as values; TOP where ``outs`` is None or does not fit."""
        vals = tensors_of(val)
        if outs is None or len(outs) != len(vals):
            only = outs[0] if outs and outs[0].ids is not None and len(vals) == 1 else Gates(None)
            outs = [only] * len(vals)
        results = []
        for gates, one in zip(outs, vals):
            ids = ones(one.dim()) if gates.ids is None else gates.ids
            if ids.dim() != one.dim():
                raise ConversionError(
                    f"the rule of {operator_name(node)} gave gates of rank {ids.dim()} for a result of rank {one.dim()}",
                    where=node.meta.get("line") or node.name,
                )
            state = gates.state if bool((ids > TOP).any()) else State.CLEAN
            value = self._value(node, ids, state, one)
            if gates.factor is not None:
                own = self.masked(self._value(node, gates.factor, State.PENDING, one), soft=True, fill=0.0)
                value = replace(own, ids=ids, state=state)
            results.append(value)
        return self._widened(results[0]) if isinstance(val, Tensor) else results

    def unrepeated(self, operands: Any) -> Any:
        """Operands for what knows nothing of gates that repeat along an open size: materialised, and live wherever."""
        return pytree.tree_map(
            lambda a: clean(self, a).top() if isinstance(a, Value) and open_dims(a.ids, node_of(a).meta["val"]) else a,
            operands,
            is_leaf=lambda a: isinstance(a, Value),
        )

    def _widened(self, value: Value) -> Value:
        if value.gated and self.table.too_large(value.ids):
            return clean(self, value).top()
        return value

    def constant_call(self, node: fx.Node, call: Call, known: bool = True) -> Any:
        """A result that does not depend on data; its actual value where all operands' values are known."""
        val = node.meta["val"]
        values = call.values()
        self.analysis.steps[node] = Step(call.args, call.kwargs)
        known = known and not is_random(call.func) and all(v.known is not None for v in values) and self._concrete(node)
        actual: list[Tensor | None] = [None] * len(tensors_of(val))
        if known and not any(isinstance(a, ByMode) for a in pytree.tree_leaves(node.meta.get("by_mode", ()))):
            args, kwargs = call.map(lambda v: v.known)
            with torch.no_grad():
                out = call.func(*args, **kwargs)
            actual = list(out) if isinstance(out, list | tuple) else [out]
        origins = result_origins(call, [tuple(concrete(s) for s in v.shape) for v in tensors_of(val)])
        if any(o is None for o in origins) or call.name in NORMS and "by_mode" in node.meta:
            self.other_use.update(n for v in values if v.origin is not None for n in v.origin.names)
        kept = call.name in FINITE and all(v.finite for v in values)
        zero = call.name in ZEROS or bool(values) and all(v.zero for v in values) and _keeps_zeros(call)
        results = [
            self._value(node, constants(v.dim()), val=v, known=k, origin=o, finite=kept if k is None else all_finite(k), zero=zero)
            for v, k, o in zip(tensors_of(val), actual, origins)
        ]
        return results[0] if isinstance(val, Tensor) else results

    def _concrete(self, node: fx.Node) -> bool:
        return all(not isinstance(s, torch.SymInt) for v in tensors_of(node.meta["val"]) for s in v.shape)

    def check_origins(self, call: Call) -> None:
        """A raw parameter that meets anything but a weight's slot, or what weights are computed by, cannot be shared."""
        if call.name in CASTS or (call.name in MOVES or call.name in DERIVABLE) and all(v.constant for v in call.values()):
            return
        for value in call.values():
            if value.origin is not None:
                self.other_use.update(value.origin.names)

    def _number(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """Arithmetic on sizes, at the example's sizes."""
        val = node.meta["val"]
        if isinstance(val, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            self.analysis.steps[node] = Step(args, kwargs)
            value = concrete(val)
            return value if isinstance(value, bool) else Ratio(value, node) if isinstance(value, float) else Size(value, node)
        raise ConversionError(f"{operator_name(node)} gives neither tensors nor a size", where=node.meta.get("line") or node.name)

    # maskers and plans

    def masker(self, name: str, channels: int) -> Tensor:
        """The gates of a masker's channels, or of the one that it is tied to: int64, shape ``(channels,)``."""
        name = self.tied.get(name, name)
        if self.analysis.sizes.setdefault(name, channels) != channels:
            raise ConversionError(
                f"two weights of different sizes ask for the masker {name}", where=name, fix="give one of them another name"
            )
        return self.table.atoms(name, channels)

    def plan(self, plan: LayerPlan) -> None:
        """Decides for a layer; a masker that an earlier call gave it stays."""
        known = self.analysis.layers.get(plan.path)
        if known is not None and known.masker is not None:
            return
        self.analysis.layers[plan.path] = plan

    # the end

    def layer_owned(self, name: str) -> bool:
        """Whether a raw parameter also belongs to a layer that is called as a module."""
        return id(self.held[name]) in self._leaf_parameters

    def finish(self, head_weights: set[str]) -> None:
        """Plans of raw parameters that have no HAT use (``head_weights`` are output layers used by function), and of parameters that a
        layer shares with the glue."""
        for name in sorted(self.indexed):
            self.analysis.uses.pop(name, None)
            reason = "output layer" if name in head_weights else "raw parameter"
            self.analysis.parameters[name] = LayerPlan(name, "task-indexed", TASK_INDEXED, reason)
        for name in sorted(self.whole):
            shape = tuple(self.held[name].shape)
            top = ones(len(shape))
            self.analysis.use(Use(name, top, top, shape, grouped=True, site="used outside its layer"))
            self.analysis.notes.append(f"{name} is used outside its layer too: locked as a whole once a task is finished")
        self.analysis.class_heads = {name for name, free in self.roles.countable.items() if free and name not in self.roles.shared}


def _keeps_zeros(call: Call) -> bool:
    """Whether nothing but elements of the operands, and zeros, are in the results."""
    return call.name in CASTS or call.name in MOVES and not pads_with_value(call)


def _same_gates(a: Outcome, b: Outcome) -> bool:
    left = a.out if isinstance(a.out, list) else [a.out]
    right = b.out if isinstance(b.out, list) else [b.out]
    if len(left) != len(right):
        return False
    for x, y in zip(left, right):
        if (x.ids is None) != (y.ids is None) or x.state is not y.state:
            return False
        if x.ids is not None and not torch.equal(x.ids, y.ids):
            return False
    return True
