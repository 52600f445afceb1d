"""What layers start from: the values that freed weights go back to."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hatify.errors import TaskError
from hatify.modules import Masker, TaskIndexed
from hatify.modules.task_indexed import task_copy

INITIALISERS = ("reset_parameters", "_reset_parameters")


def initialiser(module: nn.Module) -> Callable[[], None] | None:
    """The method by which a module draws its own weights anew, as torch's layers call it."""
    for name in INITIALISERS:
        method = getattr(module, name, None)
        if callable(method) and not _needs_arguments(method):
            return method
    return None


def drawn(owner: nn.Module, where: str) -> dict[str, Tensor]:
    """What the initialiser of a module gives its own parameters, by attribute: on the CPU, drawn from the global generator.

    ``owner`` is left as it is; its tensors may be on the meta device. What no initialiser writes is drawn as torch draws the
    weights of its layers (:func:`default`).

    Raises:
        TaskError: the initialiser failed.
    """
    own = {name: default(p) for name, p in owner._parameters.items() if p is not None}
    if initialiser(owner) is None:
        return own
    memo: dict[int, object] = {id(m): None for m in owner.modules() if isinstance(m, Masker)}
    for parameter in owner.parameters():
        held = next((n for n, p in owner._parameters.items() if p is parameter), None)
        memo[id(parameter)] = nn.Parameter(own[held] if held else default(parameter), parameter.requires_grad)
    for module in owner.modules():  # what it computed or keeps beside its parameters is no matter of its initialiser
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = torch.zeros_like(tensor, device="cpu", requires_grad=False)
    fresh = copy.deepcopy(owner, memo)
    _run(fresh, where)
    return {name: p.detach() for name, p in fresh._parameters.items() if p is not None}


def drawn_copy(module: TaskIndexed, task: int, where: str, *, pretrained: bool = False) -> dict[str, Tensor]:
    """What the copy of ``task`` starts from, by name, parameters and buffers: drawn by the layers' own initialisers.

    What no initialiser writes, and what does not train, is as it is without a task; all of it is for ``pretrained``. A
    head with classes of its own has only its initialiser.
    """
    fresh, mine = task_copy(module), module.tasks[task]
    plain, own = _state(fresh), _state(mine)
    other = {name for name, tensor in own.items() if plain[name].shape != tensor.shape}
    frozen = {name for name, parameter in mine.named_parameters() if not parameter.requires_grad}
    kept = {n: t.clone() for n, t in plain.items() if n not in other and (pretrained or n in frozen)}
    if other:
        fresh = copy.deepcopy(mine)
        for name, tensor in _state(fresh).items():
            tensor.copy_(default(tensor) if name in other else plain[name])
    if other or not pretrained:
        for inner in reversed(list(fresh.modules())):  # a layer's parts before the layer itself, which may overrule them
            if initialiser(inner) is not None:
                _run(inner, where)
    return {**_state(fresh), **kept}


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}


def default(like: Tensor) -> Tensor:
    """The draw of torch's own layers: uniform within ``1 / sqrt(fan in)``; vectors, such as biases, are zero. On the CPU."""
    value = torch.zeros(like.shape, dtype=like.dtype)
    if value.dim() > 1 and value.is_floating_point() and value.numel():
        bound = value[0].numel() ** -0.5
        value.uniform_(-bound, bound)
    return value


def _run(module: nn.Module, where: str) -> None:
    try:
        with torch.no_grad():
            initialiser(module)()
    except Exception as error:
        raise TaskError(
            "an initialiser failed; nothing was changed",
            where=where,
            why=f"{type(module).__name__}.reset_parameters: {type(error).__name__}: {error}",
            fix="hatify.forget_task(hat, task, reset='pretrained', state_dict=model.state_dict())",
        ) from error


def _needs_arguments(method: Callable) -> bool:
    parameters: Iterable[inspect.Parameter] = inspect.signature(method).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
