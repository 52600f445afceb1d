"""Normalisations: per channel they pass gates, across channels they see live channels only."""

from __future__ import annotations

from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, RuleTable, after_shift, clean_call, unknown
from hatify.gates.value import State


def mixing(run: Interpreter, call: Call, dims: list[int]) -> Outcome:
    """A normalisation with statistics over ``dims``: materialised first, statistics over live positions."""
    value = call.values()[0]
    if not any(value.varies(d) for d in dims):
        return Outcome(call.args, call.kwargs, Gates(value.ids, after_shift(value.state)))
    call = clean_call(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids, State.DIRTY), live=value)


def layer_norm(run: Interpreter, call: Call) -> Outcome:
    """``layer_norm`` and ``rms_norm`` over the last dimensions."""
    rank, k = call.values()[0].rank, len(call.argument(1, "normalized_shape"))
    return mixing(run, call, list(range(rank - k, rank)))


def group_norm(run: Interpreter, call: Call) -> Outcome:
    """``group_norm``: statistics over a group's channels and all positions."""
    return mixing(run, call, list(range(1, call.values()[0].rank)))


def per_channel(run: Interpreter, call: Call, channel_dim: int = 1, batch: bool = True) -> Outcome:
    """Statistics per channel over everything else (batch included or not): gates pass unless they vary there."""
    value = call.values()[0]
    first = 0 if batch else channel_dim + 1
    over = [d for d in range(first, value.rank) if d != channel_dim]
    if not any(value.varies(d) for d in over):
        return Outcome(call.args, call.kwargs, Gates(value.ids, after_shift(value.state)))
    call = clean_call(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids, State.DIRTY))


def instance_norm(run: Interpreter, call: Call) -> Outcome:
    """Functional ``instance_norm`` without running statistics."""
    if call.argument(3, "running_mean") is not None:
        return unknown(run, call)
    return per_channel(run, call, batch=False)


def register(rules: RuleTable) -> None:
    rules.add(["layer_norm", "rms_norm"], layer_norm)
    rules.add(["group_norm"], group_norm)
    rules.add(["instance_norm"], instance_norm)
