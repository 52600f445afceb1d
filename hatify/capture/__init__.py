"""From a module and example inputs to a graph of leaves and glue, for both modes."""

from hatify.capture.captured import Captured, FixedSize, ShapeGuard
from hatify.capture.modes import capture

__all__ = ["Captured", "FixedSize", "ShapeGuard", "capture"]
