"""Which positions live and die together: every channel that a layer makes has a label, and the labels travel through the graph.

A label is dropped where no position that carries it is both needed and possibly non-zero. Where positions meet, their labels are
tied; where a dimension is cut into equal parts, each part has to keep as many (the widest decides, the others keep dead channels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hatify.gates import Value
from hatify.gates.rules.movement import VIEWS, is_index, move_tensor
from hatify.gates.value import compress
from hatify.lifecycle.kinds import Kind, Site, call_of
from hatify.lifecycle.needs import Needs
from hatify.lifecycle.picture import Picture, operator_of
from hatify.lifecycle.plain import Plain
from hatify.lifecycle.zeros import Zeros

ANY, LIVE = 0, 1
"""Labels of constants, which take on any, and of what is never dropped."""
REALIGNED = 0.8
"""A summand that is live at less than this share of the sum's channels is computed on its own channels and spread out; above it, it
keeps the sum's channels, dead ones included, which costs less than spreading."""
RESHAPES = {*VIEWS, "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze"}


class Labelled:
    """One value's labels: ``ids`` of its rank and broadcastable to it, and the dimension ``cut`` along which positions are dropped
    (None: none are)."""

    def __init__(self, ids: Tensor, cut: int | None) -> None:
        self.ids, self.cut = ids, cut


