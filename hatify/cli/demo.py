"""``hatify demo``: five tasks learned in a row, none forgotten, then one forgotten on purpose."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .failures import FAILED, failures, quiet
from .saved import DebugOption, JsonOption

__all__ = ["demo"]


def demo(
    plot: Annotated[
        Path | None, typer.Option(help="Draw the capacity used to this picture.", show_default=False, metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and the split.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn ten digits as five tasks with a small ResNet, forget nothing, then forget one task on purpose.

    Offline, a minute or two on two cores. Exit code 1 if an output that must not change did.
    """
    with failures(debug):
        with quiet(debug), contextlib.redirect_stdout(sys.stderr), _progress() as progress:
            bar = progress.add_task("import")
            from ..artifact.atomic import check_file
            from ..demo import demonstrate

            if plot is not None:
                check_file(plot, overwrite=True)
            shown, used = demonstrate(seed, lambda step, share: progress.update(bar, description=step, completed=100 * share))
            if plot is not None:
                used.plot(plot)
        if as_json:
            typer.echo(json.dumps({**shown.to_dict(), "plot": None if plot is None else str(plot)}, indent=2))
        else:
            from .render import print_demonstration

            print_demonstration(shown, plot)
        if not (shown.learned_equal and shown.forgotten_equal):
            raise typer.Exit(FAILED)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)
