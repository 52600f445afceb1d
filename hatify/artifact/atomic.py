"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArtifactError

__all__ = ["check_file", "check_target", "new_directory", "new_file"]


def check_target(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether a directory may be written there. Touches nothing: to be asked before long work.

    Returns:
        The path, absolute and without symbolic links (a link is followed, not replaced).

    Raises:
        ArtifactError: something is there and ``overwrite`` is false, or it is no directory, or one that
            nobody can mean (the working directory, the home directory, what contains them).
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        if not target.is_dir():
            raise ArtifactError(f"{path} is a file", where=str(target), fix="give the name of a directory")
        if not overwrite:
            raise ArtifactError(
                f"{path} exists",
                where=str(target),
                why="it is not replaced unless asked for",
                fix="hatify.save(hat, path, overwrite=True), or --force; or give another name (--out)",
            )
        for precious in (Path.cwd(), Path.home()):
            if precious.resolve().is_relative_to(target):
                raise ArtifactError(
                    f"{path} is not replaced",
                    where=str(target),
                    why=f"it is or contains {precious}",
                    fix="give the name of a directory for this model alone",
                )
    ancestor = target.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        why = "permission denied" if ancestor.is_dir() else f"{ancestor} is a file"
        raise ArtifactError(f"{path} cannot be written", where=str(ancestor), why=why, fix="give another directory")
    return target


@contextmanager
def new_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the place of ``path`` at the end of the block.

    Whatever is raised inside, an interrupt included, leaves ``path`` as it was and no temporary directory.

    Raises:
        ArtifactError: as ``check_target``; or the file system refuses (no space, no permission).
    """
    target = check_target(path, overwrite)
    absent = [parent for parent in target.parents if not parent.exists()]
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            _swap(temporary, target)
        except OSError as error:
            raise ArtifactError(
                f"{path} could not be written",
                where=str(target),
                why=f"{error.strerror or error}; nothing was left there",
                fix="free some space, or give another directory",
            ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether a file may be written there. Touches nothing: to be asked before long work.

    Raises:
        ArtifactError: something is there and ``overwrite`` is false, or its directory does not exist or takes no files.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ArtifactError(f"{path} is a directory", where=str(target), fix="give the name of a file")
    if target.exists() and not overwrite:
        raise ArtifactError(f"{path} exists", where=str(target), why="it is not replaced unless asked for", fix="--force")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        why = "permission denied" if target.parent.is_dir() else "there is no such directory"
        raise ArtifactError(f"{path} cannot be written", where=str(target.parent), why=why, fix="give another directory")
    return target


@contextmanager
def new_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary file to write, which takes the place of ``path`` at the end of the block; whatever is raised inside leaves
    ``path`` as it was.

    Raises:
        ArtifactError: as ``check_file``; or the file system refuses.
    """
    target = check_file(path, overwrite)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(target)
    except OSError as error:
        raise ArtifactError(
            f"{path} could not be written",
            where=str(target),
            why=f"{error.strerror or error}; nothing was left there",
            fix="free some space, or give another directory",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _swap(temporary: Path, target: Path) -> None:
    """Two renames on one file system; the old directory comes back if the second one does not happen."""
    old = temporary.with_suffix(".old")
    replaced = target.exists()
    try:
        if replaced:
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    try:
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:  # interrupted, with the new one in place: the old one must not stay beside it
        shutil.rmtree(old, ignore_errors=True)
        raise


def _flush(file: Path) -> None:
    # Before the rename: a crash must not leave a complete directory of empty files.
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
