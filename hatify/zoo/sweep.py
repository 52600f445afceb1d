"""Many models, each in a process of its own: what crashes, hangs or eats the memory is a recorded failure, and the sweep goes on."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from hatify.zoo import records
from hatify.zoo.entry import Entry
from hatify.zoo.records import FAILED, Record

_TAIL = 2000  # characters of what a crashed process said last


@dataclass(frozen=True)
class Limits:
    """Of one model: seconds, and bytes of memory (0 for none); of the whole sweep: the seconds after which no model is begun."""

    seconds: float = 1800.0
    memory: int = 0
    budget: float = math.inf


class Watcher:
    """Hears how a sweep goes: everything may be ignored."""

    def began(self, entry: Entry) -> None: ...

    def ended(self, record: Record, again: bool) -> None:
        """``again`` is False for a record of an earlier run that still holds."""


def sweep(
    entries: Sequence[Entry],
    asked: str,
    directory: Path,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    watcher: Watcher | None = None,
    force: bool = False,
) -> list[Record]:
    """Converts and proves models, in the order given; records that still hold are not run again.

    Args:
        entries: of the catalogue.
        asked: one of ``proving.QUESTIONS``.
        directory: where records are kept. One that is interrupted goes on there.
        jobs: processes at once; torch's threads are shared out among them.
        limits: of each model and of all. A sweep whose budget is spent returns what it has.
        watcher: told about each model.
        force: run again what still holds.
    """
    watcher, limits = watcher or Watcher(), limits or Limits()
    done: dict[str, Record] = {}
    todo: list[Entry] = []
    for entry in entries:
        known = None if force else records.read(directory, entry.key)
        if known is not None and known.current(asked):
            done[entry.key] = known
            watcher.ended(known, False)
        else:
            todo.append(entry)
    threads, end = _threads() // max(jobs, 1) or 1, time.monotonic() + limits.budget
    running: list[_Worker] = []
    try:
        while running or (todo and time.monotonic() < end):
            while todo and len(running) < jobs and time.monotonic() < end:
                entry = todo.pop(0)
                watcher.began(entry)
                running.append(_Worker(entry, asked, limits, threads, directory))
            wait([worker.sentinel for worker in running], timeout=max(0.0, min(worker.left for worker in running)))
            for worker in [w for w in running if w.over]:
                running.remove(worker)
                record = worker.result()
                records.write(directory, record)
                if record.structure and not record.shares:
                    records.write(directory, record, records.structure_key(record.structure))
                done[record.key] = record
                watcher.ended(record, True)
    finally:
        for worker in running:  # interrupted: nothing is recorded of these
            worker.stop()
    return [done[entry.key] for entry in entries if entry.key in done]


def _threads() -> int:
    """Those that torch would take, so that OMP_NUM_THREADS has its say."""
    import torch

    return torch.get_num_threads()


class _Worker:
    """One process and its limits."""

    def __init__(self, entry: Entry, asked: str, limits: Limits, threads: int, directory: Path) -> None:
        self.entry, self.asked, self.limits = entry, asked, limits
        self.room = tempfile.TemporaryDirectory(prefix="hatify-zoo-", ignore_cleanup_errors=True)
        context = _context()
        self.process = context.Process(
            target=_work, args=(entry, asked, self.room.name, limits.memory, threads, directory), daemon=True
        )
        self.process.start()
        self.start = time.monotonic()  # the first one to start waits for the imports of the server, which are not the model's time

    @property
    def sentinel(self) -> int:
        return self.process.sentinel

    @property
    def left(self) -> float:
        return self.limits.seconds - (time.monotonic() - self.start)

    @property
    def over(self) -> bool:
        return self.left <= 0 or not self.process.is_alive()

    def result(self) -> Record:
        """Its record, or that of how it ended."""
        late = self.process.is_alive()
        self.stop(keep=True)
        record = records.read(Path(self.room.name), self.entry.key)
        if record is None:
            record = Record(self.entry.key, self.entry.family, FAILED, asked=self.asked, reason=self._end(late))
            record.libraries = records.versions()
        self.room.cleanup()
        return record

    def _end(self, late: bool) -> dict[str, str]:
        step = self._read("step") or "start"
        if late:
            return {"step": step, "what": f"not done after {self.limits.seconds:.0f} seconds"}
        code = self.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"the process ended with code {code}"
        return {"step": step, "what": how, "where": self._read("log")[-_TAIL:]}

    def _read(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return Path(self.room.name, name).read_text(encoding="utf-8", errors="replace").strip()
        return ""

    def stop(self, keep: bool = False) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        if not keep:
            self.room.cleanup()


def _context() -> Any:
    """Processes that begin with the libraries imported, where the system can fork; else fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hatify.zoo.preload"])
    return context


def _work(entry: Entry, asked: str, room: str, memory: int, threads: int, directory: Path) -> None:
    """In the process: one model, its record written to the room."""
    log = os.open(Path(room, "log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, encoding="utf-8")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the zoo downloads nothing
    _limit(memory)
    import torch

    from hatify.zoo.proving import prove

    torch.set_num_threads(threads)
    record = prove(entry, asked, partial(_note, Path(room, "step")), directory)
    record.memory = _peak()
    records.write(Path(room), record)


def _note(path: Path, step: str) -> None:
    path.write_text(step, encoding="utf-8")


def _limit(memory: int) -> None:
    if memory:
        with contextlib.suppress(ImportError):  # systems without it have no limit
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _peak() -> int | None:
    """The most memory that this process has held, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
