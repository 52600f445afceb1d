"""Networks drawn at random."""

from .networks import Drawn, Step, inputs, programs

__all__ = ["Drawn", "Step", "inputs", "programs"]
