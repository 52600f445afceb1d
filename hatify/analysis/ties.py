"""Residual streams: which maskers have to share one mask, if the layers that write to a stream are to keep the same channels of it."""

from __future__ import annotations

from hatify.analysis.plan import Analysis


def ties(analysis: Analysis, untied: set[str], known: dict[str, str]) -> dict[str, str]:
    """For every masker that meets another one in an OR, channel by channel, the one that stands for all of them.

    Layers that write to one residual stream have a mask each, and the stream is live where any of them is. Tied, they have one, the
    sum of equally masked tensors stays pending, and a task's stream is as narrow as its masks. Any choice is exact: what is locked follows
    from the gates, and those follow from the maskers.

    Args:
        analysis: of the network with the ties that are known.
        untied: maskers that keep to themselves (a recurrent layer's, which it applies within its own steps).
        known: the result for the ties found so far.
    """
    table = analysis.table
    leader = {name: name for name in analysis.sizes}
    order = {name: number for number, name in enumerate(analysis.sizes)}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for gate, key in enumerate(table.keys):
        atoms = table.atoms_in(gate) if key[0] == "or" else ()
        if len({channel for _, channel in atoms}) != 1:
            continue  # joined across channels: no stream that is added up channel by channel
        names = sorted({name for name, _ in atoms} - untied, key=order.__getitem__)
        for name in names[1:]:
            a, b = sorted((find(names[0]), find(name)), key=order.__getitem__)
            if analysis.sizes[a] == analysis.sizes[b]:
                leader[b] = a
    found = {name: find(name) for name in leader if find(name) != name}
    return {**{name: find(stands) for name, stands in known.items()}, **found}
