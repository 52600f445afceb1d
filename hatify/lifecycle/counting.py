"""Which tasks need which weights, counted by sets of tasks, without a pass over all weights per task."""

from __future__ import annotations

from collections import Counter
from functools import singledispatch

import torch
from torch import Tensor, nn

from hatify.gates import Use, evaluate, locked
from hatify.learning.network import Network, network_of
from hatify.model import HATModel

Sets = Counter[frozenset[int]]
"""How many elements are needed by exactly these tasks."""

_WORD = 62  # tasks that fit into one int64


def packed(bits: Tensor) -> Tensor:
    """``bits`` (bool, shape ``(tasks, elements)``) with all tasks of an element in a few integers: int64, ``(words, elements)``."""
    words = torch.zeros(-(-len(bits) // _WORD) or 1, bits.shape[1], dtype=torch.int64)
    for place, row in enumerate(bits):
        words[place // _WORD] |= row.to(torch.int64) << place % _WORD
    return words


def distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct columns of ``words``, and which of them each element has."""
    if len(words) > 1:
        return torch.unique(words, dim=1, return_inverse=True)
    found, which = torch.unique(words[0], return_inverse=True)
    return found[None], which


def count(words: Tensor, tasks: list[int], times: Tensor | None = None) -> Sets:
    """How often each set of tasks occurs among the columns of ``words``, each counted ``times`` (once if None)."""
    found, which = distinct(words)
    sums = torch.zeros(found.shape[1], dtype=torch.int64)
    sums.index_add_(0, which, torch.ones_like(which) if times is None else times)
    total: Sets = Counter()
    for column, number in zip(found.t().tolist(), sums.tolist()):
        bits = sum(word << (_WORD * place) for place, word in enumerate(column))
        total[frozenset(task for place, task in enumerate(tasks) if bits >> place & 1)] = number
    return total


@singledispatch
def weights_by_sets(module: nn.Module, tasks: list[int]) -> dict[str, Sets]:
    """For every shared parameter, how many of its elements are needed by exactly which of ``tasks``."""
    return _one_by_one(network_of(module), tasks)


def _one_by_one(network: Network, tasks: list[int]) -> dict[str, Sets]:
    locks = [network.locks([task]) for task in tasks]
    return {
        name: count(packed(_stacked([found[name].reshape(-1) for found in locks], shape.numel())), tasks)
        for name, shape in network.locks([]).items()
    }


@weights_by_sets.register
def _of_converted(hat: HATModel, tasks: list[int]) -> dict[str, Sets]:
    """A weight is needed by the tasks that have both its output and its input live; outputs and inputs come in few distinct sets of
    tasks, so one pass over pairs of them counts all tasks at once."""
    facts = hat._facts
    masks = {task: hat.binary_masks(task) for task in tasks}
    evaluated: dict[int, dict] = {t: {} for t in tasks}
    memo: dict[tuple, Tensor] = {}

    def bits(ids: Tensor) -> Tensor:
        key = (ids.data_ptr(), tuple(ids.shape), tuple(ids.stride()))
        if key not in memo:
            program = facts.program(ids)
            memo[key] = _stacked([evaluate(program, masks[t].__getitem__, evaluated[t]) > 0 for t in tasks], ids.numel())
        return memo[key]

    def live(ids: Tensor, task: int) -> Tensor:
        return bits(ids)[tasks.index(task)].reshape(ids.shape)

    found: dict[str, Sets] = {}
    for name, uses in facts.uses.items():
        numel = hat.get_parameter(name).numel()
        if len(uses) == 1 and uses[0].positions is None:
            found[name] = _by_pairs(uses[0], bits(uses[0].rows), bits(uses[0].cols), tasks)
        else:  # several uses, or a use of parts: element by element
            each = [[locked(use, numel, live, [task], False) for use in uses] for task in tasks]
            found[name] = count(packed(_stacked([torch.stack(needed).any(0) for needed in each], numel)), tasks)
    return found


def _by_pairs(use: Use, rows: Tensor, cols: Tensor, tasks: list[int]) -> Sets:
    """The elements of one use, by the distinct sets of tasks of their outputs and of their inputs."""
    row, which_row = distinct(packed(rows))
    col, which_col = distinct(packed(cols))
    pairs = (which_row.reshape(use.rows.shape) * col.shape[1] + which_col.reshape(use.cols.shape)).expand(use.shape)
    times = torch.bincount(pairs.reshape(-1), minlength=row.shape[1] * col.shape[1])
    both = (row[:, :, None] & col[:, None, :]).reshape(len(row), -1)
    there = times > 0
    return count(both[:, there], tasks, times[there])


def _stacked(bits: list[Tensor], elements: int) -> Tensor:
    return torch.stack(bits) if bits else torch.zeros(0, elements, dtype=torch.bool)
