"""Who is in a network now: a pass that reads other values in the places of its tensors is alone there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hatify.learning.reading import Reading


class Turns:
    """The passes of one network, of all threads.

    A :class:`Reading` puts values in the places of tensors, where every thread would see them. So only a pass that is alone may claim it,
    and those that begin meanwhile in other threads wait for its end. Once threads have met, none may any more: they would keep each other
    waiting, where a look at the tensors keeps nobody.

    Attributes:
        crowded: threads have met.
    """

    def __init__(self) -> None:
        self.crowded = False
        self._changed = threading.Condition()
        self._passes: dict[int, int] = {}
        self._reader = 0
        self._reading: Reading | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """One pass. Within one of the same thread that reads (a hook calls the network, say) the tensors are in their places."""
        me = threading.get_ident()
        with self._changed:
            while self._reader not in (0, me):
                self.crowded = True
                self._changed.wait()
            self._passes[me] = self._passes.get(me, 0) + 1
            outer = self._swap(None)
        try:
            yield
        finally:
            with self._changed:
                self._swap(outer)
                self._passes[me] -= 1
                if not self._passes[me]:
                    del self._passes[me]
                    self._reader = 0 if self._reader == me else self._reader
                    self._changed.notify_all()

    def claim(self) -> bool:
        """Whether the pass that asks, which has begun, may read: it is the only one."""
        me = threading.get_ident()
        with self._changed:
            self.crowded = self.crowded or len(self._passes) > 1
            if self.crowded or self._passes.get(me) != 1:
                return False
            self._reader = me
            return True

    def read(self, reading: Reading) -> None:
        """From here to the end of the pass, which has claimed it, the network reads these values."""
        with self._changed:
            self._swap(reading)

    @contextmanager
    def in_place(self) -> Iterator[bool]:
        """Whether the tensors are in their places, in all threads; if so they stay there meanwhile."""
        with self._changed:
            yield self._reading is None

    def _swap(self, reading: Reading | None) -> Reading | None:
        """What is read from now on; returns what was."""
        before, self._reading = self._reading, reading
        if before is not reading:
            if before is not None:
                before.__exit__()
            if reading is not None:
                reading.__enter__()
        return before
