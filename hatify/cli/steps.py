"""Progress on stderr: the name of the step that runs, and how long each one took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import TracebackType

from rich.console import Console

from .failures import quiet

__all__ = ["Steps", "working"]


@contextmanager
def working(debug: bool) -> Iterator[Steps]:
    """Around a command's work: its steps on stderr, with whatever libraries print, so that stdout holds the result alone."""
    with quiet(debug), Steps() as steps, redirect_stdout(sys.stderr):
        yield steps


class Steps:
    """``steps("capture")`` ends the step before and begins this one. A context manager.

    A terminal gets a spinner; a log gets one line per step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("starting")
        self._current: tuple[str, float] | None = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()
        self._status.stop()

    def __call__(self, step: str) -> None:
        self._finish()
        self._current = (step, time.perf_counter())
        if self._console.is_terminal:
            self._status.update(f"{step} ...")
        else:
            self._console.print(f"{step} ...", style="dim", soft_wrap=True)

    def _finish(self) -> None:
        if self._current is not None:
            step, start = self._current
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
            self._current = None
