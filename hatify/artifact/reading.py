"""Weights that are read and hashed while the graphs are put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tree import TreeReader

__all__ = ["Reading"]


class Stopped(Exception):
    """Nobody waits for the weights any more."""


class Reading:
    """A thread that reads weights from the moment when it is known which there are.

    Reading and hashing leave the interpreter to the graphs. Whatever the block raises stops the thread; what the thread raises comes
    out of :meth:`found`.

    Args:
        read: gives all tensors that a tree expects, one after another, to a function.
    """

    def __init__(self, read: Callable[[TreeReader, Callable[[str, Tensor], None]], None]) -> None:
        self._read = read
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hatify-weights")
        self._job: Future[list[tuple[str, Tensor]]] | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stopped.set()
        self._pool.shutdown()

    def begin(self, tree: TreeReader) -> None:
        """Starts reading; ``tree`` is only asked, not changed."""
        self._job = self._pool.submit(self._run, tree)

    def found(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, when the last one has been read and the digests were right; none of them is held any longer then.

        Raises:
            ArtifactError: anything that is not as it was written.
        """
        assert self._job is not None
        taken = self._job.result()
        taken.reverse()
        while taken:
            yield taken.pop()

    def _run(self, tree: TreeReader) -> list[tuple[str, Tensor]]:
        taken: list[tuple[str, Tensor]] = []

        def take(key: str, tensor: Tensor) -> None:
            if self._stopped.is_set():
                raise Stopped
            taken.append((key, tensor))

        with torch.no_grad():
            self._read(tree, take)
        return taken
