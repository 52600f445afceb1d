"""Dead channels removed: smaller weights, smaller norms, and the constants of shapes rewritten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hatify.gates.layers import Weighted
from hatify.lifecycle.channels import Channels, take
from hatify.lifecycle.cuts import JOINS, Cuts, Refused
from hatify.lifecycle.kinds import Site
from hatify.lifecycle.labels import Labels
from hatify.lifecycle.needs import Needs
from hatify.lifecycle.picture import Picture, operator_of
from hatify.lifecycle.plain import Plain, tidy
from hatify.lifecycle.smaller import smaller_layer, smaller_norm
from hatify.lifecycle.zeros import Zeros
from hatify.modules import live_norms

aten = torch.ops.aten


@dataclass(frozen=True)
class Slimmed:
    """What became of a layer's outputs: ``kept`` of ``size`` channels, ``live`` of which the task uses; or the reason ``why`` a node
    got its operands whole."""

    name: str
    scope: str
    kept: int = 0
    size: int = 0
    live: int = 0
    why: str = ""


def slim_down(plain: Plain, picture: Picture) -> list[Slimmed]:
    """Removes dead channels from a folded graph, in place. Where an operator cannot work on fewer channels its operands are made
    whole again, with zeros where channels were removed."""
    zeros = Zeros(plain, picture)
    needs = Needs(plain, picture, zeros)
    dense: dict[fx.Node, str] = {}
    while True:
        labels = Labels(plain, picture, zeros, needs, dense)
        try:
            cuts = Cuts(plain.graph, picture, labels)
        except Refused as refused:
            if refused.node in dense:
                raise
            dense[refused.node] = refused.why
        else:
            return _Slimmer(plain, picture, labels, cuts).run()


class _Slimmer:
    def __init__(self, plain: Plain, picture: Picture, labels: Labels, cuts: Cuts) -> None:
        self.plain, self.picture, self.labels, self.cuts = plain, picture, labels, cuts
        self.graph = plain.graph
        self.kinds = labels.zeros.kinds
        self.channels = Channels(plain, picture, cuts)
        self.realigned = {(n, o) for n, o in labels.realigned if n not in labels.dense}
        self.made: dict[int, nn.Module] = {}
        self.report: list[Slimmed] = []

    def run(self) -> list[Slimmed]:
        for node, own in self.labels.own.items():
            need, zero = self.labels.needs[node], self.labels.zeros[node]
            rows = (need & ~zero if need is not None else zero & ~zero).movedim(self.labels.of[node].cut or 0, -1)
            live = (
                int(rows.reshape(-1, rows.shape[-1]).any(0).expand(len(own)).sum()) if rows.shape[-1] in (1, len(own)) else len(own)
            )
            kept = int(self.labels.classes.keeps(own).sum())
            self.report.append(Slimmed(node.name, node.meta.get("scope", ""), kept, len(own), live))
        read = {node: node.all_input_nodes for node in self.labels.dense}
        for node in list(self.graph.nodes):
            family = self.kinds[node].family
            handler = getattr(self, "_" + family.replace(" ", "_"), None)
            if node in self.labels.dense or (handler is None and family not in ("source", "pick")):
                self._restore(node)
            elif handler is not None:
                handler(node)
        for node, why in self.labels.dense.items():
            if self.kinds[node].family == "weighted" or any(self.channels.cut(n) is not None for n in read[node]):
                self.report.append(Slimmed(node.name, node.meta.get("scope", ""), why=why))
        tidy(self.graph)
        return self.report

    def _restore(self, node: fx.Node) -> None:
        """The operands of a node that needs them whole."""
        for operand in node.all_input_nodes:
            if self.channels.cut(operand) is None:
                continue
            if node.op == "call_function" and operator_of(node) == "sym_size":
                if node.args[1] % len(self.picture[operand].shape) != self.channels.cut(operand).dim:
                    continue  # counts something else than channels
            elif isinstance(self.picture[node].other, torch.dtype | torch.device):
                continue
            node.replace_input_with(operand, self.channels.whole(operand))
            if node not in self.labels.dense:
                rule = f"no rule says how {operator_of(node)} works on fewer channels"
                why = "an output keeps its shape" if node.op == "output" else rule
                self.report.append(Slimmed(node.name, node.meta.get("scope", ""), why=why))

    # one family each

    def _mask(self, node: fx.Node) -> None:
        cut = self.channels.cut(node)
        live, x, fill = node.args
        if cut is not None:
            mask = self.picture[live].known
            rank = len(self.picture[node].shape)
            small = take(mask.reshape((1,) * (rank - mask.dim()) + tuple(mask.shape)), cut)
            if bool(small.all()):
                self._replace(node, x)
                return
            with self.graph.inserting_before(node):
                name = self.plain.add_buffer(f"{x.name}_live", small, persistent=True)
                node.args = (self.graph.create_node("get_attr", name), x, fill)

    def _weighted(self, node: fx.Node) -> None:
        site = self.kinds[node].site
        rank = len(self.picture[node].shape)
        dim = site.channel_dim(rank)
        x, out = self.channels.cut(site.x) if not site.meaning.lookup else None, self.channels.cut(node)
        inputs = x.channels if x is not None and x.dim == dim else None
        outputs = out.channels if out is not None and out.dim == dim else None
        if inputs is None and outputs is None:
            return
        if site.path is None:
            self._functional(node, site, inputs, outputs)
            return
        leaf = self.plain.leaves[site.path]
        if id(leaf) in self.made:
            return
        rows = torch.arange(site.outputs) if outputs is None else outputs
        columns = torch.arange(site.inputs) if inputs is None else inputs
        self._put(site.path, smaller_layer(leaf, site.meaning, columns, rows, (site.inputs, site.outputs)))

    def _functional(self, node: fx.Node, site: Site, inputs: Tensor | None, outputs: Tensor | None) -> None:
        meaning: Weighted = site.meaning
        groups = meaning.groups
        first, second = (inputs, outputs) if (meaning.transposed or site.flip) else (outputs, inputs)
        if meaning.lookup:
            first, second = None, outputs
        weight = site.weight
        if groups > 1:
            first, second = (first if groups != site.inputs else (inputs if meaning.transposed else outputs)), None
            if inputs is not None:  # one group per channel
                node.args = (*node.args[:6], len(inputs), *node.args[7:])
        for dim, index in ((0, first), (1, second)):
            if index is not None:
                new = self.channels.chosen(weight, node, dim, index)
                if new is not weight:
                    node.replace_input_with(weight, new)
                    self.picture.seen[new] = self.picture[weight]
                weight = new
        if site.bias is not None and outputs is not None:
            shape = self.picture[site.bias].shape
            new = self.channels.chosen(site.bias, node, len(shape) - 1, outputs)
            node.replace_input_with(site.bias, new)

    def _put(self, path: str, layer: nn.Module) -> None:
        """A layer at every path that the old one had, for all its calls: they are cut alike."""
        old = self.plain.leaves[path]
        self.made[id(layer)] = layer
        for other in [p for p, leaf in self.plain.leaves.items() if leaf is old]:
            owner, _, name = other.rpartition(".")
            self.plain.root.get_submodule(owner)._modules[name] = layer
            self.plain.leaves[other] = layer

    def _channel_norm(self, node: fx.Node) -> None:
        cut = self.channels.cut(node)
        if cut is not None and id(self.plain.leaves[node.target]) not in self.made:
            self._put(node.target, smaller_norm(self.plain.leaves[node.target], cut.channels))

    def _live_norm(self, node: fx.Node) -> None:
        cut = self.channels.cut(node)
        live = self.picture[node.kwargs["live"]].known
        rank = len(self.picture[node].shape)
        live = live.reshape((1,) * (rank - live.dim()) + tuple(live.shape))
        args = list(node.args)
        if cut is not None:
            live = take(live, cut)
            if node.target is live_norms.group_norm:
                first = 1
            else:
                first = rank - len(args[1])
                if cut.dim >= first:
                    args[1] = [cut.kept if first + i == cut.dim else s for i, s in enumerate(args[1])]
            for i, constant in enumerate(args[2:4], start=2):
                if isinstance(constant, fx.Node) and cut.dim >= first:
                    args[i] = self.channels.chosen(constant, node, cut.dim - first, cut.channels)
        if bool(live.all()):
            self._ordinary_norm(node, args)
        elif cut is not None:
            with self.graph.inserting_before(node):
                name = self.plain.add_buffer(f"{node.name}_live", live, persistent=True)
                read = self.graph.create_node("get_attr", name)
            self.picture.seen[read] = self.picture[node.kwargs["live"]]
            node.args, node.kwargs = tuple(args), {"live": read}

    def _ordinary_norm(self, node: fx.Node, args: list) -> None:
        """Only live channels are left: the task's norm is an ordinary one."""
        path = node.meta.get("norm")
        # a layer that is called once, and whose scale and shift became smaller with it
        alone = [n.meta.get("norm") or n.target for n in self.graph.nodes].count(path) == 1
        own = all(a.op == "get_attr" and a.target.rpartition(".")[0] == path for a in args[2:4] if isinstance(a, fx.Node))
        if path is not None and alone and own and isinstance(self.plain.leaves[path], nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            leaf = self.plain.leaves[path]
            if isinstance(leaf, nn.GroupNorm):
                leaf.num_channels = leaf.weight.numel() if leaf.weight is not None else self.cuts[node].kept
            else:
                leaf.normalized_shape = tuple(args[1])
            with self.graph.inserting_before(node):
                new = self.graph.create_node("call_module", path, (args[0],))
        else:
            func = {live_norms.layer_norm: F.layer_norm, live_norms.rms_norm: F.rms_norm, live_norms.group_norm: F.group_norm}
            with self.graph.inserting_before(node):
                new = self.graph.call_function(func[node.target], tuple(args))
        new.meta.update(node.meta)
        self.cuts.found[new], self.picture.seen[new] = self.cuts[node], self.picture[node]
        self._replace(node, new)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.realigned |= {(user, new) for user in old.users if (user, old) in self.realigned}
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _elementwise(self, node: fx.Node) -> None:
        cut = self.channels.cut(node)
        for operand in node.all_input_nodes:
            if (node, operand) in self.realigned:
                self.channels.spread(node, operand)
        if cut is None:
            return
        if node.op == "call_module" and any(True for _ in self.plain.leaves[node.target].parameters()):
            if id(self.plain.leaves[node.target]) not in self.made:
                self._put(node.target, smaller_norm(self.plain.leaves[node.target], cut.channels))
            return
        for operand in node.all_input_nodes:
            seen = self.picture.seen.get(operand)
            if seen is not None and seen.shape is not None and seen.constant:
                new = self.channels.taken(operand, node, cut)
                if new is not operand:
                    node.replace_input_with(operand, new)

    def _prelu(self, node: fx.Node) -> None:
        """Not cut."""

    def _norm(self, node: fx.Node) -> None:
        """Not cut along what it normalises."""

    _reduction = _mixing = _spatial = _norm

    def _movement(self, node: fx.Node) -> None:
        if node not in self.cuts.moved:
            return
        node.target, tail = self.cuts.moved[node]
        if tail is not None:
            tail = [self.channels.read(node, "numbers", part) if isinstance(part, Tensor) else part for part in tail]
            node.args, node.kwargs = (node.args[0], *tail), {}
        cut = self.channels.cut(node)
        if operator_of(node) in JOINS and cut is not None and not self.cuts._joins_along(node, cut.dim):
            for operand in node.all_input_nodes:
                seen = self.picture.seen.get(operand)
                if seen is not None and seen.shape is not None and seen.constant:
                    node.replace_input_with(operand, self.channels.taken(operand, node, cut))

    def _contraction(self, node: fx.Node) -> None:
        for (side, letters), (other, theirs) in (
            (s, o) for s in self.kinds[node].sides for o in self.kinds[node].sides if s is not o
        ):
            cut = self.channels.cut(other)
            if cut is None or not self.picture[side].constant:
                continue
            letter = theirs[cut.dim]
            if letter in letters and self.picture[side].shape[letters.index(letter)] > 1:
                index = _by_letters(cut.index, theirs, letters)
                if index is None:
                    node.replace_input_with(other, self.channels.whole(other))
                    continue
                index = cut.channels if cut.uniform else index
                node.replace_input_with(side, self.channels.chosen(side, node, letters.index(letter), index))

    def _attention(self, node: fx.Node) -> None:
        """Scores are scaled by the size that a head had."""
        cut = self.channels.cut(node.args[0])
        if cut is not None and node.kwargs.get("scale") is None:
            node.kwargs = {**node.kwargs, "scale": float(self.picture[node.args[0]].shape[-1]) ** -0.5}


def _by_letters(index: Tensor, letters: str, target: str) -> Tensor | None:
    """``index``, one dimension per letter, in the layout of ``target``; None where it differs along a letter that is not there."""
    if any(size > 1 and letter not in target for letter, size in zip(letters, index.shape)):
        return None
    own = {letter: d for d, letter in enumerate(letters)}
    kept = [letter for letter in target if letter in own]
    moved = index.permute(*[own[c] for c in kept], *[d for d, c in enumerate(letters) if c not in kept])
    sizes = {c: index.shape[own[c]] for c in kept}
    return moved.reshape([sizes.get(c, 1) for c in target])


__all__ = ["Slimmed", "slim_down"]
