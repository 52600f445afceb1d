"""Weights of more than two dimensions, and weights that an einsum spells: a parameter contracted with data becomes a HAT layer.

Each letter of the equation is one of four kinds. What both operands have and the result has not is summed over: the weight's inputs.
What only the weight has is its outputs, one channel of a masker for each of their combinations. What all three have is a batch of
matrices (heads, experts, directions), which share that masker. The rest only the data has, and its gates stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from hatify.analysis.origins import by_rows, split_use
from hatify.analysis.plan import HAT, ROW_LOCKED, LayerPlan
from hatify.gates import State, Use, Value
from hatify.gates.rules import Call, Gates, Outcome
from hatify.gates.rules.base import clean
from hatify.gates.rules.contractions import common_along, letters_of_einsum, letters_of_matmul, or_over
from hatify.gates.table import TOP

if TYPE_CHECKING:
    from hatify.analysis.analyst import Analyst


@dataclass(frozen=True, eq=False)
class Contraction:
    """``x`` (letters ``of_x``) contracted with a ``weight`` (letters ``of_weight``) to ``out``."""

    x: Value
    weight: Value
    of_x: str
    of_weight: str
    out: str

    @property
    def outputs(self) -> str:
        return "".join(c for c in self.of_weight if c not in self.of_x)

    def size(self, letter: str) -> int:
        return self.weight.shape[self.of_weight.index(letter)]


def contraction(call: Call) -> Contraction | None:
    """The call read as a contraction of data with a raw parameter, or None."""
    values = call.values()
    if len(values) != 2 or (values[0].origin is None) == (values[1].origin is None):
        return None
    if call.name == "einsum":
        letters = letters_of_einsum(call.args[0])
    else:
        letters = letters_of_matmul(*(v.rank for v in values)) if call.name in ("matmul", "bmm") else None
    if letters is None:
        return None
    (x, of_x), (weight, of_weight) = sorted(zip(values, letters[0]), key=lambda side: side[0].origin is not None)
    found = Contraction(x, weight, of_x, of_weight, letters[1])
    return found if _is_layer(found) else None


def _is_layer(found: Contraction) -> bool:
    """Whether something is summed over and something comes out, and nothing else happens."""
    x, weight, out = set(found.of_x), set(found.of_weight), set(found.out)
    plain = all(len(set(letters)) == len(letters) for letters in (found.of_x, found.of_weight, found.out))
    alike = all(found.x.shape[found.of_x.index(c)] == found.size(c) for c in x & weight)
    return plain and alike and bool(x & weight - out) and bool(weight - x) and weight - x <= out and x - weight <= out


def contracted_weight(run: Analyst, node: fx.Node, call: Call, found: Contraction) -> Any:
    """The rule of :func:`hatify.gates.layers.weighted`, letter by letter."""
    names = found.weight.origin.names
    if node in run.roles.nodes and run.heads == "task-indexed":
        run.other_use.update(names)
        run.head_weights.update(names)
    size = torch.Size([found.size(c) for c in found.outputs]).numel()
    masker = f"{node.name}[{size}]"
    masker = run.tied.get(masker, masker)
    atoms = run.masker(masker, size).reshape([found.size(c) for c in found.outputs])
    x, inputs = found.x, [d for d, c in enumerate(found.of_x) if c in found.of_weight and c not in found.out]
    cols = or_over(run.table, x.ids, [d for d, c in enumerate(found.of_x) if c in found.of_weight])
    if any(x.varies(d) for d in inputs):
        x = clean(run, x)
    own = _placed(common_along(run.table, x.ids, inputs), found.of_x, found.out)
    there = _placed(atoms, found.outputs, found.out)
    both = run.table.combine("and", there, own)
    if x.state is State.PENDING or not bool((own > TOP).any()):
        gates = Gates(both, State.PENDING)
    else:
        gates = Gates(both, x.state, factor=there)
    rows = _placed(atoms, found.outputs, found.of_weight)
    reads = _placed(cols, "".join(c for c in found.of_x if c in found.of_weight), found.of_weight)
    use = Use("weight", rows, reads, found.weight.shape, site=node.name)
    shapes = {n: tuple(run.held[n].shape) for n in names}
    for part, split in zip(found.weight.origin.parts, split_use(use, found.weight.origin, shapes)):
        if split is None:
            run.other_use.add(part.name)
            continue
        run.analysis.use(split, node)
        coupled = by_rows(part, found.weight.shape)
        reason = "weights normalised before use" if coupled else "used by function"
        run.analysis.parameters[part.name] = LayerPlan(part.name, "hat", ROW_LOCKED if coupled else HAT, reason, masker, size)
    args, kwargs = call.map(lambda v: x if v is found.x else v)
    return run.settled(node, Outcome(args, kwargs, gates), call, weighted=True)


def _placed(ids: Tensor, letters: str, target: str) -> Tensor:
    """``ids`` (one dimension per letter) with a dimension for every letter of ``target``, in its order; others must have size 1."""
    kept = [c for c in target if c in letters]
    rest = [d for d, c in enumerate(letters) if c not in target]
    moved = ids.permute(*[letters.index(c) for c in kept], *rest)
    sizes = dict(zip(kept, moved.shape))
    return moved.reshape([sizes.get(c, 1) for c in target])
