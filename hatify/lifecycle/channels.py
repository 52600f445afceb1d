"""Values and constants brought to other channels: made whole with zeros, spread out to a sum's, or cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.lifecycle.cuts import Cut, Cuts
from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import Plain

aten = torch.ops.aten


class Channels:
    """Writes into a graph that is being slimmed what brings an operand to the channels that its reader has."""

    def __init__(self, plain: Plain, picture: Picture, cuts: Cuts) -> None:
        self.plain, self.picture, self.cuts, self.graph = plain, picture, cuts, plain.graph
        self.made: dict[fx.Node, fx.Node] = {}

    def cut(self, node: Any) -> Cut | None:
        found = self.cuts.found.get(node)
        return found if isinstance(found, Cut) else None

    def whole(self, operand: fx.Node) -> fx.Node:
        """The value with zeros where channels were removed."""
        if operand in self.made:
            return self.made[operand]
        cut = self.cut(operand)
        rank = len(self.picture[operand].shape)
        places = torch.full(cut.index.shape[: cut.dim] + (cut.size,) + cut.index.shape[cut.dim + 1 :], cut.kept)
        order = torch.arange(cut.kept).reshape([-1 if d == cut.dim else 1 for d in range(rank)]).expand(cut.index.shape)
        places.scatter_(cut.dim, cut.index, order)
        name = self.plain.add_buffer(f"{operand.name}_places", places.reshape(-1) if cut.uniform else places, persistent=True)
        after = operand
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            index = self.graph.create_node("get_attr", name)
        with self.graph.inserting_after(index):
            pad = [0] * (2 * (rank - 1 - cut.dim)) + [0, 1]
            padded = self.graph.call_function(aten.constant_pad_nd.default, (operand, pad))
        with self.graph.inserting_after(padded):
            if cut.uniform:
                whole = self.graph.call_function(aten.index_select.default, (padded, cut.dim, index))
            else:
                whole = self.graph.call_function(torch.take_along_dim, (padded, index, cut.dim))
        whole.meta.update(operand.meta)
        self.made[operand] = whole
        return whole

    def spread(self, node: fx.Node, operand: fx.Node) -> None:
        """A summand with other channels than the sum: its own in the sum's order, zeros where it has none."""
        own, out = self.cut(operand), self.cut(node)
        dim = own.dim if own is not None else out.dim if out is not None else None
        if dim is None:
            return
        size = self.picture[node].shape[dim]
        whole = torch.arange(size)
        have, want = (whole if c is None else c.channels for c in (own, out))
        if torch.equal(have, want):
            return
        places = torch.full((size,), len(have))
        places[have] = torch.arange(len(have))
        places = places[want]
        name = self.plain.add_buffer(f"{operand.name}_places", places, persistent=True)
        with self.graph.inserting_before(node):
            index = self.graph.create_node("get_attr", name)
            padded = operand
            if bool((places == len(have)).any()):
                pad = [0] * (2 * (len(self.picture[node].shape) - 1 - dim)) + [0, 1]
                padded = self.graph.call_function(aten.constant_pad_nd.default, (operand, pad))
            new = self.graph.call_function(aten.index_select.default, (padded, dim, index))
        node.replace_input_with(operand, new)

    def read(self, user: fx.Node, name: str, value: Tensor) -> fx.Node:
        """A new buffer, read before ``user``."""
        name = self.plain.add_buffer(f"{user.name}_{name}", value, persistent=True)
        with self.graph.inserting_before(user):
            return self.graph.create_node("get_attr", name)

    def taken(self, constant: fx.Node, user: fx.Node, cut: Cut) -> fx.Node:
        """A constant operand that is broadcast to a value cut by ``cut``, with the kept channels only."""
        shape, rank = self.picture[constant].shape, len(self.picture[user].shape)
        dim = cut.dim - (rank - len(shape))
        if dim < 0 or shape[dim] == 1:
            return constant
        return self.chosen(
            constant, user, dim, cut.index.reshape(cut.index.shape[rank - len(shape) :]) if not cut.uniform else cut.channels
        )

    def chosen(self, constant: fx.Node, user: fx.Node, dim: int, index: Tensor) -> fx.Node:
        """A constant with the positions ``index`` along ``dim``: a smaller tensor where it is read only here."""
        if index.dim() == 1 and constant.op == "get_attr" and len(constant.users) == 1 and self._read_once(constant):
            owner, _, attribute = constant.target.rpartition(".")
            holder = self.plain.root.get_submodule(owner)
            value = self.plain.tensor(constant.target)
            small = value.detach().index_select(dim, index)
            if attribute in holder._parameters:
                holder._parameters[attribute] = nn.Parameter(small, value.requires_grad)
            else:
                holder._buffers[attribute] = small
            return constant
        name = self.plain.add_buffer(f"{constant.name}_chosen", index, persistent=True)
        with self.graph.inserting_before(user):
            read = self.graph.create_node("get_attr", name)
            if index.dim() == 1:
                return self.graph.call_function(aten.index_select.default, (constant, dim, read))
            return self.graph.call_function(torch.take_along_dim, (constant, read, dim))

    def _read_once(self, constant: fx.Node) -> bool:
        readers = [n for n in self.graph.nodes if n.op == "get_attr" and n.target == constant.target]
        owners = {constant.target.rpartition(".")[0]}
        called = {n.target for n in self.graph.nodes if n.op == "call_module"}
        named = [n for n, p in self.plain.root.named_parameters(remove_duplicate=False) if p is self.plain.tensor(constant.target)]
        return len(readers) == 1 and not owners & called and len(named) <= 1


def take(mask: Tensor, cut: Cut) -> Tensor:
    """The kept channels of a mask that is broadcast to the value which ``cut`` cuts."""
    if mask.shape[cut.dim] == 1:
        return mask
    shape = [max(a, b) for a, b in zip(mask.shape, cut.index.shape)]
    source = [cut.size if d == cut.dim else s for d, s in enumerate(shape)]
    target = [cut.kept if d == cut.dim else s for d, s in enumerate(shape)]
    return torch.gather(mask.expand(source), cut.dim, cut.index.expand(target)).clone()
