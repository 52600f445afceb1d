"""The modules of a model as data: a flat list of entries in order, each with its class, attributes and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..modules import HATConfig, HATLayer, HATRecurrent, LiveMask, Mask, Masker, TaskIndexed, TaskIndexedParameter, hat_class
from ..modules.masking import Gated
from ..modules.recurrent import RECURRENT
from ..modules.task_indexed import task_indexed_class
from ..rewrite.scope import Scope
from ..rewrite.surgery import Status
from .fields import DEEPEST, NAME, PATH, Fields
from .gates import Ids, StoredIds
from .layers import LayerReader, LayerWriter
from .tensors import DTYPES, dtype_name, is_possible
from .torch_layers import check_recurrent

__all__ = ["Inventory", "TreeReader", "TreeWriter"]

EXTRA = "_extra_state"
ADDED = ("masker", "maskers", "tasks")
"""What a raised layer holds besides what the original did."""


class TreeWriter:
    """Writes the modules of a HAT model, or of what its directory holds of the original.

    Args:
        called: the modules that are called; of the others only the tensors matter (None: all are).
        whole: the top itself is a layer.

    Attributes:
        entries: one per module, parents first.
        tensors: every tensor by the name that it has in the state dict; tensors that are not saved there by the same manner of name.
    """

    def __init__(
        self, hat: nn.Module, layers: LayerWriter, ids: Ids, called: Collection[str] | None = None, whole: bool = False
    ) -> None:
        self.layers, self.ids = layers, ids
        self.training = hat.training
        self.entries: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._modules: dict[int, str] = {}
        self._held: dict[int, str] = {}
        self._visit(hat, "", top=not whole, called=called)

    def _visit(self, module: nn.Module | None, path: str, top: bool = False, called: Collection[str] | None = None) -> None:
        """``called`` are the modules that the recipe of a layer around this one calls: of the others only the tensors matter."""
        if module is None:
            self.entries.append({"path": path, "kind": "none"})
            return
        if id(module) in self._modules:
            self.entries.append({"path": path, "kind": "same", "as": self._modules[id(module)]})
            return
        self._modules[id(module)] = path
        entry: dict[str, Any] = {"path": path}
        self.entries.append(entry)
        inner = called is not None and path not in called
        unnamed = self.layers.is_unnamed(module)
        if top or inner or unnamed:
            entry.update({"kind": "scope", "was": type(module).__name__})
        else:
            entry.update(self._described(module, path))
        if "recipe" in entry:
            called = {f"{path}.{target}" for target in self.layers.recipes[entry["recipe"]].called()}
        elif unnamed:
            called = set()
        elif not inner:
            called = None
        if module.training != self.training:
            entry["training"] = module.training
        prefix = f"{path}." if path else ""
        for shelf, word in ((module._parameters, "parameters"), (module._buffers, "buffers")):
            if shelf:
                entry[word] = {name: self._tensor(module, prefix, name, tensor) for name, tensor in shelf.items()}
        if isinstance(module, Masker | Status):
            state = module.get_extra_state()
            entry["state"] = _described(state)
            self.tensors[f"{prefix}{EXTRA}"] = state
        for name, child in module._modules.items():
            if NAME.fullmatch(name) is None:
                raise ArtifactError(
                    "a module cannot be stored under its name", where=f"{prefix}{name}", fix="letters, digits, _ and -"
                )
            added = name in ADDED and isinstance(module, HATLayer | HATRecurrent | TaskIndexed)
            self._visit(child, f"{prefix}{name}", called=None if added else called)

    def _tensor(self, module: nn.Module, prefix: str, name: str, tensor: Tensor | None) -> Any:
        key = f"{prefix}{name}"
        if tensor is None:
            return None
        if NAME.fullmatch(name) is None:
            raise ArtifactError("a tensor cannot be stored under its name", where=key, fix="letters, digits, _ and -")
        if id(tensor) in self._held:
            return self._held[id(tensor)]
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            why = f"it is a {type(tensor).__name__} with the layout {tensor.layout}"
            raise ArtifactError("a tensor cannot be stored", where=key, why=why, fix="keep ordinary dense tensors in the model")
        if dtype_name(tensor.dtype) is None:
            raise ArtifactError("a tensor cannot be stored", where=key, why=f"its type is {tensor.dtype}", fix="model.float()")
        self._held[id(tensor)] = key
        self.tensors[key] = tensor.detach()
        found = _described(tensor)
        if tensor.stride() != _plain_strides(tensor.shape) and torch.ops.aten.is_non_overlapping_and_dense(tensor):
            found["strides"] = list(tensor.stride())  # kernels choose by them, and round by their choice
        if isinstance(tensor, nn.Parameter):
            found["grad"] = tensor.requires_grad
        elif name in module._non_persistent_buffers_set:
            found["transient"] = True
        return found

    def _described(self, module: nn.Module, path: str) -> dict[str, Any]:
        if isinstance(module, Mask):
            own = {} if module.own is None else {"own": self.ids.add(module.own.ids)}
            return {"kind": "mask", "ids": self.ids.add(module.ids), **own, "soft": module.soft, "fill": float(module.fill)}
        if isinstance(module, LiveMask):
            return {"kind": "live-mask", "ids": self.ids.add(module.ids)}
        if isinstance(module, Masker):
            return {"kind": "masker", "channels": module.channels}
        if isinstance(module, Status):
            return {"kind": "status"}
        if isinstance(module, TaskIndexedParameter):
            return {"kind": "task-parameter", "buffer": module.buffer}
        if type(module) is Scope:
            return {"kind": "scope", "was": module._get_name()}
        if type(module) in (nn.ModuleList, nn.ModuleDict, nn.ParameterList):
            return {"kind": {nn.ModuleList: "list", nn.ModuleDict: "dict", nn.ParameterList: "parameters"}[type(module)]}
        if isinstance(module, HATRecurrent):
            return {"kind": "recurrent", "as": module.masker_path, **self.layers.write(module, path)}
        kind = "hat" if isinstance(module, HATLayer) else "task-indexed" if isinstance(module, TaskIndexed) else "plain"
        return {"kind": kind, **self.layers.write(module, path)}


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _plain_strides(shape: Iterable[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


class Inventory:
    """The tensors that a list of modules asks for: known long before the modules are built, so that they can be read meanwhile.

    Attributes:
        expected: dtype and shape of every tensor, by name; what a file must hold, no more and no less.

    Args:
        room: the module that holds what the conversion added.
    """

    def __init__(self, fields: Fields, room: str | None = None) -> None:
        self._room = room
        self.expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._states: set[str] = set()
        self._maskers: set[str] = set()
        for entry in fields.items():
            path = entry.get("path", str)
            prefix = f"{path}." if path else ""
            for word in ("parameters", "buffers"):
                for name, part in entry.at(word).pairs() if entry.has(word) else ():
                    if isinstance(part.data, dict):
                        self._add(f"{prefix}{name}", part)
            if entry.has("state"):
                self._states.add(f"{prefix}{EXTRA}")
                self._add(f"{prefix}{EXTRA}", entry.at("state"))
            if entry.get("kind", str) == "masker":
                self._maskers.add(path)

    def _add(self, key: str, part: Fields) -> None:
        if key in self.expected:
            raise part.wrong(repr(key[:100]), "one tensor of that name")
        dtype = DTYPES.get(part.get("dtype", str)) or DTYPES[part.at("dtype").one_of(*DTYPES)]
        shape = part.at("shape").counts(most=1 << 48)
        if not is_possible(dtype, shape):
            raise part.at("shape").wrong(str(list(shape))[:80], "the shape of a tensor")
        self.expected[key] = dtype, shape

    def is_state(self, key: str) -> bool:
        """Whether a stored tensor is no tensor of the model but marks which tasks are finished."""
        return key in self._states

    def is_made(self, key: str) -> bool:
        """Whether a stored tensor is one that the original's code makes."""
        return self._room is not None and key.startswith(f"{self._room}.constants.")

    def is_embedding(self, key: str) -> bool:
        """Whether a stored tensor is a mask embedding."""
        return key.rpartition(".embeddings.")[0] in self._maskers


