"""``hatify usage``: what tasks use of each layer, what they share, what is free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures
from .saved import DebugOption, DirArgument, FactoryOption, JsonOption, load_saved
from .steps import working

__all__ = ["usage"]


def usage(
    directory: DirArgument,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it to this picture (png, svg, pdf).", show_default=False, metavar="FILE")
    ] = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show how full the model in DIR is, layer by layer and task by task."""
    with failures(debug):
        with working(debug) as steps:
            hat = load_saved(steps, directory, factory)
            steps("count")
            from .. import usage as used_by

            used = used_by(hat)
            if plot is not None:
                steps("plot")
                used.plot(plot)
        if as_json:
            typer.echo(json.dumps({**used.to_dict(), "plot": None if plot is None else str(plot)}, indent=2))
            return
        from .render import print_with_facts

        facts = {"nearly full": ", ".join(used.nearly_full)} if used.nearly_full else {}
        print_with_facts(used, {**facts, **({} if plot is None else {"picture": str(plot)})})
