"""``hatify inspect``: the generated code, the gates of its nodes, one layer in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .convert import import_from_here
from .failures import failures
from .saved import DebugOption, FactoryOption, JsonOption, load_saved
from .steps import Steps, working

__all__ = ["inspect"]

_TASKS = 10


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A directory that convert wrote, or a model to convert now.",
            show_default=False,
        ),
    ],
    layer: Annotated[
        str | None,
        typer.Option(help="Say only what became of this layer.", show_default=False, metavar="PATH"),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(min=1, help=f"Number of tasks, for a MODEL.  \\[default: {_TASKS}]", show_default=False),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width of the images, for a MODEL.", show_default=False),
    ] = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the code of a converted model, the gates of each of its tensors, and the sizes that are fixed."""
    saved = (Path(model) / "config.json").is_file() and (Path(model) / "model.safetensors").is_file()
    for name, value in (("--tasks", tasks), ("--img-size", img_size)):
        if saved and value is not None:
            raise typer.BadParameter("a saved model has its own", param_hint=name)
    if factory is not None and not saved:
        raise typer.BadParameter("give the factory itself as MODEL", param_hint="--factory")
    with failures(debug):
        with working(debug) as steps:
            hat = load_saved(steps, Path(model), factory) if saved else _convert(steps, model, tasks or _TASKS, img_size)
            shown = _layer(hat, layer) if layer is not None else _whole(hat, model)
        if as_json:
            typer.echo(json.dumps(shown, indent=2, default=str))
        elif layer is not None:
            typer.echo(shown["description"])
        else:
            from .render import print_inspection

            print_inspection(shown)


def _convert(steps: Steps, model: str, tasks: int, img_size: int | None) -> Any:
    steps("import")
    from ..sources import find_example_inputs, parse_source

    import_from_here()
    source = parse_source(model, img_size)
    steps("build")
    original = source.build()
    args, kwargs = find_example_inputs(original, img_size=img_size)
    from .. import convert  # after all that can be refused at once

    return convert(original, tasks=tasks, example_inputs=kwargs or args, verify=False, progress=steps)


def _layer(hat: Any, path: str) -> dict[str, Any]:
    from ..inspection import describe_layer

    return {"layer": path, "description": describe_layer(hat, path)}


def _whole(hat: Any, model: str) -> dict[str, Any]:
    from ..inspection import node_table

    nodes = node_table(hat)
    return {
        "model": model,
        "tasks": hat.report.tasks,
        "code": hat.code,
        "nodes": nodes,
        "layers": hat.report.layers,
        "fixed_sizes": hat.report.fixed_sizes,
    }
