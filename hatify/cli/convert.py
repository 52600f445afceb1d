"""``hatify convert``: a model by name to a directory on disk."""

from __future__ import annotations

import json
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import failures
from .steps import Steps, working

__all__ = ["convert"]

_TASKS = 10


class Heads(StrEnum):
    task_indexed = "task-indexed"
    hat = "hat"


class Dtype(StrEnum):
    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Locking(StrEnum):
    exact = "exact"
    paper = "paper"


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm name, torchvision:NAME, transformers:DIR, or package.module:factory.",
            show_default=False,
        ),
    ],
    tasks: Annotated[int | None, typer.Option(min=1, help=f"Number of tasks.  \\[default: {_TASKS}]", show_default=False)] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes of each task, such as 2,2,3.", show_default=False, metavar="N,N,..."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write.  \\[default: NAME-hatN]", show_default=False, metavar="DIR"),
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images.", show_default=False)] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the library's weights.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Start from the weights in this file.", show_default=False, metavar="FILE"),
    ] = None,
    heads: Annotated[Heads, typer.Option(help="One head per task, or a shared, masked one.")] = Heads.task_indexed,
    locking: Annotated[Locking, typer.Option(help="Which weights a task locks.")] = Locking.exact,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Store weights in this type.  \\[default: the model's own]", show_default=False)
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the proof of parity and zero drift.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")] = False,
) -> None:
    """Convert MODEL and write it to a directory.

    The conversion is proved by running it: with no task it equals the original to the bit, and a finished
    task does not change whatever is trained later. If the proof fails, nothing is written.
    """
    wanted = _tasks(tasks, classes)
    if pretrained and checkpoint is not None:
        raise typer.BadParameter("give --pretrained or --checkpoint, not both", param_hint="--checkpoint")
    target = out or Path(f"{short_name(model)}-hat{wanted if isinstance(wanted, int) else len(wanted)}")
    with failures(debug):
        with working(debug) as steps:
            hat, path = _run(steps, model, wanted, target, force, img_size, pretrained, checkpoint,
                             heads.value, locking.value, not no_verify, dtype and dtype.value)  # fmt: skip
        weights = "pretrained" if pretrained else f"checkpoint {checkpoint}" if checkpoint else "random"
        _print(hat, model, weights, path, {**steps.seconds, **hat.report.seconds}, as_json)


def _run(
    steps: Steps,
    model: str,
    tasks: int | list[int],
    target: Path,
    force: bool,
    img_size: int | None,
    pretrained: bool,
    checkpoint: Path | None,
    heads: str,
    locking: str,
    verify: bool,
    dtype: str | None,
) -> tuple[Any, Path]:
    """The converted model, and where it was written."""
    steps("import")
    from ..artifact import save
    from ..artifact.atomic import check_target
    from ..artifact.casting import named
    from ..sources import find_example_inputs, parse_source

    check_target(target, overwrite=force)  # before the work, not after it
    import_from_here()
    source = parse_source(model, img_size)
    steps("build")
    original = source.build(pretrained=pretrained, checkpoint=checkpoint)
    args, kwargs = find_example_inputs(original, img_size=img_size)
    from .. import convert as convert_model  # after all that can be refused at once

    hat = convert_model(
        original,
        tasks=tasks,
        example_inputs=kwargs or args,
        heads=heads,
        locking=locking,
        verify=verify,
        progress=steps,
    )
    hat.source = source
    steps("save")
    return hat, save(hat, target, overwrite=force, dtype=None if dtype is None else named(dtype))


def _tasks(tasks: int | None, classes: str | None) -> int | list[int]:
    if classes is None:
        return tasks or _TASKS
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", classes) or 0 in (counts := [int(n) for n in classes.split(",")]):
        raise typer.BadParameter(f"{classes!r} is no list of numbers above 0, such as 2,2,3", param_hint="--classes")
    if tasks is not None and tasks != len(counts):
        raise typer.BadParameter(f"{len(counts)} class counts for {tasks} tasks", param_hint="--classes")
    return counts


def short_name(model: str) -> str:
    """The last part of a model's name, fit for a file name."""
    name = model.rstrip("/").rpartition(":")[2].rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name).strip(".-") or "model"


def import_from_here() -> None:
    """A console script has its own directory on the path; ``package.module:factory`` means the user's."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _print(hat: Any, model: str, weights: str, path: Path, seconds: dict[str, float], as_json: bool) -> None:
    if as_json:
        proof = hat.verification
        report = {
            "model": model,
            "weights": weights,
            "path": str(path),
            "report": hat.report.to_dict(),
            "verification": None if proof is None else proof.to_dict(),
            "seconds": seconds,
        }
        typer.echo(json.dumps(report, indent=2, default=str))
        return
    from .render import print_conversion

    print_conversion(hat, model, weights, path, seconds)
