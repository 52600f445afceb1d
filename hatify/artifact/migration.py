"""Directories of format 1, which held weights and settings only: the user's original is converted again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..conversion import OPTIONS
from ..errors import ArtifactError
from ..sources import Source
from ..structure import Structure, unflatten
from .config import hat_config_of, settings_of, source_of
from .fields import Fields, check_file
from .signatures import structure_from

if TYPE_CHECKING:
    from ..model import HATModel

__all__ = ["load_first"]

WEIGHTS, INPUTS = "model.safetensors", "example_inputs.safetensors"
_FIELDS = (
    "format", "format_version", "hatify_version", "torch_version", "source", "settings", "training", "example_inputs"
)  # fmt: skip
_SHOWN = 5


def load_first(directory: Path, config: Fields, factory: Callable[[], nn.Module] | None) -> HATModel:
    """The model of a directory of format 1; ``hatify.save`` then writes it in the present format.

    Args:
        factory: returns the original (any weights).

    Raises:
        ArtifactError: the original is needed, or another one than ``factory``'s; or a file that is not as it was written.
    """
    config.only(*_FIELDS)
    settings, source = settings_of(config), source_of(config)
    if factory is None:
        raise _needs_original(directory, source)
    hat_config = None if config.at("settings").at("config").data is None else hat_config_of(config)
    training = config.get("training", bool)
    stored = config.at("example_inputs")
    structure = None if stored.data is None else structure_from(stored)
    state = _tensors(directory / WEIGHTS)
    _check_counts(config.at("settings"), state)
    inputs = _example_inputs(directory, structure)

    from .. import convert

    with torch.random.fork_rng(devices=[]):  # the random weights of the new model are overwritten below
        model = factory()
        if not isinstance(model, nn.Module):
            raise ArtifactError("the factory does not give a model", why=f"it returned a {type(model).__name__}")
        try:
            _take_dtypes(model, state)
            hat = convert(
                model,
                tasks=settings["classes"] or settings["tasks"],
                example_inputs=inputs,
                config=hat_config,
                **{name: settings[name] for name in OPTIONS},
                verify=False,
                inplace=True,
            )
            _take_dtypes(hat, state)
            _check_keys(directory, hat.state_dict(), state)
            hat.load_state_dict(state, strict=True)
        except ArtifactError:
            raise
        except Exception as error:  # of the libraries too, for what the files say of the user's model
            raise _other_model(directory, f"{type(error).__name__}: {error}") from error
    hat.source = source
    hat.train(training)
    return hat


def _needs_original(directory: Path, source: Source | None) -> ArtifactError:
    """Names and options of a file would decide which code of a library runs, what it reads and what it fetches: they are only shown."""
    said = "" if source is None else f"; it says that it was made of {source.text[:100]!r}"
    return ArtifactError(
        "the original model is needed",
        where=str(directory),
        why=f"a directory of format 1 holds no graph, and it does not decide which code is run{said}",
        fix=f"hatify.load({str(directory)!r}, factory=make_model); make_model() returns the original",
    )


def _check_counts(settings: Fields, state: dict[str, Tensor]) -> None:
    """Whether there are weights for so many tasks and classes, before memory is taken for them."""
    longest = max((size for tensor in state.values() if tensor.numel() for size in tensor.shape), default=0)
    settings.at("tasks").count(1, max(1, len(state)))
    for part in () if settings.at("classes").data is None else settings.at("classes").items():
        if part.data is not None:
            part.count(1, max(1, longest))


def _tensors(path: Path) -> dict[str, Tensor]:
    """Tensors and, by the file's metadata, further names of the same ones."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        return {**tensors, **{key: tensors[stored] for key, stored in aliases.items()}}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(
            "a file cannot be read", where=str(path), why=f"{type(error).__name__}: {error}", fix="convert and save again"
        ) from error


def _example_inputs(directory: Path, structure: Structure | None) -> Any:
    if structure is None:
        return None
    tensors = _tensors(directory / INPUTS)
    names = [f"input_{index}" for index in range(structure.leaves)]
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


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """A model saved in half precision comes back so; `load_state_dict` alone would cast to float32."""
    for key, value in model.state_dict(keep_vars=True).items():
        stored = state.get(key)
        if isinstance(value, Tensor) and stored is not None and value.dtype != stored.dtype:
            value.data = value.data.to(stored.dtype)


def _check_keys(directory: Path, own: dict[str, Any], state: dict[str, Tensor]) -> None:
    named = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key, value in own.items() if key in state and state[key].shape != value.shape],
    }
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
