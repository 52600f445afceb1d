"""``save`` and ``load``: a model as a directory.

    config.json                  format, versions, settings, digest of every file
    model.json                   graphs, modules, gates, report: all but the tensors
    model.safetensors            weights, masks, task-indexed copies, marks of finished tasks (in shards above a size)
    gates.safetensors            the mask algebra: expressions, and the gates of masks, tensors and locks
    example_inputs.safetensors   the tensors of the example call
    graph.py                     the generated code, for people to read; never executed
    README.md                    a model card; may be edited, of which loading warns

Loading needs neither the original's code nor its library, and runs nothing of the directory.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ArtifactError, ArtifactWarning, few
from .atomic import new_directory
from .card import card
from .casting import Cast, cast, check_dtype
from .config import FORMAT, VERSION, hat_config_of, read_config, seal, settings_of, source_of
from .description import Rebuilt, describe_model
from .digests import check_digests, entry_of, word_of
from .fields import Fields, check_file, dump, parse, read_bytes
from .known import Known
from .own_code import warn_without
from .reading import TensorFile, Weights, read_tensors
from .tensors import dtype_name, write_tensors
from .tree import Inventory

if TYPE_CHECKING:
    from ..model import HATModel

__all__ = ["load", "save"]

CONFIG, MODEL, GATES, INPUTS, GRAPH, CARD = (
    "config.json", "model.json", "gates.safetensors", "example_inputs.safetensors", "graph.py", "README.md"
)  # fmt: skip
WEIGHTS = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
OWN = re.compile(r"config\.json|model\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|gates\.safetensors|"
                 r"example_inputs\.safetensors|graph\.py|README\.md")  # fmt: skip
"""Names of all that such a directory holds."""


def save(
    hat: HATModel,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a model to the directory ``path``, whole or not at all.

    Args:
        hat: the model. Its state is stored as it is: weights, masks, finished tasks, modes.
        path: a directory that does not exist, unless ``overwrite``. Parents are made.
        overwrite: replace an existing directory (all of it) once the new one is complete.
        dtype: store floating-point tensors in this type; the model itself stays as it is. Binary masks do not change; outputs do, by
            rounding, and once: of the stored model they never change again.
        max_shard_size: bytes of one file of weights, or text such as ``"2GB"``.

    Returns:
        The absolute path.

    Raises:
        ArtifactError: the directory exists or cannot be written; a layer or operator that cannot be stored; a finished task is being
            trained again at the moment; a number that ``dtype`` does not reach.
    """
    check_session(hat)
    check_dtype(dtype)
    _check_size(max_shard_size)
    with hat._guard.turns.taken():
        hat._guard.restore()
        described = describe_model(hat)
        with new_directory(path, overwrite) as directory:
            write_model(directory, hat, described, dtype, max_shard_size)
    return Path(os.path.realpath(path))


def check_only_ours(path: Path, fix: str) -> None:
    """Whether a directory, if there is one, may be replaced: it holds a saved model and nothing else, or nothing at all.

    Raises:
        ArtifactError: something else is in it.
    """
    held = path.iterdir() if path.is_dir() else ()
    others = sorted(file.name for file in held if not (OWN.fullmatch(file.name) and file.is_file()))
    if others:
        raise ArtifactError(
            f"{path} is not replaced",
            where=few(others, 5),
            why="it also holds files that are not the model's, which would be lost",
            fix=fix,
        )


def check_session(hat: HATModel) -> None:
    """A model in the middle of a session is stored as it is, but for one case.

    Raises:
        ArtifactError: a finished task is being trained again: its weights of before are not in the model.
    """
    session = hat._guard.session
    if session is not None and session.retraining:
        raise ArtifactError(
            f"task {session.task} is finished and being trained again",
            why="what it was before is kept by the session, and would be lost with the directory",
            fix="hat.finish_task() or hat.abandon_task(), then save; or keep hat.state_dict() and run.state_dict() to go on with",
        )


