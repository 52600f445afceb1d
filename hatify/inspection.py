"""What a converted graph says of itself, for people."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, fx

from hatify.errors import HatifyError
from hatify.gates import Use, Value
from hatify.gates.table import TOP
from hatify.model import HATModel


def node_table(hat: HATModel) -> list[dict[str, Any]]:
    """One row per node of the captured eval graph: ``name, op, target, shape, gates, state, scope``."""
    facts = hat._facts
    rows = []
    for node, value in facts.values.items():
        if not isinstance(value, Value):
            continue
        rows.append(
            {
                "name": node.name,
                "op": node.op,
                "target": _target(node),
                "shape": " × ".join(str(s) for s in value.shape),
                "gates": facts.analysis.table.describe(value.ids),
                "state": value.state.value if value.gated else "clean",
                "scope": node.meta.get("scope", ""),
            }
        )
    return rows


def describe_layer(hat: HATModel, path: str) -> str:
    """One layer's gates in words: what it became, what feeds it, which maskers gate its input and output, when its weights lock.

    Raises:
        HatifyError: no layer of that path; names near misses.
    """
    analysis = hat._facts.analysis
    plan = analysis.layers.get(path) or analysis.parameters.get(path)
    if plan is None:
        known = [*analysis.layers, *analysis.parameters]
        near = difflib.get_close_matches(path, known, n=3)
        raise HatifyError(
            f"no layer {path!r}", why="near misses: " + ", ".join(near) if near else None, fix=f"one of {', '.join(known[:6])}, …"
        )
    lines = [f"{path}: {plan.role}, on the rung {plan.rung}" + (f" ({plan.reason})" if plan.reason else "")]
    for node in _calls(hat, path):
        for source in node.all_input_nodes:
            value = hat._facts.values.get(source)
            if isinstance(value, Value) and not value.constant:
                gates = analysis.table.describe(value.ids)
                lines.append(f"  fed by {source.name}, live where {_words(gates)}")
        value = hat._facts.values.get(node)
        if isinstance(value, Value):
            lines.append(f"  output live where {_words(analysis.table.describe(value.ids))}; mask {_state(value)}")
    for use in [u for uses in analysis.uses.values() for u in uses if _belongs(u, path)]:
        lines.append(f"  {use.parameter} {tuple(use.shape)}: {_lock(hat, use)}")
    if plan.rung == "task-indexed":
        lines.append(
            f"  one copy for each of {hat.config.num_tasks} tasks and one without a task; nothing is shared, so nothing locks"
        )
    return "\n".join(lines)


def _calls(hat: HATModel, path: str) -> list[fx.Node]:
    return [n for n in hat._facts.values if n.target == path or path in _held_by(n)]


def _held_by(node: fx.Node) -> list[str]:
    return [str(s.target) for s in node.all_input_nodes if s.op == "get_attr"] if node.op == "call_function" else []


def _belongs(use: Use, path: str) -> bool:
    return use.site == path or use.parameter == path or use.parameter.startswith(f"{path}.")


def _lock(hat: HATModel, use: Use) -> str:
    table = hat._facts.analysis.table
    rows, cols = _all_top(use.rows), _all_top(use.cols)
    if rows and cols:
        return "locks as a whole once any task is finished"
    parts = []
    if not rows:
        parts.append(f"its output live ({table.describe(use.rows)})")
    if not cols:
        parts.append(f"its input live ({table.describe(use.cols)})")
    unit = "a row locks" if use.grouped else "an element locks"
    return f"{unit} once a finished task has " + " and ".join(parts)


def _all_top(ids: Tensor) -> bool:
    return bool((ids <= TOP).all())


def _words(gates: str) -> str:
    return "every task is" if gates in ("TOP", "CONST") else gates


def _state(value: Value) -> str:
    if not value.gated:
        return "not needed"
    return {"pending": "still pending", "clean": "applied", "dirty": "to be zeroed again"}[value.state.value]


def _target(node: fx.Node) -> str:
    return (
        str(node.target)
        if isinstance(node.target, str | torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )
