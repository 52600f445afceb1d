"""What a result is read for: a backward pass that tightens locks.

A unit of a gated layer counts only where its partner is live too: in ``up(x) * silu(gate(x))`` the product is masked by both, and so is
what a query and a key have in common. Where the partner is dead no output depends on the unit, whatever number stands there, so a task
does not need the weights that write it. :func:`narrow_to_needs` replaces «the output is live» by «the output is needed» in the locks, and
«live» by «counts» in binary masks, which give the numbers that they gave before. Soft ones stay the value's own: the soft factors of its
partners are in theirs.

Two things are followed backwards, both positions of a value, never more than are live:

- where it is *read*: elsewhere any number may stand, NaN and infinity included. A reader's mask says so, or what is read of a reader that
  works position by position, only moves, or sums over other dimensions; everything else reads all that is live.
- where it *counts*: elsewhere any finite number may stand. A factor of a clean product counts where the others are live, for they are
  zero elsewhere. This alone frees no weight, for 0 · inf is NaN; but the mask that the value has had on its way is narrowed to it, and
  behind that mask nothing else is read: rotated queries, which a sum has cleaned, are masked with the gates of their keys before it.

Several readers need what one of them needs. CONST stands for a position that nobody sees, such as what a slice leaves out: in an OR it
says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hatify.analysis.heads import operator_name
from hatify.analysis.operators import FRESH, SIZES
from hatify.analysis.places import moved_back, reduced_back
from hatify.analysis.plan import Masked, Step, node_of
from hatify.analysis.sizes import tensors_of, varies_where_open
from hatify.gates import State, Use, Value
from hatify.gates.layers import ChannelNorm, Elementwise, channel_dim
from hatify.gates.rules import Call
from hatify.gates.rules.contractions import Contraction, contraction_of, with_partners
from hatify.gates.rules.elementwise import ADDITIVE, PARTIAL, PRODUCT, QUOTIENT, TYPES_ONLY, UNARY
from hatify.gates.rules.movement import NAMES
from hatify.gates.rules.reductions import ALONG, POOLS, REDUCE
from hatify.gates.table import CONST
from hatify.registry import describe

if TYPE_CHECKING:
    from hatify.analysis.analyst import Analyst

POSITIONWISE = {*UNARY, *PARTIAL, *PRODUCT, *QUOTIENT, *ADDITIVE, "pow", "masked_fill"}
"""Each element of the result is computed from the operands' elements at its own place."""
MULTIPLYING = {*PRODUCT, *QUOTIENT}
"""Of these a result is dead where one operand is, although the other may hold any number there."""
REDUCING = {*REDUCE, *ALONG, *POOLS}
"""Each element of the result is computed from the elements along some dimensions, and along the others from those at its own place."""
STAYS_FINITE = {
    *PRODUCT,
    *ADDITIVE,
    *ALONG,
    *(name for name in POOLS if "lp_" not in name),
    "mean",
    "sum",
    "amax",
    "amin",
    "neg",
    "to",
    "_to_copy",
    "type_as",
    "float",
    "dropout",
}
"""Of these finite operands give finite results, and zeros finite gradients."""


def narrow_to_needs(run: Analyst) -> None:
    """Tightens the rows of every use whose output is needed less often than it is live, and the masks on the way."""
    needs = _Needs(run)
    for name, uses in run.analysis.uses.items():
        run.analysis.uses[name] = [needs.narrowed(use) for use in uses]


