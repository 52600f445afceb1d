"""A task's plain module as a file: torch's exported program, ONNX, or its weights alone."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from hatify.artifact.atomic import new_file
from hatify.artifact.tensors import write_tensors
from hatify.errors import HatifyError
from hatify.lifecycle.extraction import plain_call
from hatify.proof.inputs import batch_size
from hatify.proof.parity import taken_batches

if TYPE_CHECKING:
    from hatify.model import HATModel


def exported(hat: HATModel, module: nn.Module) -> ExportedProgram:
    """The module as a program for inputs like the model's own: batch, and every size that the model does not fix, stay open.

    Raises:
        HatifyError: torch.export cannot.
    """
    example, *others = taken_batches(hat)
    tensors = next((t for t in others if batch_size(t) > 1), example)  # a batch of one would be taken for a constant
    fixed = set(hat._facts.check_sizes.fixed)
    shapes = ShapesCollection()
    for name, tensor in zip(hat.signature.names, tensors):
        shapes[tensor] = {dim: Dim.AUTO for dim in range(tensor.dim()) if (name, dim) not in fixed}
    args, kwargs = _as_captured(hat, *plain_call(hat, tensors))
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(module, args, kwargs))
    except Exception as error:  # whatever the exporter meets in somebody else's layers
        raise HatifyError(
            "the extracted module cannot be exported",
            where=hat._facts.name,
            why=f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}",
            fix="--out NAME.safetensors writes its weights alone",
        ) from error


def _as_captured(hat: HATModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A program takes its inputs in one spelling: by position what the example call gave by position."""
    if args:
        return args, kwargs
    by_position = len(hat.example_inputs[0])
    arguments = [p for p, structure in hat.signature.arguments()[:by_position] if structure.leaves and p.kind is not p.KEYWORD_ONLY]
    return tuple(kwargs[p.name] for p in arguments), {n: v for n, v in kwargs.items() if n not in {p.name for p in arguments}}


def write_program(program: ExportedProgram, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """A file for ``torch.export.load``, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer ends the process on a full disk
    torch.export.save(program, buffer)
    with new_file(path, overwrite) as file:
        file.write_bytes(buffer.getbuffer())


def write_onnx(program: ExportedProgram, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """An ONNX file with its weights inside, whole or not at all.

    Raises:
        HatifyError: the packages for it are not installed, or torch's exporter cannot.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HatifyError(
            "ONNX needs more packages", why=f"{error.name} is not installed", fix='pip install "hatify[onnx]"'
        ) from error
    with new_file(path, overwrite) as file:
        try:
            torch.onnx.export(program, f=str(file), dynamo=True, external_data=False, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            raise HatifyError(
                "the extracted module cannot be written as ONNX", where=str(path), why=str(error).strip().splitlines()[0][:200]
            ) from error


def write_weights(module: nn.Module, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """The state dict as safetensors, whole or not at all."""
    with new_file(path, overwrite) as file:
        write_tensors(Path(file), module.state_dict())
