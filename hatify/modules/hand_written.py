"""What finished tasks need of a hand-written network's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from hatify.gates import TOP, Use, locked
from hatify.modules.eager import TABLE, atoms, live
from hatify.modules.layers import HATLayer, HATRecurrent
from hatify.modules.masker import MASKERS, Masker
from hatify.modules.task_indexed import TaskIndexed, TaskIndexedParameter


def locks(network: nn.Module, tasks: Iterable[int], paper: bool = False) -> dict[str, Tensor]:
    """For every parameter that tasks share, the elements that ``tasks`` need: bool, the parameter's shape, on the CPU.

    HAT layers know how they are used from the calls with a task that they have seen, in any mode and for any task; a weight
    used several times is locked where any use locks it. Conservative where nothing is known: a layer that has seen no such call
    (as after loading from disk) and a raw parameter that no layer owns are locked as a whole once there is a task to protect.
    So run the network once before asking: ``network(HATPayload(x, task_id=0))``.

    Args:
        tasks: the tasks to protect.
        paper: lock by equation 2, which takes the unions over tasks of live outputs and of live inputs, instead of pair by pair.

    Raises:
        TaskError: no such task.
    """
    tasks = sorted(set(tasks))
    owned = {id(p) for m in network.modules() if isinstance(m, Masker | TaskIndexed | TaskIndexedParameter) for p in m.parameters()}
    uses = _uses(network)
    memo: dict[tuple, Tensor] = {}

    def live_once(ids: Tensor, task: int) -> Tensor:
        key = (id(ids), task)  # ids outlive this call: the uses hold them
        if key not in memo:
            memo[key] = live(ids, task)
        return memo[key]

    found: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        if id(parameter) in owned:
            continue
        total = torch.zeros(parameter.numel(), dtype=torch.bool)
        for use in uses.get(id(parameter), [None]):
            if use is None:
                total |= bool(tasks)
            else:
                total |= locked(use, parameter.numel(), live_once, tasks, paper)
        found[name] = total.view(parameter.shape)
    return found


def _uses(network: nn.Module) -> dict[int, list[Use | None]]:
    """Uses by the id of the parameter; None for one that nothing is known of."""
    found: dict[int, list[Use | None]] = {}
    copies = _copies(network)
    for layer in network.modules():
        if not isinstance(layer, HATLayer | HATRecurrent):
            continue
        current = _translation(copies, layer)
        recorded: dict[str, list[Use | None]] = {}
        for use in (u for uses in layer.seen.values() for u in uses):
            use = replace(use, rows=_translated(use.rows, current), cols=_translated(use.cols, current))
            recorded.setdefault(use.parameter, []).append(use)
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            if not name.startswith(("masker.", "maskers.")):
                found.setdefault(id(parameter), []).extend(recorded.get(name, [None]))
    return found


def _copies(network: nn.Module) -> dict[str, list[str]]:
    """For a masker's key, the keys of the maskers of ``network`` that are copies of it."""
    found: dict[str, list[str]] = {}
    for masker in network.modules():
        if isinstance(masker, Masker):
            for key in masker.copied_from:
                found.setdefault(key, []).append(masker.key)
    return found


def _translation(copies: dict[str, list[str]], layer: HATLayer | HATRecurrent) -> Callable[[str], str | None]:
    """A copied layer remembers uses in the gates of what it was copied from: the masker of the same place in the copy, or None."""

    def current(key: str) -> str | None:
        for masker in layer.maskers.values() if isinstance(layer, HATRecurrent) else [layer.masker]:
            if masker is not None and key in masker.copied_from:
                return masker.key
        own = copies.get(key, [])
        if len(own) == 1:
            return own[0]
        return key if not own and key in MASKERS else None

    return current


def _translated(ids: Tensor, current: Callable[[str], str | None]) -> Tensor:
    """The same gates in the atoms of other maskers; TOP where there is none (locks more, never less)."""
    if all(current(key) == key for key in TABLE.maskers(ids)):
        return ids
    memo: dict[int, int] = {}

    def translate(gate: int) -> int:
        if gate not in memo:
            key = TABLE.keys[gate]
            if key[0] == "atom":
                masker = current(key[1])
                memo[gate] = TOP if masker is None else int(atoms(MASKERS[masker])[key[2]])
            elif key[0] in ("and", "or"):
                memo[gate] = TABLE.join_all(key[0], [translate(member) for member in sorted(key[1])])
            else:
                memo[gate] = gate
        return memo[gate]

    return torch.tensor([translate(gate) for gate in ids.reshape(-1).tolist()]).reshape(ids.shape)
