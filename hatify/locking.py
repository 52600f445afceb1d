"""Which weights tasks need: the locks of a converted network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hatify.facts import Facts
from hatify.gates import evaluate, locked


class LockMethods:
    """What a HAT model has of locks; its gates are evaluated with the binary masks of its tasks."""

    _facts: Facts

    def locks(self, tasks: Any, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """For every shared parameter, the elements that ``tasks`` need: bool, the parameter's shape; see :func:`hatify.gates.locked`.

        Args:
            tasks: the tasks to protect.
            without: parameters whose locks are left out, for negative controls.
        """
        return dict(self.each_lock(tasks, without=without))

    def each_lock(self, tasks: Any, *, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        """:meth:`locks` one parameter at a time: all together take a byte per weight."""
        tasks = [self.checked_task(t) for t in tasks]
        memo: dict[tuple, Tensor] = {}
        masks = {task: self.binary_masks(task) for task in tasks}
        evaluated: dict[int, dict] = {t: {} for t in tasks}

        def live(ids: Tensor, task: int) -> Tensor:
            key = (ids.data_ptr(), tuple(ids.shape), tuple(ids.stride()), task)
            if key not in memo:
                program = self._facts.program(ids)
                memo[key] = (evaluate(program, masks[task].__getitem__, evaluated[task]) > 0).reshape(ids.shape)
            return memo[key]

        for name, uses in self._facts.uses.items():
            parameter = self.get_parameter(name)
            total = torch.zeros(parameter.numel(), dtype=torch.bool)
            if name not in without:
                for use in uses:
                    total |= locked(use, parameter.numel(), live, tasks, self.settings["locking"] == "paper")
            yield name, total.view(parameter.shape)
