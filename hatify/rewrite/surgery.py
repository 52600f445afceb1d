"""Layers become HAT layers, norms become task-indexed, maskers and masks find their places."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hatify.analysis import Analysis, LayerPlan
from hatify.analysis.leaf_calls import channels_of
from hatify.errors import ConversionError
from hatify.gates import Program, compile_gates
from hatify.modules import HATConfig, HATLayer, LiveMask, Mask, Masker, TaskIndexed, TaskIndexedParameter, hat_class
from hatify.modules.masker import BEGUN, FINISHED, task_states, tasks_in
from hatify.modules.masking import Gated
from hatify.modules.recurrent import add_maskers
from hatify.modules.task_indexed import make_task_indexed
from hatify.registry import describe
from hatify.rewrite.scope import Scope


class Status(nn.Module):
    """Which tasks are finished, and which were begun; part of the state dict."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.finished: set[int] = set()
        self.begun: set[int] = set()

    def get_extra_state(self) -> Tensor:
        return task_states(self.tasks, self.finished, self.begun)

    def set_extra_state(self, state: Tensor) -> None:
        self.finished, self.begun = tasks_in(state, FINISHED), tasks_in(state, BEGUN)


class Surgery:
    """Carries out an analysis on ``root``, the model's own tree (taken over).

    What is new lives under ``root.<room>`` (``hat``, or ``hat_`` if the model has such a name): ``maskers`` of weights used by
    function, ``masks`` (the mask nodes), ``indexed`` (task copies of raw parameters and buffers), ``constants``.

    Args:
        classes: class count per task for the heads that follow it, or None to keep the original's.
    """

    def __init__(self, root: Scope, analysis: Analysis, config: HATConfig, classes: Sequence[int | None] | None) -> None:
        self.root, self.analysis, self.config, self.classes = root, analysis, config, classes
        self.room = "hat"
        while self.room in root._modules or self.room in root._parameters or self.room in root._buffers:
            self.room += "_"
        self.hat = Scope("hatify")
        for name in ("maskers", "masks", "indexed", "constants"):
            self.hat.add_module(name, Scope(name))
        self.hat.status = Status(config.num_tasks)
        self.masker_paths: dict[str, str] = {}
        self.indexed_paths: dict[str, str] = {}
        self._program = compile_gates(analysis.table, analysis.sizes)

    def operate(self) -> None:
        """All layers; the graph's own needs (masks, constants) are added while it is rewritten."""
        done: set[int] = set()
        for path, plan in self.analysis.layers.items():
            layer = self.root.get_submodule(path)
            if id(layer) not in done:
                done.add(id(layer))
                self._layer(path, layer, plan)
        for masker, size in self.analysis.sizes.items():
            if masker not in self.masker_paths:
                self.masker_paths[masker] = self._add_to("maskers", masker, Masker(size, self.config))
        for name, plan in self.analysis.parameters.items():
            if plan.role == "task-indexed":
                self._indexed(name, buffer=False)
        for name in sorted(self.analysis.buffers):
            self._indexed(name, buffer=True)
        self.root.add_module(self.room, self.hat)
        self._fresh_storage()

    def _layer(self, path: str, layer: nn.Module, plan: LayerPlan) -> None:
        if plan.role in ("hat", "through", "shared-head"):
            layer.__class__ = hat_class(type(layer))
            layer.seen = {}
            layer.masker = Masker(self.analysis.sizes[path], self.config) if plan.masker == path else None
            if plan.masker == path:
                self.masker_paths[path] = f"{path}.masker"
        elif plan.role == "recurrent":
            layer.__class__ = hat_class(type(layer))
            layer.seen = {}
            add_maskers(layer, self.config, path)
            self.masker_paths.update({f"{path}.{name}": f"{path}.maskers.{name}" for name in layer.maskers})
        elif plan.role in ("head", "norm", "task-indexed"):
            make_task_indexed(layer, self.config.num_tasks)
            if plan.role == "head" and self.classes is not None and path in self.analysis.class_heads:
                self._class_counts(path, layer)

    def _class_counts(self, path: str, head: TaskIndexed) -> None:
        """Copies of a head with each task's class count; a copy of another size starts from the layer's own initialiser."""
        for copied, count in zip(head.tasks, self.classes):
            take_class_count(path, head, copied, count)

    def _indexed(self, name: str, buffer: bool) -> None:
        owner, _, attribute = name.rpartition(".")
        value = getattr(self.root.get_submodule(owner), attribute)
        copies = TaskIndexedParameter(value, self.config, shared=False, buffer=buffer)
        self.indexed_paths[name] = self._add_to("indexed", name, copies)

    def _fresh_storage(self) -> None:
        """Every copy owns its memory: expanded or shared storage would let one task write into another."""
        seen: dict[int, str] = {}
        for name, tensor in self.root.named_parameters():
            if ".tasks." not in name or tensor.is_meta:
                continue
            key = tensor.untyped_storage()._cdata  # the storage itself: its address would be that of a copy made for asking
            if key in seen:
                tensor.data = tensor.data.clone()
            seen[key] = name

    def program(self, ids: Tensor) -> Program:
        """The gate program of a value's ids."""
        return self._program(ids)

    def add_mask(self, name: str, ids: Tensor, own: Tensor, soft: bool, fill: float) -> str:
        """A mask node's module, ``own`` the gates of its value; returns its path."""
        narrower = None if torch.equal(ids, own) else Gated(self.program(own), own, partial(self.analysis.table.describe, own))
        mask = Mask(self.program(ids), ids, soft, fill, partial(self.analysis.table.describe, ids), narrower)
        return self._add_to("masks", name, mask)

    def add_live(self, name: str, ids: Tensor) -> str:
        """A live mask for a norm; returns its path."""
        return self._add_to("masks", name, LiveMask(self.program(ids), ids, partial(self.analysis.table.describe, ids)))

    def add_constant(self, name: str, value: Tensor) -> str:
        """A tensor of the graph that no module holds; returns its path. The graph of the other mode may have another one of this name."""
        held, unique, number = self.hat.constants._buffers, name, 1
        while unique in held and not _same_bits(held[unique], value):
            unique, number = f"{name}_{number}", number + 1
        if unique not in held:
            self.hat.constants.register_buffer(unique, value.clone(), persistent=False)
        return f"{self.room}.constants.{unique}"

    def _add_to(self, shelf: str, name: str, module: nn.Module) -> str:
        scope = getattr(self.hat, shelf)
        unique, number = safe(name), 1
        while hasattr(scope, unique):  # also names like «to» that every module has
            unique, number = f"{safe(name)}_{number}", number + 1
        scope.add_module(unique, module)
        return f"{self.room}.{shelf}.{unique}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def take_class_count(path: str, head: TaskIndexed, copied: nn.Module, count: int | None) -> None:
    """Gives a fresh copy of the head at ``path`` another number of classes; it then starts from the layer's own initialiser.

    Raises:
        ConversionError: this kind of head cannot.
    """
    meaning = describe_base(head)
    attribute = next((a for a in ("out_features", "out_channels") if hasattr(head, a)), None)
    _, outputs = channels_of(head, meaning)
    if count is None or count == outputs:
        return
    if attribute is None or meaning.groups > 1 or not hasattr(copied, "reset_parameters"):
        raise ConversionError(
            f"the head {path} cannot take another class count",
            why=f"{type(copied).__name__} has no out_features or out_channels to change",
            fix="leave class counts out: hatify.convert(model, tasks=3), hat.add_tasks(3)",
        )
    setattr(copied, attribute, count)
    weight = copied.get_parameter(meaning.weight)
    shape = list(weight.shape)
    shape[1 if meaning.transposed else 0] = count
    copied.weight = nn.Parameter(weight.new_empty(shape), weight.requires_grad)
    if getattr(copied, "bias", None) is not None:
        copied.bias = nn.Parameter(weight.new_empty(count), weight.requires_grad)
    copied.reset_parameters()


def describe_base(layer: nn.Module):
    """The description of a layer that has already been raised."""
    if isinstance(layer, TaskIndexed | HATLayer):
        plain = copy.copy(layer)
        plain.__class__ = layer.plain_class
        return describe(plain)
    return describe(layer)


def safe(name: str) -> str:
    """A path as a module name."""
    return re.sub(r"\W+", "_", name).strip("_") or "value"
