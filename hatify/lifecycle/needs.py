"""Which positions of which values the outputs depend on, told backwards from the outputs.

A position that nothing needs may hold anything: what makes it may be zeroed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hatify.gates import Value
from hatify.gates.rules.movement import is_index, move_tensor
from hatify.lifecycle.kinds import Kind, call_of
from hatify.lifecycle.picture import Picture, operator_of
from hatify.lifecycle.plain import EFFECTS, Plain
from hatify.lifecycle.zeros import Zeros, compressed


class Needs:
    """``needs[node]``: bool, True where something depends on the value, of its rank and broadcastable to it; None where nothing
    does. ``wanted[name]`` says the same of every parameter that the graph uses, in the parameter's shape."""

    def __init__(self, plain: Plain, picture: Picture, zeros: Zeros) -> None:
        self.plain, self.picture, self.zeros = plain, picture, zeros
        self.found: dict[fx.Node, Tensor] = {}
        self.parts: dict[fx.Node, dict[int, Tensor]] = {}
        self.wanted: dict[str, Tensor] = {}
        self.opaque: set[fx.Node] = set()
        for node in reversed(plain.graph.nodes):
            self._visit(node, zeros.kinds[node])

    def __getitem__(self, node: fx.Node) -> Tensor | None:
        return self.found.get(node)

    def _visit(self, node: fx.Node, kind: Kind) -> None:
        if kind.family == "output" or node.target in EFFECTS:
            self._all(node)
            return
        if node in self.opaque:  # an object of the user's, made of tensors
            self._all(node)
            return
        out = self.found.get(node)
        if node.op == "get_attr" and out is not None and self.picture[node].shape is not None:
            self._want(node.target, out.expand(self.picture[node].shape))
        if kind.family in ("source", "number") or (out is None and node not in self.parts):
            return
        handler = getattr(self, "_" + kind.family.replace(" ", "_"), None)
        if handler is None or (out is None and kind.family != "movement"):
            self._all(node)
            self._want_leaf(node)
        else:
            handler(node, kind, out)

    # one family each

    def _mask(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        self._need(node.args[1], out & self.picture[node.args[0]].known)
        self._need(node.args[0], self._full(node.args[0]))

    def _pick(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        held = self.parts.setdefault(node.args[0], {})
        index = node.args[1]
        held[index] = out if index not in held else held[index] | out

    def _elementwise(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        operands = self._operands(node)
        for operand in operands:
            need = out
            if operator_of(node) in ("mul", "multiply") and len(operands) == 2:
                other = operands[1] if operand is operands[0] else operands[0]
                need = need & ~self.zeros[other]
            self._need(operand, need)
        self._want_leaf(node)

    def _prelu(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        self._need(node.args[0], out)
        self._need(node.args[1], self._full(node.args[1]))

    def _movement(self, node: fx.Node, kind: Kind, out: Tensor | None) -> None:
        call = call_of(node, self.picture)
        moved = [v for v in call.values() if not is_index(call, v)]
        probes = {id(v): torch.zeros(v.shape, dtype=torch.float64, requires_grad=True) for v in moved}

        def pick(value: Value) -> Tensor:
            if id(value) in probes:
                return probes[id(value)]
            return value.known if value.known is not None else torch.zeros(value.shape, dtype=value.dtype)

        if node.op == "call_module" or any(v.known is None for v in call.values() if is_index(call, v)):
            results: Any = None
        else:
            with torch.enable_grad():
                results = move_tensor(call, pick)
        if results is None:
            self._all(node)
            return
        needed = self.parts.get(node, {}) if isinstance(results, list | tuple) else {0: out}
        results = list(results) if isinstance(results, list | tuple) else [results]
        if any(not isinstance(i, int) for i in needed):
            self._all(node)
            return
        if not all(results[i].requires_grad for i in needed):  # it moves elements, and hides from gradients that it does
            self._all(node)
            return
        chosen = [(results[i], n) for i, n in needed.items()]
        leaves = [probes[id(v)] for v in moved]
        if not chosen:
            return
        seeds = [n.to(torch.float64).expand(r.shape) for r, n in chosen]
        gradients = torch.autograd.grad([r for r, _ in chosen], leaves, seeds, allow_unused=True)
        for value, gradient in zip(moved, gradients):
            if gradient is not None:
                self._need(value.data, compressed(gradient != 0))

    def _weighted(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        site = kind.site
        rank = len(self.picture[node].shape)
        dim = site.channel_dim(rank)
        for d in range(dim + 1, rank):
            out = out.any(d, keepdim=True)
        rows = out.movedim(dim, -1)
        rows = rows.expand(*rows.shape[:-1], site.outputs)
        if site.meaning.lookup:
            self._need(site.x, self._full(site.x))
        else:
            pattern = site.pattern(self.zeros.weight_dead(site)).float()
            self._need(site.x, compressed((rows.float() @ pattern > 0).movedim(-1, dim)))
        self._want_rows(site, rows.reshape(-1, site.outputs).any(0))

    def _want_rows(self, site: Any, rows: Tensor) -> None:
        if site.path is None:
            self._need(site.weight, self._full(site.weight))
            if site.bias is not None:
                shape = self.picture[site.bias].shape
                self._need(site.bias, rows.reshape(shape) if rows.numel() == torch.Size(shape).numel() else self._full(site.bias))
            return
        leaf, meaning = self.plain.leaves[site.path], site.meaning
        gains = site.row_gains(leaf)
        for name, parameter in leaf.named_parameters():
            by_row = torch.ones(parameter.shape, dtype=torch.bool)
            plain_rows = name == meaning.weight and not (site.normalised or meaning.transposed or meaning.lookup)
            if name == meaning.bias or name in gains or plain_rows:
                by_row = by_row & rows.reshape(-1, *[1] * (parameter.dim() - 1))
            elif name == meaning.weight and meaning.lookup:
                by_row = by_row & rows
            self._want(self.plain.parameter_name(site.path, name), by_row)

    def _channel_norm(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        mixed = _any(out, kind.dims)
        self._need(node.all_input_nodes[0], mixed)
        leaf = self.plain.leaves[node.target]
        channels = self.picture[node].shape[1]
        needed = out.movedim(1, -1).reshape(-1, out.shape[1]).any(0).expand(channels)
        for name, parameter in leaf.named_parameters():
            own = needed if name in ("weight", "bias") else torch.ones(parameter.shape, dtype=torch.bool)
            self._want(self.plain.parameter_name(node.target, name), own)

    def _norm(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        if kind.dims[0] == 1 and hasattr(self.plain.leaves[node.target], "num_groups"):
            self._channel_norm(node, kind, out)
            return
        self._need(node.all_input_nodes[0], _any(out, kind.dims))
        for name, parameter in self.plain.leaves[node.target].named_parameters():
            rank = len(self.picture[node].shape)
            own = out.reshape(-1, *out.shape[rank - parameter.dim() :]).any(0).expand(parameter.shape)
            self._want(self.plain.parameter_name(node.target, name), own)

    def _live_norm(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        self._need(node.args[0], _any(out, kind.dims))
        self._need(node.kwargs["live"], self._full(node.kwargs["live"]))
        for parameter in [n for n in node.args[2:4] if isinstance(n, fx.Node)]:
            own = out
            if node.target.__name__ == "group_norm":
                own = out.movedim(1, -1)
            self._need(parameter, own)

    def _reduction(self, node: fx.Node, kind: Kind, out: Tensor | None) -> None:
        if out is None:
            self._all(node)
            return
        if not kind.keep:
            for dim in sorted(kind.dims):
                out = out.unsqueeze(dim)
        self._need(self._operands(node)[0], out)

    def _mixing(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        first, *others = self._operands(node)
        self._need(first, _any(out, kind.dims))
        for other in others:
            self._need(other, self._full(other))

    _spatial = _mixing

    def _contraction(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        if len(kind.sides) != 2 or kind.sides[0][0] is kind.sides[1][0]:
            self._all(node)
            return
        for (side, letters), (other, theirs) in (kind.sides, kind.sides[::-1]):
            live = (~self.zeros[other]).float()
            seen = "".join(
                letter for letter in letters if letter in kind.out + theirs
            )  # any other one is summed out before they meet
            need = torch.einsum(f"{kind.out},{theirs}->{seen}", out.float(), live) > 0
            self._need(side, need[tuple(slice(None) if letter in seen else None for letter in letters)])

    def _attention(self, node: fx.Node, kind: Kind, out: Tensor) -> None:
        q, k, v = node.args[:3]
        shapes = [self.picture[n].shape for n in (q, k, v)]
        if len({len(s) for s in shapes}) > 1 or len({s[:-2] for s in shapes}) > 1 or len({q, k, v}) < 3:
            self._all(node)
            return
        self._need(v, out.any(-2, keepdim=True))
        read = out.any(-1, keepdim=True)
        self._need(q, read & ~self.zeros[k].all(-2, keepdim=True))
        self._need(k, read.any(-2, keepdim=True) & ~self.zeros[q].all(-2, keepdim=True))
        for other in self._operands(node):
            if other not in (q, k, v):
                self._need(other, self._full(other))

    # keeping books

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if self.picture[n].shape is not None]

    def _full(self, node: fx.Node) -> Tensor:
        return torch.ones((1,) * len(self.picture[node].shape), dtype=torch.bool)

    def _all(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            seen = self.picture[operand]
            if seen.shape is not None:
                self._need(operand, self._full(operand))
            elif not seen.parts and seen.size is None and not isinstance(seen.other, torch.dtype | torch.device | None):
                self.opaque.add(operand)
            for index, part in enumerate(seen.parts):
                if part.shape is not None:
                    held = self.parts.setdefault(operand, {})
                    held[index] = torch.ones((1,) * len(part.shape), dtype=torch.bool)

    def _need(self, node: fx.Node, need: Tensor) -> None:
        """Adds ``need``, of a value that ``node`` broadcasts to."""
        shape = self.picture[node].shape
        need = need.reshape((1,) * (len(shape) - need.dim()) + tuple(need.shape))
        extra = need.dim() - len(shape)
        if extra:
            need = need.reshape(-1, *need.shape[extra:]).any(0)
        for dim, size in enumerate(shape):
            if size == 1 and need.shape[dim] > 1:
                need = need.any(dim, keepdim=True)
        need = compressed(need)
        known = self.found.get(node)
        self.found[node] = need if known is None else compressed(known | need)

    def _want(self, name: str, wanted: Tensor) -> None:
        known = self.wanted.get(name)
        self.wanted[name] = wanted.clone() if known is None else known | wanted

    def _want_leaf(self, node: fx.Node) -> None:
        if node.op == "call_module":
            for name, parameter in self.plain.leaves[node.target].named_parameters():
                self._want(self.plain.parameter_name(node.target, name), torch.ones(parameter.shape, dtype=torch.bool))


def _any(need: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        need = need.any(dim, keepdim=True)
    return need
