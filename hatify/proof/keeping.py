"""The model is as it was afterwards: weights, statistics, modes and random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hatify.model import HATModel
from hatify.modules.copies import copy_of, overlaps, shareable


@contextlib.contextmanager
def kept(hat: HATModel, elsewhere: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[None]:
    """Weights, statistics and modes are as before afterwards.

    Tensors that may share memory until written are laid aside for a copy to work on, which costs what is written to it, and only as long as
    it lasts. The others are written in place and restored, from ``elsewhere`` where that holds them, so that whatever
    shares memory with them goes along.
    """
    named = {**dict(hat.named_parameters()), **dict(hat.named_buffers())}
    named = {name: tensor for name, tensor in named.items() if not overlaps(tensor)}
    copies = [(t, copy_of(t)) for t in shareable(hat)]
    aside = {id(t) for t, _ in copies}
    laid_aside = [(t, t.data) for t, _ in copies]
    backup = {n: elsewhere[n] if n in elsewhere else t.detach().clone() for n, t in named.items() if id(t) not in aside}
    try:
        while copies:
            tensor, working = copies.pop()
            tensor.data = working
        with modes_kept(hat):
            yield
    finally:
        for tensor, own in laid_aside:
            tensor.data = own
        with torch.no_grad():
            for name, tensor in named.items():
                if name in backup:
                    tensor.copy_(backup[name])


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is in the mode in which it was, afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """The same in place: converted buffers are written where they are."""
    held = [(b, b.clone()) for b in model.buffers() if not overlaps(b)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Forward may change buffers: it gets clones."""
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in held:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same random numbers for both sides; the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