class Awaited:
    """Stands for a tensor until its values are there."""

    __slots__ = ("dtype", "grad", "shape", "strides")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None, grad: bool | None) -> None:
        self.dtype, self.shape, self.strides, self.grad = dtype, shape, strides, grad

    @property
    def is_parameter(self) -> bool:
        return self.grad is not None

    def of(self, tensor: Tensor) -> Tensor:
        """What comes in its place, with these values."""
        if self.strides is not None and tensor.stride() != self.strides:
            moved = torch.empty_strided(tensor.shape, self.strides, dtype=tensor.dtype, device=tensor.device)
            tensor = moved.copy_(tensor)
        return tensor if self.grad is None else nn.Parameter(tensor, self.grad)


class TreeReader:
    """Builds the modules again, with :class:`Awaited` for tensors; :meth:`fill` puts the stored ones in.

    Attributes:
        root: the top, a :class:`Scope`.
    """

    def __init__(
        self,
        fields: Fields,
        training: bool,
        config: HATConfig,
        layers: LayerReader,
        ids: StoredIds,
        inventory: Inventory,
        top: Collection[str] = ("scope",),
    ) -> None:
        self.training, self.config, self.layers, self.ids, self._expected = training, config, layers, ids, inventory.expected
        self.masks: list[Gated] = []
        self._by_path: dict[str, nn.Module] = {}
        self._places: dict[str, list[tuple[dict, str]]] = {}
        self._stated: dict[str, Masker | Status] = {}
        entries = list(fields.items())
        if not entries or entries[0].get("path", str) != "" or entries[0].at("kind").one_of(*top) not in top:
            raise fields.wrong("another top", "the model itself first")
        for entry in entries:
            self._entry(entry)
        self.root = self._by_path[""]
        if _places(self.root) > MOST_PLACES:
            raise fields.wrong("modules in one another", f"at most {MOST_PLACES} places, and none inside itself")
        self.layers.settle(self.modules())

    def _entry(self, entry: Fields) -> None:
        path = entry.get("path", str)
        if path and PATH.fullmatch(path) is None:
            entry.at("path").module_path()
        owner_path, _, name = path.rpartition(".")
        owner = self._by_path.get(owner_path) if path else None
        if path.count(".") >= DEEPEST:
            raise entry.at("path").wrong(repr(path[:100]), f"at most {DEEPEST} names")
        if path in self._by_path or (path and (owner is None or name in owner._modules)):
            raise entry.at("path").wrong(repr(path[:100]), "a new module below one that is there")
        kind = entry.get("kind", str)
        if kind not in _MAKERS:
            entry.at("kind").one_of("none", "same", *_MAKERS)
        module: nn.Module | None = None
        if kind == "none":
            entry.only("path", "kind")
        elif kind == "same":
            entry.only("path", "kind", "as")
            module = self._by_path.get(entry.get("as", str))
            if module is None:
                raise entry.at("as").wrong(repr(entry.data["as"][:100]), "a module that is there")
        else:
            maker, own = _MAKERS[kind]
            entry.only("path", "kind", "training", "parameters", "buffers", *own)
            module = maker(self, entry)
            vars(module)["training"] = entry.get("training", bool) if entry.has("training") else self.training
            self._tensors(entry, module, path, kind)
            if isinstance(module, nn.RNNBase):
                check_recurrent(entry.at("attributes"), module)
            self._by_path[path] = module
        if path:
            owner._modules[name] = module

    def _tensors(self, entry: Fields, module: nn.Module, path: str, kind: str) -> None:
        prefix = f"{path}." if path else ""
        for word, shelf in (("parameters", module._parameters), ("buffers", module._buffers)):
            for name, part in entry.at(word).pairs() if entry.has(word) else ():
                if NAME.fullmatch(name) is None:
                    raise part.wrong(repr(name[:100]), "a name")
                if part.data is None:
                    shelf[name] = None
                elif isinstance(part.data, str):
                    known = self._places.get(part.data)
                    held = None if known is None else known[0][0][known[0][1]]
                    if held is None or held.is_parameter != (word == "parameters"):
                        raise part.wrong(repr(part.data[:100]), "a tensor that is there")
                    shelf[name] = held
                    self._places[part.data].append((shelf, name))
                else:
                    self._new_tensor(part, module, shelf, name, f"{prefix}{name}", word == "parameters")
        if kind in ("masker", "status"):
            key = f"{prefix}{EXTRA}"
            state = entry.at("state").only("dtype", "shape")
            if self._expected[key] != (torch.uint8, (self.config.num_tasks,)):
                raise state.wrong(str(state.data)[:80], f"one byte for each of {self.config.num_tasks} tasks")
            self._stated[key] = module

    def _new_tensor(self, part: Fields, module: nn.Module, shelf: dict, name: str, key: str, parameter: bool) -> None:
        part.is_a(dict)
        dtype, shape = self._expected[key]
        part.only("dtype", "shape", "strides", "grad" if parameter else "transient")
        strides = _strides(part.at("strides"), shape) if part.has("strides") else None
        grad = part.get("grad", bool) if parameter else None
        if grad and not (dtype.is_floating_point or dtype.is_complex):
            raise part.at("grad").wrong("true", f"no gradients of {part.data['dtype']}")
        if not parameter and part.has("transient") and part.get("transient", bool):
            module._non_persistent_buffers_set.add(name)
        shelf[name] = Awaited(dtype, shape, strides, grad)
        self._places[key] = [(shelf, name)]

    def fill(self, key: str, tensor: Tensor) -> None:
        """Puts a stored tensor in all its places."""
        if key in self._stated:
            self._stated[key].set_extra_state(tensor)
            return
        shelf, name = self._places[key][0]
        made = shelf[name].of(tensor)
        for shelf, name in self._places[key]:
            shelf[name] = made

    def fill_on_meta(self) -> None:
        """Puts tensors without values in all places."""
        for key in self._places:
            dtype, shape = self._expected[key]
            self.fill(key, torch.empty(shape, dtype=dtype, device="meta"))

    def modules(self) -> list[nn.Module]:
        """All modules, in order."""
        return [*self._by_path.values()]

    def module(self, path: str) -> nn.Module | None:
        """The module at that path, or None; a path may lead through a module's second name."""
        found = self._by_path.get(path)
        if found is None:
            found = self._by_path[""]
            for part in path.split("."):
                found = None if found is None else found._modules.get(part)
        return found

    def numel(self, path: str) -> int | None:
        """The elements of the parameter at that path, or None."""
        owner_path, _, name = path.rpartition(".")
        owner = self.module(owner_path)
        held = None if owner is None else owner._parameters.get(name)
        return None if held is None else math.prod(held.shape)

    # one per kind

    def _scope(self, entry: Fields) -> nn.Module:
        return Scope(entry.get("was", str) if entry.has("was") else "")

    def _list(self, entry: Fields) -> nn.Module:
        return nn.ModuleList()

    def _dict(self, entry: Fields) -> nn.Module:
        return nn.ModuleDict()

    def _parameters(self, entry: Fields) -> nn.Module:
        made = nn.ParameterList()
        made._size = len(entry.data.get("parameters", {}))
        if [*entry.data.get("parameters", {})] != [str(i) for i in range(made._size)]:
            raise entry.at("parameters").wrong("other names", "numbers in order")
        return made

    def _masker(self, entry: Fields) -> nn.Module:
        return Masker.empty(entry.at("channels").count(1), self.config)

    def _mask(self, entry: Fields) -> nn.Module:
        ids = self.ids.get(entry.at("ids"))
        own = Gated(None, self.ids.get(entry.at("own")), None) if entry.has("own") else None
        if own is not None and own.shape != tuple(ids.shape):
            raise entry.at("own").wrong(str(list(own.shape)), f"gates of the shape {list(ids.shape)}")
        made = Mask(None, ids, entry.get("soft", bool), float(entry.get("fill", float)), None, own)
        self.masks += [made] if own is None else [made, own]
        return made

    def _live_mask(self, entry: Fields) -> nn.Module:
        made = LiveMask(None, self.ids.get(entry.at("ids")), None)
        self.masks.append(made)
        return made

    def _status(self, entry: Fields) -> nn.Module:
        return Status(self.config.num_tasks)

    def _task_parameter(self, entry: Fields) -> nn.Module:
        made = TaskIndexedParameter.__new__(TaskIndexedParameter)
        nn.Module.__init__(made)
        made.buffer, made.count = entry.get("buffer", bool), self.config.num_tasks
        return made

    def _plain(self, entry: Fields) -> nn.Module:
        return self.layers.read(entry)

    def _hat(self, entry: Fields) -> nn.Module:
        made = self.layers.read(entry)
        made.__class__ = hat_class(type(made))
        made.__dict__.update(seen={}, masker=None)
        if entry.has("carries"):
            made.__dict__["carries"] = entry.at("carries").one_of(False)
        return made

    def _recurrent(self, entry: Fields) -> nn.Module:
        made = self.layers.read(entry)
        if not isinstance(made, RECURRENT):
            raise entry.at("class").wrong(repr(entry.data["class"]), "a recurrent layer")
        made.__class__ = hat_class(type(made))
        made.__dict__.update(seen={}, masker_path=entry.at("as").module_path())
        return made

    def _task_indexed(self, entry: Fields) -> nn.Module:
        made = self.layers.read(entry)
        made.__class__ = task_indexed_class(type(made))
        return made


