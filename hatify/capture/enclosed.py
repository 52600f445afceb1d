"""The user's regions (``torch.no_grad()``, ``torch.autocast()``), kept closed while PyTorch makes the rest of a program functional.

Its functionalisation runs a region's body where the region stands, and what the region switched is lost. A closed region is one operator
that makes its results from its operands, as a leaf is; reading the program opens it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from hatify.capture.functional import looked_at
from hatify.capture.in_place import mutated
from hatify.capture.regions import closes, opens

_LIBRARY = torch.library.Library("hatify", "FRAGMENT")
_LIBRARY.define("region(Tensor[] tensors, SymInt[] sizes, str key) -> Tensor[]")
ENCLOSED = torch.ops.hatify.region.default

SETTINGS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Regions that the exporter keeps as a body of their own, and how many settings come before the body."""

_REGIONS: dict[str, Region] = {}
_NUMBERS = itertools.count()


@dataclass
class Region:
    """One region of a program: the exporter's operator for it, its settings and body, and which of its operands are sizes."""

    target: Any
    settings: tuple
    body: fx.GraphModule
    sizes: list[bool]

    def operands(self, tensors: list, sizes: list) -> list:
        """The body's operands in its own order."""
        tensors, sizes = iter(tensors), iter(sizes)
        return [next(sizes) if is_size else next(tensors) for is_size in self.sizes]


def enclose(program: ExportedProgram) -> bool:
    """Closes the regions of a program, in place; False (and some are open) where one gives or takes something else than tensors."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if str(node.target) not in SETTINGS:
            continue
        count = SETTINGS[str(node.target)]
        settings, body, operands = node.args[:count], node.args[count], node.args[count + 1 :]
        vals = [o.meta.get("val") if isinstance(o, fx.Node) else None for o in operands]
        results = list(node.meta["val"]) if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        if not all(isinstance(v, Tensor | torch.SymInt) for v in vals) or not all(isinstance(r, Tensor) for r in results):
            return False
        key = f"region#{next(_NUMBERS)}"
        is_size = [isinstance(v, torch.SymInt) for v in vals]
        _REGIONS[key] = Region(node.target, settings, getattr(module, body.target), is_size)
        tensors, sizes = ([o for o, s in zip(operands, is_size) if s is wanted] for wanted in (False, True))
        with module.graph.inserting_before(node):
            closed = module.graph.call_function(ENCLOSED, (tensors, sizes, key))
        closed.meta = {**node.meta, "val": results}
        node.replace_all_uses_with(closed)
        module.graph.erase_node(node)
        if not body.users:
            module.graph.erase_node(body)
    module.recompile()
    return True


def region_of(key: str) -> Region:
    """What a closed region holds."""
    return _REGIONS[key]


def clear_regions() -> None:
    """Drops the records (they hold graphs)."""
    _REGIONS.clear()


@torch.library.register_fake("hatify::region", lib=_LIBRARY)
def _region_on_fakes(tensors: list[Tensor], sizes: list[int], key: str) -> list[Tensor]:
    region = _REGIONS[key]
    results = region.target(*region.settings, region.body, *region.operands(tensors, sizes))
    return [result.clone() for result in results]


def written_across(graph: fx.Graph) -> str | None:
    """The source line of a write to memory that is seen inside of a region and was there before it, or None. Closed, such a region would
    hide the write, or not see it."""
    groups, writes = looked_at(graph)
    order = {node: -1 if node.op == "get_attr" else i for i, node in enumerate(graph.nodes)}
    regions = list(_extents(graph))
    for write in writes:
        places = [order[node] for node in groups.of(mutated(write))]
        if any(any(p < start for p in places) and any(start < p < end for p in places) for start, end in regions):
            return write.meta.get("line") or write.name
    return None


def _extents(graph: fx.Graph) -> Iterator[tuple[int, int]]:
    """Where the outermost regions begin and end."""
    depth, start = 0, 0
    for i, node in enumerate(graph.nodes):
        if opens(node) and not depth:
            start = i
        depth += opens(node) - closes(node)
        if closes(node) and not depth:
            yield start, i
