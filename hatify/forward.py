"""A call of a converted network: what comes before the generated code, and after it.

Under ``torch.compile`` the generated code is compiled, and this is not: it runs before and after as ever. So a task and a scale are
inputs of the compiled code, and finished tasks are protected as in any call. (Within another function that is compiled as a
whole, it is part of that; the task is a constant then, and there is nobody to protect.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from hatify.calling import unflatten
from hatify.capture.selections import check_selections
from hatify.errors import CallError
from hatify.facts import check_input_types, check_parameter_types, check_way
from hatify.learning.reading import Reading
from hatify.modules import HATPayload, TaskContext
from hatify.modules.types import type_of_parameters

if TYPE_CHECKING:
    from hatify.model import HATModel


class _Call(NamedTuple):
    """A call that is ready for the generated code (or, if ``own``, for the original's)."""

    tensors: list[Tensor]
    context: TaskContext | None
    own: bool
    payload: tuple[int | None, Any] | None
    reading: Reading | None


def forward(self: HATModel, *args: Any, task: int | None = None, mask_scale: float | None = None, **kwargs: Any) -> Any:
    """``hat(*inputs, task=None, mask_scale=None)``; see :class:`HATModel`."""
    if torch.compiler.is_compiling():
        call = _prepared(self, args, kwargs, task, mask_scale)
        return _finished(self, call, self.run(call.tensors, call.context) if not call.own else _own(self, call))
    compiler = eval_frame.get_eval_frame_callback()
    if compiler is None:
        with self._guard.turns.taken():
            call = _prepared(self, args, kwargs, task, mask_scale)
            if call.reading is not None:
                self._guard.turns.read(call.reading)
            return _finished(self, call, self.run(call.tensors, call.context) if not call.own else _own(self, call))
    eval_frame.set_eval_frame(None)  # as torch.compiler.disable does, without the import of the whole compiler
    try:
        with self._guard.turns.taken():
            call = _prepared(self, args, kwargs, task, mask_scale)
            if call.reading is not None:
                self._guard.turns.read(call.reading)
            context = self._for_compiler(call.context)  # with the copies that are read in this pass
            eval_frame.set_eval_frame(compiler)
            out = self.run(call.tensors, context) if not call.own else _own(self, call)
            eval_frame.set_eval_frame(None)
            return _finished(self, call, out)
    finally:
        eval_frame.set_eval_frame(compiler)


# a compiler that comes upon the frame passes on to those that it calls
eval_frame.set_code_exec_strategy(
    forward.__code__, eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
)


def _own(self: HATModel, call: _Call) -> Any:
    args, kwargs = self.signature.rebuild(call.tensors)
    return self._own_code(*args, **kwargs)


def _prepared(self: HATModel, args: tuple, kwargs: dict[str, Any], task: int | None, mask_scale: float | None) -> _Call:
    payload = next((a for a in (*args, *kwargs.values()) if isinstance(a, HATPayload)), None)
    if payload is not None:
        if task is not None or mask_scale is not None:
            raise CallError("a payload brings its own task and scale", fix="hat(HATPayload(x, task_id=3, mask_scale=20.0))")
        task, mask_scale = payload.task_id, payload.mask_scale
        args = tuple(a.data if isinstance(a, HATPayload) else a for a in args)
        kwargs = {k: a.data if isinstance(a, HATPayload) else a for k, a in kwargs.items()}
    elif task is None:
        task = self._active_task
    reading = None
    if not torch.compiler.is_compiling():
        reading = self._guard.before_forward(task, may_read=True)
        self._guard.remember(task, args, {**kwargs, "task": task})
    tensors = self._facts.signature.bind(args, kwargs)
    self._facts.check_sizes(tensors)
    self.check_modes()
    if self._facts.selections and not torch.compiler.is_compiling():
        check_selections(self._facts.selections, self.get_buffer)
    scale = mask_scale if task is not None or payload is None else None
    context = self.context(task, scale, reading=reading)
    own = context is None and self.runs_own_code
    if not own and (self._facts.input_types or self._facts.unlike.get(self.training)):
        dtype = type_of_parameters(self)
        if not torch.compiler.is_compiling():
            check_parameter_types(self._facts, self._types())
        check_input_types(self._facts, dtype, tensors)
        check_way(self._facts.unlike.get(self.training, {}), dtype, tensors)
    return _Call(tensors, context, own, None if payload is None else (task, mask_scale), reading)


def _finished(self: HATModel, call: _Call, out: Any) -> Any:
    if not call.own:
        out = unflatten(list(out), self._facts.train_output if self.training else self._facts.output)
    return out if call.payload is None else HATPayload(out, task_id=call.payload[0], mask_scale=call.payload[1])
