"""Module paths as a tree in which repeated blocks are one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Branch", "collapse", "grow"]


@dataclass
class Branch:
    """One part of a module path: its entries (usually one or none), what is below, how many it stands for."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)
    count: int = 1

    def likeness(self) -> Any:
        """Equal for branches that may be shown as one: all but order and numbers of parameters."""
        own = tuple(tuple(str(entry.get(key)) for key in ("was", "became", "rung", "reason")) for entry in self.entries)
        below = tuple((name, child.count, child.likeness()) for name, child in sorted(self.children.items()))
        return own, below


def grow(layers: list[dict[str, Any]]) -> Branch:
    """The tree of the entries' "path"."""
    root = Branch()
    for layer in layers:
        branch = root
        for part in str(layer["path"]).split("."):
            branch = branch.children.setdefault(part, Branch())
        branch.entries.append(dict(layer))
    return root


def collapse(branch: Branch) -> Branch:
    """Neighbouring numbered children that are alike become one, from the leaves up; parameters are added.

    Chains of single children are joined to one label, ``layer1.0``.
    """
    children = {name: collapse(child) for name, child in branch.children.items()}
    groups: list[tuple[list[str], list[Branch]]] = []
    for name, child in children.items():
        numbered = groups and name.isdigit() and groups[-1][0][-1].isdigit()
        if numbered and groups[-1][1][-1].likeness() == child.likeness():
            groups[-1][0].append(name)
            groups[-1][1].append(child)
        else:
            groups.append(([name], [child]))
    out = Branch(entries=branch.entries)
    for names, alike in groups:
        label, merged = names[0], _merge(alike)
        if len(names) > 1:
            label = f"{names[0]}-{names[-1]}" if _consecutive(names) else ",".join(names)
        elif len(merged.children) == 1 and not merged.entries and merged.count == 1:
            ((below, only),) = merged.children.items()
            if only.count == 1:
                label, merged = f"{label}.{below}", only
        out.children[label] = merged
    return out


def _consecutive(names: list[str]) -> bool:
    numbers = [int(name) for name in names]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _merge(alike: list[Branch]) -> Branch:
    if len(alike) == 1:
        return alike[0]
    first = alike[0]
    entries = [
        {**entry, "parameters": sum(branch.entries[index].get("parameters") or 0 for branch in alike)}
        for index, entry in enumerate(first.entries)
    ]
    children = {name: _merge([branch.children[name] for branch in alike]) for name in first.children}
    for name, child in children.items():
        child.count = first.children[name].count
    return Branch(entries, children, count=len(alike))
