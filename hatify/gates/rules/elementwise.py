"""Operators that act on each element alone, and the arithmetic that joins two masked tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hatify.gates.rules.base import (
    Call,
    Gates,
    Interpreter,
    Outcome,
    RuleTable,
    after_shift,
    clean,
    clean_call,
    covers_constants,
    is_open,
    one_state,
    stand_in,
    unknown,
)
from hatify.gates.table import CONST
from hatify.gates.value import State, Value, constants

UNARY = [
    "relu",
    "relu6",
    "gelu",
    "silu",
    "mish",
    "tanh",
    "sigmoid",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "leaky_relu",
    "rrelu",
    "elu",
    "selu",
    "celu",
    "softplus",
    "softsign",
    "logsigmoid",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
    "tanhshrink",
    "threshold",
    "abs",
    "neg",
    "square",
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "sinh",
    "cosh",
    "asinh",
    "atan",
    "erf",
    "erfc",
    "sign",
    "sgn",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "nan_to_num",
    "to",
    "_to_copy",
    "type_as",
    "float",
    "double",
    "half",
    "bfloat16",
    "dropout",
    "native_dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "rsub",
    "deg2rad",
    "positive",
    "polygamma",
]
PARTIAL = [
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "acos",
    "asin",
    "atanh",
    "acosh",
    "digamma",
    "lgamma",
    "logit",
    "erfinv",
    "tan",
]
TYPES_ONLY = {"type_as", "to"}
"""Of a second operand these read the type, not the values."""
ADDITIVE = ["add", "sub", "subtract", "maximum", "minimum", "fmax", "fmin", "where"]
PRODUCT = ["mul", "multiply"]
QUOTIENT = ["div", "divide", "true_divide", "floor_divide"]
"""Comparisons, integer and boolean results have no rule of their own: the unknown operator is theirs."""


def zero_at_zero(call: Call) -> bool:
    """Whether f(0) = 0 with the call's actual arguments (a property of arguments, not of the name).

    A number that is computed from open sizes has the example's value here; it must hold for another value too.
    """
    shifts = (0, 1) if any(is_open(a) for a in pytree.tree_leaves((call.args, call.kwargs))) else (0,)
    return all(_zero_at_zero(call, shift) for shift in shifts)


def _zero_at_zero(call: Call, shift: int) -> bool:
    args, kwargs = call.map(lambda v: torch.zeros(_probe_shape(v), dtype=v.dtype) if v.known is None else v.known)
    args, kwargs = pytree.tree_map(lambda a: type(a).__base__(a + shift) if is_open(a) else a, (args, kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        out = call.func(*args, **kwargs)
    out = out[0] if isinstance(out, tuple | list) else out
    return bool((out == 0).all())


def _probe_shape(value: Value) -> tuple[int, ...]:
    """All channels, and otherwise as little as the rank allows."""
    return tuple(size if dim == 1 or value.rank == 1 else 1 for dim, size in enumerate(value.shape))


def unary(run: Interpreter, call: Call) -> Outcome:
    """One tensor, any scalars: gates pass; a clean tensor stays clean iff zero maps to zero."""
    values = call.values()[: 1 if call.name in TYPES_ONLY else None]
    if len([v for v in values if v.gated]) != 1 or not values[0].gated or any(v.gated or not v.constant for v in values[1:]):
        return unknown(run, call)
    value = values[0]
    if not value.dtype.is_floating_point and value.dtype != torch.complex64:
        return unknown(run, call)
    dtype = call.argument(1, "dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        return unknown(run, call)
    told = call.name in TYPES_ONLY or all(v.known is not None for v in values[1:])  # clamp(x, min=tensor): by its actual values
    state = value.state if told and zero_at_zero(call) else after_shift(value.state)
    out = Gates(value.ids, state)
    return Outcome(call.args, call.kwargs, [out, Gates(None)] if call.name == "native_dropout" else out)


def partial(run: Interpreter, call: Call) -> Outcome:
    """Not defined, or not differentiable, at zero: dead positions read 1 instead, and the gate is carried on."""
    value = call.values()[0]
    args, kwargs = call.map(lambda v: stand_in(run, v))
    return Outcome(args, kwargs, Gates(value.ids, after_shift(value.state)))


def power(run: Interpreter, call: Call) -> Outcome:
    """``x ** number``: partial for a negative or fractional exponent below one."""
    exponent = call.argument(1, "exponent")
    if not isinstance(call.args[0], Value) or not isinstance(exponent, int | float):
        return unknown(run, call)
    return unary(run, call) if exponent >= 1 else partial(run, call)


def additive(run: Interpreter, call: Call) -> Outcome:
    """Sums and their like: equal gates in the same state stay pending, otherwise both materialise and the gates OR."""
    operands = call.values()
    if call.name == "where":
        condition = call.args[0]
        if condition.rank > max(v.rank for v in operands[1:]):
            return unknown(run, call)
        if condition.gated:
            call = replace(call, args=(clean(run, condition), *call.args[1:]))
        operands = call.values()[1:]
    scalars = [a for a in (*call.args[:2], call.kwargs.get("other")) if isinstance(a, int | float)]
    if len(operands) == 1 and call.name != "where":  # tensor and number
        return unary(run, call) if scalars else unknown(run, call)
    if any(abs(a) == float("inf") for a in scalars_of(call)) or any(v.constant and not v.finite for v in operands):
        call = clean_call(run, call)  # a soft factor must not meet an infinity: its gradient would be NaN
        operands = call.values()[call.name == "where" :]
    gated = [v for v in operands if v.gated]
    steady = [v for v in operands if not v.constant]
    out = _joined(run, "or", operands)
    same = all(v.gated and v.state is gated[0].state and _same(v.ids, gated[0].ids) for v in steady)
    state = gated[0].state if gated and same else State.CLEAN
    if gated and not same:
        call = clean_call(run, call)
    if covers_constants(operands, out) or (call.name == "where" and any(isinstance(a, int | float) for a in call.args[1:])):
        state = after_shift(state)
    return Outcome(call.args, call.kwargs, Gates(out, state))


def scalars_of(call: Call) -> list[float]:
    """The plain numbers among the operands."""
    return [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, int | float) and not isinstance(a, bool)]


def divides(run: Interpreter, call: Call) -> Outcome:
    """``addcdiv``, ``remainder``, ``fmod``: all is materialised, but the divisor reads 1 where it is dead; TOP comes out."""
    divisor = call.values()[-1]
    args, kwargs = call.map(lambda v: stand_in(run, v) if v is divisor else clean(run, v))
    return Outcome(args, kwargs, Gates(None))


def masked_fill(run: Interpreter, call: Call) -> Outcome:
    """``masked_fill(x, mask, value)``: gates pass, zero-preserving for the value 0."""
    value, mask, fill = call.args[0], call.args[1], call.argument(2, "value")
    if mask.gated or mask.rank > value.rank or isinstance(fill, Value) and not fill.constant:
        return unknown(run, call)
    if isinstance(fill, int | float) and fill == 0:
        return Outcome(call.args, call.kwargs, Gates(value.ids, value.state))
    args, kwargs = call.map(lambda v: clean(run, v))  # the fill value must not meet a soft factor (-inf times a mask)
    return Outcome(args, kwargs, Gates(value.ids, State.DIRTY))


def product(run: Interpreter, call: Call) -> Outcome:
    """Gating: gates AND. A product by CONST or TOP passes the other's gates; one by zero is zero, of whatever gate it meets."""
    if len(call.values()) == 1:
        return unary(run, call)
    if any(v.zero for v in call.values()):  # the first state of a recurrence; masked all the same, for 0 · inf is NaN
        call = clean_call(run, call)
        return Outcome(call.args, call.kwargs, Gates(constants(max(v.rank for v in call.values()))))
    call, state = one_state(run, call)
    return Outcome(call.args, call.kwargs, Gates(_joined(run, "and", call.values()), state))


