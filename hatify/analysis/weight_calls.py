"""Weights used by function: a weighted operator in the glue becomes a HAT layer of its own path."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from hatify.analysis.functional import WeightedCall, main_part, row_sources
from hatify.analysis.leaf_calls import channels_of
from hatify.analysis.origins import by_rows, split_use
from hatify.analysis.plan import HAT, ROW_LOCKED, LayerPlan
from hatify.gates import Use, Value
from hatify.gates.layers import Weighted, passes_through, weighted, weighted_uses
from hatify.gates.rules import Call, Outcome
from hatify.gates.rules.base import clean
from hatify.registry import describe

if TYPE_CHECKING:
    from hatify.analysis.analyst import Analyst


def weight_call(run: Analyst, node: fx.Node, call: Call, found: WeightedCall) -> Any:
    """A weighted operator whose weight is a raw parameter, moved at most: a HAT layer of its own path."""
    names = found.weight.origin.names
    own_head = node in run.roles.nodes and run.heads == "task-indexed"
    if own_head and not any(n in run.roles.shared for n in names):
        bias = found.bias.origin.names if found.bias is not None and found.bias.origin is not None else ()
        run.other_use.update((*names, *bias))
        run.head_weights.update((*names, *bias))
    shared = own_head and any(n in run.roles.shared for n in names)
    through = not shared and passes_through(found.x, found.meaning, found.inputs)
    rows_of = row_sources(found, run.held)
    atoms = None
    masker = None
    if not shared and not through:
        masker, size, index = rows_of or (f"{node.name}[{found.outputs}]", found.outputs, None)
        masker = _masker_of_weight(run, masker, size, main_part(found.weight).name)
        masker = run.tied.get(masker, masker)
        atoms = run.masker(masker, size)
        atoms = atoms if index is None else atoms[index]
    has_bias = found.bias is not None
    outcome = weighted(run, found.x, found.meaning, atoms, found.inputs, found.outputs, has_bias)
    shapes = {"weight": found.shape, "bias": (found.outputs,)}
    for use in weighted_uses(found.meaning, outcome, shapes, found.inputs, found.outputs):
        source = found.weight if use.parameter == "weight" else found.bias
        if source is not None and source.origin is not None:
            _record(run, use, source, found, node)
    if has_bias and found.bias.origin is None and not found.bias.constant:
        call = replace(call, args=tuple(clean(run, a) if a is found.bias else a for a in call.args))
    for part in found.weight.origin.parts:
        coupled = by_rows(part, found.weight.shape)
        reason = run.roles.shared.get(part.name, "weights normalised before use" if coupled else "used by function")
        role, rung = "shared-head" if shared else "hat", ROW_LOCKED if coupled else HAT
        run.analysis.parameters[part.name] = LayerPlan(part.name, role, rung, reason, masker, found.outputs)
    args, kwargs = call.map(lambda v: outcome.x if v is found.x else v)
    return run.settled(node, Outcome(args, kwargs, outcome.out), call, weighted=True)


def _record(run: Analyst, use: Use, source: Value, found: WeightedCall, node: fx.Node) -> None:
    """A use of an effective weight, split over the parameters that it was made of."""
    origin = source.origin
    if use.parameter == "weight" and found.flip:
        rows, cols = use.rows.transpose(0, 1), use.cols.transpose(0, 1)
        if found.experts:
            rows, cols = rows[None], cols[None]
        use = replace(use, rows=rows, cols=cols, shape=source.shape)
    if use.parameter == "bias":
        if source.shape != use.shape:
            run.other_use.update(origin.names)
            return
        for name in origin.names:
            run.analysis.parameters.setdefault(name, LayerPlan(name, "hat", HAT, "used by function"))
    shapes = {n: tuple(run.held[n].shape) for n in origin.names}
    for name, part in zip(origin.names, split_use(replace(use, site=node.name), origin, shapes)):
        if part is None:
            run.other_use.add(name)
        else:
            run.analysis.use(part, node)


def _masker_of_weight(run: Analyst, masker: str, size: int, weight: str) -> str:
    """The name of a functional weight's masker, another one where a layer or another weight has that name for other rows."""
    leaf = run.captured.leaves.get(masker)
    meaning = None if leaf is None else describe(leaf)
    if isinstance(meaning, Weighted):
        own = run.canonical[id(leaf.get_parameter(meaning.weight))]
        taken = meaning.lookup or own != weight or channels_of(leaf, meaning)[1] != size
    else:
        taken = run.owners.setdefault(masker, weight) != weight
    return f"{weight}.rows" if taken else masker
