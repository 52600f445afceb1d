"""``hatify zoo``: which models convert, and the proof of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import HatifyError
from .failures import FAILED, INTERRUPTED, failures, quiet, show
from .saved import DebugOption, JsonOption

__all__ = ["zoo"]

zoo = typer.Typer(help="What converts, on which rungs, with which fixed sizes; `hatify zoo run` proves it.", no_args_is_help=False)


class Library(StrEnum):
    timm = "timm"
    torchvision = "torchvision"
    transformers = "transformers"


SourceOption = Annotated[Library | None, typer.Option("--source", help="Only models of this library.", show_default=False)]


@zoo.callback(invoke_without_command=True)
def listing(context: typer.Context, source: SourceOption = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What converts, on which rungs, with which fixed sizes: the snapshots that ship with hatify."""
    if context.invoked_subcommand is not None:
        return
    with failures(debug):
        from ..zoo.snapshots import read_all

        snapshots = [lines for lines in read_all() if source in (None, lines["source"])]
        if as_json:
            typer.echo(json.dumps(snapshots, indent=2))
            return
        from .render_zoo import print_zoo

        print_zoo(snapshots)


@zoo.command()
def run(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]", help="A name, a family or a pattern such as 'resnet*'. \\[default: one model per family]"
        ),
    ] = None,
    source: SourceOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    every: Annotated[bool, typer.Option("--all", help="Every name, not one model per family.")] = False,
    tightness: Annotated[bool, typer.Option("--tightness", help="Also measure how many locked weights count (slow).")] = False,
    convert_only: Annotated[bool, typer.Option("--convert-only", help="Convert, prove nothing.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Write the snapshots, with --all also the list of names.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what has a result of the same code.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each model.", metavar="SECONDS")] = 1800,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes after which no model is begun. \\[default: none]", metavar="MINUTES", show_default=False),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.5, help="GB for each process. \\[default: its share of the machine's; none for --convert-only]", metavar="GB"
        ),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--records", help="Where results are kept. \\[default: ~/.cache/hatify/zoo]", metavar="DIR")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert and prove models: parity in eval and train mode and without gradients, at three batch sizes, zero drift, state-dict keys.

    Each model has a process of its own, with random weights; nothing is downloaded. A sweep that is interrupted goes on where it was; what
    has a result of the same code is not run again. With a budget, names that the list has no result for come first. Exit code 1 if
    anything fails; a refusal with its reason is no failure.
    """
    if convert_only and tightness:
        raise typer.BadParameter("tightness is part of the proof", param_hint="--convert-only")
    asked = "conversion" if convert_only else "proof and tightness" if tightness else "proof"
    with failures(debug):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if update:
            from ..zoo.snapshots import check_writable

            check_writable()
        with quiet(debug), contextlib.redirect_stdout(sys.stderr):
            found = _sweep(pattern, source, every, asked, directory, jobs, timeout, memory, force, budget)
        written = _update(found, every) if update else []
        if as_json:
            typer.echo(json.dumps([record.to_dict() for record in found], indent=2))
        else:
            from .render_zoo import print_sweep

            print_sweep(found, written)
        if any(record.verdict == "failed" for record in found):
            raise typer.Exit(FAILED)


def _sweep(
    pattern: str | None,
    source: Library | None,
    every: bool,
    asked: str,
    directory: Path | None,
    jobs: int,
    timeout: float,
    memory: float | None,
    force: bool,
    budget: float | None,
) -> list[Any]:
    from ..zoo.catalogue import select, unlisted_first
    from ..zoo.records import default_directory
    from ..zoo.sweep import Limits, sweep
    from .render_zoo import Bar

    entries = select(pattern, source, every)
    share = 0 if asked == "conversion" else _share(jobs)  # weights that nobody writes are counted, although they take no memory
    limits = Limits(timeout, share if memory is None else int(memory * 2**30), math.inf if budget is None else 60 * budget)
    if budget is not None:
        entries = unlisted_first(entries)
    try:
        with Bar(len(entries)) as bar:
            return sweep(entries, asked, directory or default_directory(), jobs=jobs, limits=limits, watcher=bar, force=force)
    except KeyboardInterrupt as error:
        show(HatifyError("interrupted", why="the results so far are kept", fix="run the same command again: it goes on from there"))
        raise typer.Exit(INTERRUPTED) from error


def _share(jobs: int) -> int:
    """A process's share of the machine's memory, a tenth left for everything else; 0 where the system does not say."""
    try:
        return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jobs)
    except (AttributeError, ValueError, OSError):
        return 0


def _update(found: list[Any], every: bool) -> list[Path]:
    """Snapshots of what ran; of all names those of representatives, and a line for each in one file, with those that did not run.

    What ended for want of time or memory says nothing about the rules: the snapshot that there is stays.
    """
    from ..zoo import catalogue, page, snapshots

    stays = {r.key for r in found if r.verdict == "failed" and not r.files and snapshots.path_of(r.key).exists()}
    if not every:
        return [*(snapshots.write(snapshots.snapshot_of(record)) for record in found if record.key not in stays), page.write()]
    written: list[Path] = []
    for source in dict.fromkeys(record.source for record in found):
        of_source = [record for record in found if record.source == source]
        written.append(snapshots.write_names(source, of_source, names={e.name: e.family for e in catalogue.entries(source)}))
        chosen = {entry.key for entry in catalogue.select(source=source)} - stays
        written += [snapshots.write(snapshots.snapshot_of(record)) for record in of_source if record.key in chosen]
    return [*written, page.write()]
