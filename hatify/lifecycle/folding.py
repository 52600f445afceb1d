"""Masks folded into weights: what a task does not use becomes zero, and a mask over what is zero already goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from hatify.lifecycle.needs import Needs
from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import LIVE_NORMS, Plain, is_mask, tidy
from hatify.lifecycle.zeros import Zeros, compressed


@dataclass(frozen=True)
class Folded:
    """A mask node and what became of it: ``how`` is ``zero`` (what it masks is zero already), ``columns`` (every reader has zero
    weights there), or empty where it stays, with the reason in ``why``."""

    name: str
    scope: str
    how: str
    why: str = ""


def fold(plain: Plain, picture: Picture) -> list[Folded]:
    """Zeroes what the task does not use, and takes out the mask nodes that this makes idle."""
    zeros = Zeros(plain, picture)
    needs = Needs(plain, picture, zeros)
    add_unwanted(plain, needs)
    zero_dead(plain)
    zeros = Zeros(plain, picture)
    found = []
    for node in [n for n in plain.graph.nodes if is_mask(n)]:
        live, x, fill = node.args
        live = picture[live].known
        how = ""
        if not fill and bool((zeros[x] | live).all()):
            how = "zero"
        elif not fill and all(_reads_nothing(user, node, live, zeros) for user in node.users):
            how = "columns"
        why = "" if how else _why(fill)
        found.append(Folded(node.name, node.meta.get("scope", ""), how, why))
        if how:
            node.replace_all_uses_with(x)
            plain.graph.erase_node(node)
    tidy(plain.graph)
    return found


def still_masked(plain: Plain, folded: list[Folded]) -> list[Folded]:
    """The masks that are in the graph still, those of norms over live channels included."""
    there = {node.name for node in plain.graph.nodes}
    why = "its statistics are those of live channels; an ordinary norm would count the dead ones"
    norms = [Folded(n.name, n.meta.get("scope", ""), "", why) for n in plain.graph.nodes if n.target in LIVE_NORMS]
    return [f for f in folded if not f.how and f.name in there] + norms


def add_unwanted(plain: Plain, needs: Needs) -> None:
    """Elements of parameters that nothing reads are dead too."""
    for name, wanted in needs.wanted.items():
        tensor = plain.tensor(name)
        if isinstance(tensor, nn.Parameter) and tensor.dtype.is_floating_point and not bool(wanted.all()):
            dead = ~wanted
            plain.dead[name] = dead | plain.dead[name] if name in plain.dead else dead


@torch.no_grad()
def zero_dead(plain: Plain) -> None:
    """Dead elements become zero, and the statistics of dead channels those of a new layer."""
    for name, dead in plain.dead.items():
        tensor = plain.tensor(name)
        tensor.masked_fill_(dead.to(tensor.device), 0.0)
    for path, leaf in plain.leaves.items():
        if isinstance(leaf, nn.modules.batchnorm._NormBase) and leaf.weight is not None and leaf.running_mean is not None:
            dead = plain.dead.get(plain.parameter_name(path, "weight"))
            if dead is not None:
                leaf.running_mean.masked_fill_(dead.to(leaf.running_mean.device), 0.0)
                leaf.running_var.masked_fill_(dead.to(leaf.running_var.device), 1.0)


def _why(fill: float) -> str:
    if fill:
        return f"dead positions have to be {fill:g}, where a function is not defined at zero"
    return "what it masks is not zero there whatever the weights are, and something reads it"


def _reads_nothing(user: fx.Node, node: fx.Node, live: torch.Tensor, zeros: Zeros) -> bool:
    """Whether ``user`` is a layer whose weights are zero wherever the mask is."""
    site = zeros.kinds[user].site
    if site is None or site.x is not node or site.meaning.lookup:
        return False
    rank = len(zeros.picture[node].shape)
    dim = site.channel_dim(rank)
    live = compressed(live.reshape((1,) * (rank - live.dim()) + tuple(live.shape)))
    if any(live.shape[d] > 1 for d in range(rank) if d != dim):
        return False
    read = site.pattern(zeros.weight_dead(site)).any(0)
    return not bool((read & ~live.reshape(-1)).any())