@dataclass(frozen=True, eq=False)
class _Need:
    """Where a value is read, and where it counts: ids that broadcast to its shape. One tensor where the two are the same."""

    read: Tensor
    counts: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> _Need:
        read = change(self.read)
        return _Need(read, read if self.counts is self.read else change(self.counts))


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one reader needs of a value behind the masks that it has put on it, from the last to the first, and the gates that it sees."""

    masks: tuple[Masked, ...]
    need: _Need
    seen: Tensor


class _Needs:
    """What is needed of each value of the graphs, never wider than its own gates."""

    def __init__(self, run: Analyst) -> None:
        self.run, self.table = run, run.table
        self.found: dict[tuple[fx.Node, int | None], _Need] = {}
        for captured in run.graphs:
            for node in reversed(captured.graph.nodes):
                for index, value in self._results(node):
                    own = _made(value)[0].ids
                    whole = node in captured.writes.values() or value.constant and not self._of_gated(node)
                    self.found[node, index] = _Need(own, own) if whole else self._joined(node, index, own)

    # locks

    def narrowed(self, use: Use) -> Use:
        """``use`` with rows as its calls need them together."""
        calls = [self._of_gates(node) for node in self.run.analysis.written_by[use]]
        if not calls or not all(calls):
            return use
        ids, where = torch.unique(use.rows, return_inverse=True)
        needed = [self._together(i, [need for call in calls for need in call.get(i, [i])]) for i in ids.tolist()]
        return replace(use, rows=torch.tensor(needed)[where].reshape(use.rows.shape))

    def _of_gates(self, node: fx.Node | None) -> dict[int, list[int]]:
        """For each gate of the result of ``node`` where it is read; empty where gates cannot be told apart."""
        if node is None or not isinstance(self.run.env[node], Value):
            return {}
        own, read = torch.broadcast_tensors(_made(self.run.env[node])[0].ids, self.found[node, None].read)
        count = len(self.table.keys)  # a pair as one number: to sort numbers is much faster than to sort columns
        found: dict[int, list[int]] = {}
        for gate, needed in (divmod(pair, count) for pair in torch.unique(own * count + read).tolist()):
            found.setdefault(gate, []).append(needed)
        return {} if any(self.table.keys[i][0] == "and" for i in found) else found

    def _together(self, gate: int, needs: list[int]) -> int:
        """One need for all places of a gate that somebody reads: an upper bound of the OR, the gate itself at most."""
        read = [need for need in needs if need != CONST]
        return gate if not read or gate in read else self.table.pair("and", gate, self.table.bounded_or(read))

    # readers together

    def _of_gated(self, node: fx.Node) -> bool:
        """Whether a value is made of gated ones: a product with zeros depends on no data, and yet its factors have to be finite."""
        step = self.run.analysis.steps.get(node)
        operands = () if step is None else pytree.tree_leaves((step.args, step.kwargs), is_leaf=_is_value)
        return any(_is_value(operand) and operand.gated for operand in operands)

    def _results(self, node: fx.Node) -> list[tuple[int | None, Value]]:
        held = self.run.env.get(node)
        if isinstance(held, Value):
            return [(None, held)]
        return [(i, v) for i, v in enumerate(held) if isinstance(v, Value)] if isinstance(held, list | tuple) else []

    def _joined(self, node: fx.Node, index: int | None, own: Tensor) -> _Need:
        """What all readers of a result need of it together: an upper bound, ``own`` at most."""
        readings = [reading for user in node.users for reading in self._read_by(user, node, index, own)]
        self._narrow_masks(readings)
        needs = [self._behind_masks(reading) for reading in readings]
        read = self._either([need.read for need in needs], own)
        if all(need.counts is need.read for need in needs):
            return _Need(read, read)
        return _Need(read, self._either([need.counts for need in needs], own))

    def _either(self, needs: list[Tensor], own: Tensor) -> Tensor:
        """The OR of some needs, ``own`` where one of them is: most are, and need no new expression."""
        if not needs:
            return own
        joined, *others = needs
        for need in others:
            whole = (joined == own) | (need == own)
            joined = torch.where(whole, own, self.table.combine("or", joined.where(~whole, CONST), need.where(~whole, CONST)))
        need = self._both(joined, own)
        if self.table.too_large(need):
            need = self._both(self.table.widened(need), own)
        return own if bool((need == own).all()) or self.table.too_large(need) else need

    def _both(self, need: Tensor, ids: Tensor) -> Tensor:
        """What of a need is live; what nobody reads stays so."""
        return self.table.combine("and", need, ids).where(need != CONST, CONST)

    def _narrow_masks(self, readings: list[_Reading]) -> None:
        """Narrows what becomes one mask node to where it counts for all who read behind it."""
        alike: dict[tuple, list[_Reading]] = {}
        kept = set()
        for reading in readings:
            for inner, mask in reversed(list(enumerate(reading.masks))):
                ids = mask.value.ids
                key = (mask.soft, mask.fill, ids.shape, ids.numpy().tobytes())
                alike.setdefault(key, []).append(reading)
                if (
                    inner
                    or len(reading.masks) > 1
                    or mask.fill
                    or reading.seen.shape != ids.shape
                    or not torch.equal(reading.seen, ids)
                ):
                    kept.add(key)  # another mask stands on it, or it is a mask of another value's gates
        for group in (group for key, group in alike.items() if key not in kept):
            ids = group[0].masks[0].value.ids
            counts = self._either([reading.need.counts for reading in group], ids)
            for dim in (d for d, size in enumerate(ids.shape) if size == 1):  # one mask for all tokens
                counts = self.table.or_along(counts, dim)
            counts = self.table.combine("and", ids, counts)  # where nobody reads, the gates themselves
            open_ended = varies_where_open(counts, node_of(group[0].masks[0].value).meta["val"])
            if not open_ended and not self.table.too_large(counts) and not torch.equal(counts, ids):
                self.run.analysis.narrower.update((reading.masks[0], counts) for reading in group)

    def _behind_masks(self, reading: _Reading) -> _Need:
        need = reading.need
        for mask in reading.masks:
            need = need.map(lambda wanted, mask=mask: self._behind_mask(wanted, mask))
        return need

    def _behind_mask(self, wanted: Tensor, mask: Masked) -> Tensor:
        ids = self.run.analysis.mask_ids(mask)
        return ids if torch.equal(wanted, mask.value.ids) else self._both(wanted, ids)

    # one reader

    def _read_by(self, user: fx.Node, node: fx.Node, index: int | None, own: Tensor) -> list[_Reading]:
        """What one reader needs, once for each of its operands that is made from the result; none where it reads another result."""
        if index is not None:
            if operator_name(user) != "getitem" or not isinstance(user.args[1], int):
                return [_Reading((), _Need(own, own), own)]
            return [_Reading((), self.found[user, None], own)] if user.args[1] == index else []
        step = self.run.analysis.steps.get(user)
        if step is None:
            return [_Reading((), _Need(own, own), own)]
        told = "by_mode" not in user.meta and user.op in ("call_function", "call_module")
        operands = [v for v in pytree.tree_leaves((step.args, step.kwargs), is_leaf=_is_value) if _is_value(v)]
        of_node = [(value, masks) for value in operands for made, masks in [_made(value)] if made.data is node]
        readings = [
            _Reading(masks, self._of_operand(user, step, value) if told else _Need(value.ids, value.ids), value.ids)
            for value, masks in of_node
        ]
        return readings or [_Reading((), _Need(own, own), own)]

    def _of_operand(self, user: fx.Node, step: Step, value: Value) -> _Need:
        """What the results of ``user`` that are needed need of one operand, as it stands there."""
        results, name, whole = self._results(user), operator_name(user), _Need(value.ids, value.ids)
        narrower = any(self._is_narrower(user, index, result) for index, result in results)
        if user.op == "call_module":
            return self._through_layer(user, value) if narrower else whole
        if name in SIZES or name in FRESH:
            return _nowhere(value)
        call = Call(name, user.target, step.args, step.kwargs)
        if name in POSITIONWISE and (narrower or name in MULTIPLYING) and len(results) == 1 and results[0][0] is None:
            return self._positionwise(user, call, value)
        if name in NAMES and (narrower or _is_part(results, value)):
            return self._moved_back(user, call, value)
        if name in REDUCING and narrower and len(results) == 1 and results[0][0] is None:
            back = self.found[user, None].map(lambda wanted: reduced_back(self.table, call, wanted, value))
            return back if name in STAYS_FINITE else _Need(back.read, back.read)
        contraction = contraction_of(call)
        return whole if contraction is None else self._contracted(user, contraction, value)

    def _is_narrower(self, node: fx.Node, index: int | None, result: Value) -> bool:
        own, need = _made(result)[0].ids, self.found[node, index]
        return any(own.shape != wanted.shape or not torch.equal(own, wanted) for wanted in (need.read, need.counts))

    def _positionwise(self, user: fx.Node, call: Call, value: Value) -> _Need:
        made = _made(self.run.env[user])[0]
        if call.name in TYPES_ONLY and value is not call.values()[0]:
            return _nowhere(value)

        def back(wanted: Tensor) -> Tensor:
            zero = (made.ids == CONST) & (wanted == CONST)  # a product with zeros reads its factors: 0 · inf is NaN
            return self._placed_back(wanted, made.shape, value) if not bool(zero.any()) else value.ids

        need = self.found[user, None]
        clean_product = (
            call.name in MULTIPLYING and made.state is State.CLEAN and any(v.gated for v in call.values() if v is not value)
        )
        read = value.ids if clean_product else back(need.read)
        return _Need(read, back(need.counts)) if call.name in STAYS_FINITE else _Need(read, read)

    def _placed_back(self, need: Tensor, shape: tuple[int, ...], value: Value) -> Tensor:
        """The needs of a result at the places of an operand that broadcasts to it: what any of the places is read for that it reaches."""
        missing = len(shape) - value.rank
        for dim, (own, out) in enumerate(zip((1,) * missing + value.shape, shape)):
            if own == 1 < out:
                need = self.table.or_along(need, dim)
        return need.reshape(need.shape[missing:])

    def _moved_back(self, user: fx.Node, call: Call, value: Value) -> _Need:
        results = [(_made(result)[0].shape, self.found[user, index]) for index, result in self._results(user)]
        sizes = _made(value)[0].data.meta["val"].shape
        sizes_after = [val.shape for val in tensors_of(user.meta["val"])]

        def back(wanted: Callable[[_Need], Tensor]) -> Tensor:
            return moved_back(self.table, call, [(shape, wanted(need)) for shape, need in results], value, sizes, sizes_after)

        read = back(lambda need: need.read)
        return _Need(read, read) if all(n.counts is n.read for _, n in results) else _Need(read, back(lambda need: need.counts))

    def _contracted(self, user: fx.Node, contraction: Contraction, value: Value) -> _Need:
        """Of the dimensions that a product keeps, what its result is needed for; of those that it sums over, what its partners have."""
        letters = next((spelled for operand, spelled in contraction.operands if operand is value), None)
        made, need = _made(self.run.env[user])[0], self.found[user, None]
        if letters is None:
            return _Need(value.ids, value.ids)

        def back(wanted: Tensor) -> Tensor:
            for dim in (d for d, letter in enumerate(contraction.out) if letter not in letters):
                wanted = self.table.common_along(wanted, dim)
            sizes = dict(zip(contraction.out, wanted.shape))
            placed = [sizes.get(letter, 1) for letter in letters]
            fits = all(n in (1, size) for n, size in zip(placed, value.shape))
            order = sorted(range(wanted.dim()), key=lambda d: letters.find(contraction.out[d]))
            return wanted.permute(order).reshape(placed) if fits else value.ids

        several = len(contraction.operands) > len({id(operand) for operand, _ in contraction.operands})
        partners = any(operand.gated for operand, _ in contraction.operands if operand is not value)
        # where a partner is dead, the result's own mask is still to come
        dead_together = partners and made.state is not State.CLEAN
        narrower = not several and (dead_together or self._is_narrower(user, None, made))
        read, counts = (back(need.read), back(need.counts)) if narrower else (value.ids, value.ids)
        if partners and made.state is State.CLEAN:
            read = value.ids  # 0 · inf is NaN
        factors = [(operand, spelled) for operand, spelled in contraction.factors if operand.state is State.CLEAN]
        if several or not any(operand is value for operand, _ in factors):
            return _Need(read, read)
        return _Need(read, self.table.combine("and", counts, with_partners(self.table, value, letters, factors)))

    def _through_layer(self, user: fx.Node, value: Value) -> _Need:
        """Layers that work on each channel alone: activations, norms of each channel, depthwise products without a masker."""
        meaning = describe(self.run.model.get_submodule(user.target))
        need = self.found.get((user, None))
        whole = _Need(value.ids, value.ids)
        if need is None or _made(self.run.env[user])[0].ids.shape != value.ids.shape:
            return whole
        if isinstance(meaning, Elementwise):
            return _Need(need.read, need.read)
        plan = self.run.analysis.layers[user.target]
        through = plan.role == "through"
        dim = 1 if isinstance(meaning, ChannelNorm) else channel_dim(value, meaning) if through else None
        if dim is None or need.read.shape[dim] != value.shape[dim]:
            return whole
        samples = dim if through else 0  # a norm in train mode reads all of them
        alone = all(size in (1, value.shape[d] if d < samples else 1) for d, size in enumerate(need.read.shape) if d != dim)
        return _Need(need.read, need.read) if alone else whole


def _is_part(results: list[tuple[int | None, Value]], value: Value) -> bool:
    """Whether the results of a movement have fewer elements than an operand, so that some are left out."""
    return sum(prod(result.shape) for _, result in results) < prod(value.shape)


def _is_value(operand: object) -> bool:
    return isinstance(operand, Value)


def _made(value: Value) -> tuple[Value, tuple[Masked, ...]]:
    """The value as its node makes it, and the masks that it has had since, the last first."""
    masks = []
    while isinstance(value.data, Masked):
        masks.append(value.data)
        value = value.data.value
    return value, tuple(masks)


def _nowhere(value: Value) -> _Need:
    """What a reader of a value's type or size needs of its elements."""
    nowhere = torch.full((1,) * value.rank, CONST)
    return _Need(nowhere, nowhere)
