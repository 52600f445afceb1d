"""Calls of layers: what each becomes, who masks its output, and what locks its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from hatify.analysis.coupling import LAYER, keeps_places
from hatify.analysis.plan import HAT, ROW_LOCKED, TASK_INDEXED, LayerPlan, Masked, Step
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
from hatify.gates.rules import Call, Outcome
from hatify.gates.rules.base import clean
from hatify.registry import describe

if TYPE_CHECKING:
    from hatify.analysis.analyst import Analyst


def leaf_call(run: Analyst, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """What a layer gives, and what is decided for it: values as the node's users read them."""
    path = node.target
    leaf = run.model.get_submodule(path)
    meaning = describe(leaf)
    if not isinstance(meaning, Elementwise | Weighted):
        args, kwargs = run.unrepeated((args, kwargs))
    call = Call(type(leaf).__name__, _Probe(leaf), args, kwargs)
    if keeps_places(leaf) and _of_weights_alone(call):
        run.plan(_other_plan(path, leaf, meaning))
        return _restructured(node, run.constant_call(node, replace(call, name=LAYER), known=False))
    run.check_origins(call)
    if isinstance(meaning, Weighted) and call.values() and not _is_own_head(run, node, path):
        return _weighted_layer(run, node, path, leaf, meaning, call)
    if isinstance(meaning, Weighted):
        outcome = _head_outcome(run, leaf, meaning, call)
        run.plan(LayerPlan(path, "head", TASK_INDEXED, "output layer"))
        return run.settled(node, outcome, call)
    if isinstance(meaning, Recurrent):
        return _recurrent_layer(run, node, path, leaf, meaning, call)
    run.plan(_other_plan(path, leaf, meaning))
    if not any(v.gated for v in call.values()):
        run.analysis.steps[node] = Step(call.args, call.kwargs)
        results = run.results(node, node.meta["val"], None)
    elif isinstance(meaning, Elementwise):
        results = run.settled(node, _both_modes(run, leaf, call, meaning), call)
    else:
        norm_dims = len(getattr(leaf, "normalized_shape", ())) or 1
        results = run.settled(node, other_layer(run, meaning, call, norm_dims), call)
    return _restructured(node, results)


def _of_weights_alone(call: Call) -> bool:
    values = call.values()
    return all(v.constant for v in values) and any(v.origin is not None for v in values)


def _restructured(node: fx.Node, results: Any) -> Any:
    """Results in the structure that the leaf returns."""
    out = node.meta.get("out", 0)
    if isinstance(out, int):
        return results[0] if isinstance(results, list) else results
    return pytree.tree_map(lambda i: results[i] if isinstance(i, int) else i, out)


def _is_own_head(run: Analyst, node: fx.Node, path: str) -> bool:
    return node in run.roles.nodes and path not in run.roles.shared and run.heads == "task-indexed"


def _head_outcome(run: Analyst, leaf: nn.Module, meaning: Weighted, call: Call) -> Outcome:
    inputs, outputs = channels_of(leaf, meaning)
    x = call.values()[0]
    outcome = weighted(run, x, meaning, None, inputs, outputs, _has_bias(leaf, meaning))
    args, kwargs = call.map(lambda v: outcome.x if v is x else clean(run, v))
    return Outcome(args, kwargs, outcome.out)


def _weighted_layer(run: Analyst, node: fx.Node, path: str, leaf: nn.Module, meaning: Weighted, call: Call) -> Any:
    inputs, outputs = channels_of(leaf, meaning)
    x = call.values()[0]
    plan = run.analysis.layers.get(path)
    shared = node in run.roles.nodes and path in run.roles.shared
    through = not shared and passes_through(x, meaning, inputs) and (plan is None or plan.masker is None)
    atoms = None if shared or through else run.masker(path, outputs)
    outcome = weighted(run, x, meaning, atoms, inputs, outputs, _has_bias(leaf, meaning))
    shapes = {n: tuple(p.shape) for n, p in leaf.named_parameters(remove_duplicate=False)}
    _record(run, leaf, path, weighted_uses(meaning, outcome, shapes, inputs, outputs), node)
    grouped = meaning.row_locked or meaning.column_grouped
    role = "shared-head" if shared else "through" if through else "hat"
    reason = run.roles.shared.get(path, "") if shared else "weights normalised before use" if grouped else ""
    masker = None if atoms is None else run.tied.get(path, path)
    run.plan(LayerPlan(path, role, ROW_LOCKED if grouped else HAT, reason, masker, outputs))
    args, kwargs = call.map(lambda v: outcome.x if v is x else clean(run, v))
    return run.settled(node, Outcome(args, kwargs, outcome.out), call, weighted=True)


def _recurrent_layer(run: Analyst, node: fx.Node, path: str, leaf: nn.Module, meaning: Recurrent, call: Call) -> Any:
    atoms = {name: run.masker(f"{path}.{name}", size) for name, size in masker_sizes(meaning).items()}
    run.untied.update(f"{path}.{name}" for name in atoms)
    outcome = recurrent(run, meaning, call, atoms, _unmasked)
    shapes = {n: tuple(p.shape) for n, p in leaf.named_parameters(remove_duplicate=False)}
    _record(run, leaf, path, recurrent_uses(meaning, atoms, outcome.cols, shapes), None)
    run.plan(LayerPlan(path, "recurrent", HAT, channels=meaning.hidden))
    return _restructured(node, run.settled(node, Outcome(outcome.args, {}, outcome.out), call, weighted=True))


def _record(run: Analyst, leaf: nn.Module, path: str, uses: Iterable[Use], node: fx.Node | None) -> None:
    """Uses of a leaf's own parameters, by the names that these have in the model."""
    for use in uses:
        name = run.canonical[id(leaf.get_parameter(use.parameter))]
        run.analysis.use(replace(use, parameter=name, site=path), node)


def _other_plan(path: str, leaf: nn.Module, meaning: Layer) -> LayerPlan:
    own = any(True for _ in leaf.parameters()) or any(True for _ in leaf.buffers())
    if not own and not isinstance(meaning, MixingNorm):
        return LayerPlan(path, "plain", HAT)
    if isinstance(meaning, ChannelNorm | MixingNorm):
        return LayerPlan(path, "norm", TASK_INDEXED, "normalisation")
    reason = meaning.reason if isinstance(meaning, TaskIndexedLayer) else "acts on each element"
    return LayerPlan(path, "task-indexed", TASK_INDEXED, reason)


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


def channels_of(leaf: nn.Module, meaning: Weighted) -> tuple[int, int]:
    """Input and output channels of a weighted layer, from its weight's shape."""
    shape = tuple(leaf.get_parameter(meaning.weight).shape)
    return channels(meaning, shape)


def _has_bias(leaf: nn.Module, meaning: Weighted) -> bool:
    return meaning.bias is not None and getattr(leaf, meaning.bias, None) is not None
