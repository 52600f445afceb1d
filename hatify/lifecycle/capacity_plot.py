"""Capacity as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hatify.errors import HatifyError

if TYPE_CHECKING:
    from hatify.lifecycle.capacity import Usage

_MOST_LABELS = 60


def draw(usage: Usage, path: str | os.PathLike[str]) -> Path:
    """See :meth:`Usage.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HatifyError("a picture needs matplotlib", why="it is not installed", fix='pip install "hatify[plot]"') from error
    layers = [layer for layer in usage.layers if layer.weights]
    figure = Figure(figsize=(8 + 0.3 * len(usage.tasks), 3.5 + 0.14 * min(len(layers), _MOST_LABELS)), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no display, and none of the user's own settings of pyplot
    heat, curve = figure.subplots(1, 2, width_ratios=[3, 2])
    shares = [[100 * layer.weights_used(task) / layer.weights for task in usage.tasks] for layer in layers]
    if usage.tasks and layers:
        image = heat.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=heat, label="weights used, %")
    step = -(-len(layers) // _MOST_LABELS) or 1
    heat.set_yticks(range(0, len(layers), step), [layer.path for layer in layers][::step], fontsize=6)
    heat.set_xticks(range(len(usage.tasks)), usage.tasks)
    heat.set(xlabel="task", title="what each task uses")
    total = usage.total
    places = range(len(usage.tasks))
    filled = [100 * used / max(total.weights, 1) for _, used in usage.filled()]
    own = [100 * total.weights_used(task) / max(total.weights, 1) for task in usage.tasks]
    curve.bar(places, own, color="lightsteelblue", label="used by the task")
    curve.plot(places, filled, "o-", color="darkblue", label="used so far")
    curve.set_xticks(places, usage.tasks)
    curve.set(ylim=(0, 105), xlabel="task", ylabel="shared weights, %", title="how the network filled up")
    curve.legend(loc="upper left", fontsize=8)
    target = Path(path)
    try:
        canvas.print_figure(target)
    except (OSError, ValueError) as error:  # no such directory, no such kind of picture
        raise HatifyError("the picture could not be written", where=str(target), why=str(error), fix="plot('usage.png')") from error
    return target
