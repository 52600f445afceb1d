"""Weights from a file: safetensors, or a torch file that holds nothing but tensors and plain containers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, few

__all__ = ["alias_groups", "load_checkpoint", "read_checkpoint"]

# Under which name training scripts keep the weights, in the order in which they are looked for.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads the weights of ``path`` into ``model``, all of them or none.

    Takes ``.safetensors`` files and files of ``torch.save`` (with ``weights_only=True``: no code is run).
    Dicts that wrap the weights ("state_dict", "model") and prefixes of wrappers ("module.") are removed. Tied
    weights that the file stores once are found.

    Raises:
        CheckpointError: no such file, no checkpoint, or other keys or shapes than the model has.
    """
    state = read_checkpoint(path, model)
    own = model.state_dict()
    for group in alias_groups(own):
        stored = [key for key in group if key in state]
        if stored:
            state.update({key: state[stored[0]] for key in group if key not in state})
    _check_fits(own, state, path)
    model.load_state_dict(state)


def read_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """The weights in a file, as :func:`load_checkpoint` takes them; ``model`` says which prefixes belong to a wrapper.

    Raises:
        CheckpointError: no such file, or no checkpoint.
    """
    return _without_prefixes(_unwrap(_read(Path(path)), path), model)


def alias_groups(state: Mapping[str, Any]) -> list[list[str]]:
    """The groups of keys (two or more each) whose values are one tensor: same memory, layout and type."""
    groups: dict[Any, list[str]] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta" and value.numel():
            # Asking for its address would part weights that share memory until written; those are never one tensor.
            shared = torch._C._is_cow_tensor(value)
            memory = (value.untyped_storage()._cdata, value.storage_offset()) if shared else value.data_ptr()
            view = (value.device, memory, value.dtype, value.shape, value.stride())
            groups.setdefault(view, []).append(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def _read(path: Path) -> Any:
    if not path.is_file():
        why = "it is a directory" if path.is_dir() else "there is no such file"
        raise CheckpointError("the checkpoint cannot be read", where=str(path), why=why, fix="give a weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError("the checkpoint cannot be read", where=str(path), why=error.strerror) from error
    # The readers raise whatever the bytes lead them to: unpickling, zip, end of file, decoding, key errors.
    except Exception as error:
        whole_model = "Unsupported global" in str(error) or "GLOBAL" in str(error)
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckpointError(
            "the file is no checkpoint" if not whole_model else "the file holds Python objects, not only weights",
            where=str(path),
            why="reading it would run code" if whole_model else f"{type(error).__name__}: {first_line[:200]}",
            fix='write it with torch.save(model.state_dict(), "weights.pt")',
        ) from error


def _unwrap(state: Any, path: Any) -> dict[str, Any]:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    strange = None
    if not isinstance(state, Mapping) or not state:
        strange = f"it holds a {type(state).__name__}" if state else "it is empty"
    else:
        odd = [k for k, v in state.items() if not isinstance(v, Tensor) and not str(k).endswith("_extra_state")]
        if odd:
            strange = f"{odd[0]!r} holds a {type(state[odd[0]]).__name__}, not a tensor"
    if strange:
        raise CheckpointError(
            "the file is no checkpoint",
            where=str(path),
            why=strange,
            fix='write it with torch.save(model.state_dict(), "weights.pt")',
        )
    return dict(state)


def _without_prefixes(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    own = model.state_dict().keys()
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                again = True
    return state


def _check_fits(own: Mapping[str, Any], state: Mapping[str, Any], path: Any) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
        for key, value in state.items()
        if isinstance(own.get(key), Tensor) and isinstance(value, Tensor) and own[key].shape != value.shape
    ]
    lists = [_list("missing", missing), _list("unexpected", unexpected), _list("other shape", shapes)]
    if any(lists):
        raise CheckpointError(
            "the checkpoint does not fit the model",
            where=str(path),
            why="\n".join(text for text in lists if text),
            fix="give the weights of this very architecture (same options, same number of classes)",
        )


def _list(title: str, entries: list[str]) -> str:
    return f"{title} ({len(entries)}): {few(entries, _SHOWN)}" if entries else ""
