"""``save`` and ``load``: a conversion as a directory.

    config.json                  format, versions, source, settings, structure of the example inputs
    model.safetensors            hat.state_dict(): weights, masks, locks, task-indexed copies
    example_inputs.safetensors   the tensors of the example call
    graph.py                     the generated code, for people to read; never executed

Loading builds the architecture again, converts it with the same settings and loads the state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ArtifactError, HatifyError
from ..sources import Source
from ..structure import Structure, flatten, unflatten
from .atomic import new_directory
from .config import FORMAT, VERSION, read_config
from .tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from ..model import HATModel

__all__ = ["load", "save"]

CONFIG, WEIGHTS, INPUTS, GRAPH = "config.json", "model.safetensors", "example_inputs.safetensors", "graph.py"

FILES = (CONFIG, WEIGHTS, INPUTS, GRAPH)
"""All that such a directory holds."""

_SHOWN = 5


def save(hat: HATModel, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a converted model to the directory ``path``, whole or not at all.

    Args:
        hat: the model. Its state is stored as it is: dtypes, masks, finished tasks.
        path: a directory that does not exist, unless ``overwrite``. Parents are made.
        overwrite: replace an existing directory (all of it) once the new one is complete.

    Returns:
        The absolute path.

    Raises:
        ArtifactError: the directory exists or cannot be written, or the state holds more than tensors.
    """
    inputs = hat.example_inputs
    tensors, structure = flatten(inputs, "example_inputs") if inputs is not None else ([], None)
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "hatify_version": __version__,
        "torch_version": str(torch.__version__),
        "source": hat.source.to_json() if hat.source is not None else None,
        "settings": hat.settings,
        "training": hat.training,
        "example_inputs": structure.to_json() if structure is not None else None,
    }
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise ArtifactError("the settings cannot be stored", where="hat.settings", why=str(error)) from error
    with new_directory(path, overwrite) as directory:
        write_tensors(directory / WEIGHTS, hat.state_dict())
        if structure is not None:
            write_tensors(directory / INPUTS, {_input_name(index): tensor for index, tensor in enumerate(tensors)})
        header = "# The converted model as generated code, to be read. hatify never runs this file.\n\n"
        (directory / GRAPH).write_text(header + hat.code.strip() + "\n", encoding="utf-8")
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
    return Path(os.path.realpath(path))


def load(path: str | os.PathLike[str], *, factory: Callable[[], nn.Module] | None = None) -> HATModel:
    """Reads what ``save`` wrote, onto the CPU.

    Args:
        path: the directory.
        factory: returns the original model (any weights). Needed where the model is not one of timm,
            torchvision or transformers: a directory must not decide which function of yours is called.

    Raises:
        ArtifactError: no saved model, an unknown format, incomplete, or another model than ``factory``'s.
    """
    directory = Path(path)
    config = read_config(directory / CONFIG)
    state = read_tensors(directory / WEIGHTS)
    settings, source = config["settings"], config["source"]

    from .. import convert  # not before the files have been checked: the core takes a while to import

    with torch.random.fork_rng(devices=[]):  # the random weights of the new model are overwritten below
        model = _build(directory, source, factory)
        _take_dtypes(model, state)
        _take_buffers(model, state)
        hat = convert(
            model,
            tasks=settings["classes"] or settings["tasks"],
            example_inputs=_example_inputs(directory, config["example_inputs"]),
            config=_hat_config(directory, settings["config"]),
            heads=settings["heads"],
            locking=settings["locking"],
            norms=settings.get("norms", "live"),
            residuals=settings.get("residuals", "or"),
            verify=False,
            inplace=True,
        )
    hat.source = source
    _take_dtypes(hat, state)
    _check_keys(directory, hat.state_dict(), state)
    try:
        hat.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _other_model(directory, str(error)) from error
    hat.train(config["training"])
    return hat


def _build(directory: Path, source: Source | None, factory: Callable[[], nn.Module] | None) -> nn.Module:
    if factory is not None:
        model = factory()
        if not isinstance(model, nn.Module):
            raise ArtifactError("the factory does not give a model", why=f"it returned a {type(model).__name__}")
        return model
    if source is not None and source.kind != "factory":
        try:
            return source.build()
        except HatifyError:
            raise
        except Exception as error:  # the library's own refusal of a name or an argument that the file gave
            raise ArtifactError(
                "the model cannot be built",
                where=f"{directory / CONFIG}: source",
                why=f"{source.text}: {type(error).__name__}: {error}",
                fix=f"hatify.load({str(directory)!r}, factory=make_model)",
            ) from error
    if source is None:
        why = "the directory does not say which model it was made of"
        fix = f"hatify.load({str(directory)!r}, factory=make_model); make_model() returns the original"
    else:
        module, _, name = source.name.partition(":")
        why = f"it was made by {source.name}, and a directory does not decide which code is run"
        fix = f"from {module} import {name}; hatify.load({str(directory)!r}, factory={name})"
    raise ArtifactError("the original model is needed", where=str(directory), why=why, fix=fix)


def _example_inputs(directory: Path, structure: Structure | None) -> Any:
    if structure is None:
        return None
    tensors = read_tensors(directory / INPUTS)
    names = [_input_name(index) for index in range(structure.leaves)]
    missing = [name for name in names if name not in tensors]
    value = unflatten([tensors[name] for name in names], structure) if not missing else None
    shaped = isinstance(value, tuple) and len(value) == 2
    if missing or not shaped or not isinstance(value[0], tuple) or not isinstance(value[1], dict):
        raise ArtifactError(
            "the example inputs cannot be read",
            where=str(directory / INPUTS),
            why=f"it lacks {', '.join(missing)}" if missing else "they are not the arguments of a call",
            fix="save again",
        )
    args, kwargs = value
    return kwargs if kwargs and not args else args


def _input_name(index: int) -> str:
    return f"input_{index}"


def _hat_config(directory: Path, stored: dict[str, Any] | None) -> Any:
    if stored is None:
        return None
    from ..modules import HATConfig

    try:
        return HATConfig(**stored)
    except (TypeError, HatifyError) as error:
        raise ArtifactError(
            "a field of the configuration is wrong",
            where=f"{directory / CONFIG}: settings.config",
            why=str(error),
            fix="convert and save again",
        ) from error


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """A model saved in half precision comes back so; `load_state_dict` alone would cast to float32."""
    for key, value in model.state_dict(keep_vars=True).items():
        stored = state.get(key)
        if isinstance(value, Tensor) and stored is not None and value.dtype != stored.dtype:
            value.data = value.data.to(stored.dtype)


def _take_buffers(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Index tables and masks are data to the conversion: it must see those that were saved, not those of a new model."""
    for name, buffer in model.named_buffers():
        stored = state.get(name)
        if stored is not None and stored.shape == buffer.shape:
            buffer.data.copy_(stored)


def _check_keys(directory: Path, own: dict[str, Any], state: dict[str, Tensor]) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        key
        for key, value in own.items()
        if isinstance(value, Tensor)
        and key in state
        and state[key].shape != value.shape
        # what a module keeps as extra state has the size it needs
        and not key.endswith("_extra_state")
    ]
    named = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = [f"{title} ({len(keys)}): {', '.join(keys[:_SHOWN])}" for title, keys in named.items() if keys]
    if lines:
        raise _other_model(directory, "\n".join(lines))


def _other_model(directory: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "the saved weights do not fit the model",
        where=str(directory / WEIGHTS),
        why=why,
        fix="give the factory of the very model that was converted; the same versions of its library help",
    )
