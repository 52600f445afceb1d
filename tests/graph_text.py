"""A captured graph as text, to compare graphs by."""

from __future__ import annotations

from torch import Tensor

from hatify.capture.captured import Captured


def text(captured: Captured | None, strides: bool = True) -> list[str]:
    """A line for each node, with all that it knows."""
    nodes = [] if captured is None else captured.graph.nodes
    names = ("scope", "line", "aliases", "out")
    return [
        f"{n.format_node()} {n.name} {[n.meta.get(name) for name in names]} {_looks(n.meta.get('val'), strides)}" for n in nodes
    ]


def _looks(value, strides: bool) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.stride() if strides else ''} {value.dtype}"
    return str([_looks(v, strides) for v in value]) if isinstance(value, list | tuple) else str(value)
