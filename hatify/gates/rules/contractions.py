"""Matrix products, einsum and attention: what is summed over is materialised, what is not keeps its gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
            replaced[id(value)] = value = clean(run, _pending_with_partners(run.table, value, letters, operands))
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


def _pending_with_partners(table: GateTable, value: Value, letters: str, operands: list[tuple[Value, str]]) -> Value:
    """A pending operand with the gates of those that it is multiplied by and summed with, see :func:`with_partners`."""
    return replace(value, ids=with_partners(table, value, letters, operands)) if value.state is State.PENDING else value


def with_partners(table: GateTable, value: Value, letters: str, operands: list[tuple[Value, str]]) -> Tensor:
    """The gates of an operand and of those that it is multiplied by and summed with: of dimensions that it lacks, what is common to them.

    A product counts where both factors are live. Were each masked by its own gates alone, a task would hold on to a query that meets a
    dead key.
    """
    ids = value.ids
    for other, spelled in operands:
        if other is value or not other.gated:
            continue
        partner = other.ids
        for dim in (d for d, letter in enumerate(spelled) if letter not in letters):
            partner = table.common_along(partner, dim)
        sizes = dict(zip(spelled, partner.shape))
        partner = partner.permute(sorted(range(partner.dim()), key=lambda d: letters.find(spelled[d])))
        partner = partner.reshape([sizes.get(letter, 1) for letter in letters])
        if all(n in (1, size) for n, size in zip(partner.shape, value.shape)):  # else grouped heads, say
            joint = table.combine("and", ids, partner)
            ids = ids if table.too_large(joint) else joint
    return ids


LETTERS = "abcdefghijlopqrstuvwxyz"


@dataclass(frozen=True)
class Contraction:
    """A product that is summed over: its operands with one letter per dimension, and the result's letters.

    ``factors`` are those operands whose numbers are multiplied with each other: all but an attention's values, which meet a softmax of
    what the others give, and that is zero nowhere.
    """

    operands: list[tuple[Value, str]]
    out: str
    factors: list[tuple[Value, str]]


def contraction_of(call: Call) -> Contraction | None:
    """The letters of a matrix product, einsum or attention; None for calls that have none."""
    spell = SPELLED.get(call.name)
    return None if spell is None else spell(call)


def letters_of_einsum(equation: str) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result; None for an equation with an ellipsis."""
    equation = equation.replace(" ", "")
    if "." in equation:
        return None
    if "->" not in equation:
        letters = equation.replace(",", "")
        equation += "->" + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    inputs, out = equation.split("->")
    return inputs.split(","), out


def letters_of_matmul(*ranks: int) -> tuple[list[str], str] | None:
    """The letters of two operands of these ranks and of their product; None where one is a vector."""
    if min(ranks) < 2:
        return None
    batch = LETTERS[: max(ranks) - 2]
    return [batch[len(batch) - (rank - 2) :] + tail for rank, tail in zip(ranks, ("mk", "kn"))], batch + "mn"


def _matmul_letters(call: Call) -> Contraction | None:
    values = call.args[:2]
    found = letters_of_matmul(*(v.rank for v in values))
    if found is None:
        return None
    operands = list(zip(values, found[0]))
    return Contraction(operands, found[1], operands)


def _linear_letters(call: Call) -> Contraction | None:
    x, weight = call.args[0], call.args[1]
    if weight.rank != 2 or x.rank < 1:
        return None
    batch = LETTERS[: x.rank - 1]
    operands = [(x, batch + "k"), (weight, "nk")]
    return Contraction(operands, batch + "n", operands)


def _einsum_letters(call: Call) -> Contraction | None:
    found = letters_of_einsum(call.args[0])
    if found is None or any(len(set(side)) != len(side) for side in found[0]):
        return None
    operands = list(zip(call.values(), found[0]))
    return Contraction(operands, found[1], operands)


def _attention_letters(call: Call) -> Contraction | None:
    q, k, v = call.args[:3]
    if v.rank != q.rank or k.rank != q.rank:
        return None
    batch = LETTERS[: q.rank - 2]
    factors = [(q, batch + "mk"), (k, batch + "nk")]
    return Contraction([*factors, (v, batch + "nv")], batch + "mv", factors)


def contracted(run: Interpreter, call: Call) -> Outcome:
    """``A @ B`` with batch dimensions (mm, bmm, matmul), and ``einsum`` with explicit letters."""
    found = contraction_of(call)
    return unknown(run, call) if found is None else contract(run, call, found.operands, found.out)


def _added_letters(call: Call) -> Contraction | None:
    return _matmul_letters(replace(call, args=call.args[1:])) if len(call.args) > 2 else None


def matrix_add(run: Interpreter, call: Call) -> Outcome:
    """``addmm`` and ``baddbmm`` of activations: a product that is added to something live (scores to what masks them)."""
    found = contraction_of(call)
    if found is None or call.args[0].gated:
        return unknown(run, call)
    outcome = contract(run, call, found.operands, found.out)
    gated = bool((outcome.out.ids > TOP).any())
    return unknown(run, call) if gated else outcome


def linear(run: Interpreter, call: Call) -> Outcome:
    """``x @ W.T (+ b)`` where W is no parameter of a HAT layer."""
    bias = call.argument(2, "bias")
    if contraction_of(call) is None or (bias is not None and not bias.constant):
        return unknown(run, call)
    outcome = contracted(run, call)
    if bias is not None and outcome.out.state is State.CLEAN and bool((outcome.out.ids > TOP).any()):
        return Outcome(outcome.args, outcome.kwargs, Gates(outcome.out.ids, State.DIRTY))
    return outcome


def attention(run: Interpreter, call: Call) -> Outcome:
    """``scaled_dot_product_attention(q, k, v)``: scores are live for all, from materialised q and k (a dead head's scores are
    uniform, not zero); v's columns pass, since every result only mixes positions of its own column."""
    q, k, v = call.args[:3]
    heads = v.rank - 3
    grouped = call.kwargs.get("enable_gqa", False) and heads >= 0 and v.varies(heads)
    found = contraction_of(call)
    if grouped or v.varies(v.rank - 2) or found is None:
        return unknown(run, call)
    joint = {
        id(x): clean(run, _pending_with_partners(run.table, x, spelled, found.factors))
        for x, spelled in found.factors
        if x is not v and q is not k
    }
    args, kwargs = call.map(lambda a: a if a is v and a is not q and a is not k else joint.get(id(a)) or clean(run, a))
    return Outcome(args, kwargs, Gates(v.ids, args[2].state if v.gated else State.CLEAN))


SPELLED: dict[str, Callable[[Call], Contraction | None]] = {
    "matmul": _matmul_letters,
    "bmm": _matmul_letters,
    "mm": _matmul_letters,
    "addmm": _added_letters,
    "baddbmm": _added_letters,
    "linear": _linear_letters,
    "einsum": _einsum_letters,
    "scaled_dot_product_attention": _attention_letters,
}


def register(rules: RuleTable) -> None:
    rules.add(["matmul", "bmm", "mm", "einsum"], contracted)
    rules.add(["addmm", "baddbmm"], matrix_add)
    rules.add(["linear"], linear)
    rules.add(["scaled_dot_product_attention"], attention)