class Labels:
    """The labels of a whole graph. ``dense`` maps nodes whose operands have to be whole to the reason; it grows while the graph is
    read."""

    def __init__(self, plain: Plain, picture: Picture, zeros: Zeros, needs: Needs, dense: dict[fx.Node, str]) -> None:
        self.plain, self.picture, self.zeros, self.needs, self.dense = plain, picture, zeros, needs, dense
        self.parent: list[int] = [ANY, LIVE]
        self.families: list[Tensor] = []
        self.own: dict[fx.Node, Tensor] = {}
        self.of: dict[fx.Node, Any] = {}
        self.realigned: set[tuple[fx.Node, fx.Node]] = set()
        self.rows: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.shared = _shared(plain)
        for node in plain.graph.nodes:
            self.of[node] = self._visit(node, zeros.kinds[node])
        self.kept = self._solved()

    # classes of labels

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels at equal places live and die together; constants go with anything."""
        pairs = torch.unique(torch.stack([t.reshape(-1) for t in torch.broadcast_tensors(a, b)]), dim=1)
        for x, y in pairs.t().tolist():
            if x != ANY and y != ANY:
                x, y = sorted((self.root(x), self.root(y)))
                self.parent[y] = x

    def fresh(self, count: int) -> Tensor:
        """New labels."""
        first = len(self.parent)
        self.parent += range(first, first + count)
        return torch.arange(first, first + count)

    def keeps(self, ids: Tensor) -> Tensor:
        """Which labels are kept: bool, the shape of ``ids``."""
        distinct, where = torch.unique(ids, return_inverse=True)
        return torch.tensor([self.kept[self.root(i)] for i in distinct.tolist()])[where].reshape(ids.shape)

    def _solved(self) -> list[bool]:
        kept = [False] * len(self.parent)
        kept[ANY] = kept[LIVE] = True
        for node, held in self.of.items():
            need = self.needs[node]
            if isinstance(held, Labelled) and held.cut is not None and need is not None:
                used = need & ~self.zeros[node]
                ids, used = torch.broadcast_tensors(held.ids, used)
                for label in torch.unique(ids[used]).tolist():
                    kept[self.root(label)] = True
        kept[self.root(LIVE)] = True
        changed = True
        while changed:
            changed = False
            for family in self.families:
                rows = [[self.root(i) for i in row] for row in family.tolist()]
                target = max(1, max(sum(kept[i] for i in row) for row in rows))
                for row in rows:
                    missing = target - sum(kept[i] for i in row)
                    for label in row:
                        if missing > 0 and not kept[label]:
                            kept[label] = changed = True
                            missing = target - sum(kept[i] for i in row)
        return [kept[self.root(i)] for i in range(len(self.parent))]

    # through the graph

    def _visit(self, node: fx.Node, kind: Kind) -> Any:
        seen = self.picture[node]
        if kind.family in ("output", "number") or (seen.shape is None and not seen.parts):
            return None
        if seen.parts:
            if node not in self.dense and kind.family == "movement" and all(p.shape is not None for p in seen.parts):
                return self._movement(node)
            return [self._whole(p.shape) if p.shape is not None else None for p in seen.parts]
        if seen.constant and kind.family != "mask":
            return Labelled(torch.full((1,) * len(seen.shape), ANY), None)
        if node in self.dense:
            return self._whole(seen.shape)
        handler = getattr(self, "_" + kind.family.replace(" ", "_"), None)
        if handler is None or kind.family == "source":
            return self._whole(seen.shape)
        found = handler(node, kind)
        return self._checked(found)

    def _checked(self, found: Any) -> Any:
        """A dimension along which everything has one label is not cut."""
        if isinstance(found, Labelled) and found.cut is not None and found.ids.shape[found.cut] == 1:
            found.cut = None
        return found

    def refuse(self, node: fx.Node, why: str) -> Labelled:
        """``node`` gets its operands whole."""
        self.dense.setdefault(node, why)
        return self._whole(self.picture[node].shape)

    def _whole(self, shape: tuple[int, ...]) -> Labelled:
        return Labelled(torch.full((1,) * len(shape), LIVE), None)

    def _alike(self, shelf: dict[int, Tensor], node: fx.Node, labels: Tensor) -> Tensor:
        """``labels`` tied to those that another call of the same layer has."""
        first = shelf.setdefault(id(self.plain.leaves[node.target]), labels)
        self.tie(first, labels)
        return labels

    def _uniform(self, held: Labelled) -> Tensor:
        """Labels along the cut dimension, tied over all others: shape ``(size,)``."""
        rows = held.ids.movedim(held.cut, -1).reshape(-1, held.ids.shape[held.cut])
        for row in rows[1:]:
            self.tie(rows[0], row)
        return rows[0]

    def _along(self, ids: Tensor, rank: int, dim: int) -> Labelled:
        return Labelled(ids.reshape([-1 if d == dim else 1 for d in range(rank)]), dim)

    def _pick(self, node: fx.Node, kind: Kind) -> Any:
        held = self.of[node.args[0]]
        return (
            held[node.args[1]]
            if isinstance(held, list) and isinstance(node.args[1], int)
            else self._whole(self.picture[node].shape)
        )

    def _mask(self, node: fx.Node, kind: Kind) -> Any:
        return self.of[node.args[1]]

    def _weighted(self, node: fx.Node, kind: Kind) -> Labelled:
        site = kind.site
        rank = len(self.picture[node].shape)
        dim = site.channel_dim(rank)
        if site.normalised or self._is_shared(site):
            return self.refuse(
                node, "its weight is normalised before use" if site.normalised else "its weight is used elsewhere too"
            )
        x = self.of[site.x] if not site.meaning.lookup else None
        if x is not None and x.cut is not None and x.cut != dim:
            if x.cut > dim:
                return self.refuse(node, "its input is cut along a dimension that it mixes")
            return self._along(self._uniform(x), rank, x.cut)
        if site.path is None and site.meaning.groups not in (1, site.inputs):
            return self.refuse(node, "groups of a weight that is used by function")
        inputs = self._uniform(x) if x is not None and x.cut is not None else None
        if site.path is not None and not site.meaning.lookup:
            self._alike(self.columns, node, torch.full((1,), LIVE) if inputs is None else inputs)
        groups, depthwise = site.meaning.groups, site.meaning.groups == site.inputs > 1
        if depthwise:
            if inputs is None:
                return self._whole(self.picture[node].shape)
            return self._along(inputs.repeat_interleave(site.outputs // site.inputs), rank, dim)
        if inputs is not None and groups > 1:
            self.families.append(inputs.reshape(groups, -1))
        if site.outputs == 1:
            return self._whole(self.picture[node].shape)
        own = self.own[node] = self.fresh(site.outputs)
        if site.path is not None:
            self._alike(self.rows, node, own)
        self.families.append(own.reshape(groups, -1))
        return self._along(own, rank, dim)

    def _is_shared(self, site: Site) -> bool:
        return site.path is not None and self._named_elsewhere(site.node)

    def _elementwise(self, node: fx.Node, kind: Kind) -> Labelled:
        if node.op == "call_module" and any(True for _ in self.plain.leaves[node.target].parameters()):
            return self._per_channel_leaf(node)
        operands = [n for n in node.all_input_nodes if self.picture[n].shape is not None]
        if self._draws(node):
            return self.refuse(node, "it draws a random number for every channel, in eval mode too")
        return self._joined(node, [(n, self.of[n]) for n in operands], self.picture[node].shape)

    def _draws(self, node: fx.Node) -> bool:
        return node.op == "call_function" and "dropout" in operator_of(node) and True in (*node.args[1:], *node.kwargs.values())

    def _joined(self, node: fx.Node, operands: list, shape: tuple[int, ...]) -> Labelled:
        rank = len(shape)
        cuts = {held.cut + rank - held.ids.dim() for n, held in operands if held.cut is not None}
        if not cuts:
            return self._whole(shape)
        if len(cuts) > 1:
            return self.refuse(node, "its operands are cut along different dimensions")
        cut = cuts.pop()
        out = torch.full((1,) * rank, ANY)
        narrow = self._narrow(node, operands, rank, cut)
        if len(narrow) == len(operands):
            out = self._along(self.fresh(shape[cut]), rank, cut).ids
        for n, held in operands:
            if n in narrow:
                self.realigned.add((node, n))
                continue
            own = self.picture[n].shape
            size = own[cut - (rank - len(own))] if cut >= rank - len(own) else 1
            ids = held.ids.reshape((1,) * (rank - held.ids.dim()) + tuple(held.ids.shape))
            if size == 1 and shape[cut] > 1:
                continue  # the same for every channel
            if held.cut is None and not self.picture[n].constant:
                ids = torch.full((1,) * rank, LIVE)
            self.tie(out, ids)
            a, b = torch.broadcast_tensors(out, ids)
            out = torch.where(a == ANY, b, a)
        return Labelled(out.contiguous(), cut)

    def _narrow(self, node: fx.Node, operands: list, rank: int, cut: int) -> set[fx.Node]:
        """Summands that have far fewer live channels than the sum."""
        names = node.op == "call_function" and operator_of(node) in ("add", "sub")
        whole = self.needs[node]
        if not names or whole is None or len(operands) != 2 or operands[0][0] is operands[1][0]:
            return set()
        if any(h.cut is None or h.ids.numel() != h.ids.shape[h.cut] or h.ids.dim() != rank for _, h in operands):
            return set()

        def live(n: fx.Node) -> Tensor:
            used = (whole & ~self.zeros[n]).movedim(cut, -1)
            return used.reshape(-1, used.shape[-1]).any(0).expand(self.picture[n].shape[cut])

        every = int(live(node).sum())
        return {n for n, _ in operands if int(live(n).sum()) < REALIGNED * every}

    def _per_channel_leaf(self, node: fx.Node) -> Labelled:
        """An activation with parameters: only those with one per channel are understood."""
        x = self.of[node.all_input_nodes[0]]
        if x.cut is None:
            self._alike(self.rows, node, torch.full((1,), LIVE))
            return self._whole(self.picture[node].shape)
        leaf = self.plain.leaves[node.target]
        if type(leaf) is not torch.nn.PReLU or x.cut != 1:
            return self.refuse(node, f"{type(leaf).__name__} has parameters that no rule cuts")
        return self._along(self._alike(self.rows, node, self._uniform(x)), x.ids.dim(), 1)

    def _prelu(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[node.args[0]]
        return x if x.cut is None else self.refuse(node, "its slope belongs to channels")

    def _named_elsewhere(self, node: fx.Node) -> bool:
        names = [self.plain.parameter_name(node.target, n) for n, _ in self.plain.leaves[node.target].named_parameters()]
        return any(n in self.shared for n in names)

    def _channel_norm(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[node.all_input_nodes[0]]
        if x.cut is None:
            self._alike(self.rows, node, torch.full((1,), LIVE))
            return self._whole(self.picture[node].shape)
        if x.cut != 1 or self._named_elsewhere(node):
            return self.refuse(node, "statistics over a dimension that is cut")
        return self._along(self._alike(self.rows, node, self._uniform(x)), x.ids.dim(), 1)

    def _norm(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[node.all_input_nodes[0]]
        if x.cut is None:
            return self._whole(self.picture[node].shape)
        return x if x.cut not in kind.dims else self.refuse(node, "its statistics count channels that are zero")

    def _live_norm(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[node.args[0]]
        if x.cut is None:
            return self._whole(self.picture[node].shape)
        rank = len(self.picture[node].shape)
        if node.target.__name__ == "group_norm":
            if x.cut != 1:
                return self.refuse(node, "statistics over a dimension that is cut")
            own = self._uniform(x)
            self.families.append(own.reshape(node.args[1], -1))
            return self._along(own, rank, 1)
        return self._along(self._uniform(x), rank, x.cut)

    def _reduction(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[[n for n in node.all_input_nodes if self.picture[n].shape is not None][0]]
        if x.cut is None:
            return self._whole(self.picture[node].shape)
        if x.cut in kind.dims:
            return self.refuse(node, "it reduces over channels that are cut")
        if any(x.ids.shape[d] > 1 for d in kind.dims):
            x = self._along(self._uniform(x), x.ids.dim(), x.cut)
        ids, cut = x.ids, x.cut
        if not kind.keep:
            for d in sorted(kind.dims, reverse=True):
                ids = ids.squeeze(d)
            cut -= sum(d < cut for d in kind.dims)
        return Labelled(ids, cut)

    def _mixing(self, node: fx.Node, kind: Kind) -> Labelled:
        x = self.of[[n for n in node.all_input_nodes if self.picture[n].shape is not None][0]]
        if x.cut is None:
            return self._whole(self.picture[node].shape)
        if x.cut in kind.dims:
            return self.refuse(node, "it mixes channels that are cut")
        if any(x.ids.shape[d] > 1 for d in kind.dims):
            x = self._along(self._uniform(x), x.ids.dim(), x.cut)
        return x

    _spatial = _mixing

    def _contraction(self, node: fx.Node, kind: Kind) -> Labelled:
        sides = [(n, self.of[n], letters) for n, letters in kind.sides]
        cuts = [(n, held, letters, letters[held.cut]) for n, held, letters in sides if held.cut is not None]
        shape = self.picture[node].shape
        if not cuts:
            return self._whole(shape)
        kept = {letter for *_, letter in cuts if letter in kind.out}
        summed = {letter for *_, letter in cuts if letter not in kind.out}
        if len(sides) != 2 or len(kept) > 1 or len(summed) > 1 or (kept and summed):
            return self.refuse(node, "its operands are cut in ways that do not fit")
        if summed:
            letter = summed.pop()
            shared = [c for c in sides[0][2] if c in sides[1][2]]
            views = [self._by_letters(held, letters, shared) for _, held, letters in sides]
            for (n, held, _), view in zip(sides, views):
                if held.cut is None and not self.picture[n].constant:
                    view.fill_(LIVE)
            self.tie(*views)
            return self._whole(shape)
        letter = kept.pop()
        n, held, letters, _ = cuts[0]
        if len(cuts) > 1 or any(letter in other for m, _, other in sides if m is not n):
            return self.refuse(node, "it is cut along a dimension that both operands share")
        summed_dims = [d for d, c in enumerate(letters) if c not in kind.out]
        if any(held.ids.shape[d] > 1 for d in summed_dims):
            held = self._along(self._uniform(held), len(letters), held.cut)
        ids = self._by_letters(held, letters, list(kind.out))
        return Labelled(ids, kind.out.index(letter))

    def _by_letters(self, held: Labelled, letters: str, wanted: list[str]) -> Tensor:
        """The labels with one dimension per letter of ``wanted``; others are tied together."""
        ids = held.ids
        for d, letter in enumerate(letters):
            if letter not in wanted and ids.shape[d] > 1:
                first = ids.narrow(d, 0, 1)
                self.tie(ids, first)
                ids = first
        order = [letters.index(c) for c in wanted if c in letters]
        rest = [d for d, c in enumerate(letters) if c not in wanted]
        ids = ids.permute(*order, *rest).reshape([ids.shape[d] for d in order])
        present = iter(ids.shape)
        return ids.reshape([next(present) if c in letters else 1 for c in wanted]).clone()

    def _attention(self, node: fx.Node, kind: Kind) -> Labelled:
        q, k, v = (self.of[n] for n in node.args[:3])
        rank = len(self.picture[node].shape)
        for held in (q, k, v):
            if held.cut is not None and held.cut != rank - 1:
                return self.refuse(node, "it is cut along another dimension than the channels of a head")
        for other in node.all_input_nodes:
            if other not in node.args[:3] and isinstance(self.of[other], Labelled):
                self.tie(self.of[other].ids, torch.full((1,), LIVE))  # a bias of the scores: no head is dropped
        if any(h.cut is not None for h in (q, k)):
            rows = []
            for n, held in zip(node.args[:2], (q, k)):
                ids = held.ids if held.cut is not None or self.picture[n].constant else torch.full((1,) * rank, LIVE)
                if ids.shape[-2] > 1:
                    self.tie(ids, ids.narrow(-2, 0, 1))
                    ids = ids.narrow(-2, 0, 1)
                rows.append(ids)
            if rows[0].shape[:-2] != rows[1].shape[:-2] and node.kwargs.get("enable_gqa"):
                return self.refuse(node, "queries share keys")
            self.tie(*rows)
        if v.cut is None:
            return self._whole(self.picture[node].shape)
        if node.kwargs.get("enable_gqa"):
            return self.refuse(node, "queries share values")
        ids = v.ids
        if ids.shape[-2] > 1:
            self.tie(ids, ids.narrow(-2, 0, 1))
            ids = ids.narrow(-2, 0, 1)
        return Labelled(ids, rank - 1)

    # movement: the operator itself says where labels go

    def _movement(self, node: fx.Node, kind: Kind | None = None) -> Any:
        call = call_of(node, self.picture)
        moved = [v for v in call.values() if not is_index(call, v)]
        held = {id(v): self.of[v.data] for v in moved}
        if not any(h.cut is not None for h in held.values()):
            parts = self.picture[node].parts
            return [self._whole(p.shape) for p in parts] if parts else self._whole(self.picture[node].shape)
        if node.op == "call_module" or any(v.known is None for v in call.values() if is_index(call, v)):
            return self._refuse_all(node, "it moves elements in a way that is not known beforehand")
        if call.name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack"):
            self._aligned(node, call, moved, held)

        def labels(value: Value) -> Tensor:
            if id(value) in held:
                h = held[id(value)]
                ids = h.ids if h.cut is not None or value.constant else torch.full((1,) * value.rank, LIVE)
                return ids.to(torch.float64).expand(value.shape)
            return value.known

        def places(value: Value) -> Tensor:
            cut = held[id(value)].cut if id(value) in held else None
            if id(value) not in held:
                return value.known
            if cut is None:
                return torch.zeros(value.shape, dtype=torch.float64)
            shape = [-1 if d == cut else 1 for d in range(value.rank)]
            return (1 + torch.arange(value.shape[cut], dtype=torch.float64)).reshape(shape).expand(value.shape)

        out, where = move_tensor(call, labels), move_tensor(call, places)
        many = isinstance(out, list | tuple)
        found = []
        for ids, place in zip(out, where) if many else [(out, where)]:
            ids, place = compress(ids)[0], compress(place, adopt=False)[0]
            dims = [d for d in range(place.dim()) if place.shape[d] > 1 and ids.shape[d] > 1]
            found.append(self._cut_of(node, call.name, ids, dims))
        return [self._checked(f) for f in found] if many else found[0]

    def _refuse_all(self, node: fx.Node, why: str) -> Any:
        self.dense.setdefault(node, why)
        parts = self.picture[node].parts
        return [self._whole(p.shape) for p in parts] if parts else self._whole(self.picture[node].shape)

    def _cut_of(self, node: fx.Node, name: str, ids: Tensor, dims: list[int]) -> Labelled:
        """Where a moved value is cut: where its channels went. A dimension that came apart is cut at its innermost part."""
        if not dims:
            return Labelled(ids, None) if bool((ids <= LIVE).all()) else self.refuse(node, "one channel alone is taken")
        if len(dims) > 1 and name not in RESHAPES:
            return self.refuse(node, "it spreads channels over several dimensions")
        cut = dims[-1]
        rows = ids.movedim(cut, -1).reshape(-1, ids.shape[cut])
        if len(rows) > 1:
            self.families.append(rows)
        return Labelled(ids, cut)

    def _aligned(self, node: fx.Node, call: Any, moved: list[Value], held: dict[int, Labelled]) -> None:
        """Values joined along one dimension have equal labels along the others."""
        rank = moved[0].rank
        dim = call.argument(1, "dim", 0) if call.name not in ("hstack", "vstack") else 0
        dim = dim % (rank + (call.name == "stack"))
        first = None
        for value in moved:
            own = held[id(value)]
            if own.cut is None and value.constant:
                continue
            ids = own.ids if own.cut is not None else torch.full((1,) * value.rank, LIVE)
            if call.name != "stack" and (own.cut == dim or ids.shape[dim] > 1):
                continue
            first = ids if first is None else first
            self.tie(first, ids)


def _shared(plain: Plain) -> set[str]:
    """Parameters that more than one layer, or the glue too, reads."""
    readers: dict[str, set] = {}
    for node in plain.graph.nodes:
        if node.op == "call_module":
            leaf = plain.leaves[node.target]
            for name, _ in leaf.named_parameters():
                readers.setdefault(plain.parameter_name(node.target, name), set()).add(id(leaf))
        elif node.op == "get_attr" and any(user.target is not getattr for user in node.users):  # more than its type
            readers.setdefault(plain.canonical(node.target), set()).add(node)
    return {name for name, found in readers.items() if len(found) > 1}
