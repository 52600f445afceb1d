"""What was forgotten, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

KINDS = ("weights", "copies", "statistics", "masks")


class Count(NamedTuple):
    """Elements of one tensor that were reset, and how many it has. ``kind`` is ``weights`` (shared by tasks), ``copies`` (parameters of
    this task alone), ``statistics`` (buffers of this task alone) or ``masks`` (mask embeddings)."""

    count: int
    total: int
    kind: str


class Forgotten(Mapping[str, Count]):
    """Counts by parameter, in the order of the network; a shared parameter of which nothing is reset is there with count 0.

    Attributes:
        tasks: the tasks that were forgotten.
        kept: the finished tasks that were not.
        reset: what weights went back to, ``initial`` or ``pretrained``.
        dry_run: nothing was written.
    """

    def __init__(self, counts: dict[str, Count], tasks: list[int], kept: list[int], reset: str, dry_run: bool) -> None:
        self._counts = counts
        self.tasks, self.kept, self.reset, self.dry_run = tasks, kept, reset, dry_run

    def __getitem__(self, name: str) -> Count:
        return self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def of(self, kind: str) -> Count:
        """The sum over all tensors of one kind."""
        found = [c for c in self.values() if c.kind == kind]
        return Count(sum(c.count for c in found), sum(c.total for c in found), kind)

    @property
    def count(self) -> int:
        """Elements that were reset."""
        return sum(c.count for c in self.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "tasks": self.tasks,
            "kept": self.kept,
            "reset": self.reset,
            "dry_run": self.dry_run,
            "sums": {kind: {"count": self.of(kind).count, "total": self.of(kind).total} for kind in KINDS},
            "parameters": {name: c._asdict() for name, c in self.items()},
        }

    def __repr__(self) -> str:
        weights = self.of("weights")
        own = ", ".join(f"{self.of(kind).count:,} {kind}" for kind in KINDS[1:])
        return f"<{self._title()}: {weights.count:,} of {weights.total:,} shared weights; {own}>"

    def _title(self) -> str:
        tasks = ", ".join(map(str, self.tasks)) or "none"
        kept = ", ".join(map(str, self.kept)) or "none"
        verb = "would be forgotten" if self.dry_run else "forgotten"
        return f"tasks {verb}: {tasks} (kept: {kept})"

    def __rich__(self) -> Group:
        table = Table(title=self._title(), title_justify="left")
        table.add_column("parameter", overflow="fold")
        for column in ("reset", "of", "share"):
            table.add_column(column, justify="right")
        for name, c in self.items():
            if c.kind == "weights":
                table.add_row(Text(name), f"{c.count:,}", f"{c.total:,}", f"{100 * c.count / max(c.total, 1):.1f} %")
        table.add_section()
        for kind in KINDS:
            c = self.of(kind)
            label = "all shared weights" if kind == "weights" else f"{kind} of the forgotten tasks alone"
            table.add_row(label, f"{c.count:,}", f"{c.total:,}", f"{100 * c.count / max(c.total, 1):.1f} %")
        return Group(
            table, Text("nothing was written: a dry run", style="yellow") if self.dry_run else Text(f"reset to {self.reset}")
        )
