"""Learning one task after another, and keeping what was learned out of reach."""

from hatify.learning.guard import Guard
from hatify.learning.regularizers import regularization
from hatify.learning.schedules import SCHEDULES, mask_scale
from hatify.learning.session import Learning

__all__ = ["SCHEDULES", "Guard", "Learning", "mask_scale", "regularization"]
