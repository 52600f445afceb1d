"""``hatify forget`` and ``hatify prune``: single tasks go, the others stay to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import failures
from .saved import (
    DebugOption,
    DirArgument,
    FactoryOption,
    JsonOption,
    OutOption,
    check_replaceable,
    load_saved,
    replace_saved,
    tasks_of,
)
from .steps import working

__all__ = ["forget", "prune"]

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only count; write nothing.")]
PretrainedOption = Annotated[
    Path | None,
    typer.Option(
        "--pretrained",
        metavar="FILE",
        show_default=False,
        help="Reset to the weights in this checkpoint of the original, not to what its layers start from.",
    ),
]


def forget(
    directory: DirArgument,
    task: Annotated[int, typer.Option(min=0, help="The task to forget.", show_default=False)],
    dry_run: DryRunOption = False,
    pretrained: PretrainedOption = None,
    out: OutOption = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Forget one task of the model in DIR.

    What only this task uses goes back to where it started, and another task can be learned in its place. The outputs of
    all other tasks stay the same to the last bit.
    """

    def run(hat: Any, how: dict[str, Any]) -> Any:
        from .. import forget_task

        return forget_task(hat, task, **how)

    _change(run, directory, dry_run, pretrained, out, factory, as_json, debug)


def prune(
    directory: DirArgument,
    keep: Annotated[str, typer.Option(metavar="N,N,...", help="Tasks to keep, such as 0,1.", show_default=False)],
    dry_run: DryRunOption = False,
    pretrained: PretrainedOption = None,
    out: OutOption = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Forget all finished tasks of the model in DIR but those to keep."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", keep):
        raise typer.BadParameter(f"{keep!r} is no list of tasks, such as 0,1", param_hint="--keep")
    kept = [int(task) for task in keep.split(",")]

    def run(hat: Any, how: dict[str, Any]) -> Any:
        from .. import prune as prune_tasks

        return prune_tasks(hat, kept, **how)

    _change(run, directory, dry_run, pretrained, out, factory, as_json, debug)


def _change(
    run: Callable[[Any, dict[str, Any]], Any],
    directory: Path,
    dry_run: bool,
    pretrained: Path | None,
    out: Path | None,
    factory: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    with failures(debug):
        with working(debug) as steps:
            target = None if dry_run else check_replaceable(directory, out)
            hat = load_saved(steps, directory, factory)
            steps("forget")
            reset = _reset(pretrained, hat)
            with tasks_of(directory):
                result = run(hat, {"dry_run": dry_run, **reset})
            path = None if target is None else replace_saved(steps, hat, target)
        if as_json:
            typer.echo(json.dumps({**result.to_dict(), "path": None if path is None else str(path)}, indent=2))
            return
        from .render import print_with_facts

        print_with_facts(result, {} if path is None else {"written to": str(path)})


def _reset(checkpoint: Path | None, hat: Any) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    from ..checkpoints import read_checkpoint

    return {"reset": "pretrained", "state_dict": read_checkpoint(checkpoint, hat)}
