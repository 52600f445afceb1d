"""The converted network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hatify.calling import Signature
from hatify.children import ChildrenByName
from hatify.contexts import TaskContexts
from hatify.errors import ConversionError, HatifyError, TaskError
from hatify.facts import Facts
from hatify.forward import forward
from hatify.hub import HubMethods
from hatify.learning import Guard
from hatify.learning.casts import check_reach
from hatify.learning.hooks import watch_state
from hatify.learning.methods import LearningMethods
from hatify.learning.network import Converted, network_of
from hatify.locking import LockMethods
from hatify.modules import HATConfig, Masker, TaskContext
from hatify.modules.types import type_of_parameters
from hatify.original import OwnCode
from hatify.part_modes import check_modes, parts_that_ask
from hatify.rewrite.carrying import Carried, carrying, modules_of
from hatify.rewrite.graph import readable, spelled
from hatify.rewrite.scope import Scope, numbers_of
from hatify.task_copies import TaskCopies


class HATModel(ChildrenByName, TaskContexts, LearningMethods, LockMethods, TaskCopies, fx.GraphModule, HubMethods):
    """A network that learns one task after another.

    Calls: ``hat(x)`` (no task: exactly the original), ``hat(x, task=3)``, ``hat(x, task=3, mask_scale=20.0)``,
    ``hat(HATPayload(x, task_id=3))`` (gives a payload), or ``hat.active_task = 3`` for all calls that name none. Inputs are
    those of the original, in any spelling; so are outputs.

    Without a task the weights are the shared ones: equal to the original until a task has been trained.

    The original's children, parameters and buffers keep their names, whatever these are. Where one is called like an attribute of this
    class, ``hat.config`` is the attribute; ``hat["config"]`` and ``hat.get_submodule("config")`` are the child.
    """

    report = verification = source = train_graph = None
    _active_task = _maskers = _own_code_made = None
    _asking_parts = _carrying = _tracer_extras = None  # the class has these names, so no child hides them

    def __init__(self, root: Scope, graph: fx.Graph, train_graph: fx.Graph | None, facts: Facts) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name="HATModel")
        self.__dict__["_facts"], self.__dict__["_numbers"] = facts, numbers_of(root)
        for shelf in ("_parameters", "_buffers", "_modules"):
            # fx keeps only what the graph names; unused and aliased entries belong to the state dict too, in order
            self.__dict__[shelf] = dict(root.__dict__[shelf])
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.training = root.training
        self.__dict__["_guard"] = Guard(self)
        watch_state(self)
        self._number_copies()
        held = (*self._modules, *self._parameters, *self._buffers)
        hidden = [name for name in held if hasattr(type(self), name) or name in self.__dict__]
        for code in (graph, train_graph):
            if code is not None:
                code.on_generate_code(lambda _: partial(spelled, hidden=hidden))
        self.train_graph = train_graph
        self.graph = graph

    # calling

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        cls._evaluate = cls.forward
        cls._train = cls.forward
        if self.train_graph is not None:
            cls._train = _compiled(self.train_graph, "train graph")
        cls.forward = forward
        self.__dict__.pop("_carrying", None)
        if "_facts" in self.__dict__:
            graphs = [g for g in (self.graph, self.train_graph) if g is not None]
            self.__dict__["_asking_parts"] = parts_that_ask(self, graphs, self._facts.room)
        return code

    def run(self, tensors: list[Tensor], task: TaskContext | None) -> tuple[Tensor, ...]:
        """The generated code on flat inputs: the train graph in train mode, where the modes differ.

        This is the frame that ``torch.compile`` compiles.
        """
        if task is not None and task.chosen is not None:
            task = task.again()  # made here, so that nothing that it remembers has to leave the compiled code
        generated = type(self)._train if self.training else type(self)._evaluate
        if task is not None and task.carries:
            generated = self._that_carries() or generated
        if not self._facts.switches:
            return generated(self, *tensors, task)
        device = tensors[0].device.type if tensors else "cpu"
        # an error inside the user's no_grad or autocast region must not leave it on
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),
            torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)),
        ):
            return generated(self, *tensors, task)

    def check_modes(self) -> None:
        """See :func:`hatify.part_modes.check_modes`.

        Raises:
            CallError: a part is in another mode than the network, and asks for it in its own code.
        """
        if self._asking_parts:
            check_modes(self._asking_parts, self.training, self._facts.own_modes.get(self.training, ()))

    def _that_carries(self) -> Callable | None:
        """The code of the mode in which weights carry masks (:mod:`hatify.rewrite.carrying`), made when it is first called; None where
        there is nothing to carry, or not now."""
        made = self.__dict__.setdefault("_carrying", {})
        of_train = self.training and self.train_graph is not None
        found = made.get(of_train)
        if found is None or not found.holds():
            if _get_current_dispatch_mode_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
                return None
            found = made[of_train] = self._carried(self.train_graph if of_train else self.graph)
        return found.code if found.usable() else None

    def _carried(self, generated: fx.Graph) -> Carried:
        device = next((p.device.type for p in self.parameters()), "cpu")
        # whoever calls first, other calls come after
        with torch.inference_mode(False), torch.autocast(device, enabled=False), torch._C.DisableTorchFunction():
            graph = carrying(self, generated, self.maskers)
            return Carried(None if graph is None else _compiled(graph, "carrying graph"), modules_of(self, generated))

    @property
    def runs_own_code(self) -> bool:
        """Whether a call without a task runs the original's own code now: it asks whether gradients are on, and some are off.

        A graph has one answer in it, that of a network which trains as a whole; torch's transformer layers ask, each for its own
        weights, before they take a fused kernel.
        """
        if self._facts.reference is None and self._facts.stand_in is None:  # loaded without any of it: see ``hatify.load``
            return False
        return bool(self._facts.asks.get(self.training)) and not (torch.is_grad_enabled() and self._own_code.all_trainable())

    @property
    def _own_code(self) -> OwnCode:
        made = self.__dict__.get("_own_code_made")
        if made is None:
            made = self.__dict__["_own_code_made"] = OwnCode(self)
        return made

    # what it is made of

    @property
    def config(self) -> HATConfig:
        return self._facts.config

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked of the conversion, as plain data."""
        return self._facts.settings

    @property
    def example_inputs(self) -> tuple[tuple, dict[str, Any]]:
        """The call that the model was captured with: ``(args, kwargs)``."""
        return self._facts.signature.rebuild(self._facts.inputs)

    @property
    def signature(self) -> Signature:
        return self._facts.signature

    @property
    def room(self) -> Scope:
        """What the conversion added: maskers, masks, task copies of raw parameters, constants."""
        return self._modules[self._facts.room]

    @property
    def maskers(self) -> dict[str, Masker]:
        """Maskers by name: the path of the layer, or of the weight used by function."""
        found = self.__dict__.get("_maskers")
        if found is None:
            found = {name: self.get_submodule(path) for name, path in self._facts.masker_paths.items()}
            self.__dict__["_maskers"] = found
        return found

    @property
    def finished_tasks(self) -> set[int]:
        """Tasks whose masks are binary and whose weights are locked."""
        return self.room.status.finished

    @property
    def code(self) -> str:
        """The generated code; of both modes where they differ."""
        code = readable(super().code, self.graph)
        if self.train_graph is not None:
            train = readable(self.train_graph.python_code("self").src, self.train_graph)
            code = f"# in eval mode\n{code}\n# in train mode\n{train}"
        for training, places in self._facts.asks.items():
            if places:
                mode = "train" if training else "eval"
                code += (
                    f"\n# in {mode} mode, without a task, where some gradients are off: the original's own code, which asks in\n"
                )
                code += "".join(f"#     {place}\n" for place in places)
        return code

    # modes and devices

    def train(self, mode: bool = True) -> HATModel:
        """As the original's, which may leave modules in the other mode (frozen batch norms); a finished task's norms and heads stay in
        eval mode, so that a replay leaves their statistics alone.

        Warns:
            UserWarning: train mode could not be captured, so layers are in train mode, but the code around them is that of eval mode.
        """
        if mode and not self.can_train:
            warnings.warn(
                f"train mode of {self._facts.name} could not be captured (hat.report.notes says why): layers like dropout are in "
                "train mode, the code around them is that of eval mode",
                stacklevel=2,
            )
        super().train(mode)
        for path in self._facts.own_modes.get(mode, ()):
            module = self.get_submodule(path)
            if isinstance(module, Scope):
                module.training = not mode
            else:
                module.train(not mode)
        network_of(self).rest()
        return self

    def _types(self) -> set[torch.dtype]:
        """The types of the parameters but those of masks; their places are looked for once."""
        if "_typed" not in self.__dict__:
            masks = {id(p) for masker in self.maskers.values() for p in masker.parameters()}
            held = [(m, name, p) for m in self.modules() for name, p in m._parameters.items() if p is not None]
            self.__dict__["_typed"] = [(m, name) for m, name, p in held if p.is_floating_point() and id(p) not in masks]
        held = (m._parameters.get(name) for m, name in self.__dict__["_typed"])
        return {p.dtype for p in held if p is not None}

    def _learn(self, **facts: Any) -> None:
        """Replaces some of what the model knows of its making; copies of it keep theirs."""
        self.__dict__["_facts"] = replace(self._facts, **facts)

    def _apply(self, fn: Any, recurse: bool = True) -> HATModel:
        """``.to()`` and the like: the protected values move along, and binary masks stay as they are. So do the types of tensors that the
        original made in its forward or held in plain attributes. Example inputs that have the parameters' type get the new one.

        Raises:
            NonFiniteError: a weight would become infinite; nothing has been cast then.
        """
        self._guard.restore()
        check_reach(self, fn)
        constants = self.room.constants._buffers
        made, before = dict(constants), type_of_parameters(self)
        super()._apply(fn, recurse)
        after = type_of_parameters(self)
        if after != before:
            self._learn(inputs=[t.to(after) if t.dtype == before else t for t in self._facts.inputs])
        constants.update({n: t.to(constants[n].device) for n, t in made.items() if constants[n].dtype != t.dtype})
        self._guard.follow()
        return self

    # state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As any module's, masks and finished tasks included; also while another thread evaluates."""
        with self._guard.turns.taken():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False, *, overwrite: bool = False) -> Any:
        """As any module's, masks and finished tasks included. A checkpoint of the original, with its keys and no others, goes to
        :meth:`load_pretrained`: so it does from the tools that know no other call.

        Args:
            overwrite: also where it changes what finished tasks need, or leaves a task that is finished here unfinished.

        Raises:
            TaskError: it would, and ``overwrite`` is not given; nothing has been written then.
        """
        with self._guard.turns.taken():
            if strict and set(state_dict) == set(self._facts.original_keys) != set(self.state_dict(keep_vars=True)):
                self.load_pretrained(state_dict)
                return _IncompatibleKeys([], [])
            with self._guard.opened() if overwrite else nullcontext():
                return super().load_state_dict(state_dict, strict, assign)

    def load_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        """Loads a checkpoint of the *original* model; task-indexed modules get it in every copy.

        Raises:
            ConversionError: keys or shapes that are not the original's.
            TaskError: a task is finished, and its locked weights would be overwritten.
        """
        if self.finished_tasks:
            raise TaskError(
                f"tasks {sorted(self.finished_tasks)} are finished: loading would overwrite their locked weights",
                fix="load before training, or convert the loaded model anew",
            )
        keys = self._facts.original_keys
        missing, unexpected = [k for k in keys if k not in state_dict], [k for k in state_dict if k not in set(keys)]
        own = self.state_dict(keep_vars=True)
        shapes = [k for k in keys if k in state_dict and k in own and own[k].shape != state_dict[k].shape]
        if missing or unexpected or shapes:
            raise ConversionError(
                "this is no checkpoint of the original model",
                why=f"missing {missing[:5]}, unexpected {unexpected[:5]}, other shapes {shapes[:5]}",
                fix="hat.load_pretrained(model.state_dict())",
            )
        with torch.no_grad():
            for key in keys:
                own[key].copy_(state_dict[key])
        self.copy_to_tasks(range(self.config.num_tasks))

    @property
    def can_train(self) -> bool:
        """Whether train mode was captured too."""
        return self._facts.can_train

    def __str__(self) -> str:
        return repr(self)  # fx would add the code; it is in hat.code

    def __deepcopy__(self, memo: dict) -> HATModel:
        with self._guard.turns.taken():
            return self._copied(memo)

    def _copied(self, memo: dict) -> HATModel:
        self._guard.restore()
        root = Scope(type(self).__name__, self._numbers)
        for shelf in ("_parameters", "_buffers", "_modules"):
            root.__dict__[shelf] = copy.deepcopy(dict(self.__dict__[shelf]), memo)
        root._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        root.training = self.training
        graphs = [None if g is None else copy.deepcopy(g) for g in (self.graph, self.train_graph)]
        copied = HATModel(root, *graphs, self._facts)
        for name in ("_active_task", "report", "verification", "source"):
            setattr(copied, name, getattr(self, name))
        memo[id(self)] = copied
        copied._guard.refresh()
        return copied

    def __copy__(self) -> HATModel:
        raise HatifyError(
            "a HAT model has no shallow copy",
            why="it would share the weights and not what protects them",
            fix="copy.deepcopy(hat)",
        )

    def __reduce__(self):
        raise HatifyError(
            "a HAT model is not pickled",
            why="pickling a graph module runs its code when it is loaded",
            fix="hatify.save(hat, 'directory')",
        )


def _compiled(graph: fx.Graph, name: str) -> Callable:
    """The function that a graph's own code defines, as fx makes it."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), names)
    return names["forward"]


network_of.register(HATModel, Converted)
