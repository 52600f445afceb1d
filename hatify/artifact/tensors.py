"""Named tensors in safetensors files: written and hashed in one pass."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError
from .atomic import start_flush
from .digests import PIECE, Digests, after

__all__ = ["DTYPES", "Entry", "Expected", "dtype_name", "is_possible", "layout", "memory_of", "write_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of tensors, by key."""
Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""Key, type, shape and bytes of a tensor in a file."""

MOST = 512
"""Parts of memory that one call of the system reads or writes."""


MOST_DIMENSIONS = 64


def is_possible(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether there can be such a tensor: its strides, too, are numbers of 64 bits, even where a size is 0."""
    return len(shape) <= MOST_DIMENSIONS and math.prod(max(size, 1) for size in shape) * dtype.itemsize < 1 << 62


def dtype_name(dtype: torch.dtype) -> str | None:
    """What the format calls a dtype, or None where it has no name for it."""
    return _NAMES.get(dtype)


def layout(expected: Expected) -> tuple[bytes, list[Entry]]:
    """The header of a file that holds these tensors, and what is in it, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    entries: list[Entry] = []
    start = 0
    for key in sorted(expected, key=lambda key: (-expected[key][0].itemsize, key)):  # as the library: aligned to their own size
        dtype, shape = expected[key]
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}
        entries.append((key, dtype, shape, size))
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), entries


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes tensors of any strides and device, one at a time; readable by every safetensors library.

    Returns:
        The digests and ``bytes`` of the file.

    Raises:
        ArtifactError: a tensor on the meta device.
        OSError: the file cannot be written.
    """
    for key, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ArtifactError(
                "a tensor has no values",
                where=key,
                why="it is on the meta device",
                fix="load the model on a device that holds values",
            )
    text, entries = layout({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    with path.open("wb", buffering=0) as file, Digests() as digests:
        parts, written = [memoryview(len(text).to_bytes(8, "little") + text)], 0
        digests.add(parts[0])
        for key, _, _, size in entries:
            if size:
                parts.append(_bytes(tensors[key].detach().contiguous().cpu()))
                digests.add(parts[-1])
            if digests.bytes - written >= PIECE or len(parts) == MOST:
                written = _write(file, parts, written)
                parts = []
        _write(file, parts, written)
        return digests.entry()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that has any; a tensor that shares memory until written keeps doing so."""
    if torch._C._is_cow_tensor(tensor):
        tensor = tensor.clone()  # asking for the address of shared memory would part it for good
    return memory_of(tensor)


_OF_NUMPY = {DTYPES[name] for name in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")}


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that has any."""
    if tensor.dtype in _OF_NUMPY and tensor.dim():  # the short way: there are thousands of small ones
        return memoryview(tensor.numpy()).cast("B")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write(file: BinaryIO, parts: list[memoryview], start: int) -> int:
    """Writes what comes next in the file, at ``start``; where it ends. In few calls: after each one, another thread may hold Python."""
    end = start
    while parts:
        count = os.writev(file.fileno(), parts) if hasattr(os, "writev") else file.write(parts[0])
        end += count
        parts = after(parts, count)
    start_flush(file.fileno(), start, end - start)
    return end
