"""The zoo for people: tables, and the progress of a sweep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..zoo.page import sizes, summary
from ..zoo.snapshots import HEAD, hat_share, reason, snapshot_of
from .render import _console

__all__ = ["Bar", "print_sweep", "print_zoo"]

_STYLES = {"proved": "green", "converted": "cyan", "refused": "yellow", "failed": "bold red"}
_SHARES = ("hat", "row-locked", "task-indexed", HEAD, "frozen")


class Bar:
    """Hears a sweep: a bar on a terminal, a line per model in a log."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("zoo", total=total)
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.stop()

    def began(self, entry: Any) -> None:
        self._progress.update(self._task, description=entry.key)

    def ended(self, record: Any, again: bool) -> None:
        self._progress.advance(self._task)
        self._counts[record.verdict] += 1
        if again:
            line = Text(f"{record.verdict:<10}", style=_STYLES[record.verdict]) + Text(f"{record.key:<48}")
            line += Text(f"{sum(record.seconds.values()):7.1f} s", style="dim")
            if record.reason:
                line += Text("  " + _first(record.reason.get("what", "")))
            self._progress.console.print(line, soft_wrap=True)


def print_zoo(snapshots: list[dict[str, Any]]) -> None:
    """What the snapshots say, a row for each model."""
    console = _console()
    for source in dict.fromkeys(lines["source"] for lines in snapshots):
        of_source = [lines for lines in snapshots if lines["source"] == source]
        console.print(_table(source, of_source))
        console.print(summary(of_source) + "\n", soft_wrap=True)
    if not snapshots:
        console.print("no snapshots: hatify zoo run --update writes them")


def _table(source: str, snapshots: list[dict[str, Any]]) -> Table:
    table = Table(title=source, title_justify="left", box=None, padding=(0, 1))
    for column in ("family", "model", ""):
        table.add_column(column, no_wrap=True)
    for column in (*_SHARES, "tightness"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fixed sizes", overflow="fold")
    for lines in snapshots:
        row = [lines["family"], lines["model"], Text(lines["verdict"], style=_STYLES[lines["verdict"]])]
        if hat_share(lines) is None:
            table.add_row(*row, *[""] * 6, Text(reason(lines), style="dim"))
            continue
        tight = lines.get("tightness")
        table.add_row(*row, *(f"{100 * s:.1f} %" for s in _shares(lines)), "" if tight is None else f"{tight:.3f}", sizes(lines))
    return table


def _shares(lines: dict[str, Any]) -> list[float]:
    """The share of parameters on each rung, with output layers on their own."""
    counts = {rung: lines["rungs"][rung]["parameters"] for rung in lines["rungs"]}
    counts[HEAD] = lines["task-indexed because"].get(HEAD, 0)
    counts["task-indexed"] -= counts[HEAD]
    total = max(sum(counts.values()), 1)
    return [counts[name] / total for name in _SHARES]


def print_sweep(found: list[Any], written: list[Path]) -> None:
    """The summary of a sweep: what failed and what was refused, with the reasons, and the counts of each library."""
    console = _console()
    for verdict in ("refused", "failed"):
        for record in (r for r in found if r.verdict == verdict):
            console.print(Text(f"{verdict}  ", style=_STYLES[verdict]) + Text(record.key, style="bold"), soft_wrap=True)
            for part in ("what", "where", "why", "fix"):
                if text := record.reason.get(part):
                    console.print(
                        Text(f"  {part + ':':<7}", style="cyan") + Text(text.replace("\n", "\n" + " " * 9)), soft_wrap=True
                    )
    for source in dict.fromkeys(record.source for record in found):
        lines = [snapshot_of(record) for record in found if record.source == source]
        console.print(Text(f"{source:<14}", style="cyan") + Text(summary(lines)), soft_wrap=True)
    if written:
        console.print(
            Text(f"{'written':<14}", style="cyan") + Text(f"{len(written)} files in {written[-1].parent}"), soft_wrap=True
        )


def _first(text: str) -> str:
    return (text.splitlines() or [""])[0][:160]
