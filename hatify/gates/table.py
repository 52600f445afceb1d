"""Hash-consed gate expressions: the integers that stand for «live for which tasks»."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

CONST = 0
"""Does not depend on the data; may take on any gate. Zero, so that zero padding of ids reads as CONST."""
TOP = 1
"""Live for every task."""

MAX_ATOMS = 256
"""An expression over more atoms than this widens to TOP."""
MAX_ATOMS_MIXED = 8
"""The same for a tensor whose gates vary along several dimensions, where the expressions multiply."""


KINDS = ("const", "top", "atom", "or", "and")

LONGEST = 1 << 16
"""Characters of an expression in words, and steps to find them; a longer one reads "…"."""


class Expressions:
    """Gate expressions named by integers, each made of earlier ones: what it takes to evaluate them, and to put them in words."""

    def step(self, gate: int) -> tuple:
        """How an expression is made: ``("const",)``, ``("top",)``, ``("atom", masker, channel)``, or ``("or", a, b)`` and ``("and", a, b)``
        of two earlier expressions."""
        raise NotImplementedError

    def describe(self, ids: Tensor) -> str:
        """The gates in words, channels of one masker gathered into ranges: ``conv1[0:64] | conv3[0:64]``."""
        distinct = torch.unique_consecutive(ids.reshape(-1)).tolist()
        words: list[str] = []
        runs: list[list] = []  # [shape of the expression, first channel, last channel]
        for gate in distinct:
            if len(runs) > 4:
                break
            shape, channel = self._shape(gate)
            if runs and runs[-1][0] == shape and channel is not None and channel == runs[-1][2] + 1:
                runs[-1][2] = channel
            else:
                runs.append([shape, channel, channel])
        for shape, first, last in runs[:4]:
            words.append(shape if first is None else shape.replace("#", f"{first}:{last + 1}"))
        return ", ".join(words) + (", …" if len(runs) > 4 else "")

    def _shape(self, gate: int) -> tuple[str, int | None]:
        """The expression with its channel replaced by ``#`` when all its atoms share one channel."""
        if gate in (CONST, TOP):
            return self.step(gate)[0].upper(), None
        found: dict[int, tuple[str, list]] = {}
        left, todo = LONGEST, [gate]
        while todo and left > 0:
            one = todo.pop()
            if one not in found:
                kind, inside, steps = self._flat(one, left)
                found[one], left = (kind, inside), left - steps
                todo += inside if kind != "atom" else ()
        channels = {inside[1] for kind, inside in found.values() if kind == "atom"}
        shared = channels.pop() if len(channels) == 1 else None
        words: dict[int, str] = {}
        for one in sorted(found):  # what it is made of comes before it
            kind, inside = found[one]
            left -= sum(len(words[i]) for i in inside) if kind != "atom" and left > 0 else 0
            if left <= 0:
                return "…", None
            if kind == "atom":
                words[one] = f"{inside[0]}[{'#' if shared is not None else inside[1]}]"
            else:
                words[one] = f"({(' | ' if kind == 'or' else ' & ').join(sorted(words[i] for i in inside))})"
        text = words[gate]
        return text[1:-1] if text.startswith("(") else text, shared

    def _flat(self, gate: int, most: int) -> tuple[str, list, int]:
        """What an expression is, its masker and channel or its members, and the steps that took; no more than ``most``."""
        kind, *inside = self.step(gate)
        if kind == "atom":
            return kind, inside, 1
        members: list[int] = []
        seen: set[int] = set()
        while inside and len(seen) < most:
            part = inside.pop()
            if part not in seen:
                seen.add(part)
                below, *parts = self.step(part)
                if below == kind:
                    inside += parts
                else:
                    members.append(part)
        return kind, members, len(seen)


