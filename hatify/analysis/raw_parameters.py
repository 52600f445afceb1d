"""Raw parameters that only a copy per task can serve, told from the graphs before any rule has run."""

from __future__ import annotations

from torch import fx, nn

from hatify.analysis.coupling import DERIVABLE, keeps_places
from hatify.analysis.heads import WEIGHT_SLOT, operator_name
from hatify.analysis.origins import CASTS, MOVES
from hatify.capture import Captured


def surely_indexed(graphs: list[Captured], model: nn.Module) -> set[str]:
    """Raw parameters that no user could take for a weight: saves starting again for them."""
    owned = {id(p) for g in graphs for leaf in g.leaves.values() for p in leaf.parameters()}
    fixed = {n for g in graphs for n in _fixed(g)}
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in reversed(named.items())}
    maybe: set[str] = set()
    seen: set[str] = set()
    for captured in graphs:
        for node in captured.graph.nodes:
            if node.op == "get_attr" and node.target in named:
                name = first[id(named[node.target])]
                seen.add(name)
                if id(named[name]) in owned or _may_be_weight(node, fixed):
                    maybe.add(name)
    return seen - maybe


def _fixed(captured: Captured) -> set[fx.Node]:
    """Nodes that do not depend on data, operators and layers that weights may be computed by."""
    found: set[fx.Node] = set()
    for node in captured.graph.nodes:
        may = node.op == "call_function" or node.op == "call_module" and keeps_places(captured.leaves[node.target])
        if node.op == "get_attr" or may and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _may_be_weight(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a parameter gets to a weight's slot by movement and what weights are computed by."""
    stack, seen = [node], set()
    while stack:
        for user in stack.pop().users:
            name = operator_name(user)
            if name in WEIGHT_SLOT:
                return True
            computes = user.op == "call_module" or name in MOVES or name in CASTS or name in DERIVABLE or name == "getitem"
            if user not in seen and user in fixed and computes:
                seen.add(user)
                stack.append(user)
    return False
