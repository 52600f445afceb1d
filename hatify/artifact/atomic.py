"""Directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows: directories cannot be locked or flushed there
    fcntl = None

__all__ = ["check_file", "check_target", "new_directory", "new_file", "start_flush"]


def check_target(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether a directory may be written there. Touches nothing: to be asked before long work.

    Returns:
        The path, absolute and without symbolic links (a link is followed, not replaced).

    Raises:
        ArtifactError: something is there and ``overwrite`` is false, or it is no directory, or one that
            nobody can mean (the working directory, the home directory, what contains them).
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if mode is not None:
        if not stat.S_ISDIR(mode):
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

    Whatever is raised inside, an interrupt included, leaves ``path`` as it was and no temporary directory. A process that is killed leaves
    ``path`` as it was or as it was to become; the temporary directory that may stay behind goes with the next one for the same path.
    Of several at once for the same path, the last one to end stays, whole; without ``overwrite``, the first.

    Raises:
        ArtifactError: as ``check_target``; or the file system refuses (no space, no permission).
    """
    target = check_target(path, overwrite)
    absent = [parent for parent in target.parents if not parent.exists()]
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    handle, swapped = None, False
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target.parent) as alone:
                temporary.mkdir()
                handle = _held(temporary)
                if alone:  # else one that was made but is not held yet would look abandoned
                    _remove_abandoned(target)
            yield temporary
            _flush_all(temporary.iterdir())
            _flush(temporary)
            with _alone(target.parent):
                _swap(temporary, target, overwrite)
            swapped = True
            _flush(target.parent)
        except OSError as error:
            raise _unwritten(path, target, error, swapped) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what was at ``path`` before
    except BaseException:  # interrupted, with the new one in place: the old one must not stay beside it
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether a file may be written there. Touches nothing: to be asked before long work.

    Raises:
        ArtifactError: something is there and ``overwrite`` is false, or its directory does not exist or takes no files.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if mode is not None and stat.S_ISDIR(mode):
        raise ArtifactError(f"{path} is a directory", where=str(target), fix="give the name of a file")
    if mode is not None and not overwrite:
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
    temporary, swapped = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}"), False
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(target)
        swapped = True
        _flush(target.parent)
    except OSError as error:
        raise _unwritten(path, target, error, swapped) from error
    finally:
        temporary.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """What is there (``st_mode``), or None where nothing can be seen. Asked once: another process may replace it between two questions."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _unwritten(path: str | os.PathLike[str], target: Path, error: OSError, swapped: bool) -> ArtifactError:
    """Says what is there now: the new one where only its name could not be flushed, else what was there before."""
    there = "nothing was left there" if not target.exists() else "what was there is as it was"
    return ArtifactError(
        f"{path} could not be written",
        where=str(target),
        why=f"{error.strerror or error}; {'it is there, but a crash of the machine may bring back the old one' if swapped else there}",
        fix="write it again" if swapped else "free some space, or give another directory",
    )


def _swap(temporary: Path, target: Path, overwrite: bool) -> None:
    """Puts ``temporary`` in the place of ``target``; what was there is called ``temporary`` then.

    One step where the system has it. Elsewhere two renames, and the old directory comes back if the second one does not happen.
    """
    for _ in range(1000):  # what another process does between two steps is seen in the next round
        try:
            temporary.rename(target)  # where nothing is (or an empty directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not overwrite:
            check_target(target)
            continue
        with suppress(FileNotFoundError):  # gone again
            if _exchange(temporary, target):
                return
            _rename_twice(temporary, target)
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _rename_twice(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    old.rename(temporary)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two directories in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), swap)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), swap)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code))
    return not failed


def _held(directory: Path) -> int | None:
    """Others see that a living process writes there, until what is returned is closed. None where the file system has no locks."""
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _alone(parent: Path) -> Iterator[bool]:
    """One process after the other, for a moment; whether it is so. Who holds the directory for longer (``flock . command``) is not waited
    for, and some file systems have no locks: what is done inside is right without, but for what it says."""
    if fcntl is None:
        yield False
        return
    handle, alone = os.open(parent, os.O_RDONLY), False
    try:
        for _ in range(100):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield alone
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """What killed processes left behind of the same target; after a kill between two renames, the old directory comes back."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    for path in [p for p in target.parent.iterdir() if pattern.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:  # gone by now, or not ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by a living process, or there are no locks here
            continue
        else:
            if path.suffix == ".old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _flush_all(paths: Iterable[Path]) -> None:
    """At once, not one after another: so the file system writes its journal once for many of them."""
    pool = ThreadPoolExecutor(8, thread_name_prefix="hatify-flush")
    try:
        for done in [pool.submit(_flush, path) for path in paths]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_flush(handle: int, start: int, size: int) -> None:
    """Lets the system begin to write these bytes of an open file to disk, while more are added; :func:`_flush` has less to wait for then.

    A hint: where the system does not know it, or refuses it, nothing else changes.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(handle, start, size, 2)  # SYNC_FILE_RANGE_WRITE


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    found = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


_SYNC_FILE_RANGE = _sync_file_range()


def _flush(path: Path) -> None:
    # Before the rename: a crash must not leave a complete directory of empty files.
    if fcntl is None and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
