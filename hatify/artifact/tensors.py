"""Named tensors in safetensors files: written and hashed in one pass, read into memory that was checked for before it is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError
from .digests import Digests, check_digests
from .fields import Fields, check_file, parse

__all__ = ["DTYPES", "dtype_name", "read_tensors", "write_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER = 100_000_000
"""Bytes of a header that are read, as in the safetensors library."""

BATCH, MOST = 1 << 24, 512
"""Bytes and tensors that are read at a time; a tensor may be larger."""

Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""Key, type, shape and bytes of a tensor in a file."""


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
        for key in ordered:
            _write(file, _bytes(tensors[key].detach().contiguous().cpu()), digests)
        return digests.entry()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; a tensor that shares memory until written keeps doing so."""
    if tensor.numel() == 0:
        return memoryview(b"")
    if torch._C._is_cow_tensor(tensor):
        tensor = tensor.clone()  # asking for the address of shared memory would part it for good
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write(file: BinaryIO, data: memoryview, digests: Digests) -> None:
    digests.add(data)
    while len(data):
        data = data[file.write(data) :]


def read_tensors(
    path: Path,
    expected: Expected | None,
    digests: Mapping[str, Any],
    fill: Callable[[str, Tensor], None],
    *,
    device: torch.device | None = None,
    convert: Callable[[str, Tensor], Tensor] | None = None,
    only: Callable[[str], bool] | None = None,
) -> None:
    """Reads a file, tensor by tensor, in the order of the file.

    Args:
        expected: dtype and shape of every tensor that the file must hold, no more and no less; None takes what there is.
        digests: the entry of the file in ``config.json``.
        fill: takes each tensor, in memory of its own. The digests are only compared when all have been read: an error then says that what
            was filled in is not to be used.
        device: where they go; a few MiB are moved before the next ones are read.
        convert: what becomes of each, on its device.
        only: which tensors are filled in; the others are read for the digest alone.

    Raises:
        ArtifactError: anything that is not as it was written.
    """
    size = check_file(path)
    try:
        with path.open("rb", buffering=0) as file, Digests(whole="pieces" not in digests) as hashed:
            for entries in _batches(_header(file, path, size, expected, hashed)):
                held = [(key, torch.empty(shape, dtype=dtype, device="cpu")) for key, dtype, shape, _ in entries]
                data = [memoryview(t.reshape(-1).view(torch.uint8).numpy()) for _, t in held if t.numel()]
                _read(file, [*data], path)
                for part in data:
                    hashed.add(part)
                for key, tensor in held:
                    if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
                        raise _wrong(path, key, "a bool that is neither 0 nor 1")
                    if only is not None and not only(key):
                        continue
                    moved = tensor if device is None else tensor.to(device)
                    fill(key, moved if convert is None else convert(key, moved))
                del held, data
            found = hashed.entry()
    except OSError as error:
        raise ArtifactError("a file cannot be read", where=str(path), why=error.strerror or str(error)) from error
    check_digests(path, found, dict(digests))


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """What is read at a time: some large tensors or many small ones, so that thousands do not ask for the interpreter one by one."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and (size + entry[3] > BATCH or len(batch) == MOST):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry[3]
    if batch:
        yield batch


def _header(file: BinaryIO, path: Path, size: int, expected: Expected | None, hashed: Digests) -> Iterator[Entry]:
    """The entries in the order of their data, all of them checked before the first one is given."""
    first = bytearray(8)
    if size < 8:
        raise _wrong(path, "header", f"the file has {size} bytes")
    _read(file, [memoryview(first)], path)
    length = int.from_bytes(first, "little")
    if length > min(HEADER, size - 8):
        raise _wrong(path, "header", f"its length would be {length} bytes of {size}")
    text = bytearray(length)
    _read(file, [memoryview(text)], path)
    hashed.add(memoryview(bytes(first) + bytes(text)))
    fields = Fields(parse(bytes(text), str(path)), str(path))
    entries = []
    for key, part in fields.pairs():
        if key == "__metadata__":
            for _, value in part.pairs():
                value.is_a(str)
            continue
        part.only("dtype", "shape", "data_offsets")
        dtype = DTYPES[part.at("dtype").one_of(*DTYPES)]
        shape = tuple(p.count(most=size) for p in part.at("shape").items())
        offsets = [p.count(most=size) for p in part.at("data_offsets").items()]
        nbytes = dtype.itemsize
        for dim in shape:
            nbytes *= dim
        if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
            raise part.at("data_offsets").wrong(str(offsets), f"{nbytes} bytes for {shape}")
        if expected is not None and expected.get(key) != (dtype, shape):
            found = f"{part.data['dtype']} {list(shape)}"
            wanted = "no such tensor" if key not in expected else f"{dtype_name(expected[key][0])} {list(expected[key][1])}"
            raise part.wrong(found, wanted)
        entries.append((offsets[0], key, dtype, shape, nbytes))
    for key in expected or ():
        if key not in fields.data:
            raise _wrong(path, key, "the file does not hold it")
    entries.sort(key=lambda e: (e[0], e[4]))
    end = 0
    for start, key, _, _, nbytes in entries:
        if start != end:
            raise _wrong(path, key, f"its data begins at {start}, the one before ends at {end}")
        end += nbytes
    if 8 + length + end != size:
        raise _wrong(path, "header", f"it describes {8 + length + end} bytes, the file has {size}")
    return ((key, dtype, shape, nbytes) for _, key, dtype, shape, nbytes in entries)


def _read(file: BinaryIO, parts: list[memoryview], path: Path) -> None:
    """Fills ``parts``, none of them empty, one after another."""
    while parts and len(parts[0]):
        count = os.readv(file.fileno(), parts) if hasattr(os, "readv") else file.readinto(parts[0])  # type: ignore[attr-defined]
        if not count:
            raise _wrong(path, "data", "the file ends too early")
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]


def _wrong(path: Path, key: str, why: str) -> ArtifactError:
    return ArtifactError("a file is not what was written", where=f"{path}: {key}", why=why, fix="save again")