def addcmul(run: Interpreter, call: Call) -> Outcome:
    """``base + value * a * b``: the gates of the product, OR those of the base. A constant base is a shift, as a bias is."""
    base, a, b = call.args[:3]
    if any(v.constant and not v.finite for v in (base, a, b)):
        return unknown(run, call)
    together = _joined(run, "and", [a, b])
    inner = replace(a, ids=together, shape=torch.broadcast_shapes(a.shape, b.shape))
    out = _joined(run, "or", [base, inner])
    if base.constant or base.gated and _same(base.ids, together):
        call, state = one_state(run, call)
    else:
        call, state = clean_call(run, call), State.CLEAN
    return Outcome(call.args, call.kwargs, Gates(out, after_shift(state) if covers_constants([base, inner], out) else state))


def quotient(run: Interpreter, call: Call) -> Outcome:
    """``a / b``: gates AND. A gated divisor reads 1 where it is dead; a clean quotient may be 0/0, so it is masked again."""
    if len(call.values()) == 1:
        return unary(run, call) if isinstance(call.args[0], Value) else partial(run, call)
    if call.name == "floor_divide" or call.kwargs.get("rounding_mode"):
        return unknown(run, call)
    a, b = call.args[0], call.args[1]
    state = after_shift(a.state if a.gated else b.state)
    return Outcome((a, stand_in(run, b), *call.args[2:]), call.kwargs, Gates(_joined(run, "and", [a, b]), state))