MOST_PLACES = 1 << 20
"""Places of modules, each as often as it is reached: the largest models of the zoos have a hundredth of them."""


def _places(root: nn.Module) -> float:
    """In how many places modules stand below ``root`` and at it; infinite where one is inside itself."""
    counts: dict[int, float] = {}
    waiting = [(root, False)]
    while waiting:
        module, entered = waiting.pop()
        inner = [child for child in module._modules.values() if child is not None]
        if entered:
            counts[id(module)] = 1 + sum(counts[id(child)] for child in inner)
        elif id(module) not in counts:
            counts[id(module)] = math.inf  # what is met again before it is left is inside itself
            waiting += [(module, True), *((child, False) for child in inner)]
    return counts[id(root)]


def _strides(fields: Fields, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that give every element a place of its own, and no place to anything else."""
    strides = fields.counts(1, 1 << 48)
    laid = len(strides) == len(shape) and fields.decoded(
        lambda _: torch.ops.aten.is_non_overlapping_and_dense(torch.empty_strided(shape, strides, device="meta")), "strides"
    )
    if not laid:
        raise fields.wrong(str(strides)[:80], f"strides of {shape}")
    return strides


_LAYER = ("class", "attributes", "recipe")
_MAKERS: dict[str, tuple[Callable[[TreeReader, Fields], nn.Module], tuple[str, ...]]] = {
    "scope": (TreeReader._scope, ("was",)),
    "list": (TreeReader._list, ()),
    "dict": (TreeReader._dict, ()),
    "parameters": (TreeReader._parameters, ()),
    "masker": (TreeReader._masker, ("channels", "state")),
    "mask": (TreeReader._mask, ("ids", "own", "soft", "fill")),
    "live-mask": (TreeReader._live_mask, ("ids",)),
    "status": (TreeReader._status, ("state",)),
    "task-parameter": (TreeReader._task_parameter, ("buffer",)),
    "plain": (TreeReader._plain, _LAYER),
    "hat": (TreeReader._hat, ("carries", *_LAYER)),
    "recurrent": (TreeReader._recurrent, ("as", *_LAYER)),
    "task-indexed": (TreeReader._task_indexed, _LAYER),
}


def bind_masks(reader: TreeReader, program: Callable[[Tensor], Any], describe: Callable[[Tensor], str]) -> None:
    """Tells every mask how its program is made, when it is first needed."""
    for mask in reader.masks:
        mask.bind(partial(program, mask.ids), partial(describe, mask.ids))
