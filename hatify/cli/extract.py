"""``hatify extract``: one task as a plain torch program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import failures
from .saved import DebugOption, DirArgument, FactoryOption, JsonOption, check_outside, load_saved, tasks_of
from .steps import Steps, working

__all__ = ["extract"]

_ENDINGS = (".pt2", ".safetensors")


def extract(
    directory: DirArgument,
    task: Annotated[int, typer.Option(min=0, help="The finished task to take out.", show_default=False)],
    slim: Annotated[bool, typer.Option("--slim", help="Remove dead channels: smaller and faster.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="NAME.pt2 for torch.export.load, or NAME.safetensors for its weights.  \\[default: DIR-taskN.pt2]",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="Write ONNX to this file.", show_default=False, metavar="FILE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take one task of the model in DIR out, as a plain torch module with no hatify in it."""
    if out is not None and out.suffix not in _ENDINGS:
        raise typer.BadParameter(f"{out} ends neither with .pt2 nor with .safetensors", param_hint="--out")
    if out is None and onnx is None:
        out = _beside(directory, f"{directory.resolve().name or 'model'}-task{task}.pt2")
    with failures(debug):
        with working(debug) as steps:
            report = _run(steps, directory, task, slim, out, onnx, force, factory)
        written = [str(path) for path in (out, onnx) if path is not None]
        if as_json:
            typer.echo(json.dumps({**report, "written": written}, indent=2, default=str))
            return
        from .render import print_extraction

        print_extraction(report, written)


def _beside(directory: Path, name: str) -> Path:
    """``name`` where the command runs, or beside ``directory`` where it runs inside of it."""
    own = directory.resolve()
    return own.parent / name if Path.cwd().resolve().is_relative_to(own) else Path(name)


def _run(
    steps: Steps, directory: Path, task: int, slim: bool, out: Path | None, onnx: Path | None, force: bool, factory: str | None
) -> dict[str, Any]:
    from ..artifact.atomic import check_file

    for path in (out, onnx):
        if path is not None:
            check_file(path, overwrite=force)
            check_outside(path, directory)
    hat = load_saved(steps, directory, factory)
    steps("extract")
    from .. import extract as extract_task

    with tasks_of(directory):
        module = extract_task(hat, task, slim=slim)
    from ..lifecycle.export import exported, write_onnx, write_program, write_weights

    if out is not None and out.suffix == ".safetensors":
        steps("write")
        write_weights(module, out, force)
    if onnx is not None or (out is not None and out.suffix == ".pt2"):
        steps("export")
        program = exported(hat, module)
        if out is not None and out.suffix == ".pt2":
            write_program(program, out, force)
        if onnx is not None:
            steps("onnx")
            write_onnx(program, onnx, force)
    return module.extraction
