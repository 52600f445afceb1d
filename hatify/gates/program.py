"""Gate tensors as small vector programs: what it takes to turn the maskers' masks into the mask of a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hatify.gates.table import CONST, TOP, GateTable


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
        with torch.inference_mode(False):  # it serves training too, whichever pass asks for it first
            return None if self.index is None else torch.tensor(self.index, device="cpu")

    def prepare(self, seen: set[Program]) -> None:
        """Makes what is made when it is first asked for, which compiled code cannot; parts of ``seen`` have it."""
        if self not in seen:
            seen.add(self)
            self.index_tensor  # noqa: B018
            for part in self.parts:
                part.prepare(seen)

    def maskers(self) -> set[str]:
        """Names of the maskers that the program reads."""
        found: set[str] = set()
        self.collect(found, set())
        return found

    def collect(self, found: set[str], seen: set[Program]) -> None:
        """Adds the names of the maskers that the program reads to ``found``; parts of ``seen`` have been there."""
        if self in seen:
            return
        seen.add(self)
        if self.masker:
            found.add(self.masker)
        for part in self.parts:
            part.collect(found, seen)


class _Compiler:
    """Compiles vectors of gate ids; equal vectors give the same program, so that a residual stream's OR is shared."""

    def __init__(self, table: GateTable, sizes: dict[str, int]) -> None:
        self.table, self.sizes = table, sizes
        self.done: dict[tuple[int, ...], Program] = {}

    def compile(self, ids: tuple[int, ...]) -> Program:
        if ids not in self.done:
            self.done[ids] = self._compile(ids)
        return self.done[ids]

    def _compile(self, ids: tuple[int, ...]) -> Program:
        groups: dict[tuple, list[int]] = {}
        of = {gate: groups.setdefault(self._group(gate), []) for gate in dict.fromkeys(ids)}
        for position, gate in enumerate(ids):
            of[gate].append(position)
        if len(groups) > 1:
            parts = tuple(self.compile(tuple(ids[p] for p in positions)) for positions in groups.values())
            order = [p for positions in groups.values() for p in positions]
            index = torch.empty(len(ids), dtype=torch.int64)
            index[torch.tensor(order)] = torch.arange(len(ids))
            identity = order == list(range(len(ids)))
            return Program("pick", len(ids), index=None if identity else tuple(index.tolist()), parts=parts)
        (kind, *rest) = next(iter(groups))
        if kind == "ones":
            return Program("ones", len(ids))
        if kind == "atom":
            channels = tuple(self.table.keys[gate][2] for gate in ids)
            identity = channels == tuple(range(self.sizes[rest[0]]))
            return Program("atom", len(ids), masker=rest[0], index=None if identity else channels)
        sides = zip(*(self.table.parts[gate] for gate in ids))
        return Program(kind, len(ids), parts=tuple(self.compile(tuple(side)) for side in sides))

    def _group(self, gate: int) -> tuple:
        key = self.table.keys[gate]
        if gate in (CONST, TOP):
            return ("ones",)
        return ("atom", key[1]) if key[0] == "atom" else (key[0],)


def compile_gates(table: GateTable, sizes: dict[str, int]) -> Callable[[Tensor], Program]:
    """A function from gate ids (any shape, read in row-major order) to a program of as many elements.

    ``sizes`` gives the number of channels of each masker.
    """
    compiler = _Compiler(table, sizes)
    return lambda ids: compiler.compile(tuple(ids.reshape(-1).tolist()))


def evaluate(program: Program, mask_of: Callable[[str], Tensor], memo: dict) -> Tensor:
    """The mask that a program stands for: shape ``(program.size,)``.

    ``mask_of(name)`` gives a masker's mask, shape ``(channels,)``; OR is max and AND is min (section 2 of the algebra),
    so the result is binary for binary masks. ``memo`` keeps shared parts for the duration of one forward pass.
    """
    found = memo.get(program)
    if found is not None:
        return found
    if program.op == "ones":
        out = torch.ones(program.size, device=memo.get("device"))
    elif program.op == "atom":
        out = mask_of(program.masker)
        if program.index is not None:
            out = out.index_select(0, program.index_tensor.to(out.device))
    else:
        parts = [evaluate(part, mask_of, memo) for part in program.parts]
        if program.op == "pick":
            out = torch.cat(parts)
            if program.index is not None:
                out = out.index_select(0, program.index_tensor.to(out.device))
        else:
            out = (torch.maximum if program.op == "or" else torch.minimum)(*parts)
    memo[program] = out
    return out