def write_model(directory: Path, hat: HATModel, described: Any, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    """All files of a model, into an empty directory."""
    files: dict[str, Any] = {}
    data, tensors = described.data, described.tensors
    if dtype is not None:
        data, tensors = _cast(data, tensors, dtype)
    shards = _shards(tensors, max_shard_size)
    inputs = {name: cast(name, t, dtype) for name, t in ((f"input_{i}", t) for i, t in enumerate(hat._facts.inputs))}
    with ThreadPoolExecutor(1, thread_name_prefix="hatify-save") as beside:
        others = beside.submit(_write_others, directory, hat, described, data, inputs, dtype)
        for name, held in shards.items():
            files[name] = write_tensors(directory / name, held)
        weights = [*files]
        if len(weights) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
            for name, held in shards.items():
                index["weight_map"].update(dict.fromkeys(held, name))
            files[INDEX] = _write(directory / INDEX, dump(index))
        files.update(others.result())
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "hatify_version": __version__,
        "torch_version": str(torch.__version__),
        "model": hat._facts.name,
        "source": None if hat.source is None else hat.source.to_json(),
        "settings": hat.settings,
        "training": hat.training,
        "active_task": hat.active_task if hat._guard.session is None else hat._guard.session.active_before,
        "example_inputs": [{"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for t in inputs.values()],
        "weights": weights,
        "files": files,
    }
    _write(directory / CONFIG, dump(seal(parse(dump(config).encode(), CONFIG))))


def _write_others(
    directory: Path, hat: HATModel, described: Any, data: dict[str, Any], inputs: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Any]:
    """The files that are made while the weights are written."""
    header = "# The model as generated code, to be read. hatify never runs this file.\n\n"
    return {
        GATES: write_tensors(directory / GATES, described.gates()),
        INPUTS: write_tensors(directory / INPUTS, inputs),
        MODEL: _write(directory / MODEL, dump(data)),
        GRAPH: _write(directory / GRAPH, header + hat.code.strip() + "\n"),
        CARD: _write(directory / CARD, card(hat, [*inputs.values()], dtype)),
    }


def _write(path: Path, text: str) -> dict[str, Any]:
    data = text.encode("utf-8")
    path.write_bytes(data)
    return entry_of(data)


def _cast(data: dict[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same in another type; one tensor after the other is cast when it is written."""
    made = f"{data['room']}.constants."  # which have the types that the original's code gives them
    floating = {key for key, tensor in tensors.items() if tensor.is_floating_point() and not key.startswith(made)}

    def entry(path: str, name: str, part: Any) -> Any:
        key = f"{path}.{name}" if path else name
        return {**part, "dtype": dtype_name(dtype)} if isinstance(part, dict) and key in floating else part

    modules = [
        {
            k: {n: entry(module["path"], n, p) for n, p in v.items()} if k in ("parameters", "buffers") else v
            for k, v in module.items()
        }
        for module in data["modules"]
    ]
    maskers = tuple(f"{module['path']}.embeddings." for module in modules if module["kind"] == "masker")
    held = {k: Cast(k, t, dtype, k.startswith(maskers)) if k in floating else t for k, t in tensors.items()}
    return {**data, "modules": modules}, held


def _check_size(size: int | str) -> None:
    """Whether files of weights may have that size.

    Raises:
        ArtifactError: they may not.
    """
    if isinstance(size, bool) or not (
        (isinstance(size, int) and size > 0) or (isinstance(size, str) and re.fullmatch(r"[1-9]\d*[KMGT]B", size.upper()))
    ):
        why = "bytes are meant, or a whole number of KB, MB, GB or TB"
        raise ArtifactError(f"max_shard_size is not {size!r}", why=why, fix='max_shard_size="2GB"')


def _shards(tensors: Mapping[str, Tensor], size: int | str) -> dict[str, dict[str, Tensor]]:
    """Which tensors go into which file, as the Hub's own helper splits them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_id=lambda tensor: None,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS,
        max_shard_size=size,
    )
    return {name: {key: tensors[key] for key in keys} for name, keys in plan.filename_to_tensors.items()}


def load(
    path: str | os.PathLike[str],
    *,
    factory: Callable[[], nn.Module] | None = None,
    layers: Iterable[Any] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HATModel:
    """Reads what ``save`` wrote. Needs neither the original's code nor its library, and runs nothing of the directory.

    One thing can need the original's code (``factory``): a call without a task, with gradients off, of a model whose own code asks
    whether they are on. Without it such a call takes the path with gradients, and loading warns of it. torch's transformer layers, which
    ask before they take a fused kernel, are stored whole.

    Args:
        path: the directory.
        factory: returns the original model (any weights), for :func:`hatify.verify` to compare with; without it, parity cannot be
            measured. A directory of format 1 needs it.
        layers: what of yours the directory names (it says so if it needs one): classes of layers, autograd functions, operators
            (``torch.ops.mine.spike``), and classes of what the model returns.
        device: where the tensors go, a few at a time (default: torch's default device); ``"meta"`` gives the model without values.
        dtype: the type of all floating-point tensors, as in :func:`hatify.save`.

    Raises:
        ArtifactError: no saved model, or anything in it that is not as it was written; names the file and the field.

    Warns:
        ArtifactWarning: a call without a task and without gradients may differ from the original's; or the model card, of which nothing is
            loaded, is not the one that was written.
    """
    check_dtype(dtype)
    directory, layers = Path(path), list(layers)
    default = torch.get_default_device()
    where = None if device is None and default.type == "cpu" else torch.device(default if device is None else device)
    for attempt in range(_ATTEMPTS):
        seen = _identity(directory)
        try:
            # where and how files are read is not for the caller's region to say; a device mode where none is needed costs time
            with torch.inference_mode(False), nullcontext() if default.type == "cpu" else torch.device("cpu"):
                return _load(directory, seen, factory, layers, where, dtype)
        except ArtifactError:
            if seen == _identity(directory) or attempt == _ATTEMPTS - 1:
                raise  # else another process saved there in the meantime: once more, from the new one
    raise AssertionError


_ATTEMPTS = 100


def _identity(directory: Path) -> tuple[int, ...] | None:
    """Which directory is there."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _load(
    directory: Path,
    seen: tuple[int, ...] | None,
    factory: Callable[[], nn.Module] | None,
    layers: list[Any],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> HATModel:
    config = read_config(directory / CONFIG)
    if config.data["format_version"] == 1:
        from .migration import load_first

        hat = load_first(directory, config, factory)
        return hat if device is None and dtype is None else hat.to(device=device, dtype=dtype)
    return _Reader(directory, seen, config, Known(layers), device, dtype).model(factory)


class _Reader:
    """Reads one directory: small files first, everything checked, tensors last."""

    def __init__(
        self,
        directory: Path,
        seen: tuple[int, ...] | None,
        config: Fields,
        known: Known,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.directory, self.seen, self.config, self.known, self.device, self.dtype = directory, seen, config, known, device, dtype

    def model(self, factory: Callable[[], nn.Module] | None) -> HATModel:
        config = self.config
        settings, source, hat_config = settings_of(config), source_of(config), hat_config_of(config)
        training = config.get("training", bool)
        active = None if config.at("active_task").data is None else config.at("active_task").count(0, hat_config.num_tasks - 1)
        for name in self.config.data["files"]:
            if name != CARD:
                self._sized(name)
        description = Fields(parse(self._bytes(MODEL), str(self.directory / MODEL)), str(self.directory / MODEL))
        inventory = Inventory(description.at("modules"), description.get("room", str))
        with self._weights(inventory) as weights:
            weights.begin()
            self._bytes(GRAPH)
            changed = self._changed_card()
            gates, inputs, where = self._tensors(GATES, None), self._inputs(), str(self.directory / GATES)
            rebuilt = Rebuilt(description, inventory, hat_config, settings, training, gates, where, inputs, self.known)
            for key, tensor in self._moved(weights, inventory):
                rebuilt.fill(key, tensor)
        rebuilt.filled()
        hat = rebuilt.model
        hat.train(training)  # modules that its own train() leaves in the other mode included
        hat.source = source
        hat.active_task = active
        if factory is not None:
            from .reference import take_reference

            take_reference(hat, factory, self.directory)
        elif any(hat._facts.asks.values()) and hat._facts.stand_in is None:
            warn_without(hat, "it is code of its own, or the directory was written before such code was stored", stacklevel=5)
        if self.device is None or self.device.type != "meta":
            hat._guard.refresh()
        if changed is not None:
            warnings.warn(
                f"the model card is not what was written ({changed.where}: {changed.why}); it says nothing that is loaded, and the rest is "
                "as it was: hatify.save writes another one",
                ArtifactWarning,
                stacklevel=4,
            )
        return hat

    def _changed_card(self) -> ArtifactError | None:
        """What is wrong with the model card. It is there for people, who edit it, on the Hub's pages too: all the rest is strict.

        Raises:
            ArtifactError: it is that of another directory, which was saved there in the meantime.
        """
        self._entry(CARD)
        try:
            self._sized(CARD), self._bytes(CARD)
        except ArtifactError as error:
            if self.seen != _identity(self.directory):
                raise
            return error
        return None

    def _weights(self, inventory: Inventory) -> Weights:
        """The files of all tensors of the inventory. Where these stay as they are read, all of their memory is taken at once; where they
        are moved or cast, a few pieces at a time are there twice."""
        names, expected = self.config.list("weights", str), inventory.expected
        maps = [expected] if len(names) == 1 else self._split(names, expected)
        stay = self.device is None and self.dtype is None
        return Weights([TensorFile(self.directory / n, held, self._entry(n), at_once=stay) for n, held in zip(names, maps)])

    def _moved(self, weights: Weights, inventory: Inventory) -> Iterator[tuple[str, Tensor]]:
        """All tensors where and as they are wanted; without values on the meta device, for which the files are read all the same."""
        meta = self.device is not None and self.device.type == "meta"
        for key, tensor in weights.found():
            if not (meta and inventory.is_state(key)):  # which says what is finished
                tensor = tensor if self.device is None else tensor.to(self.device)
                if self.dtype is not None and not inventory.is_made(key):
                    file = next(file.path for file in weights.files if key in file.expected)
                    tensor = cast(key, tensor, self.dtype, inventory.is_embedding(key), file)
            yield key, tensor

    def _split(self, names: list[str], expected: dict[str, Any]) -> list[dict[str, Any]]:
        """What each shard must hold, by the index."""
        where = str(self.directory / INDEX)
        index = Fields(parse(self._bytes(INDEX), where), where).only("metadata", "weight_map")
        maps: list[dict[str, Any]] = [{} for _ in names]
        for key, part in index.at("weight_map").pairs():
            if key not in expected:
                raise part.wrong(repr(key[:100]), "a tensor of the model")
            maps[names.index(part.one_of(*names))][key] = expected[key]
        missing = next((key for key in expected if not any(key in held for held in maps)), None)
        if missing is not None:
            raise index.at("weight_map").wrong(f"no {missing}", "every tensor of the model")
        return maps

    def _inputs(self) -> list[Tensor]:
        described = []
        for part in self.config.at("example_inputs").items():
            part.only("dtype", "shape")
            dtype = vars(torch).get(part.get("dtype", str))
            if not isinstance(dtype, torch.dtype):
                raise part.at("dtype").wrong(repr(part.data["dtype"])[:60], "a type")
            described.append((dtype, part.at("shape").counts()))
        expected = {f"input_{i}": entry for i, entry in enumerate(described)}
        found = self._tensors(INPUTS, expected)
        return [cast(name, found[name], self.dtype, file=self.directory / INPUTS) for name in expected]

    def _tensors(self, name: str, expected: Any) -> dict[str, Tensor]:
        return read_tensors(self.directory / name, expected, self._entry(name))

    def _sized(self, name: str) -> None:
        size = check_file(self.directory / name)
        if size != self.config.data["files"][name]["bytes"]:
            raise ArtifactError(
                "a file is not what was written",
                where=str(self.directory / name),
                why=f"it has {size} bytes, not {self.config.data['files'][name]['bytes']}",
                fix="copy the directory again, or save again",
            )

    def _entry(self, name: str) -> dict[str, Any]:
        files = self.config.data["files"]
        if name not in files:
            raise ArtifactError("a file is missing", where=f"{self.directory / CONFIG}: files", why=f"no {name}", fix="save again")
        return files[name]

    def _bytes(self, name: str) -> bytes:
        entry, data = self._entry(name), read_bytes(self.directory / name)
        check_digests(self.directory / name, entry_of(data, word_of(entry)), entry)
        return data
