"""How full a network is: what each task uses of each layer, what tasks share, and what is left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from hatify.errors import few
from hatify.learning.hooks import guard_of
from hatify.learning.network import Network, network_of
from hatify.lifecycle.counting import Sets, count, packed, weights_by_sets

NEARLY_FULL = 0.95
"""Share of locked weights from which a layer counts as nearly full."""
_SHOWN_TASKS = 10
_SHOWN_LAYERS = 3


class CapacityWarning(UserWarning):
    """A layer has hardly any weights left for new tasks."""


@dataclass
class LayerUsage:
    """One layer, or one weight that the network uses by function.

    Attributes:
        path: where it is.
        channels: output channels that its masks choose from; 0 where it has no mask of its own.
        weights: elements of its shared parameters, biases included.
        channels_by: how many channels are live for exactly these tasks.
        weights_by: how many weights exactly these tasks need.
        locked: weights that finished tasks keep; more than they need for ``locking="paper"``.
    """

    path: str
    channels: int
    weights: int
    channels_by: Sets
    weights_by: Sets
    locked: int

    def channels_used(self, *tasks: int) -> int:
        """Channels that are live for some of ``tasks``; for any task without arguments."""
        return _used(self.channels_by, tasks)

    def weights_used(self, *tasks: int) -> int:
        """Weights that some of ``tasks`` need; that any task needs without arguments."""
        return _used(self.weights_by, tasks)

    @property
    def shared(self) -> int:
        """Weights that several tasks need."""
        return sum(n for tasks, n in self.weights_by.items() if len(tasks) > 1)

    @property
    def free(self) -> int:
        """Weights that new tasks may still change."""
        return self.weights - self.locked

    @property
    def full(self) -> float:
        """Share of locked weights, between 0 and 1."""
        return self.locked / self.weights if self.weights else 0.0

    def to_dict(self, tasks: Iterable[int]) -> dict[str, Any]:
        return {
            "path": self.path,
            "channels": self.channels,
            "channels_used": {str(t): self.channels_used(t) for t in tasks},
            "channels_free": self.channels - self.channels_used(),
            "weights": self.weights,
            "weights_used": {str(t): self.weights_used(t) for t in tasks},
            "weights_by": {_spelled(s): n for s, n in _ordered(self.weights_by) if s},
            "shared": self.shared,
            "locked": self.locked,
            "free": self.free,
        }


@dataclass
class Usage:
    """What finished tasks use of a network's shared weights. Prints as a table; ``to_dict`` and ``plot`` are its other forms.

    Attributes:
        tasks: the finished tasks.
        layers: in the order of the network.
        own: for every finished task, the elements of its own copies (norms, heads, raw parameters), which are not shared.
    """

    tasks: list[int]
    layers: list[LayerUsage]
    own: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, path: str) -> LayerUsage:
        return next(layer for layer in self.layers if layer.path == path)

    @property
    def total(self) -> LayerUsage:
        """All layers as one."""
        channels, weights = Sets(), Sets()
        for layer in self.layers:
            channels.update(layer.channels_by)
            weights.update(layer.weights_by)
        sums = [sum(getattr(layer, name) for layer in self.layers) for name in ("channels", "weights", "locked")]
        return LayerUsage("all layers", *sums[:2], channels, weights, sums[2])

    @property
    def nearly_full(self) -> list[str]:
        """Paths of layers of which nearly all weights are locked."""
        return [layer.path for layer in self.layers if layer.weights and layer.full >= NEARLY_FULL]

    def filled(self) -> list[tuple[int, int]]:
        """``(task, weights used by it and the tasks before it)``, in the order of their numbers."""
        total = self.total
        return [(task, total.weights_used(*self.tasks[: place + 1])) for place, task in enumerate(self.tasks)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; sets of tasks are spelled ``0+2``."""
        total = self.total
        return {
            "tasks": self.tasks,
            "total": total.to_dict(self.tasks),
            "filled": [{"task": t, "used": n, "share": n / max(total.weights, 1)} for t, n in self.filled()],
            "own": {str(t): n for t, n in self.own.items()},
            "nearly_full": self.nearly_full,
            "layers": [layer.to_dict(self.tasks) for layer in self.layers],
        }

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws how much of each layer each task uses, and how the network filled up task by task, to a picture file (the ending of
        ``path`` gives its kind).

        Raises:
            HatifyError: matplotlib is not installed, or cannot write there.
        """
        from hatify.lifecycle.capacity_plot import draw

        return draw(self, path)

    def __repr__(self) -> str:
        total = self.total
        used = ", ".join(f"after task {t} {_share(n, total.weights)}" for t, n in self.filled()) or "no finished task"
        return f"<usage of {total.weights:,} shared weights: {used}; free {total.free:,}>"

    def __rich__(self) -> Group:
        table = Table(title="weights used, by layer and task", title_justify="left")
        table.add_column("layer", overflow="fold")
        shown = self.tasks[-_SHOWN_TASKS:]
        for name in ("channels", "weights", *(f"task {t}" for t in shown), "shared", "free"):
            table.add_column(name, justify="right")
        for layer in (*self.layers, None):
            if layer is None:
                table.add_section()
                layer = self.total
            shares = [_share(layer.weights_used(t), layer.weights) for t in shown]
            free = Text(_share(layer.free, layer.weights), style="red" if layer.full >= NEARLY_FULL else "")
            channels = f"{layer.channels_used():,}/{layer.channels:,}" if layer.channels else ""
            table.add_row(Text(layer.path), channels, f"{layer.weights:,}", *shares, _share(layer.shared, layer.weights), free)
        total, before = self.total, 0
        lines = []
        for task, used in self.filled():
            new = _share(used - before, total.weights)
            lines.append(f"after task {task}: {_share(used, total.weights)} used, {new} new, {self.own.get(task, 0):,} of its own")
            before = used
        return Group(table, Text("\n".join(lines) or "no task is finished: all is free"))


def usage(hat: nn.Module) -> Usage:
    """What the finished tasks of a network use of each layer, what they share, and what is free.

    Args:
        hat: a HAT model, or a network written by hand from HAT layers (which must have been called with a task once).

    Returns:
        Counts of channels and weights; see :class:`Usage`. A weight is used by a task that has both its output and its input live.

    Warns:
        CapacityWarning: nearly all weights of a layer are locked, so that new tasks can hardly change it.

    Raises:
        TaskError: the network has no HAT layers.

    >>> print(hatify.usage(hat)["layer1.0.conv1"].free)  # doctest: +SKIP
    18432
    """
    network = network_of(hat)
    guard_of(hat).restore()  # masks as they were finished
    tasks = sorted(network.finished)
    own = {t: sum(c.numel() for c in network.copies(t) if isinstance(c, nn.Parameter)) for t in tasks}
    found = Usage(tasks, _layers(network, tasks), own)
    if found.nearly_full:
        warnings.warn(
            f"nearly all weights are locked in {few(found.nearly_full, _SHOWN_LAYERS)}: new tasks can hardly change them. Stronger "
            "regularization leaves more free; hatify.forget_task or hatify.prune frees what single tasks use",
            CapacityWarning,
            stacklevel=2,
        )
    return found


def _layers(network: Network, tasks: list[int]) -> list[LayerUsage]:
    weights = weights_by_sets(network.module, tasks)
    locked = {name: sum(n for s, n in sets.items() if s) for name, sets in weights.items()}
    if getattr(network.module, "settings", {}).get("locking") == "paper":  # equation 2 keeps more than what is needed
        locked = {name: int(lock.sum()) for name, lock in network.locks(tasks).items()}
    order = {name: place for place, (name, _) in enumerate(network.module.named_parameters(remove_duplicate=False))}
    by_function = {
        name.rpartition(".")[0] for name in weights if name in network.maskers
    }  # what uses weights of its own, not a layer
    layers: dict[str, LayerUsage] = {}
    for name in sorted(weights, key=order.__getitem__):
        owner = name.rpartition(".")[0]
        path = owner if owner and owner not in by_function else name
        layer = layers.setdefault(path, LayerUsage(path, 0, 0, Sets(), Sets(), 0))
        layer.weights += sum(weights[name].values())
        layer.weights_by.update(weights[name])
        layer.locked += locked[name]
    for name, masker in network.maskers.items():
        bits = torch.stack([masker.live(task).cpu() for task in (*tasks, 0)])[:-1]  # also for no task at all
        path = name
        while path not in layers and path:  # a layer with several maskers, each with a name below its path
            path = path.rpartition(".")[0]
        layer = layers[path] if path in layers else layers.setdefault(name, LayerUsage(name, 0, 0, Sets(), Sets(), 0))
        layer.channels += masker.channels
        layer.channels_by.update(count(packed(bits), tasks))
    return list(layers.values())


def _used(sets: Sets, tasks: tuple[int, ...]) -> int:
    return sum(n for needed, n in sets.items() if (needed & set(tasks) if tasks else needed))


def _ordered(sets: Sets) -> list[tuple[frozenset[int], int]]:
    return sorted(sets.items(), key=lambda item: (len(item[0]), sorted(item[0])))


def _spelled(tasks: frozenset[int]) -> str:
    return "+".join(map(str, sorted(tasks)))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
