"""What commands on a saved model share: reading it, and putting it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .convert import import_from_here
from .steps import Steps

__all__ = [
    "DebugOption", "DirArgument", "FactoryOption", "JsonOption", "OutOption", "check_outside", "load_saved", "replace_saved", "tasks_of",
]  # fmt: skip

DirArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that convert wrote.", show_default=False)]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        help="package.module:factory of the original, for a DIR made of your own code.", show_default=False, metavar="FACTORY"
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Write there and leave DIR as it is.  \\[default: DIR]", show_default=False, metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]


def load_saved(steps: Steps, path: Path, factory: str | None) -> Any:
    """The model in a directory."""
    steps("load")
    from ..artifact import load
    from ..sources import parse_source

    import_from_here()
    return load(path, factory=None if factory is None else parse_source(factory).build)


@contextmanager
def tasks_of(path: Path) -> Iterator[None]:
    """Errors about tasks name the directory, and a command in place of a call."""
    from ..errors import TaskError

    try:
        yield
    except TaskError as error:
        fix = f"hatify usage {path} shows its finished tasks; more are trained in Python: hat = hatify.load({str(path)!r})"
        raise TaskError(error.what, where=error.where or str(path), why=error.why, fix=fix) from error


def check_outside(file: Path, directory: Path) -> None:
    """Whether a file goes elsewhere than among those of a saved model, which hold nothing else.

    Raises:
        ArtifactError: it does not.
    """
    from ..errors import ArtifactError

    if file.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(
            f"{file} is not written",
            where=str(directory.resolve()),
            why="the directory of a model holds its own files and no others",
            fix=f"give another place: {directory.resolve().parent / file.name}",
        )


def check_replaceable(path: Path, out: Path | None) -> Path:
    """Where a changed model goes. Asked before the work: nothing of others may be lost with the old directory.

    Raises:
        ArtifactError: the directory holds files that are not the model's, or cannot be written.
    """
    from ..artifact.atomic import check_target
    from ..artifact.directory import check_only_ours

    if out is not None and out.resolve() != path.resolve():
        return check_target(out)
    check_only_ours(path, "--out OTHER writes another directory; or move these files away")
    return check_target(path, overwrite=True)


def replace_saved(steps: Steps, hat: Any, target: Path) -> Path:
    """Writes the model there; an interrupted run leaves what was there whole."""
    steps("save")
    from ..artifact import save

    return save(hat, target, overwrite=target.exists())
