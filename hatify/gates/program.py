"""Gate tensors as small vector programs: what it takes to turn the maskers' masks into the mask of a value."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from hatify.gates.lattice import Lattice
from hatify.gates.table import Expressions


@contextmanager
def kept_for_all() -> Iterator[None]:
    """For tensors that later passes use too, whatever pass asks for them first: one without gradients, one that is traced with fake tensors
    (``torch.export``), or one within a transform of ``torch.func``, where every new tensor belongs to the transform."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    outside = temporarily_clear_interpreter_stack() if transformed else nullcontext()
    with torch.inference_mode(False), _disable_current_modes(), outside:
        yield


@dataclass(frozen=True, eq=False)
class Program:
    """One step of a vector program over masks; programs share their parts, so they are compared by identity.

    ``op`` is ``ones`` (TOP and CONST), ``atom`` (channels of one masker), ``or`` (max), ``and`` (min) or ``pick``
    (positions gathered from the concatenation of the parts). ``size`` is the number of elements.
    """

    op: str
    size: int
    masker: str | None = None
    index: tuple[int, ...] | None = None
    parts: tuple[Program, ...] = ()

    @cached_property
    def index_tensor(self) -> Tensor | None:
        """``index`` as int64 on the CPU, or None where it is the identity."""
        with kept_for_all():
            return None if self.index is None else torch.tensor(self.index, device="cpu")

    @cached_property
    def lattice(self) -> Lattice | None:
        """``index`` as views, where it can be."""
        return None if self.index is None else Lattice.of(self.index)

    def steps(self, done: Container[Any] = ()) -> list[Program]:
        """The program and all parts, each behind its own parts; those of ``done`` and what only they are made of are left out.

        No recursion, here and where it is compiled: deep programs would exhaust the interpreter's stack.
        """
        found: dict[Program, None] = {}
        todo = [self]
        while todo:
            one = todo.pop()
            if one in found or one in done:
                continue
            before = [part for part in one.parts if part not in found and part not in done]
            if before:
                todo += [one, *before]
            else:
                found[one] = None
        return list(found)

    def prepare(self, seen: set[Program]) -> None:
        """Makes what is made when it is first asked for, which compiled code cannot; parts of ``seen`` have it."""
        for one in self.steps(seen):
            seen.add(one)
            if one.lattice is None:
                one.index_tensor  # noqa: B018

    def maskers(self) -> set[str]:
        """Names of the maskers that the program reads."""
        found: set[str] = set()
        self.collect(found, set())
        return found

    def collect(self, found: set[str], seen: set[Program]) -> None:
        """Adds the names of the maskers that the program reads to ``found``; parts of ``seen`` have been there."""
        for one in self.steps(seen):
            seen.add(one)
            if one.masker:
                found.add(one.masker)


class _Compiler:
    """Compiles vectors of gate ids; equal vectors give the same program, so that a residual stream's OR is shared."""

    def __init__(self, table: Expressions, sizes: dict[str, int], count: Callable[[int], None] | None) -> None:
        self.table, self.sizes, self.count = table, sizes, count
        self.done: dict[tuple[int, ...], Program] = {}

    def compile(self, ids: tuple[int, ...]) -> Program:
        plans: dict[tuple[int, ...], tuple[dict, list]] = {}
        todo = [ids]
        while todo:
            one = todo[-1]
            if one in self.done:
                todo.pop()
            elif one in plans:
                step, parts = plans.pop(todo.pop())
                self.done[one] = Program(size=len(one), parts=tuple([self.done[part] for part in parts]), **step)
            else:
                if self.count is not None:
                    self.count(len(one))
                plans[one] = self._plan(one)
                todo += plans[one][1]
        return self.done[ids]

    def _plan(self, ids: tuple[int, ...]) -> tuple[dict, list[tuple[int, ...]]]:
        """A program's own fields, and the vectors that its parts compute."""
        steps = {gate: self.table.step(gate) for gate in dict.fromkeys(ids)}
        groups: dict[tuple, list[int]] = {}
        of = {gate: groups.setdefault(_group(step), []) for gate, step in steps.items()}
        for position, gate in enumerate(ids):
            of[gate].append(position)
        if len(groups) > 1:
            order = [p for positions in groups.values() for p in positions]
            index = torch.empty(len(ids), dtype=torch.int64)
            index[torch.tensor(order)] = torch.arange(len(ids))
            identity = order == list(range(len(ids)))
            parts = [tuple([ids[p] for p in positions]) for positions in groups.values()]
            return {"op": "pick", "index": None if identity else tuple(index.tolist())}, parts
        (kind, *rest) = next(iter(groups))
        if kind == "ones":
            return {"op": "ones"}, []
        if kind == "atom":
            channels = tuple([steps[gate][2] for gate in ids])
            identity = channels == tuple(range(self.sizes[rest[0]]))
            return {"op": "atom", "masker": rest[0], "index": None if identity else channels}, []
        return {"op": kind}, [tuple([steps[gate][side] for gate in ids]) for side in (1, 2)]


def _group(step: tuple) -> tuple:
    """What steps that one program computes at once have in common."""
    return ("ones",) if step[0] in ("const", "top") else step[:2] if step[0] == "atom" else step[:1]


def compile_gates(
    table: Expressions, sizes: dict[str, int], count: Callable[[int], None] | None = None
) -> Callable[[Tensor], Program]:
    """A function from gate ids (any shape, read in row-major order) to a program of as many elements.

    ``sizes`` gives the number of channels of each masker. ``count`` is told the size of every program before it is made: whoever does
    not know where a table is from can raise an error there.
    """
    compiler = _Compiler(table, sizes, count)
    return lambda ids: compiler.compile(tuple(ids.reshape(-1).tolist()))


def evaluate(program: Program, mask_of: Callable[[str], Tensor], memo: dict) -> Tensor:
    """The mask that a program stands for: shape ``(program.size,)``.

    ``mask_of(name)`` gives a masker's mask, shape ``(channels,)``; OR is max and AND is min (section 2 of the algebra),
    so the result is binary for binary masks. ``memo`` keeps shared parts for the duration of one forward pass.
    """
    if program not in memo:
        for step in program.steps(memo):
            memo[step] = _evaluated(step, mask_of, memo)
    return memo[program]


def _evaluated(program: Program, mask_of: Callable[[str], Tensor], memo: dict) -> Tensor:
    """The mask of a program whose parts are in ``memo``."""
    if program.op == "ones":
        return torch.ones(program.size, device=memo.get("device"))
    if program.op in ("or", "and"):
        return (torch.maximum if program.op == "or" else torch.minimum)(*[memo[part] for part in program.parts])
    out = mask_of(program.masker) if program.op == "atom" else torch.cat([memo[part] for part in program.parts])
    if program.index is None:
        return out
    return out.index_select(0, program.index_tensor.to(out.device)) if program.lattice is None else program.lattice.take(out)
