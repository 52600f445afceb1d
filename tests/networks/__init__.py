"""Hand-written small networks, each with one habit of users' code that a conversion has to survive."""

from . import attention, contracted, conv, experts, functional, interface, norms, recurrent, sequence, state, tied, tokens
from .registry import NETWORKS, Network

__all__ = ["NETWORKS", "Network"]

# Importing a family registers its networks.
_FAMILIES = (attention, contracted, conv, experts, functional, interface, norms, recurrent, sequence, state, tied, tokens)
