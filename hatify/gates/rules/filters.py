"""Convolutions with weights that are no parameters: fixed filters, such as the blur before a stride."""

from __future__ import annotations

from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, RuleTable, after_shift, unknown
from hatify.gates.value import Value

FILTERS = {f"conv{tail}{k}d": k for k in (1, 2, 3) for tail in ("", "_transpose")}


def filtered(run: Interpreter, call: Call) -> Outcome:
    """A filter of each channel alone, with a constant weight: zeros stay zeros, so gates pass; TOP comes out of any other."""
    x, weight, bias = *call.args[:2], call.argument(2, "bias")
    dim = x.rank - FILTERS[call.name] - 1
    apart = call.argument(6, "groups", 1) == x.shape[dim]
    fixed = weight.constant and weight.finite and not (isinstance(bias, Value) and not bias.constant)
    if not (apart and fixed) or any(x.varies(d) for d in range(dim + 1, x.rank)):
        return unknown(run, call)
    outputs = weight.shape[1] if "transpose" in call.name else weight.shape[0] // x.shape[dim]
    ids = x.ids.repeat_interleave(outputs, dim) if x.varies(dim) else x.ids
    return Outcome(call.args, call.kwargs, Gates(ids, x.state if bias is None else after_shift(x.state)))


def register(rules: RuleTable) -> None:
    rules.add(FILTERS, filtered)
