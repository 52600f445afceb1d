"""What there is to convert, and how it is asked for."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterator, Sequence

from hatify.errors import UnknownModelError
from hatify.zoo import from_timm, from_torchvision, from_transformers
from hatify.zoo.entry import Entry
from hatify.zoo.snapshots import NOT_RUN, read_all, read_names

SOURCES = ("timm", "torchvision", "transformers")
_ENTRIES = {"timm": from_timm.entries, "torchvision": from_torchvision.entries, "transformers": from_transformers.entries}


def installed(source: str | None = None) -> list[str]:
    """The libraries whose models can be built here.

    Raises:
        UnknownModelError: ``source`` is none of them, or is not installed.
    """
    if source is not None and source not in SOURCES:
        raise UnknownModelError(f"unknown source {source!r}", why=f"the zoo has {', '.join(SOURCES)}", fix="--source timm")
    found = [s for s in SOURCES if s == (source or s) and importlib.util.find_spec(s) is not None]
    if not found:
        raise UnknownModelError(f"{source} is not installed", fix=f"pip install {source}")
    return found


def entries(source: str | None = None) -> Iterator[Entry]:
    """Every model of the installed libraries, or of one."""
    for library in installed(source):
        yield from _ENTRIES[library]()


def unlisted_first(models: Sequence[Entry]) -> list[Entry]:
    """The same models, those before that no sweep of all names has reached."""
    listed = {source: read_names(source) for source in SOURCES}

    def reached(entry: Entry) -> bool:
        return listed[entry.source].get(entry.name, {}).get("verdict", NOT_RUN) != NOT_RUN

    return sorted(models, key=reached)


def representatives(source: str | None = None) -> list[Entry]:
    """One model for each family: the smallest of timm's and torchvision's modules, and all configurations of transformers."""
    chosen: set[str] = set()
    for library in installed(source):
        if library == "timm":
            chosen |= {f"timm/{name}" for name in from_timm.representatives().values()}
        elif library == "torchvision":
            chosen |= {f"torchvision/{name}" for name in from_torchvision.representatives()}
        else:
            chosen |= {entry.key for entry in from_transformers.entries()}
    return [entry for entry in entries(source) if entry.key in chosen]


def select(pattern: str | None = None, source: str | None = None, every: bool = False) -> list[Entry]:
    """The models that a user asks for.

    Without a pattern: one representative of each family, and what else has a snapshot.

    Args:
        pattern: a name, or a pattern as in the shell (``resnet*``); a family's name stands for its representative.
        source: ``timm``, ``torchvision`` or ``transformers``.
        every: all names.

    Raises:
        UnknownModelError: nothing fits.
    """
    if every or pattern:
        chosen = list(entries(source))
    else:
        keys = {entry.key for entry in representatives(source)} | {f"{s['source']}/{s['model']}" for s in read_all()}
        chosen = [entry for entry in entries(source) if entry.key in keys]
    if pattern:
        chosen = [entry for entry in chosen if fnmatch.fnmatchcase(entry.name, pattern) or entry.key == pattern]
        chosen = chosen or [entry for entry in representatives(source) if fnmatch.fnmatchcase(entry.family, pattern)]
    if not chosen:
        raise UnknownModelError(f"no model is called {pattern!r}", where=source or "the zoo", fix="hatify zoo run 'resnet*'")
    return chosen
