"""Random gate expressions, built in a table and evaluated directly, for the laws of the algebra."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from hatify.gates import CONST, TOP, GateTable, compile_gates, evaluate

SIZES = {"a": 3, "b": 4}

Tree = tuple
"""``("const",)``, ``("top",)``, ``("atom", masker, channel)`` or ``("or" | "and", tree, tree)``."""

atoms = st.sampled_from([("atom", m, c) for m, size in SIZES.items() for c in range(size)])
leaves = st.one_of(atoms, atoms, atoms, st.just(("top",)), st.just(("const",)))
trees = st.recursive(leaves, lambda inner: st.tuples(st.sampled_from(["or", "and"]), inner, inner), max_leaves=10)
gated = st.recursive(atoms, lambda inner: st.tuples(st.sampled_from(["or", "and"]), inner, inner), max_leaves=8)
"""Expressions over atoms alone."""


def build(table: GateTable, tree: Tree) -> int:
    """The id of an expression."""
    if tree[0] in ("const", "top"):
        return CONST if tree[0] == "const" else TOP
    if tree[0] == "atom":
        return int(table.atoms(tree[1], SIZES[tree[1]])[tree[2]])
    return table.pair(tree[0], build(table, tree[1]), build(table, tree[2]))


def direct(tree: Tree, masks: dict[str, Tensor]) -> float | None:
    """What an expression is worth: OR is max, AND is min, TOP is 1; None for CONST, which takes on the other's gate."""
    if tree[0] in ("const", "top"):
        return None if tree[0] == "const" else 1.0
    if tree[0] == "atom":
        return float(masks[tree[1]][tree[2]])
    sides = [s for s in (direct(tree[1], masks), direct(tree[2], masks)) if s is not None]
    return None if not sides else max(sides) if tree[0] == "or" else min(sides)


def random_masks(seed: int, binary: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(size, generator=generator) for name, size in SIZES.items()}
    return {name: (mask > 0.5).float() if binary else mask for name, mask in drawn.items()}


def value(table: GateTable, ids: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The masks of gate ids, through a compiled program: the shape of ``ids``."""
    return evaluate(compile_gates(table, SIZES)(ids), masks.__getitem__, {}).reshape(ids.shape)
