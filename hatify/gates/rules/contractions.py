"""Matrix products, einsum and attention: what is summed over is materialised, what is not keeps its gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, RuleTable, clean, unknown
from hatify.gates.table import CONST, TOP, GateTable
from hatify.gates.value import State, Value


def common_along(table: GateTable, ids: Tensor, dims: list[int]) -> Tensor:
    """An upper bound of the OR over ``dims``, which become size 1: what all positions along them have in common.

    Where the bound is dead every position along ``dims`` is, so a sum over materialised data is exactly zero there.
    """
    dims = [d for d in dims if ids.shape[d] > 1]
    if not dims:
        return ids
    rest = [d for d in range(ids.dim()) if d not in dims]
    flat = ids.permute(*rest, *dims).reshape(*[ids.shape[d] for d in rest], -1)
    shape = [1 if d in dims else ids.shape[d] for d in range(ids.dim())]
    rows = flat.reshape(-1, flat.shape[-1])
    if len(rows) == 1 and all(len(table.factors(i)) < 2 for i in torch.unique(rows).tolist()):
        return torch.full(shape, TOP)  # distinct expressions without factors have nothing in common
    return torch.tensor(_each(rows, table.common)).reshape(shape)


def or_along(table: GateTable, ids: Tensor, dim: int) -> Tensor:
    """The OR over all dimensions but ``dim`` (or an upper bound), for locks: shape ``(size of dim,)``. CONST counts as live."""
    return or_over(table, ids, [dim])


def or_over(table: GateTable, ids: Tensor, kept: list[int]) -> Tensor:
    """:func:`or_along` for several dimensions ``kept``, in their order."""
    sizes = [ids.shape[d] for d in kept]
    columns = ids.permute(*kept, *[d for d in range(ids.dim()) if d not in kept]).reshape(torch.Size(sizes).numel(), -1)
    if columns.shape[1] == 1:
        flat = columns[:, 0]
        return torch.where(flat == CONST, TOP, flat).reshape(sizes)
    return torch.tensor(_each(columns, table.bounded_or)).reshape(sizes)


def _each(rows: Tensor, function: Callable[[list[int]], int]) -> list[int]:
    """``function`` of the distinct ids of each row, sorted; called once for rows of the same ids."""
    distinct = [tuple(sorted(set(row))) for row in rows.tolist()]
    found = {ids: function(list(ids)) for ids in dict.fromkeys(distinct)}
    return [found[ids] for ids in distinct]


def contract(run: Interpreter, call: Call, operands: list[tuple[Value, str]], out: str) -> Outcome:
    """An einsum over gated operands. ``operands`` pairs each value with one letter per dimension; ``out`` has the result's.

    Letters that are not in ``out`` are summed over. Batch dimensions that broadcast have size-1 gates.
    """
    replaced: dict[int, Value] = {}
    passing: list[tuple[Value, Tensor, str]] = []
    for value, letters in operands:
        summed = [d for d, letter in enumerate(letters) if letter not in out]
        if value.gated and any(value.varies(d) for d in summed):
            replaced[id(value)] = value = clean(run, _with_partners(run.table, value, letters, operands))
        passing.append((value, common_along(run.table, value.ids, summed), letters))
    states = {value.state for value, ids, _ in passing if bool((ids > TOP).any())}
    state = states.pop() if len(states) == 1 else State.CLEAN
    mixed = bool(states)
    args, kwargs = call.map(lambda v: clean(run, replaced.get(id(v), v)) if mixed else replaced.get(id(v), v))
    ids = torch.full((1,) * len(out), CONST)
    for _, own, letters in passing:
        kept = [d for d, letter in enumerate(letters) if letter in out]
        order = sorted(kept, key=lambda d: out.index(letters[d]))
        own = own.permute(*order, *[d for d in range(own.dim()) if d not in kept]).reshape([own.shape[d] for d in order])
        present = {letters[d]: own.shape[i] for i, d in enumerate(order)}
        ids = run.table.combine("and", ids, own.reshape([present.get(letter, 1) for letter in out]))
    return Outcome(args, kwargs, Gates(ids, state))


def _with_partners(table: GateTable, value: Value, letters: str, operands: list[tuple[Value, str]]) -> Value:
    """A pending operand with the gates of those that it is multiplied by and summed with, where these have the same dimensions.

    A product counts where both factors are live. Were each masked by its own gates alone, a task would hold on to a query that meets a
    dead key.
    """
    ids = value.ids
    for other, spelled in operands:
        apart = any(other.varies(d) for d, letter in enumerate(spelled) if letter not in letters)
        if other is value or not other.gated or value.state is not State.PENDING or apart:
            continue
        kept = [letter for letter in letters if letter in spelled]
        moved = other.ids.permute(*[spelled.index(c) for c in kept], *[d for d, c in enumerate(spelled) if c not in kept]).reshape(
            [other.ids.shape[spelled.index(c)] for c in kept]
        )
        sizes = dict(zip(kept, moved.shape))
        joint = table.combine("and", ids, moved.reshape([sizes.get(c, 1) for c in letters]))
        fits = all(n in (1, size) for n, size in zip(joint.shape, value.shape))
        ids = joint if fits and not table.too_large(joint) else ids
    return replace(value, ids=ids)


LETTERS = "abcdefghijlopqrstuvwxyz"


def matmul(run: Interpreter, call: Call) -> Outcome:
    """``A @ B`` with batch dimensions (mm, bmm, matmul)."""
    a, b = call.args[0], call.args[1]
    if a.rank < 2 or b.rank < 2:
        return unknown(run, call)
    batch = LETTERS[: max(a.rank, b.rank) - 2]
    left = batch[len(batch) - (a.rank - 2) :] + "mk"
    right = batch[len(batch) - (b.rank - 2) :] + "kn"
    return contract(run, call, [(a, left), (b, right)], batch + "mn")


def matrix_add(run: Interpreter, call: Call) -> Outcome:
    """``addmm`` and ``baddbmm`` of activations: materialise (rare outside weighted layers)."""
    return unknown(run, call)


def linear(run: Interpreter, call: Call) -> Outcome:
    """``x @ W.T (+ b)`` where W is no parameter of a HAT layer."""
    x, weight = call.args[0], call.args[1]
    bias = call.argument(2, "bias")
    if weight.rank != 2 or x.rank < 1 or (bias is not None and not bias.constant):
        return unknown(run, call)
    batch = LETTERS[: x.rank - 1]
    outcome = contract(run, call, [(x, batch + "k"), (weight, "nk")], batch + "n")
    if bias is not None and outcome.out.state is State.CLEAN and bool((outcome.out.ids > TOP).any()):
        return Outcome(outcome.args, outcome.kwargs, Gates(outcome.out.ids, State.DIRTY))
    return outcome


def einsum(run: Interpreter, call: Call) -> Outcome:
    """``einsum`` with explicit letters."""
    equation = call.args[0].replace(" ", "")
    operands = call.values()
    if "." in equation:
        return unknown(run, call)
    if "->" not in equation:
        letters = equation.replace(",", "")
        equation += "->" + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    inputs, out = equation.split("->")
    sides = inputs.split(",")
    if any(len(set(side)) != len(side) for side in sides):
        return unknown(run, call)
    return contract(run, call, list(zip(operands, sides)), out)


def attention(run: Interpreter, call: Call) -> Outcome:
    """``scaled_dot_product_attention(q, k, v)``: scores are live for all, from materialised q and k (a dead head's scores are
    uniform, not zero); v's columns pass, since every result only mixes positions of its own column."""
    q, k, v = call.args[:3]
    heads = v.rank - 3
    grouped = call.kwargs.get("enable_gqa", False) and heads >= 0 and v.varies(heads)
    if grouped or v.varies(v.rank - 2) or v.rank != q.rank:
        return unknown(run, call)
    letters = LETTERS[: q.rank - 2]
    sides = [(q, letters + "mk"), (k, letters + "nk")]
    joint = {id(x): clean(run, _with_partners(run.table, x, spelled, sides)) for x, spelled in sides if x is not v and q is not k}
    args, kwargs = call.map(lambda a: a if a is v and a is not q and a is not k else joint.get(id(a)) or clean(run, a))
    return Outcome(args, kwargs, Gates(v.ids, args[2].state if v.gated else State.CLEAN))


def register(rules: RuleTable) -> None:
    rules.add(["matmul", "bmm", "mm"], matmul)
    rules.add(["addmm", "baddbmm", "addbmm"], matrix_add)
    rules.add(["linear"], linear)
    rules.add(["einsum"], einsum)
    rules.add(["scaled_dot_product_attention"], attention)
