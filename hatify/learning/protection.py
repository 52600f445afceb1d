"""The protected values: what finished tasks need, element by element, and how it is kept as it was."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from hatify.errors import TaskError
from hatify.learning import bits
from hatify.learning.network import Network
from hatify.modules.masker import in_type
from hatify.modules.shards import local, part_of, sharded, version


@dataclass(eq=False)
class Locked:
    """One tensor of which some elements are protected.

    ``free`` says which are not (int8, the tensor's shape and device: -1 where an element may move, 0 where it is protected), or is None
    where all are protected; ``kept`` holds the protected elements as they must stay and zeros elsewhere, so that protecting costs one more
    copy of the tensor. ``within`` narrows the lock (bool) for as long as a finished task is trained again: ``kept`` keeps all
    that was protected before, to go back to. ``task`` is the one that owns the tensor, None for what tasks share; ``mask`` says that
    it is a mask embedding. Of a sharded tensor all are of the part that is here.
    """

    name: str
    tensor: Tensor
    free: Tensor | None
    kept: Tensor
    within: Tensor | None = None
    task: int | None = None
    mask: bool = False
    stamp: Stamp | None = field(default=None, init=False)
    _ordinary: bool | None = field(default=None, init=False)
    _masked: tuple[weakref.ref[Tensor], Stamp] | None = field(default=None, init=False)

    @classmethod
    def of(cls, name: str, tensor: Tensor, lock: Tensor | None, task: int | None = None, mask: bool = False) -> Locked:
        """Takes the present values as those to keep; ``lock`` (bool, the tensor's shape) says where, None everywhere."""
        data = local(tensor)
        if lock is None:
            made = cls(name, tensor, None, data.clone(), task=task, mask=mask)
        else:
            free = bits.cleared(part_of(lock, tensor), like=data)
            made = cls(name, tensor, free, bits.clear_(data.clone(), ~free), task=task)
        made.seen()
        return made

    @property
    def whole(self) -> bool:
        """Whether every element is protected."""
        return self.free is None and self.within is None

    @property
    def lock(self) -> Tensor | None:
        """The protected elements, those of a task in retraining too: bool; None for all of them."""
        return None if self.free is None else self.free == 0

    @property
    def held(self) -> Tensor | None:
        """The elements that must not move now; None for all of them."""
        return self.lock if self.within is None else self.within

    def restore(self, look: bool = False) -> None:
        """Puts the protected values back. Not through the tensor itself: a new version of it would invalidate graphs
        that wait for their backward pass, although nothing that they saved has changed.

        Args:
            look: write only where they are not there: other threads read the tensor meanwhile, and a write passes through other bits.
        """
        data = local(self.tensor)
        if look and self.within is None and self.intact():
            self.seen()
            return
        if self.within is not None:
            data.copy_(torch.where(self.within, self.kept, data))
        elif self.free is None:
            data.copy_(self.kept)
        else:
            bits.put_(data, self.free, self.kept)
        self.seen()

    def seen(self) -> None:
        """The protected values are in their places: writes are counted from here on."""
        self.stamp = stamp(self.tensor)

    def intact(self) -> bool:
        """Whether the protected elements have the bits that they must have. Not for a tensor of a task in retraining."""
        data = local(self.tensor)
        if self.free is not None:
            return bits.same(data, self.free, self.kept)
        words = bits.WORDS[data.element_size()]
        return torch.equal(data.view(words), self.kept.view(words))

    @property
    def ordinary(self) -> bool:
        """Whether the protected values are numbers to which zero can be added; looked up once."""
        if self._ordinary is None:
            self._ordinary = bits.ordinary(self.kept)
        return self._ordinary

    def narrow(self, lock: Tensor) -> None:
        """Protects only the elements of ``lock`` (bool), which were protected before."""
        self.within = part_of(lock, self.tensor).to(self.tensor.device)
        self._moving = bits.cleared(self.within, like=local(self.tensor))
        self._masked = None

    def follow(self, tensor: Tensor) -> None:
        """The network was moved or cast: the values go where its tensor is now."""
        self.tensor, data = tensor, local(tensor)
        kept = in_type(self.kept, data.dtype) if self.mask and self.kept.dtype != data.dtype else self.kept
        self.kept = torch.empty_like(data).copy_(kept)
        self.free = None if self.free is None else torch.empty_like(data, dtype=torch.int8).copy_(self.free)
        if self.within is not None:
            self.within = self.within.to(data.device)
            self._moving = bits.cleared(self.within, like=data)
        self._ordinary = self._masked = None
        self.seen()

    def return_to_old(self) -> None:
        """Puts back all values, those of a task in retraining too."""
        self.within = self._masked = None
        self.restore()

    @property
    def elsewhere(self) -> bool:
        """Whether the tensor was cast or moved since."""
        return self.tensor.dtype != self.kept.dtype or self.tensor.device != self.kept.device

    @property
    def written(self) -> bool:
        """Whether torch counted a write to the tensor since its values were last put back, or it was given other memory."""
        return stamp(self.tensor) != self.stamp

    def values(self) -> Tensor:
        """The protected values alone: flat, or all of the tensor where all are protected."""
        lock = self.lock
        return self.kept if lock is None else self.kept[lock]

    def moved(self) -> int:
        """How many protected elements differ from their values."""
        return int(self._different(local(self.tensor)).sum())

    def differs(self, other: Tensor) -> bool:
        """Whether ``other``, of the same shape, has other values at protected elements."""
        return bool(self._different(part_of(other.detach(), self.tensor).to(self.kept.device, self.kept.dtype)).any())

    def _different(self, other: Tensor) -> Tensor:
        different = self.kept != other
        if other.is_floating_point():
            different &= ~(self.kept.isnan() & other.isnan())
        return different if self.held is None else different & self.held

    def mask_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros at protected elements, in place. Chosen, not multiplied: NaN times zero is NaN."""
        if gradient.is_sparse:
            free = self._free_now
            rows = gradient.coalesce()
            values, at = rows._values(), rows._indices()
            values = torch.zeros_like(values) if free is None else bits.clear_(values.clone(), free[tuple(at)])
            return torch.sparse_coo_tensor(at, values, gradient.shape, is_coalesced=True, check_invariants=False)
        self.clear_(gradient)
        self._masked = weakref.ref(gradient), stamp(gradient)
        return gradient

    def masked(self, gradient: Tensor) -> bool:
        """Whether torch counted no write to the gradient since :meth:`mask_gradient` gave it."""
        return self._masked is not None and self._masked[0]() is gradient and self._masked[1] == stamp(gradient)

    def clear_(self, values: Tensor) -> None:
        """Zeroes what stands at elements that must not move now, in a tensor of the same shape."""
        free, here = self._free_now, local(values)
        if free is None:
            here.zero_()
        else:
            bits.clear_(here, free)

    @property
    def _free_now(self) -> Tensor | None:
        return self.free if self.within is None else self._moving


@dataclass(eq=False)
class Protection:
    """Everything that a set of finished tasks needs of a network.

    ``tasks`` are those of which anything is protected, ``locking`` those whose shared weights are.
    """

    tasks: frozenset[int] = frozenset()
    shared: list[Locked] = field(default_factory=list)
    own: list[Locked] = field(default_factory=list)
    locking: frozenset[int] = frozenset()
    _whole: set[int] | None = field(default=None, init=False)
    _counted: tuple[list[Tensor], list[int]] | None = field(default=None, init=False)

    @classmethod
    def of(cls, network: Network, locking: Iterable[int], finished: Iterable[int]) -> Protection:
        """Takes the present values as those to keep.

        Args:
            locking: tasks whose shared weights are locked.
            finished: tasks whose copies, masks and statistics are kept; usually the same.
        """
        locking, finished = frozenset(locking), frozenset(finished)
        shared, own = [], []
        if locking:
            for name, lock in network.locks(sorted(locking)).items():
                if bool(lock.any()):
                    parameter = network.module.get_parameter(name)
                    shared.append(Locked.of(name, parameter, None if bool(lock.all()) else lock.to(parameter.device)))
        names = {id(t): n for n, t in _tensors(network.module).items()} if finished else {}
        for task in sorted(finished):
            own += [Locked.of(names[id(t)], t, None, task, mask=True) for t in network.embeddings(task)]
            own += [Locked.of(names[id(t)], t, None, task) for t in network.copies(task)]
        return cls(locking | finished, shared, own, locking)

    def __iter__(self):
        return iter((*self.shared, *self.own))

    def narrow(self, network: Network, locking: Iterable[int], finished: Iterable[int]) -> None:
        """Protects less for a while, and forgets no value: a finished task is trained again, and is none of ``tasks`` meanwhile."""
        self._whole = None
        locking, finished = sorted(locking), sorted(finished)
        self.tasks, self.locking = frozenset((*locking, *finished)), frozenset(locking)
        locks = network.locks(locking)
        for entry in self.shared:
            entry.narrow(locks[entry.name])
        kept = {id(t) for task in finished for t in (*network.embeddings(task), *network.copies(task))}
        for entry in self.own:
            if id(entry.tensor) not in kept:
                entry.narrow(torch.zeros(entry.tensor.shape, dtype=torch.bool))

    @classmethod
    def resumed(cls, network: Network, old: Mapping[str, tuple[Tensor | None, Tensor]], tasks: Iterable[int]) -> Protection:
        """The protection that :meth:`state` told of, of a network that was made anew."""
        shared = set(network.locks(()))
        made = cls(frozenset(tasks))
        tensors = _tensors(network.module)
        owners = {id(t): task for task in made.tasks for t in (*network.embeddings(task), *network.copies(task))}
        masks = {id(t) for task in made.tasks for t in network.embeddings(task)}
        for name, (lock, values) in old.items():
            tensor = tensors[name]
            entry = Locked.of(name, tensor, lock, owners.get(id(tensor)), id(tensor) in masks)
            entry.kept[... if lock is None else lock] = values.to(tensor.device, tensor.dtype)
            entry.stamp = None  # the tensor itself holds something else by now
            (made.shared if name in shared else made.own).append(entry)
        return made

    def state(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Locks and values by the tensor's name."""
        return {entry.name: (entry.lock, entry.values()) for entry in self}

    @property
    def elsewhere(self) -> bool:
        """Whether the network was cast or moved, wholly or in part, and the values were not."""
        return any(entry.elsewhere for entry in self)

    def replaced(self, module: nn.Module) -> bool:
        """Whether the network holds other tensors by now than those that are protected, with the same protected values.

        Raises:
            TaskError: it holds others with other values, or none.
        """
        tensors, found = _tensors(module), False
        for entry in self:
            held = tensors.get(entry.name)
            if held is entry.tensor:
                continue
            if held is None or held.shape != entry.tensor.shape or entry.differs(held):
                raise TaskError(
                    f"{entry.name} was replaced by another tensor, and finished tasks need its values",
                    why="the locks are on the one that was there: whatever replaced it was not kept from doing so",
                    fix="write into it instead; hat.state_dict() of an earlier copy has the values",
                )
            found = True
        return found

    def follow(self, module: nn.Module) -> None:
        """The network was moved or cast, or its tensors were replaced: so are the values."""
        tensors = _tensors(module)
        self._whole = self._counted = None
        for entry in self:
            entry.follow(tensors[entry.name])

    def restore(self, look: bool = False) -> None:
        """Puts every protected value back; ``look`` as for :meth:`Locked.restore`."""
        for entry in self:
            entry.restore(look)

    @cached_property
    def _of_task(self) -> dict[int | None, list[Locked]]:
        found: dict[int | None, list[Locked]] = {}
        for entry in self.own:
            found.setdefault(entry.task, []).append(entry)
        return found

    def needed_by(self, task: int | None) -> list[Locked]:
        """What a forward pass of ``task`` reads."""
        return [*self.shared, *self._of_task.get(task, ())]

    @property
    def whole(self) -> set[int]:
        """The ids of tensors of finished tasks that are protected as a whole now."""
        if self._whole is None:
            self._whole = {id(entry.tensor) for entry in self.own if entry.whole}
        return self._whole

    def restore_written(self) -> None:
        """Puts back what finished tasks own and torch counted a write to. A look at all of it costs little, even for a hundred tasks."""
        if self._counted is None or [t._version for t in self._counted[0]] != self._counted[1]:
            for entry in self.own:
                if entry.written:
                    entry.restore()
            tensors = [entry.tensor for entry in self.own]
            if not any(map(sharded, tensors)):  # what is sharded counts elsewhere
                self._counted = tensors, [t._version for t in tensors]

    def return_to_old(self) -> None:
        """The end of a retraining that did not succeed."""
        self._whole = None
        for entry in self:
            entry.return_to_old()

    def parameters(self) -> dict[int, Locked]:
        """Protected parameters by their id."""
        return {id(entry.tensor): entry for entry in self if isinstance(entry.tensor, nn.Parameter)}


Stamp = tuple[int, int]
"""The writes that torch has counted, and which memory they went to."""


def stamp(tensor: Tensor) -> Stamp:
    """Another one after every write that torch counts, and where ``.data`` is replaced. Not by the memory's address: asking for that would
    part tensors that share memory until written."""
    return version(tensor), 0 if sharded(tensor) else tensor.untyped_storage()._cdata


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fingerprint(entries: Iterable[Locked]) -> list[int]:
    """A sum over the bits of each tensor, modulo 2^64: many times faster than putting values back, and other for other bits."""
    sums: dict[torch.device, list[Tensor]] = {}
    for entry in entries:
        sums.setdefault(entry.tensor.device, []).append(_bits(local(entry.tensor)).sum())
    return [found for group in sums.values() for found in torch.stack(group).tolist()]


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    words = size < 8 and flat.numel() % (8 // size) == 0 and flat.storage_offset() % (8 // size) == 0
    return flat.view(torch.int64 if words or size >= 8 else {1: torch.int8, 2: torch.int16, 4: torch.int32}[size])
