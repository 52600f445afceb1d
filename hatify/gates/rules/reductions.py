"""Reductions, pooling and resizing: gates pass where they are constant along what is reduced."""

from __future__ import annotations

from torch import Tensor

from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, RuleTable, after_shift, unknown
from hatify.gates.rules.contractions import or_over
from hatify.gates.value import State, Value

REDUCE = [
    "mean",
    "sum",
    "nansum",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "linalg_norm",
    "logsumexp",
    "var_mean",
    "std_mean",
]
REDUCE_PAIR = {"var_mean", "std_mean"}
ZERO_OF_ZEROS = {"mean", "sum", "nansum", "amax", "amin"}
"""Of these, zeros give zero, and gradients that are finite."""
ALONG = ["softmax", "_softmax", "log_softmax", "_log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp"]
SHIFTS = {"logsumexp", "softmax", "_softmax", "log_softmax", "_log_softmax", "softmin", "cumprod", "logcumsumexp", "prod"}
POOLS = {
    **{f"{kind}{k}d": k for k in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "lp_pool")},
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "grid_sampler": 2,
    "mkldnn_max_pool2d": 2,
}
POOL_PAIRS = {f"{kind}{k}d{tail}" for k in (1, 2, 3) for kind, tail in (("max_pool", "_with_indices"), ("adaptive_max_pool", ""))}
DIMS = {"norm": 2, "linalg_vector_norm": 2, "linalg_norm": 2}
KEEP = {
    "norm": 3,
    "linalg_vector_norm": 3,
    "linalg_norm": 3,
    "var": 3,
    "std": 3,
    "var_mean": 3,
    "std_mean": 3,
    "amax": 2,
    "amin": 2,
}


def dims_of(call: Call, rank: int) -> list[int]:
    """The reduced dimensions of a call, counted from the front."""
    dims = call.argument(DIMS.get(call.name, 1), "dim")
    if dims is None or isinstance(dims, bool) or dims == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, list | tuple) else [dims])]


def dims_along(call: Call, rank: int) -> list[int]:
    """The dimensions along which a call of one of ``REDUCE``, ``ALONG`` or ``POOLS`` brings elements together."""
    if call.name in POOLS:
        return list(range(rank - POOLS[call.name], rank))
    return [call.argument(1, "dim") % rank] if call.name in ALONG else dims_of(call, rank)


def reduce(run: Interpreter, call: Call) -> Outcome:
    """A reduction: from a materialised operand where gates vary along a reduced dimension. Then it is live where any of what it brings
    together is, if zeros give zero and these are few; else everywhere."""
    value = call.values()[0]
    dims = dims_of(call, value.rank)
    if not _of_vectors(call, dims):
        return unknown(run, call)
    keep = bool(call.argument(KEEP.get(call.name, 2), "keepdim", False)) and len(dims) < value.rank + 1
    if any(value.varies(d) for d in dims):
        outcome = unknown(run, call)
        if call.name in ZERO_OF_ZEROS:
            return Outcome(outcome.args, outcome.kwargs, Gates(_kept(_joined_along(run, value, dims), dims, keep)))
        return Outcome(outcome.args, outcome.kwargs, [Gates(None)] * 2) if call.name in REDUCE_PAIR else outcome
    ids = _kept(value.ids, dims, keep)
    out = Gates(ids, after_shift(value.state) if call.name in SHIFTS else value.state)
    return Outcome(call.args, call.kwargs, [out, out] if call.name in REDUCE_PAIR else out)


def _of_vectors(call: Call, dims: list[int]) -> bool:
    """Whether a norm, if the call is one, is of vectors: of matrices it may be made of singular values."""
    if call.name == "norm":
        return isinstance(call.argument(1, "p", 2), int | float | type(None))
    order = call.argument(1, "ord") if call.name == "linalg_norm" else None
    return order is None or (isinstance(order, int | float) and len(dims) == 1)


def _joined_along(run: Interpreter, value: Value, dims: list[int]) -> Tensor:
    """The OR of the gates along ``dims``, which become size 1, or an upper bound. CONST counts as live: a constant is not zero."""
    kept = [d for d in range(value.rank) if d not in dims]
    shape = [1 if d in dims else size for d, size in enumerate(value.ids.shape)]
    return or_over(run.table, value.ids, kept).reshape(shape)


def _kept(ids: Tensor, dims: list[int], keep: bool) -> Tensor:
    """The gates of a result from those of size 1 along its reduced dimensions: without these, unless it keeps them."""
    for dim in sorted(dims, reverse=True):
        ids = ids if keep else ids.select(dim, 0)
    return ids


def extreme(run: Interpreter, call: Call) -> Outcome:
    """``max(x)``, ``max(x, other)``, ``max(x, dim)``: the last gives indices, so it materialises."""
    if len(call.values()) == 2:
        from hatify.gates.rules.elementwise import additive

        return additive(run, call)
    outcome = unknown(run, call)
    if len(call.args) < 2 and "dim" not in call.kwargs:
        return outcome
    value = call.values()[0]
    dim = call.argument(1, "dim") % value.rank
    if value.varies(dim):
        return Outcome(outcome.args, outcome.kwargs, [Gates(None), Gates(None)])
    ids = value.ids if call.argument(2, "keepdim", False) else value.ids.select(dim, 0)
    return Outcome(outcome.args, outcome.kwargs, [Gates(ids, State.CLEAN), Gates(None)])


def along(run: Interpreter, call: Call) -> Outcome:
    """Softmax and cumulative sums: every result along ``dim`` reads all of it."""
    value = call.values()[0]
    if value.varies(call.argument(1, "dim") % value.rank):
        return unknown(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids, after_shift(value.state) if call.name in SHIFTS else value.state))


def spatial(run: Interpreter, call: Call, k: int | None = None) -> Outcome:
    """Pooling and resizing over the last ``k`` dimensions."""
    value = call.values()[0]
    k = POOLS[call.name] if k is None else k
    if any(v.gated for v in call.values()[1:]) or any(value.varies(d) for d in range(value.rank - k, value.rank)):
        return unknown(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids, value.state))


def max_pool(run: Interpreter, call: Call) -> Outcome:
    """Max pooling that returns indices too: they are computed from materialised data."""
    outcome = unknown(run, call)
    value: Value = outcome.args[0]
    k = int(call.name.split("d")[0][-1]) if call.name.startswith("max") else int(call.name.split("pool")[1][0])
    fixed = not any(value.varies(d) for d in range(value.rank - k, value.rank))
    return Outcome(outcome.args, outcome.kwargs, [Gates(value.ids if fixed else None, State.CLEAN), Gates(None)])


def register(rules: RuleTable) -> None:
    rules.add(REDUCE, reduce)
    rules.add(["max", "min"], extreme)
    rules.add(ALONG, along)
    rules.add(POOL_PAIRS, max_pool)
    rules.add(POOLS, spatial)
