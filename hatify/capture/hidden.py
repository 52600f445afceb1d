"""Weights that a program holds past its modules, where nobody would train or lock them."""

from __future__ import annotations

import dis
from collections.abc import Collection
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from hatify.capture.names import line_behind
from hatify.capture.tree import FunctionCall
from hatify.errors import CaptureError
from hatify.modules.closures import memory_of, reached


def check_constant(program: ExportedProgram, value: Any, node: fx.Node) -> None:
    """That no tensor which the model reads past its modules (in a closure, a view made before) is a parameter: nobody would train it.

    Raises:
        CaptureError: it shares memory with one.
    """
    if not isinstance(value, Tensor):
        return
    memory = memory_of(value)
    shared = (n for n in program.graph_signature.parameters if memory_of(program.state_dict[n]) == memory)
    name = None if memory is None else next(shared, None)
    if name is not None:
        name = name.removeprefix("root.")
        raise CaptureError(
            f"forward reads the parameter {name}, or a view of it, past the module that owns it",
            where=next((line for user in node.users if (line := line_behind(user))), name),
            why="what is held by a function or in another object stays the original's",
            fix=f"read self.{name} in forward",
        )


def check_arguments(graph: fx.Graph, memory: Collection[int]) -> None:
    """That no function of the user's holds or is given what has weights: nobody would see them.

    Args:
        memory: of the weights.

    Raises:
        CaptureError: one is.
    """
    for node in graph.nodes:
        given = pytree.tree_leaves((node.args, node.kwargs))
        held = next((a for a in given if isinstance(a, nn.Module) or (callable(a) and not isinstance(a, type))), None)
        role = "an argument"
        if held is None and isinstance(node.target, FunctionCall):
            held, role = _closed_over(node.target.function, memory), "closed over by forward or backward"
        if held is None:
            continue
        kind = type(held).__name__
        raise CaptureError(
            f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} is {role} of a function of your own",
            where=node.meta.get("line") or str(node.target),
            why="what its weights do in there, and in the backward pass, cannot be seen",
            fix="give the function the tensors that it needs, or keep the module that calls it whole: "
            "hatify.register(ThatModule, hatify.TaskIndexedLayer())",
        )


def _closed_over(function: type[torch.autograd.Function], memory: Collection[int]) -> Any:
    """A module or weight that a user's function reads from where it was written, not from its arguments; a table is none."""
    methods = [m for base in function.__mro__ if base is not torch.autograd.Function for m in vars(base).values()]
    functions = [m.__func__ if isinstance(m, staticmethod | classmethod) else m for m in methods]
    own = [f for f in functions if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")]
    by_name = [f.__globals__.get(i.argval) for f in own for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL"]
    read = [*own, *(value for value in by_name if isinstance(value, nn.Module | nn.Parameter))]
    return next((value for value in reached(read) if isinstance(value, nn.Module) or _is_weight(value, memory)), None)


def _is_weight(value: Any, memory: Collection[int]) -> bool:
    if not isinstance(value, Tensor):
        return False
    return isinstance(value, nn.Parameter) or value.requires_grad or memory_of(value) in memory
