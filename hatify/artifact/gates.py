"""Gates as data: the table of expressions, ids of masks, values and locks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError
from ..gates import Use
from ..gates.table import KINDS, Expressions
from .fields import Fields

__all__ = ["Budget", "Ids", "StoredIds", "table_from", "uses_from", "uses_to"]

TABLE, IDS, POSITIONS = "table", "ids", "positions"

PROGRAMS = 1 << 16
"""Vector programs of a model: 205 for ResNet-152, 202 for Swin-T."""
ELEMENTS, TIMES = 1 << 24, 16
"""Elements of all programs, and how many more for each row and id: 6.4 million for 5.6 million rows and ids in Mixer-S/16, and never
more than 1.1 for each."""


class Ids:
    """Collects gate ids of any shapes in one vector; equal ones are stored once."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._offsets: dict[bytes, int] = {}
        self._total = 0
        self._positions: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def add(self, ids: Tensor) -> list[Any]:
        """``[offset, shape]`` of these ids in the vector."""
        flat = ids.detach().reshape(-1).to(torch.int32)
        key = flat.numpy().tobytes()
        if key not in self._offsets:
            self._offsets[key] = self._total
            self._parts.append(flat)
            self._total += flat.numel()
        return [self._offsets[key], list(ids.shape)]

    def add_positions(self, positions: Tensor) -> int:
        """The number of an index tensor of its own."""
        if id(positions) not in self._positions:
            self._positions[id(positions)] = len(self._kept)
            self._kept.append(positions)
        return self._positions[id(positions)]

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the file beside the table."""
        ids = torch.cat(self._parts) if self._parts else torch.zeros(0, dtype=torch.int32)
        positions = {f"{POSITIONS}.{n}": p.to(torch.int64) for n, p in enumerate(self._kept)}
        return {IDS: ids, **positions}


class StoredIds:
    """The other way: ids and index tensors by what :class:`Ids` gave, checked."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str) -> None:
        self.file, self.tensors = file, tensors
        for name in (TABLE, IDS):
            if name not in tensors or tensors[name].dtype != torch.int32:
                raise ArtifactError("a tensor is missing", where=f"{file}: {name}", why="or no int32", fix="save again")
        ids = tensors[IDS].reshape(-1).numpy()
        self.ids = torch.from_numpy(ids.astype(np.int64))
        size = tensors[TABLE].shape[0] if tensors[TABLE].dim() else 0
        if len(ids) and not (ids.min() >= 0 and ids.max() < size):
            raise ArtifactError("a gate is not in the table", where=f"{file}: {IDS}", fix="save again")

    def get(self, fields: Fields) -> Tensor:
        """The ids at ``[offset, shape]``: int64."""
        if len(fields.is_a(list)) != 2:
            raise fields.wrong(str(fields.data)[:60], "an offset and a shape")
        start = fields.at(0).count()
        shape = fields.at(1).counts()
        numel = 1
        for size in shape:
            numel *= size
            if numel > self.ids.numel():
                raise fields.wrong(str(list(shape)), f"at most {self.ids.numel()} ids")
        if start + numel > self.ids.numel():
            raise fields.wrong(str(start), f"ids among {self.ids.numel()}")
        return self.ids[start : start + numel].view(shape)

    def positions(self, fields: Fields, shape: tuple[int, ...], numel: int) -> Tensor:
        """An index tensor of that shape into a parameter of ``numel`` elements."""
        found = self.tensors.get(f"{POSITIONS}.{fields.count()}")
        fits = found is not None and found.dtype == torch.int64 and tuple(found.shape) == shape
        if not fits or (found.numel() and not (int(found.min()) >= -1 and int(found.max()) < numel)):
            raise fields.wrong(str(fields.data), f"an index tensor of shape {shape} in {self.file}")
        return found


class StoredTable(Expressions):
    """The table whose :meth:`GateTable.stored` is ``entries``; read when it is first asked for, which many uses of a model never do.

    Only steps are kept, no normal form: nothing is combined with what is stored, and the members of all expressions of a deep stream
    would need memory that is quadratic in its depth.
    """

    def __init__(self, maskers: list[str], entries: Tensor) -> None:
        self._maskers, self._entries = maskers, entries

    def __len__(self) -> int:
        return len(self._entries)

    @cached_property
    def _rows(self) -> list[list[int]]:
        return self._entries.tolist()

    def step(self, gate: int) -> tuple:
        kind, a, b = self._rows[gate]
        return (KINDS[kind], self._maskers[a] if kind == 2 else a, b) if kind > 1 else (KINDS[kind],)

    def stored(self, maskers: list[str]) -> Tensor:
        """The entries; ``maskers`` are the same as ever."""
        return self._entries


