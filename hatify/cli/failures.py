"""Failures on one screen: what, where, why, fix. Tracebacks are for ``--debug``."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from ..errors import HatifyError

__all__ = ["failures", "quiet", "show"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_LINES = 18
_WIDTH = 400


@contextmanager
def failures(debug: bool) -> Iterator[None]:
    """Turns what is raised in the block into a message on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):  # under typer's names: newer ones are no classes of click
        raise  # usage errors, and exits that have said what they had to say
    except KeyboardInterrupt as error:
        _trace(debug)
        show(HatifyError("interrupted", why="nothing was written"))
        raise typer.Exit(INTERRUPTED) from error
    except HatifyError as error:
        _trace(debug)
        show(error)
        raise typer.Exit(FAILED) from error
    except BrokenPipeError as error:  # the reader of our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from error
    except OSError as error:
        _trace(debug)
        where = str(error.filename) if error.filename else None
        show(HatifyError("the system refused", where=where, why=error.strerror or str(error)))
        raise typer.Exit(FAILED) from error
    except Exception as error:
        _trace(debug)
        show(
            HatifyError(
                f"unexpected {type(error).__name__}",
                why=str(error).strip() or "no message",
                fix="run the same command with --debug to see where; this may be a mistake of hatify",
            )
        )
        raise typer.Exit(FAILED) from error


def show(error: HatifyError) -> None:
    """Prints an error to stderr. Lines are not wrapped, so that the fix can be copied."""
    console = Console(stderr=True, highlight=False)
    text = Text("error: ", style="bold red").append(error.what, style="bold")
    for label, part in error.parts():
        lines = part.splitlines()
        if len(lines) > _LINES:
            lines = [*lines[:_LINES], f"({len(lines) - _LINES} more lines)"]
        lines = [line if len(line) <= _WIDTH else line[:_WIDTH] + " ..." for line in lines]
        text.append(f"\n  {label + ':':<7}", style="cyan").append(("\n" + " " * 9).join(lines), style="default")
    console.print(text, soft_wrap=True)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Keeps the libraries' warnings and log lines off the screen, except with ``--debug``."""
    if debug:
        yield
        return
    # Read by the libraries when they are imported, which no command has done yet.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
