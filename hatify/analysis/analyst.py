"""The dry interpreter: runs the rules over a captured graph, on shapes and gate ids."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hatify.analysis import functional
from hatify.analysis.coupling import DERIVABLE, NORMS
from hatify.analysis.heads import WEIGHT_SLOT, Heads, operator_name
from hatify.analysis.origins import CASTS, MOVES, by_rows, result_origins, split_use
from hatify.analysis.plan import HAT, ROW_LOCKED, TASK_INDEXED, Analysis, LayerPlan, Masked, Ratio, Size, Step
from hatify.analysis.sizes import all_finite, concrete, tensors_of, varies_where_open
from hatify.analysis.ties import ties
from hatify.capture import Captured
from hatify.capture.captured import ByMode
from hatify.errors import ConversionError
from hatify.gates import State, Use, Value
from hatify.gates.layers import (
    ChannelNorm,
    Elementwise,
    Layer,
    MixingNorm,
    TaskIndexedLayer,
    Weighted,
    channels,
    other_layer,
    passes_through,
    weighted,
    weighted_uses,
)
from hatify.gates.recurrent import Recurrent, masker_sizes, recurrent, recurrent_uses
from hatify.gates.rules import RULES, Call, Gates, Outcome, unknown
from hatify.gates.rules.base import clean
from hatify.gates.table import TOP
from hatify.gates.value import Origin, Part, constants, ones
from hatify.registry import describe

SWITCHES = {"_set_grad_enabled", "is_grad_enabled", "enter_autocast", "exit_autocast"}
FRESH = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
         "randn_like", "randint_like", "new_empty_strided"}  # fmt: skip
FINITE = {*MOVES, *CASTS, *FRESH, "add", "sub", "mul", "sigmoid", "tanh", "relu", "gelu", "silu", "linear", "matmul", "mean", "softmax",
          "layer_norm", "zeros", "ones", "arange", "linspace", "sin", "cos", "neg", "abs", "upsample_bilinear2d", "upsample_bicubic2d",
          "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "bernoulli", "rand", "randn", "div"}  # fmt: skip
"""Operators that make no infinities out of finite constants."""
RANDOM = {"bernoulli", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "multinomial",
          "empty", "new_empty", "empty_like", "uniform", "dropout", "native_dropout", "exponential"}  # fmt: skip


def analyse(
    graphs: list[Captured], model: nn.Module, heads: str = "task-indexed", norms: str = "live", residuals: str = "or"
) -> Analysis:
    """Decides what becomes of every layer, raw parameter and node of ``graphs`` (the modes of one model).

    ``heads`` is ``task-indexed`` or ``hat``, ``norms`` is ``live`` or ``plain``, ``residuals`` is ``or`` or ``tied``.

    A raw parameter whose use can only be told at its last node may turn out to be used in a way that tasks cannot share; the
    analysis then starts again with that known. So it does where maskers meet on a residual stream and are to be tied.
    """
    roles = Heads(graphs, model)
    indexed, whole = _surely_indexed(graphs, model), set()
    tied: dict[str, str] = {}
    while True:
        analyst = Analyst(graphs, model, roles, heads, indexed, whole, norms == "live", tied)
        analysis = analyst.run()
        if not analyst.other_use - indexed - whole:
            found = ties(analysis, analyst.untied, tied) if residuals == "tied" else tied
            if found == tied:
                analyst.finish()
                return analysis
            tied = found
        for name in sorted(analyst.other_use - indexed - whole):
            (whole if analyst.layer_owned(name) else indexed).add(name)


def _surely_indexed(graphs: list[Captured], model: nn.Module) -> set[str]:
    """Raw parameters that no user could take for a weight: saves starting again for them."""
    owned = {id(p) for g in graphs for leaf in g.leaves.values() for p in leaf.parameters()}
    fixed = {n for g in graphs for n in _fixed(g)}
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in reversed(named.items())}
    maybe: set[str] = set()
    seen: set[str] = set()
    for captured in graphs:
        for node in captured.graph.nodes:
            if node.op == "get_attr" and node.target in named:
                name = first[id(named[node.target])]
                seen.add(name)
                if id(named[name]) in owned or _may_be_weight(node, fixed):
                    maybe.add(name)
    return seen - maybe


def _fixed(captured: Captured) -> set[fx.Node]:
    """Nodes that do not depend on data."""
    found: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.op == "get_attr" or node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _may_be_weight(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a parameter gets to a weight's slot by movement and what weights are computed by."""
    stack, seen = [node], set()
    while stack:
        for user in stack.pop().users:
            name = operator_name(user)
            if name in WEIGHT_SLOT:
                return True
            if user not in seen and user in fixed and (name in MOVES or name in CASTS or name in DERIVABLE or name == "getitem"):
                seen.add(user)
                stack.append(user)
    return False


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
        self.owners: dict[str, str] = {}
        self.canonical: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.canonical.setdefault(id(parameter), name)
        self.held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        for captured in graphs:
            self.analysis.buffers.update(n for n in captured.writes if n in self.held)
            for node in captured.graph.nodes:
                if node.op == "call_function" and operator_name(node) in ("batch_norm", "instance_norm"):
                    statistics = [a for a in node.args[3:5] if isinstance(a, fx.Node) and a.op == "get_attr"]
                    self.analysis.buffers.update(a.target for a in statistics if a.target in self.held)  # written in place, unsaid
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node | None = None
        self.captured: Captured | None = None
        self._leaf_parameters = {
            id(p) for g in graphs for leaf in g.leaves.values() if describe(leaf) is not None for p in leaf.parameters()
        }

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
                self.env[node] = self._visit(node)
                if captured is self.graphs[0]:
                    self.analysis.values[node] = self.env[node]
            for value in captured.writes.values():
                self.analysis.steps[value, "write"] = Step((self._materialised(self.env[value]),), {}, None)
        return self.analysis

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._value(node, ones(node.meta["val"].dim()))
        if node.op == "get_attr":
            return self._held(node)
        if node.op == "output":
            args = pytree.tree_map(lambda n: self._materialised(self.env[n]) if isinstance(n, fx.Node) else n, node.args)
            self.analysis.steps[node] = Step(args, {}, None)
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.op == "call_module":
            return self._layer(node, args, kwargs)
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
            self.analysis.steps[node] = Step(args, kwargs, None)
            return Size(1, node) if name in ("is_grad_enabled", "enter_autocast") else None
        if name == "getitem" and isinstance(args[0], list | tuple | dict):
            picked = args[0][args[1]]
            return self._widened(replace(picked, data=node)) if isinstance(picked, Value) else picked
        if not tensors_of(val):
            return self._number(node, args, kwargs)
        call = Call(name, node.target, args, kwargs)
        self.analysis.operators[name] += 1
        found = functional.weighted_call(call)
        if found is not None and functional.is_parameter(found.weight):
            return self._functional(node, call, found)
        values = call.values()
        if name in FRESH:
            return self._constant(node, call, known=False)
        self._check_origins(call)
        if not any(v.gated for v in values):
            if all(v.constant for v in values):
                return self._constant(node, call)
            self.analysis.steps[node] = Step(call.args, call.kwargs, None)
            return self._results(node, val, None)
        outcome = self._ruled(node, call)
        return self._finish(node, outcome, call)

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

    def _finish(self, node: fx.Node, outcome: Outcome, call: Call) -> Any:
        """Results of a node, widened or made conservative where gates cannot be kept."""
        val = node.meta["val"]
        outs = outcome.out if isinstance(outcome.out, list) else [outcome.out]
        vals = tensors_of(val)
        if any(g.ids is not None and varies_where_open(g.ids, v) for g, v in zip(outs, vals)):
            outcome = unknown(self, call)
            outs = [outcome.out]
        self.analysis.steps[node] = Step(outcome.args, outcome.kwargs, None, live=outcome.live if self.live else None)
        return self._results(node, val, outs)

    def _results(self, node: fx.Node, val: Any, outs: list[Gates] | None) -> Any:
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

    def _widened(self, value: Value) -> Value:
        if value.gated and self.table.too_large(value.ids):
            return clean(self, value).top()
        return value

    def _constant(self, node: fx.Node, call: Call, known: bool = True) -> Any:
        """A result that does not depend on data; its actual value where all operands' values are known."""
        val = node.meta["val"]
        values = call.values()
        self.analysis.steps[node] = Step(call.args, call.kwargs, None)
        known = known and call.name not in RANDOM and all(v.known is not None for v in values) and self._concrete(node)
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
        results = [
            self._value(node, constants(v.dim()), val=v, known=k, origin=o, finite=kept if k is None else all_finite(k))
            for v, k, o in zip(tensors_of(val), actual, origins)
        ]
        return results[0] if isinstance(val, Tensor) else results

    def _concrete(self, node: fx.Node) -> bool:
        return all(not isinstance(s, torch.SymInt) for v in tensors_of(node.meta["val"]) for s in v.shape)

    def _check_origins(self, call: Call) -> None:
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
            self.analysis.steps[node] = Step(args, kwargs, None)
            value = concrete(val)
            return value if isinstance(value, bool) else Ratio(value, node) if isinstance(value, float) else Size(value, node)
        raise ConversionError(f"{operator_name(node)} gives neither tensors nor a size", where=node.meta.get("line") or node.name)

    # layers

    def _layer(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        path = node.target
        leaf = self.model.get_submodule(path)
        meaning = describe(leaf)
        call = Call(type(leaf).__name__, _Probe(leaf), args, kwargs)
        self._check_origins(call)
        if isinstance(meaning, Weighted) and call.values() and not self._is_own_head(node, path):
            return self._weighted_layer(node, path, leaf, meaning, call)
        if isinstance(meaning, Weighted):
            outcome = self._head_outcome(leaf, meaning, call)
            self._plan(LayerPlan(path, "head", TASK_INDEXED, "output layer"))
            return self._finish(node, outcome, call)
        if isinstance(meaning, Recurrent):
            return self._recurrent_layer(node, path, leaf, meaning, call)
        self._plan(self._other_plan(path, leaf, meaning))
        if not any(v.gated for v in call.values()):
            self.analysis.steps[node] = Step(call.args, call.kwargs, None)
            results = self._results(node, node.meta["val"], None)
        elif isinstance(meaning, Elementwise):
            results = self._finish(node, _both_modes(self, leaf, call, meaning), call)
        else:
            norm_dims = len(getattr(leaf, "normalized_shape", ())) or 1
            results = self._finish(node, other_layer(self, meaning, call, norm_dims), call)
        return self._restructured(node, results)

    def _restructured(self, node: fx.Node, results: Any) -> Any:
        out = node.meta.get("out", 0)
        if isinstance(out, int):
            return results[0] if isinstance(results, list) else results
        return pytree.tree_map(lambda i: results[i] if isinstance(i, int) else i, out)

    def _is_own_head(self, node: fx.Node, path: str) -> bool:
        return node in self.roles.nodes and path not in self.roles.shared and self.heads == "task-indexed"

    def _head_outcome(self, leaf: nn.Module, meaning: Weighted, call: Call) -> Outcome:
        inputs, outputs = channels_of(leaf, meaning)
        x = call.values()[0]
        outcome = weighted(self, x, meaning, None, inputs, outputs, _has_bias(leaf, meaning))
        args, kwargs = call.map(lambda v: outcome.x if v is x else clean(self, v))
        return Outcome(args, kwargs, outcome.out)

    def _weighted_layer(self, node: fx.Node, path: str, leaf: nn.Module, meaning: Weighted, call: Call) -> Any:
        inputs, outputs = channels_of(leaf, meaning)
        x = call.values()[0]
        plan = self.analysis.layers.get(path)
        shared = node in self.roles.nodes and path in self.roles.shared
        through = not shared and passes_through(x, meaning, inputs) and (plan is None or plan.masker is None)
        atoms = None if shared or through else self._masker(path, outputs)
        outcome = weighted(self, x, meaning, atoms, inputs, outputs, _has_bias(leaf, meaning))
        shapes = {n: tuple(p.shape) for n, p in leaf.named_parameters(remove_duplicate=False)}
        for use in weighted_uses(meaning, outcome, shapes, inputs, outputs):
            name = self.canonical[id(leaf.get_parameter(use.parameter))]
            self.analysis.use(replace(use, parameter=name, site=path))
        grouped = meaning.row_locked or meaning.column_grouped
        role = "shared-head" if shared else "through" if through else "hat"
        reason = self.roles.shared.get(path, "") if shared else "weights normalised before use" if grouped else ""
        masker = None if atoms is None else self.tied.get(path, path)
        self._plan(LayerPlan(path, role, ROW_LOCKED if grouped else HAT, reason, masker, outputs))
        args, kwargs = call.map(lambda v: outcome.x if v is x else clean(self, v))
        return self._finish(node, Outcome(args, kwargs, outcome.out), call)

    def _recurrent_layer(self, node: fx.Node, path: str, leaf: nn.Module, meaning: Recurrent, call: Call) -> Any:
        atoms = {name: self._masker(f"{path}.{name}", size) for name, size in masker_sizes(meaning).items()}
        self.untied.update(f"{path}.{name}" for name in atoms)
        outcome = recurrent(self, meaning, call, atoms, _unmasked)
        shapes = {n: tuple(p.shape) for n, p in leaf.named_parameters(remove_duplicate=False)}
        for use in recurrent_uses(meaning, atoms, outcome.cols, shapes):
            name = self.canonical[id(leaf.get_parameter(use.parameter))]
            self.analysis.use(replace(use, parameter=name, site=path))
        self._plan(LayerPlan(path, "recurrent", HAT, channels=meaning.hidden))
        return self._restructured(node, self._finish(node, Outcome(outcome.args, {}, outcome.out), call))

    def _masker(self, name: str, channels: int) -> Tensor:
        name = self.tied.get(name, name)
        if self.analysis.sizes.setdefault(name, channels) != channels:
            raise ConversionError(
                f"two weights of different sizes ask for the masker {name}", where=name, fix="give one of them another name"
            )
        return self.table.atoms(name, channels)

    def _masker_of_weight(self, masker: str, size: int, weight: str) -> str:
        """The name of a functional weight's masker, another one where a layer or another weight has that name for other rows."""
        leaf = self.captured.leaves.get(masker)
        meaning = None if leaf is None else describe(leaf)
        if isinstance(meaning, Weighted):
            own = self.canonical[id(leaf.get_parameter(meaning.weight))]
            taken = meaning.lookup or own != weight or channels_of(leaf, meaning)[1] != size
        else:
            taken = self.owners.setdefault(masker, weight) != weight
        return f"{weight}.rows" if taken else masker

    def _other_plan(self, path: str, leaf: nn.Module, meaning: Layer) -> LayerPlan:
        own = any(True for _ in leaf.parameters()) or any(True for _ in leaf.buffers())
        if not own and not isinstance(meaning, MixingNorm):
            return LayerPlan(path, "plain", HAT)
        if isinstance(meaning, ChannelNorm | MixingNorm):
            return LayerPlan(path, "norm", TASK_INDEXED, "normalisation")
        reason = meaning.reason if isinstance(meaning, TaskIndexedLayer) else "acts on each element"
        return LayerPlan(path, "task-indexed", TASK_INDEXED, reason)

    def _plan(self, plan: LayerPlan) -> None:
        known = self.analysis.layers.get(plan.path)
        if known is not None and known.masker is not None:
            return
        self.analysis.layers[plan.path] = plan

    # weights used by function

    def _functional(self, node: fx.Node, call: Call, found: functional.WeightedCall) -> Any:
        """A weighted operator whose weight is a raw parameter, moved at most: a HAT layer of its own path."""
        names = found.weight.origin.names
        own_head = node in self.roles.nodes and self.heads == "task-indexed"
        if own_head and not any(n in self.roles.shared for n in names):
            self.other_use.update(names)
            if found.bias is not None and found.bias.origin is not None:
                self.other_use.update(found.bias.origin.names)
        shared = own_head and any(n in self.roles.shared for n in names)
        through = not shared and passes_through(found.x, found.meaning, found.inputs)
        rows_of = functional.row_sources(found, self.held)
        atoms = None
        masker = None
        if not shared and not through:
            masker, size, index = rows_of or (f"{node.name}[{found.outputs}]", found.outputs, None)
            masker = self._masker_of_weight(masker, size, functional.main_part(found.weight).name)
            masker = self.tied.get(masker, masker)
            atoms = self._masker(masker, size)
            atoms = atoms if index is None else atoms[index]
        has_bias = found.bias is not None
        outcome = weighted(self, found.x, found.meaning, atoms, found.inputs, found.outputs, has_bias)
        shapes = {"weight": found.shape, "bias": (found.outputs,)}
        for use in weighted_uses(found.meaning, outcome, shapes, found.inputs, found.outputs):
            source = found.weight if use.parameter == "weight" else found.bias
            if source is not None and source.origin is not None:
                self._record(use, source, found, node)
        if has_bias and found.bias.origin is None and not found.bias.constant:
            call = replace(call, args=tuple(clean(self, a) if a is found.bias else a for a in call.args))
        for part in found.weight.origin.parts:
            coupled = by_rows(part, found.weight.shape)
            reason = self.roles.shared.get(part.name, "weights normalised before use" if coupled else "used by function")
            role, rung = "shared-head" if shared else "hat", ROW_LOCKED if coupled else HAT
            self.analysis.parameters[part.name] = LayerPlan(part.name, role, rung, reason, masker, found.outputs)
        args, kwargs = call.map(lambda v: outcome.x if v is found.x else v)
        return self._finish(node, Outcome(args, kwargs, outcome.out), call)

    def _record(self, use: Use, source: Value, found: functional.WeightedCall, node: fx.Node) -> None:
        """A use of an effective weight, split over the parameters that it was made of."""
        origin = source.origin
        if use.parameter == "weight" and found.flip:
            use = replace(use, rows=use.rows.transpose(0, 1), cols=use.cols.transpose(0, 1), shape=source.shape)
        if use.parameter == "bias":
            if source.shape != use.shape:
                self.other_use.update(origin.names)
                return
            for name in origin.names:
                self.analysis.parameters.setdefault(name, LayerPlan(name, "hat", HAT, "used by function"))
        shapes = {n: tuple(self.held[n].shape) for n in origin.names}
        for name, part in zip(origin.names, split_use(replace(use, site=node.name), origin, shapes)):
            if part is None:
                self.other_use.add(name)
            else:
                self.analysis.use(part)

    # the end

    def layer_owned(self, name: str) -> bool:
        """Whether a raw parameter also belongs to a layer that is called as a module."""
        return id(self.held[name]) in self._leaf_parameters

    def finish(self) -> None:
        """Plans of raw parameters that have no HAT use, and of parameters that a layer shares with the glue."""
        for name in sorted(self.indexed):
            self.analysis.uses.pop(name, None)
            self.analysis.parameters[name] = LayerPlan(name, "task-indexed", TASK_INDEXED, "raw parameter")
        for name in sorted(self.whole):
            shape = tuple(self.held[name].shape)
            top = ones(len(shape))
            self.analysis.use(Use(name, top, top, shape, grouped=True, site="used outside its layer"))
            self.analysis.notes.append(f"{name} is used outside its layer too: locked as a whole once a task is finished")
        self.analysis.class_heads = {name for name, free in self.roles.countable.items() if free and name not in self.roles.shared}


class _Probe:
    """A leaf as a function of tensors, on a copy, for probing and for moving ids."""

    def __init__(self, leaf: nn.Module) -> None:
        self.leaf = leaf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return type(self.leaf).forward(self.leaf, *args, **kwargs)


def _both_modes(run: Analyst, leaf: nn.Module, call: Call, meaning: Layer) -> Outcome:
    """An elementwise layer must preserve zero in both modes; checked on a copy, so that the leaf keeps its mode."""
    outcomes = []
    for training in (True, False):
        twin = copy.deepcopy(leaf).train(training)
        if hasattr(twin, "inplace"):
            twin.inplace = False
        outcomes.append(other_layer(run, meaning, replace(call, func=_Probe(twin))))
    worst = next((o for o in outcomes if o.out.state is State.DIRTY), outcomes[0])
    return worst


def _unmasked(value: Value) -> Value:
    """The pending value that one was materialised from, or itself."""
    return value.data.value if isinstance(value.data, Masked) and not value.data.fill else value


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


def channels_of(leaf: nn.Module, meaning: Weighted) -> tuple[int, int]:
    """Input and output channels of a weighted layer, from its weight's shape."""
    shape = tuple(leaf.get_parameter(meaning.weight).shape)
    return channels(meaning, shape)


def _has_bias(leaf: nn.Module, meaning: Weighted) -> bool:
    return meaning.bias is not None and getattr(leaf, meaning.bias, None) is not None
