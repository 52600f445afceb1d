"""Labels of layers with weights, and of normalisations."""

from __future__ import annotations

from torch import fx, nn

from hatify.lifecycle.kinds import Kind
from hatify.lifecycle.labels.base import Labelled, Walk, along, live
from hatify.modules import live_norms


def weighted(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """A layer's outputs have labels of its own; a depthwise one passes its inputs' on."""
    site = kind.site
    rank = len(walk.picture[node].shape)
    dim = site.channel_dim(rank)
    if site.normalised:
        return walk.refuse(node, "its weight is normalised before use")
    if walk.is_shared(site):
        return walk.refuse(node, "its weight is used elsewhere too")
    x = None if site.meaning.lookup else walk.of[site.x]
    if x is not None and x.cut is not None and x.cut != dim:
        if x.cut > dim:
            return walk.refuse(node, "its input is cut along a dimension that it mixes")
        walk.keep_layer(node)
        return along(walk.uniform(x), rank, x.cut)
    if site.path is None and site.meaning.groups not in (1, site.inputs):
        return walk.refuse(node, "groups of a weight that is used by function")
    inputs = walk.uniform(x) if x is not None and x.cut is not None else None
    if site.path is not None and not site.meaning.lookup:
        walk.alike(walk.columns, node, live(1) if inputs is None else inputs)
    groups = site.meaning.groups
    if groups == site.inputs > 1:
        return walk.whole(node) if inputs is None else along(inputs.repeat_interleave(site.outputs // site.inputs), rank, dim)
    if inputs is not None and groups > 1:
        walk.classes.families.append(inputs.reshape(groups, -1))
    if site.outputs == 1:
        return walk.whole(node)
    own = walk.own[node] = walk.classes.fresh(site.outputs)
    if site.path is not None:
        walk.alike(walk.rows, node, own)
    walk.classes.families.append(own.reshape(groups, -1))
    return along(own, rank, dim)


def channel_norm(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Each channel is normalised on its own."""
    x = walk.of[node.all_input_nodes[0]]
    if x.cut is None:
        walk.alike(walk.rows, node, live(1))
        return walk.whole(node)
    if x.cut != 1 or walk.used_elsewhere(node.target):
        return walk.refuse(node, "statistics over a dimension that is cut")
    return along(walk.alike(walk.rows, node, walk.uniform(x)), x.ids.dim(), 1)


def plain_norm(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Statistics over all channels, dead ones included."""
    x = walk.of[node.all_input_nodes[0]]
    return x if x.cut not in kind.dims else walk.refuse(node, "its statistics count channels that are zero")


def live_norm(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Statistics over live channels: those of the smaller network. Groups keep as many channels each."""
    x = walk.of[node.args[0]]
    if x.cut is None:
        return walk.whole(node)
    rank = len(walk.picture[node].shape)
    if node.target is live_norms.group_norm:
        if x.cut != 1:
            return walk.refuse(node, "statistics over a dimension that is cut")
        own = walk.uniform(x)
        walk.classes.families.append(own.reshape(node.args[1], -1))
        return along(own, rank, 1)
    return along(walk.uniform(x), rank, x.cut)


def parametrised(walk: Walk, node: fx.Node) -> Labelled:
    """An activation with parameters: only one slope per channel is understood."""
    x = walk.of[node.all_input_nodes[0]]
    if x.cut is None:
        walk.alike(walk.rows, node, live(1))
        return walk.whole(node)
    leaf = walk.plain.leaves[node.target]
    if type(leaf) is not nn.PReLU or x.cut != 1:
        return walk.refuse(node, f"{type(leaf).__name__} has parameters that no rule cuts")
    return along(walk.alike(walk.rows, node, walk.uniform(x)), x.ids.dim(), 1)


def prelu(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    x = walk.of[node.args[0]]
    return x if x.cut is None else walk.refuse(node, "its slope belongs to channels")


__all__ = ["channel_norm", "live_norm", "parametrised", "plain_norm", "prelu", "weighted"]
