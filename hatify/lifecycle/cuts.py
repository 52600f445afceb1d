"""Where each value is cut, checked: an operator that moves elements has to bring the remaining ones of its smaller operands to where it
brought them before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hatify.gates.rules.movement import VIEWS
from hatify.lifecycle.labels import Labelled, Labels
from hatify.lifecycle.picture import Picture, Seen, operator_of

aten = torch.ops.aten
JOINS = ("cat", "concat", "concatenate", "stack")


class Refused(Exception):
    """A node that has to get its operands whole."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass(frozen=True, eq=False)
class Cut:
    """A value is cut along ``dim``: ``index`` has its rank and says which position each of the kept ones had, of size 1 along
    dimensions where that is the same."""

    dim: int
    size: int
    index: Tensor

    @property
    def kept(self) -> int:
        return self.index.shape[self.dim]

    @property
    def uniform(self) -> bool:
        return self.index.numel() == self.kept

    @property
    def channels(self) -> Tensor:
        """The kept positions, where they are the same everywhere."""
        return self.index.reshape(-1)


class Cuts:
    """``cuts[node]``: a :class:`Cut`, None for a whole value, or a list of these. ``moved[node]`` are the target of a movement
    on the smaller value, and what follows its first argument (None: as it is).

    Raises:
        Refused: where a movement does not work on the smaller value.
    """

    def __init__(self, graph: fx.Graph, picture: Picture, labels: Labels) -> None:
        self.picture, self.labels = picture, labels
        self.found: dict[fx.Node, Any] = {}
        self.moved: dict[fx.Node, tuple] = {}
        for node in graph.nodes:
            held = labels.of[node]
            if isinstance(held, list):
                parts = self.picture[node].parts
                self.found[node] = [None if h is None else self._cut(node, h, p) for h, p in zip(held, parts)]
            else:
                self.found[node] = None if held is None else self._cut(node, held, self.picture[node])
        for node in graph.nodes:
            if labels.zeros.kinds[node].family == "movement" and node not in labels.dense:
                self._movement(node)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.found[node]

    def _cut(self, node: fx.Node, held: Labelled, seen: Seen) -> Cut | None:
        if held.cut is None:
            return None
        keep = self.labels.classes.keeps(held.ids)
        rows = keep.movedim(held.cut, -1)
        counts = rows.sum(-1)
        if bool((counts != counts.reshape(-1)[0]).any()):
            raise Refused(node, "parts that have to be equal keep unequal numbers of channels")
        if bool(keep.all()):
            return None
        if held.cut in seen.open:  # channels beside those of other samples: numbers of one batch size say nothing of another
            raise Refused(node, "how many channels there are depends on the sizes of the inputs")
        index = rows.nonzero()[:, -1].reshape(*rows.shape[:-1], -1).movedim(-1, held.cut)
        return Cut(held.cut, seen.shape[held.cut], compress_other(index, held.cut))

    # movement

    def _smaller(self, ids: Tensor, cut: Cut | None) -> Tensor:
        """What is left of a full-sized value."""
        if cut is None:
            return ids
        shape = [cut.kept if d == cut.dim else s for d, s in enumerate(ids.shape)]
        return torch.gather(ids, cut.dim, cut.index.expand(shape))

    def _movement(self, node: fx.Node) -> None:
        operands = [n for n in node.all_input_nodes if self.picture[n].shape is not None]
        found = self.found[node]
        out = found if isinstance(found, list) else [found]
        if all(self.found[n] is None for n in operands) and all(cut is None for cut in out):
            return
        constants = [n for n in operands if self.picture[n].constant and self.picture[n].dtype.is_floating_point]
        name = operator_of(node)
        if constants and name not in JOINS:
            raise Refused(node, "it moves channels among constants")
        target, tail = self._rewritten(node, name, out)

        def operand(n: fx.Node, small: bool) -> Any:
            seen = self.picture[n]
            if seen.shape is None:
                return seen.size if seen.size is not None else seen.other
            if n in constants:
                shape, cut = list(seen.shape), out[0]
                if small and cut is not None and name != "stack" and not self._joins_along(node, cut.dim):
                    shape[cut.dim] = cut.kept
                return torch.zeros(shape, dtype=torch.float64)
            if not seen.dtype.is_floating_point and seen.constant:
                return seen.known
            ids = _numbered(seen.shape, operands.index(n))
            return self._smaller(ids, self.found[n]) if small else ids

        def run(func: Any, args: tuple, kwargs: dict, small: bool) -> list[Tensor]:
            args, kwargs = fx.map_arg((args, kwargs), lambda n: operand(n, small))
            results = (torch.reshape if name in VIEWS else func)(*args, **kwargs)
            return list(results) if isinstance(results, list | tuple) else [results]

        whole = run(node.target, node.args, node.kwargs, False)
        args, kwargs = (node.args, node.kwargs) if tail is None else ((node.args[0], *tail), {})
        try:
            results = run(target, args, kwargs, True)
        except (RuntimeError, IndexError) as error:  # the operator itself says that the smaller value does not fit
            raise Refused(node, str(error).splitlines()[0]) from error
        for result, full, cut in zip(results, whole, out):
            if not torch.equal(result, self._smaller(full, cut)):
                raise Refused(node, "it would put the remaining channels in another order")
        self.moved[node] = target, tail

    def _joins_along(self, node: fx.Node, dim: int) -> bool:
        own = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return own % len(self.picture[node].shape) == dim

    def _rewritten(self, node: fx.Node, name: str, out: list[Cut | None]) -> tuple:
        """The node's target, and what follows its first argument on the smaller value (None: as it is)."""
        target, tail = node.target, None
        args = node.args
        source = next(n for n in node.all_input_nodes if self.picture[n].shape is not None)
        cut, made = self.found[source], out[0]
        if self._takes_by_number(node, name, cut):
            return self._by_number(node, cut, made)
        if name in (*VIEWS, "reshape", "expand") and made is not None:
            tail = (self._sizes(node, args[1], made, 0),)
        elif name == "unflatten" and made is not None:
            first = args[1] % len(self.picture[source].shape)
            tail = (args[1], self._sizes(node, args[2], made, first))
        elif name in ("split", "split_with_sizes", "chunk") and cut is not None and self._dim(node, 2) == cut.dim:
            sizes = [p.shape[cut.dim] for p in self.picture[node].parts]
            target, tail = aten.split_with_sizes.default, (self._counts(node, cut, sizes), cut.dim)
        elif name == "slice" and cut is not None and self._dim(node, 1) == cut.dim:
            start, end = (self._place(node, cut, args[i] if len(args) > i else d) for i, d in ((2, 0), (3, cut.size)))
            tail = (cut.dim, start, end)
        elif name == "select" and cut is not None and self._dim(node, 1) == cut.dim:
            tail = (cut.dim, self._place(node, cut, args[2]))
        elif name == "narrow" and cut is not None and self._dim(node, 1) == cut.dim:
            start, end = self._place(node, cut, args[2]), self._place(node, cut, args[2] + args[3])
            tail = (cut.dim, start, end - start)
        return target, tail

    def _takes_by_number(self, node: fx.Node, name: str, cut: Cut | None) -> bool:
        """Whether the node picks or orders channels, along the dimension that is cut and no other."""
        if cut is None or not cut.uniform:
            return False
        args = node.args
        if name == "slice":
            return self._dim(node, 1) == cut.dim and len(args) > 4 and args[4] != 1
        if name == "index_select":
            return self._dim(node, 1) == cut.dim
        if name == "roll":
            return len(args) > 2 and [d % len(self.picture[args[0]].shape) for d in args[2]] == [cut.dim]
        if name == "index":
            given = [d for d, index in enumerate(args[1]) if index is not None]
            return given == [cut.dim] and len(self.picture[args[1][cut.dim]].shape) == 1
        return False

    def _by_number(self, node: fx.Node, cut: Cut, made: Cut | None) -> tuple:
        """The same channels by the numbers that they have on the smaller value."""
        rank = len(self.picture[node.args[0]].shape)
        numbers = torch.arange(cut.size).reshape([-1 if d == cut.dim else 1 for d in range(rank)])
        seen = self.picture.seen
        args = fx.map_arg(
            node.args, lambda n: numbers if n is node.args[0] else seen[n].known if seen[n].size is None else seen[n].size
        )
        taken = node.target(*args).reshape(-1)
        taken = taken if made is None else taken[made.channels]
        return aten.index_select.default, (cut.dim, torch.searchsorted(cut.channels, taken))

    def _dim(self, node: fx.Node, position: int) -> int:
        dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        return dim % len(self.picture[node.args[0]].shape)

    def _sizes(self, node: fx.Node, sizes: Any, cut: Cut, first: int) -> list:
        sizes, at = list(sizes), cut.dim - first
        if not 0 <= at < len(sizes):
            return sizes
        if isinstance(sizes[at], fx.Node):
            raise Refused(node, "the number of channels is computed")
        if sizes[at] != -1:
            sizes[at] = cut.kept
        return sizes

    def _counts(self, node: fx.Node, cut: Cut, sizes: list[int]) -> list[int]:
        ends = torch.tensor(sizes).cumsum(0)
        return [self._place(node, cut, int(e)) - self._place(node, cut, int(e) - s) for e, s in zip(ends, sizes)]

    def _place(self, node: fx.Node, cut: Cut, position: Any) -> int:
        """How many kept channels come before ``position``."""
        if not isinstance(position, int):
            raise Refused(node, "where it begins or ends is computed")
        position = min(position if position >= 0 else position + cut.size, cut.size)
        counts = (cut.index < position).sum(cut.dim)
        if bool((counts != counts.reshape(-1)[0]).any()):
            raise Refused(node, "parts that have to be equal keep unequal numbers of channels")
        return int(counts.reshape(-1)[0])


def compress_other(index: Tensor, dim: int) -> Tensor:
    """``index`` with size 1 along the dimensions, other than ``dim``, where all are alike."""
    for d in range(index.dim()):
        if d != dim and index.shape[d] > 1 and bool((index == index.narrow(d, 0, 1)).all()):
            index = index.narrow(d, 0, 1)
    return index.contiguous()


def _numbered(shape: tuple[int, ...], operand: int) -> Tensor:
    """A number of its own for every element of every operand: float64, as movement runs on."""
    count = torch.Size(shape).numel()
    return (operand * 2.0**40 + 1 + torch.arange(count, dtype=torch.float64)).reshape(shape)


__all__ = ["Cut", "Cuts", "Refused"]
