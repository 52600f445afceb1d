"""Named tensors in safetensors files: written and hashed in one pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError
from .atomic import start_flush
from .digests import PIECE, Digests

__all__ = ["DTYPES", "dtype_name", "memory_of", "write_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

def dtype_name(dtype: torch.dtype) -> str | None:
    """What the format calls a dtype, or None where it has no name for it."""
    return _NAMES.get(dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes tensors of any strides and device, one at a time; readable by every safetensors library.

    Returns:
        The digests and ``bytes`` of the file.

    Raises:
        ArtifactError: a tensor on the meta device.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ordered = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # as the library: aligned to their own size
    start = 0
    for key in ordered:
        tensor = tensors[key]
        if tensor.device.type == "meta":
            raise ArtifactError(
                "a tensor has no values",
                where=key,
                why="it is on the meta device",
                fix="load the model on a device that holds values",
            )
        end = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file, Digests() as digests:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text), digests)
        begun = 0
        for key in ordered:
            _write(file, _bytes(tensors[key].detach().contiguous().cpu()), digests)
            if digests.bytes - begun >= PIECE:
                start_flush(file.fileno(), begun, digests.bytes - begun)
                begun = digests.bytes
        return digests.entry()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; a tensor that shares memory until written keeps doing so."""
    if tensor.numel() == 0:
        return memoryview(b"")
    if torch._C._is_cow_tensor(tensor):
        tensor = tensor.clone()  # asking for the address of shared memory would part it for good
    return memory_of(tensor)


_OF_NUMPY = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that has any."""
    if tensor.dtype in _OF_NUMPY and tensor.dim():  # the short way: there are thousands of small ones
        return memoryview(tensor.numpy()).cast("B")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write(file: BinaryIO, data: memoryview, digests: Digests) -> None:
    digests.add(data)
    while len(data):
        data = data[file.write(data) :]
