"""The ``hatify`` command: what it offers, and nothing of how."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .convert import convert
from .demo import demo
from .extract import extract
from .failures import failures
from .forget import forget, prune
from .inspect import inspect
from .usage import usage
from .verify import verify
from .zoo import zoo

__all__ = ["app", "main"]

app = typer.Typer(
    name="hatify",
    help="Convert trained PyTorch models to learn task after task without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, inspect, verify, usage, forget, prune, extract, demo):
    app.command()(command)
app.add_typer(zoo, name="zoo")


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"hatify {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    try:
        with failures(debug=False):  # what is raised outside the commands, such as a closed pipe under --help
            app()
    except typer.Exit as error:
        sys.exit(error.exit_code)