def prelu(run: Interpreter, call: Call) -> Outcome:
    """PReLU with a constant slope per channel."""
    value = call.args[0]
    if not call.args[1].constant:
        return unknown(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids, value.state))


def summed_into(run: Interpreter, call: Call) -> Outcome:
    """``index_add`` and ``scatter_add``: elements of one are added to those of another, as data says along one dimension, along which the
    gates of neither may vary; elsewhere it is a sum of both."""
    subject, dim, index = call.args[0], call.argument(1, "dim"), call.argument(2, "index")
    source = call.argument(3, "source" if call.name == "index_add" else "src")
    alpha = call.kwargs.get("alpha", 1)
    if (
        not isinstance(source, Value)
        or not isinstance(dim, int)
        or not isinstance(alpha, int | float)
        or abs(alpha) == float("inf")
    ):
        return unknown(run, call)
    crossed = range(max(subject.rank, 1)) if subject.rank != source.rank else [dim % max(subject.rank, 1)]
    if index.gated or any(v.rank and v.varies(d) for v in (subject, source) for d in crossed if d < v.rank):
        return unknown(run, call)
    if any(source.varies(d) and source.shape[d] != subject.shape[d] for d in range(source.rank)):
        return unknown(run, call)
    total = additive(run, Call("add", call.func, (subject, source), {}))
    args = (total.args[0], dim, index, total.args[1])
    return Outcome(args, {k: v for k, v in call.kwargs.items() if k == "alpha"}, total.out)


def glu(run: Interpreter, call: Call) -> Outcome:
    """``a * sigmoid(b)`` over two halves: the gates of both halves AND; sigmoid(b) never is zero, so ``a`` decides cleanness."""
    value, dim = call.args[0], call.argument(1, "dim", -1)
    size = value.shape[dim] // 2
    if not value.varies(dim % value.rank):
        return Outcome(call.args, call.kwargs, Gates(value.ids, value.state))
    ids = value.ids
    out = run.table.combine("and", ids.narrow(dim, 0, size), ids.narrow(dim, size, size))
    return Outcome(call.args, call.kwargs, Gates(out, after_shift(value.state)))


def _joined(run: Interpreter, op: str, operands: list[Value]) -> Tensor:
    rank = max(v.rank for v in operands)
    out = torch.full((1,) * rank, CONST)
    for value in operands:
        ids = value.ids.reshape((1,) * (rank - value.rank) + tuple(value.ids.shape))
        shape = (1,) * (rank - value.rank) + value.shape
        out = run.table.combine(op, out, ids) if shape else out
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def register(rules: RuleTable) -> None:
    rules.add(UNARY, unary)
    rules.add(PARTIAL, partial)
    rules.add(ADDITIVE, additive)
    rules.add(PRODUCT, product)
    rules.add(QUOTIENT, quotient)
    rules.add(["addcmul"], addcmul)
    rules.add(["pow"], power)
    rules.add(["addcdiv", "remainder", "fmod"], divides)
    rules.add(["masked_fill"], masked_fill)
    rules.add(["prelu"], prelu)
    rules.add(["glu"], glu)
    rules.add(["index_add", "scatter_add"], summed_into)