class GateTable(Expressions):
    """Gate expressions in a normal form, each stored once and named by an integer.

    An expression is CONST, TOP, an atom ``(masker, channel)``, or an OR / AND of at least two expressions. OR and AND
    are associative, commutative and idempotent, and absorb: ``a | (a & b) = a`` and ``a & (a | b) = a``.
    """

    def __init__(self) -> None:
        self.keys: list[tuple] = [("const",), ("top",)]
        self.parts: list[tuple[int, int] | None] = [None, None]
        self._ids: dict[tuple, int] = {key: i for i, key in enumerate(self.keys)}
        self._pairs: dict[str, dict[int, int]] = {"or": {}, "and": {}}  # by the pair as one number, see _pair_number
        self._atoms: dict[int, frozenset] = {}  # of expressions that somebody has asked about
        self._nested: list[bool] = [False, False]  # whether a member may be an AND in an OR, an OR in an AND
        self._most: list[int] = [0, 0]  # upper bounds of the number of an expression's atoms, past all limits at most
        self._most_tensor = torch.zeros(2, dtype=torch.int64)

    def step(self, gate: int) -> tuple:
        parts = self.parts[gate]
        return self.keys[gate] if parts is None else (self.keys[gate][0], *parts)

    def __len__(self) -> int:
        return len(self.keys)

    def atoms(self, masker: str, channels: int) -> Tensor:
        """The gates of all channels of one masker, in order: int64, shape ``(channels,)``."""
        return torch.tensor([self._intern(("atom", masker, i), None) for i in range(channels)])

    def atoms_in(self, gate: int) -> frozenset[tuple[str, int]]:
        """The atoms of an expression, ``(masker, channel)`` each."""
        found = self._atoms.get(gate)
        if found is None:
            kind, *inside = self.keys[gate]
            if kind == "atom":
                found = frozenset((tuple(inside),))
            else:
                found = frozenset().union(*(self.atoms_in(i) for i in inside[0])) if inside else frozenset()
            self._atoms[gate] = found
        return found

    def combine(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """``a op b`` element by element with broadcasting; ``op`` is ``"or"`` or ``"and"``."""
        if a.shape == b.shape and torch.equal(a, b):
            return a
        a, b = torch.broadcast_tensors(a, b)
        pairs, where = torch.unique(_pair_number(a, b).reshape(-1), return_inverse=True)
        return self._combined(op, pairs)[where].reshape(a.shape)

    def _combined(self, op: str, pairs: Tensor) -> Tensor:
        """``a op b`` for each of some pairs, in their order: the cases of :meth:`pair`, those that need no new expression at once."""
        a, b = pairs >> _HALF, pairs & (1 << _HALF) - 1
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        plain, top = (a == b) | (low == CONST), low == TOP
        out = torch.where(plain, high, torch.full_like(high, TOP) if op == "or" else high)
        rest = ~(plain | top)
        known, joined = self._pairs[op], []
        for number, pair in zip(_pair_number(low, high)[rest].tolist(), pairs[rest].tolist()):
            found = known.get(number)
            if found is None:
                found = known[number] = self._join(op, pair >> _HALF, pair & (1 << _HALF) - 1)
            joined.append(found)
        out[rest] = torch.tensor(joined, dtype=torch.int64)
        return out

    def pair(self, op: str, a: int, b: int) -> int:
        """``a op b`` for two expressions."""
        if a == b:
            return a
        if CONST in (a, b):  # CONST takes on the other's gate, in a sum and in a product
            return a + b - CONST
        if TOP in (a, b):
            return TOP if op == "or" else a + b - TOP
        number = _pair_number(min(a, b), max(a, b))
        found = self._pairs[op].get(number)
        if found is None:
            found = self._pairs[op][number] = self._join(op, a, b)
        return found

    def join_all(self, op: str, ids: list[int]) -> int:
        """All of ``ids`` under one operator (CONST for none)."""
        return reduce(lambda a, b: self.pair(op, a, b), ids, CONST)

    def factors(self, gate: int) -> frozenset[int]:
        """The members of an AND; any other expression is its own only factor; TOP and CONST have none."""
        key = self.keys[gate]
        return key[1] if key[0] == "and" else frozenset() if gate in (CONST, TOP) else frozenset((gate,))

    def common(self, ids: list[int]) -> int:
        """An upper bound of the OR of ``ids``: the AND of the factors that all of them share, else TOP.

        A CONST among them holds its value for every task, so it counts as live.
        """
        sets = [self.factors(i) for i in ids]
        shared = frozenset.intersection(*sets) if sets else frozenset()
        return self.join_all("and", sorted(shared)) if shared else TOP

    def bounded_or(self, ids: list[int]) -> int:
        """The OR of ``ids``, or an upper bound where it would grow too large: enough for locks, never for masks. CONST counts as live."""
        distinct = sorted(set(ids))
        if not distinct or distinct[0] in (CONST, TOP):
            return TOP
        if len(distinct) > MAX_ATOMS_MIXED or sum(len(self.atoms_in(i)) for i in distinct) > MAX_ATOMS:
            return self.common(distinct)
        return self.join_all("or", distinct)

    def or_along(self, ids: Tensor, dim: int) -> Tensor:
        """The OR along a dimension, which becomes size 1, or an upper bound where it would have too many atoms: see :meth:`common`."""
        return self._along(ids, dim, self._or_or_common)

    def common_along(self, ids: Tensor, dim: int) -> Tensor:
        """An upper bound of the OR along a dimension, which becomes size 1: see :meth:`common`."""
        return self._along(ids, dim, self.common)

    def _along(self, ids: Tensor, dim: int, join: Callable[[list[int]], int]) -> Tensor:
        """Each line along a dimension as one expression; lines of the same expressions are joined once."""
        if ids.shape[dim] == 1:
            return ids
        lines = ids.movedim(dim, -1)
        distinct, where = torch.unique(lines.reshape(-1, lines.shape[-1]), dim=0, return_inverse=True)
        joined = torch.tensor([join(sorted(set(line))) for line in distinct.tolist()])
        return joined[where].reshape(lines.shape[:-1]).unsqueeze(dim)

    def _or_or_common(self, ids: list[int]) -> int:
        own = [i for i in ids if i != CONST]
        return self.join_all("or", own) if sum(self._most[i] for i in own) <= MAX_ATOMS else self.common(own)

    def too_large(self, ids: Tensor) -> bool:
        """Whether some expression of ``ids`` has grown past the size at which it has to widen."""
        return bool(self._too_large(ids))

    def widened(self, ids: Tensor) -> Tensor:
        """Upper bounds of ``ids`` in which what has grown past that size is made of what the members of its ORs have in common."""
        for gate in self._too_large(ids):
            ids = ids.where(ids != gate, self._widened(gate))
        return ids

    def _widened(self, gate: int) -> int:
        kind, *inside = self.keys[gate]
        if kind == "and":
            return self.join_all("and", [self._widened(member) for member in sorted(inside[0])])
        return self.common(sorted(inside[0])) if kind == "or" else gate

    def _too_large(self, ids: Tensor) -> list[int]:
        mixed = sum(size > 1 for size in ids.shape) > 1
        limit = MAX_ATOMS_MIXED if mixed else MAX_ATOMS
        if len(self._most_tensor) < len(self._most):
            self._most_tensor = torch.cat([self._most_tensor, torch.tensor(self._most[len(self._most_tensor) :])])
        suspects = ids[self._most_tensor[ids] > limit]
        return [i for i in torch.unique(suspects).tolist() if len(self.atoms_in(i)) > limit]

    def maskers(self, ids: Tensor) -> list[str]:
        """Names of the maskers that ``ids`` depend on, sorted."""
        return sorted({masker for i in torch.unique(ids).tolist() for masker, _ in self.atoms_in(i)})

    def _join(self, op: str, a: int, b: int) -> int:
        key_a, key_b = self.keys[a], self.keys[b]
        first, second = key_a[0], key_b[0]
        if first == second == "atom":
            return self._intern((op, frozenset((a, b))), (a, b))
        other = "and" if op == "or" else "or"
        members_a, members_b = self._members(op, a), self._members(op, b)
        if second == other and not key_b[1].isdisjoint(members_a):  # a | (a & c) = a
            return a
        if first == other and not key_a[1].isdisjoint(members_b):
            return b
        if first != op and second != op:  # two members, neither in the other
            return self._intern((op, frozenset((a, b))), (a, b))
        members = kept = members_a | members_b
        if first == other or second == other or self._nested[a] or self._nested[b]:
            kept = frozenset(m for m in members if not (self.keys[m][0] == other and self.keys[m][1] & members))
        if len(kept) == 1:
            return next(iter(kept))
        if members_a == kept:  # absorption may have eaten one side
            return a
        if members_b == kept:
            return b
        if kept == members:
            return self._intern((op, kept), (a, b))
        ordered = sorted(kept)
        if (op, kept) in self._ids:
            return self._ids[op, kept]
        return self._intern((op, kept), (reduce(lambda x, y: self.pair(op, x, y), ordered[:-1]), ordered[-1]))

    def _members(self, op: str, gate: int) -> frozenset[int]:
        key = self.keys[gate]
        return key[1] if key[0] == op else frozenset((gate,))

    def _intern(self, key: tuple, parts: tuple[int, int] | None) -> int:
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self.keys)
            self.keys.append(key)
            self.parts.append(parts)
            self._most.append(1 if parts is None else min(self._most[parts[0]] + self._most[parts[1]], MAX_ATOMS + 1))
            self._nested.append(parts is not None and any(self._nests(key[0], part) for part in parts))
        return found

    def _nests(self, op: str, part: int) -> bool:
        kind = self.keys[part][0]
        return self._nested[part] if kind == op else kind in KINDS[3:]

    def stored(self, maskers: list[str]) -> Tensor:
        """All expressions as numbers, int32 of shape ``(expressions, 3)``: what it is (an index of ``KINDS``) and, for an atom, the
        index of its masker in ``maskers`` and its channel, for OR and AND two earlier expressions."""
        numbers = {name: i for i, name in enumerate(maskers)}
        rows = [(0, 0, 0), (1, 0, 0)]
        for key, parts in zip(self.keys[2:], self.parts[2:]):
            rows.append((2, numbers[key[1]], key[2]) if parts is None else (KINDS.index(key[0]), *parts))
        return torch.tensor(rows, dtype=torch.int32)


_HALF = 32


def _pair_number(a: Any, b: Any) -> Any:
    """Two expressions as one number: to sort numbers is much faster than to sort columns, and to hash them than to hash tuples."""
    return a << _HALF | b
