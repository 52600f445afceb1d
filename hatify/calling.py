"""Calls as flat lists of tensors: every spelling of the captured call is understood, others are refused.

>>> def forward(x, mask=None, *, scale=1.0): ...
>>> signature, tensors = Signature.from_call(forward, (torch.zeros(2, 3),), {"mask": torch.ones(2)})
>>> signature.names
['x', 'mask']
>>> signature.bind((), {"mask": m, "x": x}) == [x, m]   # another spelling of the same call
True
>>> signature.bind((x,), {"mask": m, "scale": 2.0})     # CallError: captured with scale=1.0
"""

from __future__ import annotations

import difflib
import inspect
import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CallError
from .structure import Structure, flatten, match, refusal, unflatten

__all__ = ["Signature", "Structure", "flatten", "unflatten"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """How a model was called when it was captured, in terms of the parameters of its ``forward``.

    The canonical order of the tensors is that of the parameters, which is also the order of ``names``.
    """

    def __init__(self, parameters: list[inspect.Parameter], positional: int, captured: dict[str, Structure]) -> None:
        self._parameters = parameters
        self._taken = inspect.Signature(parameters)
        self._positional = positional  # how many arguments the example call passed by position
        self._captured = captured  # parameter name -> structure; *args as a tuple, **kwargs as a dict
        self._names = _names(parameters, captured)

    @classmethod
    def from_call(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Signature, list[Tensor]]:
        """Records the example call ``forward(*args, **kwargs)`` (which is not run).

        Returns:
            The signature and the tensors of the call in canonical order.

        Raises:
            CallError: ``forward`` does not take these arguments, or one holds a value that is not supported.
        """
        parameters = _parameters(forward)
        bound = _bind(parameters, args, kwargs, known=None)
        captured: dict[str, Structure] = {}
        tensors: list[Tensor] = []
        for parameter in parameters:
            if parameter.name in bound:
                more, captured[parameter.name] = flatten(bound[parameter.name], parameter.name)
                tensors += more
        return cls(parameters, len(args), captured), tensors

    @property
    def names(self) -> list[str]:
        """One readable, valid, unique identifier per tensor, in canonical order."""
        return list(self._names)

    def arguments(self) -> list[tuple[inspect.Parameter, Structure]]:
        """The parameters that the captured call passed, each with the structure of its value."""
        return [(p, self._captured[p.name]) for p in self._parameters if p.name in self._captured]

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of another call, in canonical order.

        Arguments may be given by position or by keyword, and those that the example call left out may be
        given with their default value.

        Raises:
            CallError: an unknown, missing or surplus argument, another structure, or another constant.
        """
        taken = (
            None if torch.compiler.is_compiling() else self._taken
        )  # a compiler makes its own: it cannot follow one that is there
        bound = _bind(self._parameters, tuple(args), kwargs, known=self._captured, signature=taken)
        tensors: list[Tensor] = []
        for parameter in self._parameters:
            name = parameter.name
            if name in self._captured:
                if name in bound:
                    value = bound[name]
                elif parameter.kind is parameter.VAR_POSITIONAL:
                    value = ()
                elif parameter.kind is parameter.VAR_KEYWORD:
                    value = {}
                elif parameter.default is not parameter.empty:
                    value = parameter.default
                else:
                    raise refusal(name, f"captured was {self._captured[name]}, but it is missing in this call")
                if parameter.kind is parameter.VAR_KEYWORD:
                    self._check_extras(value, name)
                tensors += match(value, self._captured[name], name)
            elif name in bound:
                self._check_default(parameter, bound[name])
        return tensors

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of the captured call, with other tensors (in canonical order).

        Raises:
            CallError: not as many tensors as the call has.
        """
        if len(tensors) != len(self._names):
            raise CallError(f"{len(self._names)} tensors expected, {len(tensors)} given", where=", ".join(self._names))
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        start = 0
        for parameter in self._parameters:
            structure = self._captured.get(parameter.name)
            if structure is None:
                continue
            value = unflatten(tensors[start : start + structure.leaves], structure)
            start += structure.leaves
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif parameter.kind in _POSITIONAL and len(args) < self._positional:
                args.append(value)
            else:
                kwargs[parameter.name] = value
        return tuple(args), kwargs

    def __str__(self) -> str:
        return f"({', '.join(f'{name}={structure}' for name, structure in self._captured.items())})"

    def _check_extras(self, given: dict[str, Any], name: str) -> None:
        """``**kwargs`` by single name, so that the error names the keyword and not the whole dict."""
        captured = self._captured[name].labels()
        for key in given:
            if key not in captured:
                raise refusal(key, f"it was not in the captured call{_near(key, captured)}")
        for key in captured:
            if key not in given:
                raise refusal(key, "it was in the captured call, but it is missing in this call")

    @staticmethod
    def _check_default(parameter: inspect.Parameter, value: Any) -> None:
        if parameter.kind is parameter.VAR_POSITIONAL:
            if value:
                raise refusal(parameter.name, f"the captured call had none, given are {len(value)}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            for key in value:
                raise refusal(key, "it was not in the captured call")
        elif not _same(value, parameter.default):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)[:80]
            raise refusal(
                parameter.name,
                f"the captured call left it out, with default {parameter.default!r}; given is {shown}",
            )


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # builtins and compiled callables do not say
        parameters = inspect.signature(lambda *args, **kwargs: None).parameters.values()
    # Annotations may hold anything, also what cannot be copied with the model.
    return [parameter.replace(annotation=parameter.empty) for parameter in parameters]


def _bind(
    parameters: list[inspect.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Any,
    signature: inspect.Signature | None = None,
) -> dict[str, Any]:
    """The arguments by parameter name, without defaults. ``known`` is None while capturing; ``signature`` is that of the parameters, where
    there is one already."""
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in kwargs:
        if key not in names and not takes_any:
            raise refusal(key, f"the model takes no such argument{_near(key, names)}; it takes {', '.join(names)}")
    signature = inspect.Signature(parameters) if signature is None else signature
    try:
        # Missing arguments of a later call are reported by `bind`, with what was captured.
        bound = signature.bind(*args, **kwargs) if known is None else signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise CallError(
            "the arguments do not fit the model",
            where=f"forward{signature}",
            why=str(error),
            fix="pass what forward takes; example_inputs may be a tensor, a tuple of positional arguments or a dict of keywords"
            if known is None
            else "call it as captured",
        ) from error
    return dict(bound.arguments)


def _near(name: str, names: Sequence[Any]) -> str:
    close = difflib.get_close_matches(name, [str(other) for other in names], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _same(value: Any, default: Any) -> bool:
    """Whether an argument that was not captured has its default value."""
    if value is default:
        return True
    try:
        mine, structure = flatten(value)
        others, other_structure = flatten(default)
    except CallError:
        return False
    return structure == other_structure and all(torch.equal(a, b) for a, b in zip(mine, others))


def _names(parameters: list[inspect.Parameter], captured: dict[str, Structure]) -> list[str]:
    names: list[str] = []
    taken: set[str] = set()
    for parameter in parameters:
        structure = captured.get(parameter.name)
        if structure is None:
            continue
        # A keyword taken by **kwargs is known to the caller by its own name.
        root = [] if parameter.kind is parameter.VAR_KEYWORD else [parameter.name]
        for path in _paths(structure, root):
            base = name = _identifier("_".join(path))
            count = 1
            while name in taken:
                name = f"{base}_{count}"
                count += 1
            taken.add(name)
            names.append(name)
    return names


def _paths(structure: Structure, path: list[str]) -> list[list[str]]:
    if structure.kind == "tensor":
        return [path]
    pairs = zip(structure.labels(), structure.children)
    return [found for label, child in pairs for found in _paths(child, [*path, str(label)])]


def _identifier(text: str) -> str:
    text = re.sub(r"\W", "_", text) or "input"
    if text[0].isdigit():
        text = f"input_{text}"
    return f"{text}_" if keyword.iskeyword(text) else text
