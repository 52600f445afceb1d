"""From decisions to a network: modules raised under their own paths, and the graph that calls them."""

from hatify.rewrite.graph import rewrite_graph
from hatify.rewrite.surgery import Surgery

__all__ = ["Surgery", "rewrite_graph"]