def table_from(entries: Tensor, maskers: list[str], sizes: Mapping[str, int], file: str) -> StoredTable:
    """The table of the stored entries, checked as a whole.

    Here and with the ids, numpy: other threads read and hash at the same time, and torch's own would get in their way.

    Raises:
        ArtifactError: an entry that is none.
    """

    def wrong(why: str) -> ArtifactError:
        return ArtifactError("the table of gates is wrong", where=f"{file}: {TABLE}", why=why, fix="save again")

    if entries.dim() != 2 or entries.shape[1] != 3 or entries[:2].tolist() != [[0, 0, 0], [1, 0, 0]]:
        raise wrong(f"its shape is {tuple(entries.shape)}")
    kind, a, b = entries.numpy().T.copy()
    number = np.arange(len(entries))
    channels = np.array([sizes[m] for m in maskers] or [0])
    atom = (kind == 2) & (a >= 0) & (a < len(maskers)) & (b >= 0) & (b < channels[a.clip(0, len(channels) - 1)])
    joined = ((kind == 3) | (kind == 4)) & (a > 1) & (b > 1) & (a < number) & (b < number) & (a != b)
    good = atom | joined | (number < 2)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise wrong(f"row {row}: {entries[row].tolist()}")
    return StoredTable(maskers, entries)


class Budget:
    """Counts what is compiled from the gates of a file, which can say in a few rows what takes forever to compute.

    Raises:
        ArtifactError: it is more than gates that were written by this library need.
    """

    def __init__(self, stored: int, file: str) -> None:
        self.file, self.programs, self.elements = file, PROGRAMS, ELEMENTS + TIMES * stored

    def __call__(self, size: int) -> None:
        self.programs, self.elements = self.programs - 1, self.elements - size
        if self.programs < 0 or self.elements < 0:
            why = "its expressions share more parts than can be computed"
            raise ArtifactError("the table of gates is wrong", where=f"{self.file}: {TABLE}", why=why, fix="save again")


def uses_to(uses: Mapping[str, list[Use]], ids: Ids) -> list[dict[str, Any]]:
    """Every use of every shared parameter."""
    out = []
    for parameter, found in uses.items():
        for use in found:
            entry = {"parameter": parameter, "rows": ids.add(use.rows), "cols": ids.add(use.cols), "shape": list(use.shape)}
            if use.positions is not None:
                entry["positions"] = ids.add_positions(use.positions)
            if use.grouped:
                entry["grouped"] = True
            if use.groups is not None:
                entry["groups"] = ids.add_positions(use.groups)
            if use.site:
                entry["site"] = use.site
            out.append(entry)
    return out


def uses_from(fields: Fields, ids: StoredIds, numels: Callable[[str], int | None]) -> dict[str, list[Use]]:
    """The uses again; ``numels`` gives the size of a parameter, or None where there is none of that name."""
    found: dict[str, list[Use]] = {}
    for entry in fields.items():
        entry.only("parameter", "rows", "cols", "shape", "positions", "grouped", "groups", "site")
        parameter = entry.get("parameter", str)
        held = numels(parameter)
        if held is None:
            raise entry.at("parameter").wrong(repr(parameter[:100]), "the name of a parameter")
        shape = entry.at("shape").counts()
        rows, cols = ids.get(entry.at("rows")), ids.get(entry.at("cols"))
        numel = 1
        for size in shape:
            numel *= size
        positions = ids.positions(entry.at("positions"), shape, held) if entry.has("positions") else None
        if positions is None and numel != held:
            raise entry.at("shape").wrong(str(shape), f"{held} elements")
        for name, part in (("rows", rows), ("cols", cols)):
            fits = part.dim() <= len(shape) and all(p in (1, s) for p, s in zip(reversed(part.shape), reversed(shape)))
            if not fits:
                raise entry.at(name).wrong(str(tuple(part.shape)), f"a shape that broadcasts to {shape}")
        grouped = entry.get("grouped", bool) if entry.has("grouped") else False
        site = entry.get("site", str) if entry.has("site") else ""
        groups = ids.positions(entry.at("groups"), (held,), held) if entry.has("groups") else None
        use = Use(parameter, rows, cols, shape, positions=positions, grouped=grouped, groups=groups, site=site)
        found.setdefault(parameter, []).append(use)
    return found
