"""The converted network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.calling import Signature, unflatten
from hatify.capture import Captured
from hatify.capture.selections import check_selections
from hatify.errors import CallError, ConversionError, HatifyError, TaskError
from hatify.gates import evaluate, locked
from hatify.hub import HubMethods
from hatify.learning import Guard, Learning
from hatify.learning.hooks import watch_state
from hatify.learning.network import Converted, network_of
from hatify.modules import HATConfig, HATPayload, Masker, TaskContext, TaskIndexed, TaskIndexedParameter
from hatify.original import OwnCode
from hatify.rewrite.graph import readable, spelled
from hatify.rewrite.scope import Scope


class Facts:
    """What a HAT model knows of its making; immutable (:meth:`HATModel.add_tasks` replaces it), shared by its copies.

    ``uses`` are the uses of every shared parameter, ``masker_paths`` where each masker lives, ``original_keys`` the keys of the
    original's state dict in order, ``reference`` the original's tree on the meta device (its code, without its weights).
    """

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)

    def __deepcopy__(self, memo: dict) -> Facts:
        return self


class HATModel(fx.GraphModule, HubMethods):
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

    def __init__(self, root: Scope, graph: fx.Graph, train_graph: fx.Graph | None, facts: Facts) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name="HATModel")
        self.__dict__["_facts"] = facts
        for shelf in ("_parameters", "_buffers", "_modules"):
            # fx keeps only what the graph names; unused and aliased entries belong to the state dict too, in order
            self.__dict__[shelf] = dict(root.__dict__[shelf])
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.training = root.training
        self.__dict__["_guard"] = Guard(self)
        watch_state(self)
        held = (*self._modules, *self._parameters, *self._buffers)
        hidden = [name for name in held if hasattr(type(self), name) or name in self.__dict__]
        for code in (graph, train_graph):
            if code is not None:
                code.on_generate_code(lambda _: partial(spelled, hidden=hidden))
        self.train_graph = train_graph
        self.graph = graph

    # names

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):  # what the class has is never a child, even if a child is called so
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: int | str) -> nn.Module | Tensor:
        """A child, parameter or buffer by its name, or a child by its number as in a sequential model."""
        name = str(key)
        for shelf in (self._modules, self._parameters, self._buffers):
            if name in shelf:
                return shelf[name]
        raise KeyError(name)

    def get_submodule(self, target: str) -> nn.Module:
        """A module of the original by its path; see :meth:`torch.nn.Module.get_submodule`."""
        name, _, below = target.partition(".")
        child = self._modules.get(name)
        return super().get_submodule(target) if child is None else child.get_submodule(below)

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter of the original by its path."""
        found = self._parameters.get(target)
        return super().get_parameter(target) if found is None else found

    def get_buffer(self, target: str) -> Tensor:
        """A buffer of the original by its path."""
        found = self._buffers.get(target)
        return super().get_buffer(target) if found is None else found

    # calling

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        cls._evaluate = cls.forward
        cls._train = cls.forward
        if self.train_graph is not None:
            train = self.train_graph.python_code("self")
            names = dict(train.globals)
            exec(compile(train.src, "<train graph>", "exec"), names)  # the graph's own code, as fx does for the other
            cls._train = names["forward"]
        cls.forward = _forward
        return code

    def run(self, tensors: list[Tensor], task: TaskContext | None) -> tuple[Tensor, ...]:
        """The generated code on flat inputs: the train graph in train mode, where the modes differ."""
        generated = type(self)._train if self.training else type(self)._evaluate
        if not self._facts.switches:
            return generated(self, *tensors, task)
        device = tensors[0].device.type if tensors else "cpu"
        # an error inside the user's no_grad or autocast region must not leave it on
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),
            torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)),
        ):
            return generated(self, *tensors, task)

    @property
    def runs_own_code(self) -> bool:
        """Whether a call without a task runs the original's own code now: it asks whether gradients are on, and some are off.

        A graph has one answer in it, that of a network which trains as a whole; torch's transformer layers ask, each for its own
        weights, before they take a fused kernel.
        """
        if self._facts.reference is None:  # loaded without the original's code: see ``hatify.load``
            return False
        return bool(self._facts.asks.get(self.training)) and not (torch.is_grad_enabled() and self._own_code.all_trainable())

    @property
    def _own_code(self) -> OwnCode:
        made = self.__dict__.get("_own_code_made")
        if made is None:
            made = self.__dict__["_own_code_made"] = OwnCode(self)
        return made

    def context(self, task: int | None, mask_scale: float | None = None) -> TaskContext | None:
        """The context of one forward pass; None without a task.

        A finished task's masks are binary whatever the scale; so are those of a task that is given no scale in eval mode. In train mode the
        default is ``config.max_mask_scale``; the task of a session gets the session's scale, in train mode or where gradients are on.

        Raises:
            TaskError: no such task, or a scale that is not positive.
        """
        if task is None:
            if mask_scale is not None:
                raise TaskError("a mask scale needs a task", fix="hat(x, task=0, mask_scale=20.0)")
            return None
        task = self.checked_task(task)
        if mask_scale is not None and not mask_scale > 0:
            raise TaskError(f"mask_scale must be positive, not {mask_scale!r}", fix="hat(x, task=0, mask_scale=20.0)")
        if task in self.finished_tasks:
            mask_scale = None
        elif mask_scale is None:
            session = self._guard.session
            if session is not None and session.task == task and (self.training or torch.is_grad_enabled()):
                mask_scale = session.scale_tensor
            elif self.training:
                mask_scale = self.config.max_mask_scale
        maskers = self.maskers
        return TaskContext(task, mask_scale, lambda name: maskers[name](task, mask_scale), hard=mask_scale is None)

    def checked_task(self, task: Any) -> int:
        """``task`` as an integer in range.

        Raises:
            TaskError: it is not.
        """
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < self.config.num_tasks:
            raise TaskError(
                f"no task {task!r}", why=f"the model has the tasks 0 to {self.config.num_tasks - 1}", fix="hat(x, task=0)"
            )
        return task

    @property
    def active_task(self) -> int | None:
        """The task of calls that name none; None is the original network."""
        return self._active_task

    @active_task.setter
    def active_task(self, task: int | None) -> None:
        self._active_task = None if task is None else self.checked_task(task)

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

    # learning

    def learning(self, task: int, optimizer: Any = None, **options: Any) -> Learning:
        """A session that trains one task; see :class:`hatify.Learning` for all options.

        >>> with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=len(loader)) as run:  # doctest: +SKIP
        ...     for x, y in loader:
        ...         loss = F.cross_entropy(hat(x), y) + run.regularization()
        ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
        """
        return Learning(self, task, optimizer, **options)

    def begin_task(self, task: int, optimizer: Any = None, **options: Any) -> Learning:
        """:meth:`learning` without a block, for frameworks: ends with :meth:`finish_task` or :meth:`abandon_task`."""
        return self.learning(task, optimizer, **options).begin()

    def finish_task(self) -> None:
        """Finishes the task of the open session: binary masks, locked weights.

        Raises:
            TaskError: no session is open.
        """
        self._session().finish()

    def abandon_task(self) -> None:
        """Ends the open session without locking anything; a finished task in retraining is as it was before.

        Raises:
            TaskError: no session is open.
        """
        self._session().abandon()

    def protect(self, optimizer: Any) -> None:
        """Makes an optimizer forget what it remembers (momentum, averages) of locked weights; a session does it by itself.

        What is locked is put back after the step of any optimizer; this keeps it from being moved in between.

        Raises:
            TaskError: the optimizer holds none of the model's parameters.
        """
        self._guard.protect(optimizer)

    def _session(self) -> Learning:
        if self._guard.session is None:
            raise TaskError("no task is being learned", fix="hat.begin_task(task=0, optimizer=optimizer, steps_per_epoch=100)")
        return self._guard.session

    def add_tasks(self, tasks: int | Sequence[int | None], optimizer: Any = None) -> list[int]:
        """More tasks than were planned; those there are stay as they are, to the last bit.

        New copies are made of the state without a task, new masks drawn by ``config.mask_init``, as at conversion. Other copies of the
        model keep their own number of tasks.

        Args:
            tasks: how many more, or the class count of each (None keeps the original's).
            optimizer: one or several, each of which gets one more param group per group that holds masks or copies of other tasks,
                with that group's settings (a learning-rate scheduler made before does not know of it). The others have to be
                told, or made anew.

        Returns:
            The numbers of the new tasks.

        Raises:
            ConversionError: counts that make no sense, or class counts that no head can take. Nothing is changed then.
            TaskError: a session is open, or an optimizer holds nothing that belongs to a task.

        >>> hat.add_tasks([2, 3], optimizer=optimizer)  # doctest: +SKIP
        [5, 6]
        """
        from hatify.lifecycle.growth import grow  # which needs conversion, and that this module

        return grow(self, tasks, optimizer)

    def train(self, mode: bool = True) -> HATModel:
        """As any module's; a finished task's norms and heads stay in eval mode, so that a replay leaves their statistics alone."""
        super().train(mode)
        network_of(self).rest()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> HATModel:
        """``.to()`` and the like: the protected values move along."""
        self._guard.restore()
        super()._apply(fn, recurse)
        self._guard.follow()
        return self

    # locks

    def live(self, ids: Tensor, task: int) -> Tensor:
        """Which gates are live for the binary mask of ``task``: bool, the shape of ``ids``."""
        program = self._facts.program(ids)
        masks = {name: m.live(task).float().cpu() for name, m in self.maskers.items() if name in program.maskers()}
        return (evaluate(program, masks.__getitem__, {}) > 0).reshape(ids.shape)

    def locks(self, tasks: Any, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """For every shared parameter, the elements that ``tasks`` need: bool, the parameter's shape (section 2, locking).

        Args:
            tasks: the tasks to protect.
            without: parameters whose locks are left out, for negative controls.
        """
        return dict(self.each_lock(tasks, without=without))

    def each_lock(self, tasks: Any, *, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        """:meth:`locks` one parameter at a time: all together take a byte per weight."""
        tasks = [self.checked_task(t) for t in tasks]
        memo: dict[tuple, Tensor] = {}
        masks = {t: {n: m.live(t).float().cpu() for n, m in self.maskers.items()} for t in tasks}
        evaluated: dict[int, dict] = {t: {} for t in tasks}

        def live(ids: Tensor, task: int) -> Tensor:
            key = (ids.data_ptr(), tuple(ids.shape), tuple(ids.stride()), task)
            if key not in memo:
                program = self._facts.program(ids)
                memo[key] = (evaluate(program, masks[task].__getitem__, evaluated[task]) > 0).reshape(ids.shape)
            return memo[key]

        for name, uses in self._facts.uses.items():
            parameter = self.get_parameter(name)
            total = torch.zeros(parameter.numel(), dtype=torch.bool)
            if name not in without:
                for use in uses:
                    total |= locked(use, parameter.numel(), live, tasks, self.settings["locking"] == "paper")
            yield name, total.view(parameter.shape)

    # state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False, *, overwrite: bool = False) -> Any:
        """As any module's, masks and finished tasks included.

        Args:
            overwrite: also where it changes what finished tasks need, or leaves a task that is finished here unfinished.

        Raises:
            TaskError: it would, and ``overwrite`` is not given; nothing has been written then.
        """
        if not overwrite:
            return super().load_state_dict(state_dict, strict, assign)
        with self._guard.opened():
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

    def copy_to_tasks(self, tasks: Any) -> None:
        """Copies the state without a task into the task copies of ``tasks``, where shapes agree (a head of another class count
        keeps its own)."""
        with torch.no_grad():
            for task in tasks:
                for module in self.modules():
                    if isinstance(module, TaskIndexed):
                        mine = {k: v for k, v in module.state_dict(keep_vars=True).items() if not k.startswith("tasks.")}
                        for key, value in module.tasks[task].state_dict(keep_vars=True).items():
                            if value.shape == mine[key].shape:
                                value.copy_(mine[key])
                for name in (*self._facts.indexed, *self._facts.indexed_buffers):
                    self.indexed(name).of(task).copy_(_attribute(self, name))

    def indexed(self, name: str) -> TaskIndexedParameter:
        """The task copies of a raw parameter or buffer, by its original name."""
        return self.get_submodule(self._facts.indexed_paths[name])

    def task_copies(self) -> list[tuple[list[Tensor], Callable[[int], list[Tensor]]]]:
        """Everything that has one copy per task: the tensors without a task, and a function from a task to its tensors."""
        found = []
        for module in self.modules():
            if isinstance(module, TaskIndexed):
                inside = {id(t) for m in module.tasks for t in (*m.parameters(), *m.buffers())}
                shared = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in inside]
                found.append((shared, lambda t, m=module: [*m.tasks[t].parameters(), *m.tasks[t].buffers()]))
        for name in (*self._facts.indexed, *self._facts.indexed_buffers):
            copies = self.indexed(name)
            found.append(([_attribute(self, name)], lambda t, copies=copies: [copies.of(t)]))
        return found

    @property
    def can_train(self) -> bool:
        """Whether train mode was captured too."""
        return self._facts.can_train

    def original_state(self) -> dict[str, Tensor]:
        """Parameters and buffers without a task, by the original's names (buffers that are not saved included)."""
        return {n: _attribute(self, n) for n in self._facts.original_names}

    def __str__(self) -> str:
        return repr(self)  # fx would add the code; it is in hat.code

    def __deepcopy__(self, memo: dict) -> HATModel:
        self._guard.restore()
        root = Scope(type(self).__name__)
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

    def __reduce__(self):
        raise HatifyError(
            "a HAT model is not pickled",
            why="pickling a graph module runs its code when it is loaded",
            fix="hatify.save(hat, 'directory')",
        )


def _forward(self: HATModel, *args: Any, task: int | None = None, mask_scale: float | None = None, **kwargs: Any) -> Any:
    """``hat(*inputs, task=None, mask_scale=None)``; see :class:`HATModel`."""
    payload = next((a for a in (*args, *kwargs.values()) if isinstance(a, HATPayload)), None)
    if payload is not None:
        if task is not None or mask_scale is not None:
            raise CallError("a payload brings its own task and scale", fix="hat(HATPayload(x, task_id=3, mask_scale=20.0))")
        task, mask_scale = payload.task_id, payload.mask_scale
        args = tuple(a.data if isinstance(a, HATPayload) else a for a in args)
        kwargs = {k: a.data if isinstance(a, HATPayload) else a for k, a in kwargs.items()}
    elif task is None:
        task = self._active_task
    if not torch.compiler.is_compiling():
        self._guard.before_forward(task)
        self._guard.remember(task, args, {**kwargs, "task": task})
    tensors = self._facts.signature.bind(args, kwargs)
    self._facts.check_sizes(tensors)
    if self._facts.selections and not torch.compiler.is_compiling():
        check_selections(self._facts.selections, self.get_buffer)
    context = self.context(task, mask_scale if task is not None or payload is None else None)
    if context is None and self.runs_own_code:
        args, kwargs = self._facts.signature.rebuild(tensors)
        out = self._own_code(*args, **kwargs)
    else:
        structure = self._facts.train_output if self.training else self._facts.output
        out = unflatten(list(self.run(tensors, context)), structure)
    return HATPayload(out, task_id=task, mask_scale=mask_scale) if payload is not None else out


class Sizes:
    """The sizes that a capture fixed, checked once per combination of input shapes."""

    def __init__(self, captures: list[Captured]) -> None:
        self.names = captures[0].signature.names
        self.fixed = {(f.input, f.dim): f.size for c in captures for f in c.fixed_sizes}
        self.guards = [g for c in captures for g in c.guards]
        self.example = captures[0].inputs
        self.seen: set[tuple] = set()

    @classmethod
    def of(cls, names: list[str], fixed: dict[tuple[str, int], int], guards: list[Any], example: list[Tensor]) -> Sizes:
        """The same of a capture that is not there any more."""
        made = cls.__new__(cls)
        made.names, made.fixed, made.guards, made.example, made.seen = names, fixed, guards, example, set()
        return made

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether inputs of these sizes are what was captured."""
        try:
            self(tensors)
        except CallError:
            return False
        return True

    def __call__(self, tensors: list[Tensor]) -> None:
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key in self.seen:
            return
        for name, tensor, example in zip(self.names, tensors, self.example):
            if tensor.dim() != example.dim():
                raise _refused(name, f"it has {tensor.dim()} dimensions, captured were {example.dim()}", tensor)
            if tensor.dtype.is_floating_point != example.dtype.is_floating_point:
                raise _refused(name, f"it is {tensor.dtype}, captured was {example.dtype}", tensor)
            for dim, size in enumerate(tensor.shape):
                fixed = self.fixed.get((name, dim), size)
                if fixed != size:
                    raise _refused(name, f"dimension {dim} is {size}; the capture fixed it at {fixed}", tensor)
        for guard in self.guards:
            if not guard.holds(tensors):
                raise CallError(
                    "the model takes another path for inputs of these sizes",
                    where=guard.line,
                    why=f"the capture assumed {guard.text}",
                    fix="convert again with example_inputs of the sizes that you need",
                )
        self.seen.add(key)


def _refused(name: str, why: str, tensor: Tensor) -> CallError:
    shape = ", ".join(str(s) for s in tensor.shape)
    return CallError(
        f"the input {name} does not fit the capture",
        where=name,
        why=why,
        fix=f"hatify.convert(model, example_inputs=torch.randn({shape}))",
    )


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner)
    return owner._parameters[attribute] if attribute in owner._parameters else owner._buffers[attribute]


network_of.register(HATModel, Converted)
