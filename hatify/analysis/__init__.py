"""From a captured graph to decisions: which layers become what, where masks go, what locks which weight."""

from hatify.analysis.analyst import analyse
from hatify.analysis.plan import Analysis, LayerPlan, Masked, Step

__all__ = ["Analysis", "LayerPlan", "Masked", "Step", "analyse"]
