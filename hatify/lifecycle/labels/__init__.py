"""Which positions live and die together: every channel that a layer makes has a label, and the labels travel through the graph.

A label is dropped where no position that carries it is both needed and possibly non-zero. Where positions meet, their labels are
tied; where a dimension is cut into equal parts, each part has to keep as many (the widest decides, the others keep dead channels).
"""

from .base import Labelled
from .walk import Labels

__all__ = ["Labelled", "Labels"]
