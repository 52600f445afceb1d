"""What a model's code remembers between calls: tensors of a trace must not stay there."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

LIBRARIES = {"torch", "sympy", "hatify", *sys.stdlib_module_names}
"""Whose caches hold nothing of a model's."""

_known: ContextVar[list[Any] | None] = ContextVar("caches", default=None)


@contextmanager
def known_caches() -> Iterator[None]:
    """Looks for the caches once for all traces inside the block."""
    token = _known.set(_caches())
    try:
        yield
    finally:
        _known.reset(token)


@contextmanager
def traces_forgotten() -> Iterator[None]:
    """Every ``functools.lru_cache`` that took something in inside the block is emptied after it: the next trace would find tensors of this
    one there, and so would the model itself."""
    found = _known.get()
    caches = _caches() if found is None else found
    before = [cache.cache_info().misses for cache in caches]
    try:
        yield
    finally:
        for cache, misses in zip(caches, before):
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches() -> list[Any]:
    found = (o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper)
    return [cache for cache in found if (cache.__module__ or "").partition(".")[0] not in LIBRARIES]
