"""Weights that no finished task needs: a task leaves them as it found them, so that each starts from where the first one did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hatify.learning.network import Network
from hatify.modules.shards import local, part_of, shard_again


class FreeWeights:
    """The free shared weights as a session finds them, to give back what its task has trained and does not keep.

    While masks are soft a task trains every weight that is free, and keeps a share of them. What it gives up has learned to be of use in
    *its* network and in no other: a task that starts from that learns slower than one that starts from the pretrained (or drawn) values.
    Measured with ``benchmarks/split_digits.py --select`` on ten permuted tasks (one seed): 91.4 % on the last two where the values
    were given back, 89.0 % where not.

    Free are the elements that are not locked for any finished task; they are copied, and held while the session lasts.
    """

    def __init__(self, network: Network, task: int) -> None:
        self.network, self.task = network, task
        self.values: dict[str, tuple[Tensor | None, Tensor]] = {}
        for name, lock in network.locks(sorted(network.finished)).items():
            parameter = network.module.get_parameter(name)
            if parameter.requires_grad:
                where = None if not bool(lock.any()) else ~part_of(lock, parameter).to(parameter.device)
                value = local(parameter)
                self.values[name] = where, value.clone() if where is None else value[where]

    @torch.no_grad()
    def give_back(self, needed: Iterable[int]) -> None:
        """What was free and none of the tasks ``needed`` needs becomes what it was."""
        shard_again(self.network.module)
        for name, lock in self.network.locks(sorted(needed)).items():
            if name not in self.values:
                continue
            where, value = self.values[name]
            parameter = self.network.module.get_parameter(name)
            data = local(parameter)
            value = value.to(data)
            old = value if where is None else data.clone().masked_scatter_(where.to(data.device), value)
            data.copy_(torch.where(part_of(lock, parameter).to(data.device), data, old))

    def state(self) -> dict[str, Any]:
        """Places and values by parameter."""
        return {"task": self.task, "values": self.values}

    @classmethod
    def resumed(cls, network: Network, state: Mapping[str, Any]) -> FreeWeights:
        """What another session found."""
        made = cls.__new__(cls)
        made.network, made.task, made.values = network, state["task"], dict(state["values"])
        return made
