"""What a converted network knows of its making, and the sizes that its capture fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from hatify.calling import Signature
from hatify.capture import Captured
from hatify.capture.captured import Way
from hatify.errors import CallError
from hatify.structure import Structure

if TYPE_CHECKING:
    from hatify.analysis.plan import Analysis
    from hatify.gates.locks import Use
    from hatify.gates.program import Program
    from hatify.inspection import Row
    from hatify.modules import HATConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What a HAT model knows of its making; :meth:`HATModel.add_tasks` replaces it, and copies of the model share it.

    Attributes:
        name: of the original's class.
        settings: what the conversion was asked for.
        signature, inputs: of the original's forward, and the example inputs in its order.
        output, train_output: the structure of what it gives, in eval and in train mode.
        check_sizes: the sizes that the capture fixed.
        room: the path of the module that holds what the conversion added.
        masker_paths: where each masker is.
        indexed_paths: where the task copies of raw parameters and buffers are, by their names.
        indexed, indexed_buffers: the names of parameters and buffers with task copies.
        program: gates as a program, for any of their ids.
        uses: the uses of every shared parameter.
        original_keys, original_names: the keys of the original's state dict in order; its parameters and buffers, all names.
        reference: the original's tree on the meta device (its code, without its weights); None in a loaded model.
        stand_in: what a directory holds of that.
        values: what the analysis found of every node; nothing in a loaded model, which has ``rows``.
        switches: whether a graph switches gradients or autocast.
        can_train: whether train mode could be captured.
        asks: where the original asks whether gradients are on, by mode (True: train mode).
        own_modes: the modules that its ``train(mode)`` leaves in the other mode, by mode.
        unlike: the types in which it takes another path, with its source line, by mode.
        parameter_types: those of the original's parameters, each once.
        input_types: the types of the example inputs, where the original's code looks at types; None for one that has the parameters'.
        selections: buffers whose values were taken for which elements a boolean index picks, or which way a branch goes.
    """

    name: str
    config: HATConfig
    settings: dict[str, Any]
    signature: Signature
    inputs: list[Tensor]
    output: Structure
    train_output: Structure
    check_sizes: Sizes
    room: str
    masker_paths: dict[str, str]
    indexed_paths: dict[str, str]
    indexed: list[str]
    indexed_buffers: list[str]
    program: Callable[[Tensor], Program]
    uses: dict[str, list[Use]]
    original_keys: list[str]
    original_names: list[str]
    reference: nn.Module | None = None
    stand_in: nn.Module | None = None
    analysis: Analysis
    values: dict[fx.Node, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    switches: bool
    can_train: bool
    asks: dict[bool, list[str]]
    own_modes: dict[bool, list[str]]
    unlike: dict[bool, dict[Way, str]]
    parameter_types: list[torch.dtype]
    input_types: list[torch.dtype | None]
    selections: dict[str, Tensor]

    def __deepcopy__(self, memo: dict) -> Facts:
        return self


class Sizes:
    """The sizes that a capture fixed, checked once per combination of input shapes."""

    def __init__(self, captures: list[Captured]) -> None:
        self.names = captures[0].signature.names
        self.fixed = {(f.input, f.dim): f.size for c in captures for f in c.fixed_sizes}
        self.guards = [g for c in captures for g in c.guards]
        self.example = captures[0].inputs
        self.seen: set[tuple] = set()

    @classmethod
    def of(cls, names: list[str], fixed: dict[tuple[str, int], int], guards: list[Any], example: list[Tensor]) -> Sizes:
        """The same of a capture that is not there any more."""
        made = cls.__new__(cls)
        made.names, made.fixed, made.guards, made.example, made.seen = names, fixed, guards, example, set()
        return made

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether inputs of these sizes are what was captured."""
        try:
            self(tensors)
        except CallError:
            return False
        return True

    def __call__(self, tensors: list[Tensor]) -> None:
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key in self.seen:
            return
        for name, tensor, example in zip(self.names, tensors, self.example):
            if tensor.dim() != example.dim():
                raise self._refused(name, f"it has {tensor.dim()} dimensions, captured were {example.dim()}", tensor)
            if tensor.dtype.is_floating_point != example.dtype.is_floating_point:
                raise self._refused(name, f"it is {tensor.dtype}, captured was {example.dtype}", tensor)
            for dim, size in enumerate(tensor.shape):
                fixed = self.fixed.get((name, dim), size)
                if fixed != size:
                    raise self._refused(name, f"dimension {dim} is {size}; the capture fixed it at {fixed}", tensor)
        for guard in self.guards:
            if not guard.holds(tensors):
                raise CallError(
                    "the model takes another path for inputs of these sizes",
                    where=guard.line,
                    why=f"the capture assumed {guard.text}",
                    fix="convert again with example_inputs of the sizes that you need",
                )
        self.seen.add(key)

    def _refused(self, name: str, why: str, tensor: Tensor) -> CallError:
        alone = len(self.names) == 1 and tensor.is_floating_point()
        shape = ", ".join(map(str, tensor.shape))
        example = f"torch.randn({shape})" if alone else f"...), in which {name} is {tensor.dtype} of the shape ({shape}"
        fix = f"hatify.convert(model, example_inputs={example})"
        return CallError(f"the input {name} does not fit the capture", where=name, why=why, fix=fix)


def check_input_types(facts: Facts, dtype: torch.dtype | None, tensors: list[Tensor]) -> None:
    """Whether inputs have the types that were captured, where the original's code looks at types.

    Args:
        dtype: of the model's parameters.

    Raises:
        CallError: one has another.
    """
    for name, tensor, known in zip(facts.signature.names, tensors, facts.input_types):
        expected = dtype if known is None else known
        if tensor.dtype in (expected, dtype) or (tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)):
            continue
        raise CallError(
            f"the input {name} is {tensor.dtype}, not {expected}",
            where=name,
            why="the model's code looks at types, and was captured with inputs of "
            + ("the parameters' type" if known is None else str(known)),
            fix=f"{name}.to({expected}), or hatify.convert with example inputs of {tensor.dtype}",
        )


def check_parameter_types(facts: Facts, types: set[torch.dtype]) -> None:
    """Whether the parameters have one type, or those that they were captured with, where the original's code looks at types.

    Raises:
        CallError: they have other ones.
    """
    captured = set(facts.parameter_types)
    if types != captured and len({*types, *captured}) > 1 and (len(types) > 1 or types <= captured):
        raise CallError(
            f"the parameters are of {', '.join(sorted(map(str, types)))}",
            where=facts.name,
            why=f"the model's code looks at types, and was captured with parameters of {', '.join(sorted(map(str, captured)))}",
            fix="cast the original, and convert that: hatify.convert(model, ...)",
        )


def check_way(unlike: Mapping[Way, str], dtype: torch.dtype | None, tensors: list[Tensor]) -> None:
    """Whether the original computes the same in these types.

    Args:
        dtype: of the model's parameters.

    Raises:
        CallError: it takes another path.
    """
    device = tensors[0].device.type if tensors else "cpu"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    for way, line in unlike.items():
        if way.dtype == dtype if way.autocast is None else way.autocast == autocast:
            fix = f"hatify.convert(model.to({way.dtype}), ...), whose graph has that path"
            if way.autocast is not None:
                others = {torch.bfloat16, torch.float16} - {w.autocast for w in unlike}
                fix = f"torch.autocast({device!r}, dtype={next(iter(others))})" if others else "call it without torch.autocast"
            raise CallError(f"the model takes another path {way}", where=line, why="the capture followed the other one", fix=fix)
