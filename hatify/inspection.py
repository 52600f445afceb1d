"""What a converted graph says of itself, for people."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hatify.errors import HatifyError
from hatify.gates import Use, Value
from hatify.gates.table import TOP
from hatify.model import HATModel


@dataclass(frozen=True, eq=False)
class Row:
    """One tensor of the captured graphs: the node that makes it, its sizes in words, its gates and the state of its mask."""

    name: str
    op: str
    target: str
    shape: tuple[str, ...]
    ids: Tensor
    state: str
    gated: bool
    constant: bool
    scope: str
    inputs: tuple[str, ...]


def rows_of(hat: HATModel) -> list[Row]:
    """What the analysis found of every tensor, in the order of the graphs."""
    facts = hat._facts
    if not facts.values:  # the model was loaded
        return facts.rows
    return [
        Row(
            name=node.name,
            op=node.op,
            target=_target(node),
            shape=tuple(str(s) for s in value.shape),
            ids=value.ids,
            state=value.state.value,
            gated=value.gated,
            constant=value.constant,
            scope=node.meta.get("scope", ""),
            inputs=tuple(n.name for n in node.all_input_nodes),
        )
        for node, value in facts.values.items()
        if isinstance(value, Value)
    ]


def node_table(hat: HATModel) -> list[dict[str, Any]]:
    """One row per node of the captured eval graph: ``name, op, target, shape, gates, state, scope``."""
    describe = hat._facts.analysis.table.describe
    return [
        {
            "name": row.name,
            "op": row.op,
            "target": row.target,
            "shape": " × ".join(row.shape),
            "gates": describe(row.ids),
            "state": row.state if row.gated else "clean",
            "scope": row.scope,
        }
        for row in rows_of(hat)
    ]


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
    rows = {row.name: row for row in rows_of(hat)}
    for row in rows.values():
        sources = [rows[name] for name in row.inputs if name in rows]
        if row.target != path and path not in _held_by(row, sources):
            continue
        for source in sources:
            if not source.constant:
                lines.append(f"  fed by {source.name}, live where {_words(analysis.table.describe(source.ids))}")
        lines.append(f"  output live where {_words(analysis.table.describe(row.ids))}; mask {_state(row)}")
    for use in [u for uses in analysis.uses.values() for u in uses if _belongs(u, path)]:
        lines.append(f"  {use.parameter} {tuple(use.shape)}: {_lock(hat, use)}")
    if plan.rung == "task-indexed":
        lines.append(
            f"  one copy for each of {hat.config.num_tasks} tasks and one without a task; nothing is shared, so nothing locks"
        )
    return "\n".join(lines)


def _held_by(row: Row, sources: list[Row]) -> list[str]:
    return [s.target for s in sources if s.op == "get_attr"] if row.op == "call_function" else []


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


def _state(row: Row) -> str:
    if not row.gated:
        return "not needed"
    return {"pending": "still pending", "clean": "applied", "dirty": "to be zeroed again"}[row.state]


def _target(node: fx.Node) -> str:
    return (
        str(node.target)
        if isinstance(node.target, str | torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )
