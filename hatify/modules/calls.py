"""What becomes of payloads in calls of functions and modules: the rules decide, here it is carried out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from hatify.errors import TaskError
from hatify.gates import State
from hatify.gates.layers import ChannelNorm, Elementwise, Layer, Moving, Weighted, channels, other_layer, weighted
from hatify.gates.rules import Call, Interpreter, Outcome
from hatify.gates.rules.base import Rule, clean
from hatify.gates.value import constants
from hatify.modules import eager, functions, live_norms
from hatify.modules.pending import Pending
from hatify.registry import describe, describe_as

_HAT_WEIGHTS, _READ_BY_HAND, _TASK_COPIES = (WeakIdKeyDictionary() for _ in range(3))
"""Parameters of HAT layers, those met beside a payload, and copies that one task owns."""


def call_function(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A torch function, or an operator, with payloads among its arguments."""
    if isinstance(func, partial):
        func, args, kwargs = func.func, (*func.args, *args), {**func.keywords, **kwargs}
    payloads = _payloads(args, kwargs)
    if payloads[0].task_id is None:
        return _plainly(func, payloads, args, kwargs)
    if functions.hashable(func):
        if func in functions.COMPOSITE:
            return functions.COMPOSITE[func](*args, **kwargs)
        if func in functions.FRESH:
            return func(*_replaced(args, lambda p: p.unmasked_data), **kwargs)
        _checked_weights(func, args, kwargs)
    inplace = bool(kwargs.get("inplace"))
    found = functions.read(func, args, {**kwargs, "inplace": False} if inplace else kwargs)
    out = _ruled(payloads[0], found.name, found.rule, found.func, found.args, found.kwargs, (found.func,), found.live)
    if inplace:
        payloads[0]._become(out)
        return payloads[0]
    return out


def forward_by(payload: Pending, module: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``module(payload, ...)`` for a module or function that does not know payloads."""
    if not isinstance(module, nn.Module):
        return call_function(module, (payload, *args), kwargs)
    if isinstance(module, nn.Sequential) and not _hooked(module):
        for child in module:
            payload = forward_by(payload, child, (), {})
        return payload
    if any(getattr(m, "takes_payloads", False) for m in module.modules()):
        return module(payload, *args, **kwargs)
    payloads = _payloads((payload, args), kwargs)
    if payload.task_id is None:
        return _plainly(module, payloads, (payload, *args), kwargs)
    meaning = describe(module)
    _refuse_shared(module, meaning)
    if meaning is None and type(module).__module__.startswith("torch.nn") and not _hooked(module):
        return module(payload, *args, **kwargs)  # torch's own layers without weights: seen operator by operator
    return _by_module(payload, module, meaning, args, kwargs)


def weighted_of_payload(layer: nn.Module, payload: Pending, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A HAT layer on a payload: the input is masked, the layer's own mask is left pending, its use is recorded in ``layer.seen``.

    Raises:
        TaskError: its weights are coupled in a way that tasks cannot share, or used by hand elsewhere.
    """
    forward = partial(layer.plain_class.forward, layer)
    payloads = _payloads((payload, args), kwargs)
    if payload.task_id is None:
        return _plainly(forward, payloads, (payload, *args), kwargs)
    meaning = describe_as(layer, layer.plain_class)
    shapes = _shapes(layer)
    if not isinstance(meaning, Weighted) or meaning.weight not in shapes:
        reason = getattr(meaning, "reason", f"{layer.plain_class.__name__} has no parameter of its own that is its weight")
        fix = f"task_indexed_class({layer.plain_class.__name__})(..., config): one copy per task"
        raise TaskError("this layer cannot be shared between tasks", where=_named(layer), why=reason, fix=fix)
    sizes = channels(meaning, shapes[meaning.weight])
    plan = eager.weighted_plan(meaning, payload.dim(), payload._gates(), layer.masker, sizes, shapes)
    _owned(layer, plan)
    eager.record(layer.seen, plan)
    data = payload._with(plan.masks)
    args, kwargs = _replaced((args, kwargs), lambda p: p.data)
    out = forward(data, *args, **kwargs)
    if plan.out.factor is not None:
        out = payload._made(out, plan.out.factor, State.PENDING).data
    return payload._made(out, *eager.gates_of_result(plan.out, out, type(layer).__name__))


def recurrent_of_payload(layer: nn.Module, payload: Pending, hx: Any) -> Any:
    """A recurrent HAT layer on a payload, with states that are payloads, tensors or None; outputs and states are payloads.

    Raises:
        TaskError: packed sequences, or weights that are used by hand elsewhere.
    """
    payloads = _payloads((payload, hx), {})
    if payload.task_id is None:
        return _plainly(partial(layer.plain_class.forward, layer), payloads, (payload, hx), {})
    if not isinstance(payload.unmasked_data, Tensor):
        kind = type(payload.unmasked_data).__name__
        raise TaskError(f"a {kind} has no mask of its own", where=_named(layer), fix="a padded tensor of the same sequences")
    # a state that something else has looked at is still pending here: its soft factor must not gather from step to step
    operands = [payload, *(s._unsettled() if isinstance(s, Pending) else s for s in pytree.tree_leaves(hx) if s is not None)]
    known = [(tuple(o.shape), o.dtype, *_gates_of(o)) for o in operands]
    plan = eager.recurrent_plan(layer.meaning(), known, layer.maskers, _shapes(layer))
    _owned(layer, plan)
    eager.record(layer.seen, plan)
    x, *states = [_operand(o, masks) for o, masks in zip(operands, plan.masks)]
    given = tuple(states) if len(states) > 1 else states[0] if states else None
    masks = {n: eager.checked_masker(m, payload.task_id)(payload.task_id, payload.mask_scale) for n, m in layer.maskers.items()}
    out = layer.on(layer.folded(masks.__getitem__, soft=payload.mask_scale is not None), x, given)
    return _wrapped(payload, out, plan.out, type(layer).__name__)


def norm_of_payload(module: nn.Module, payload: Pending, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
    """A task-indexed module on a payload: the copy of its task, by the rule of its plain class."""
    kwargs = kwargs or {}
    if payload.task_id is None:
        payloads = _payloads((payload, args), kwargs)
        return _plainly(partial(module.plain_class.forward, module), payloads, (payload, *args), kwargs)
    chosen = copy_of_task(module.tasks.__getitem__, len(module.tasks), payload.task_id)
    return _by_module(payload, chosen, describe(chosen), args, kwargs)


def copy_of_task(of: Callable[[int], Any], tasks: int, task: int) -> Any:
    """The copy that belongs to ``task``.

    Raises:
        TaskError: no such task.
    """
    eager.checked_task(task, tasks)
    found = of(task)
    if isinstance(found, nn.Parameter):
        _TASK_COPIES[found] = True
    return found


def _by_module(payload: Pending, module: nn.Module, meaning: Layer | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A module that this task may use, by the rule of what it means."""
    inplace = any(getattr(m, "inplace", False) for m in module.modules())
    norm_dims = len(getattr(module, "normalized_shape", ())) or 1
    rule = _module_rule(meaning, module, norm_dims)
    probed = isinstance(meaning, Elementwise | Moving) and any(True for _ in (*module.parameters(), *module.buffers()))
    settings = tuple((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple | None))
    token = (type(module), settings, meaning) if not probed else None

    def run(*a: Any, **k: Any) -> Any:
        return module(*(t.clone() if inplace and isinstance(t, Tensor) else t for t in a), **k)

    def counted(x: Tensor, *, live: Tensor) -> Tensor:
        return live_norms.of_module(module, x, live)

    out = _ruled(payload, type(module).__name__, rule, run, (payload, *args), kwargs, token, counted)
    if inplace and isinstance(out, Pending):
        payload._become(out)
        return payload
    return out


def _module_rule(meaning: Layer | None, module: nn.Module, norm_dims: int) -> Rule:
    def rule(run: Interpreter, call: Call) -> Outcome:
        if isinstance(meaning, Weighted):  # one copy per task: no mask of its own
            return _own_weights(run, call, meaning, module)
        if not isinstance(meaning, Elementwise):
            return other_layer(run, meaning, call, norm_dims)
        probe = copy.deepcopy(module).cpu()
        forward = partial(type(probe).forward, probe)
        return other_layer(run, meaning, Call(call.name, forward, call.args, call.kwargs))

    return rule


def _own_weights(run: Interpreter, call: Call, meaning: Weighted, module: nn.Module) -> Outcome:
    sizes = channels(meaning, tuple(module.get_parameter(meaning.weight).shape))
    x = call.values()[0]
    bias = meaning.bias is not None and getattr(module, meaning.bias, None) is not None
    outcome = weighted(run, x, meaning, None, *sizes, bias)
    args, kwargs = call.map(lambda v: outcome.x if v is x else clean(run, v))
    return Outcome(args, kwargs, outcome.out)


def _ruled(
    payload: Pending, name: str, rule: Rule, func: Callable, args: tuple, kwargs: dict, token: Any, live: Callable | None = None
) -> Any:
    """Carries out one call by its rule."""
    payloads = _payloads(args, kwargs)
    if not any(p._gated for p in payloads):
        args, kwargs = _replaced((args, kwargs), lambda p: p._current())
        return _wrapped(payload, func(*args, **kwargs), (), name)
    plan = eager.plan(name, rule, func, args, kwargs, _gates_of, token)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    masks = iter(plan.masks)
    operands = [leaf for leaf in leaves if isinstance(leaf, Pending | Tensor)]
    live_mask = None
    if plan.live is not None:
        counted = list({id(o): o for o in operands}.values())[plan.live]
        live_mask = counted._mask() if payload.mask_scale is not None else counted._mask() > 0
    data = [_operand(leaf, next(masks)) if isinstance(leaf, Pending | Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(data, spec)
    out = func(*args, **kwargs) if live_mask is None else live(*args, **kwargs, live=live_mask)
    return _wrapped(payload, out, plan.out, name)


def _operand(leaf: Any, masks: tuple) -> Tensor:
    return leaf._with(masks) if isinstance(leaf, Pending) else leaf


def _wrapped(payload: Pending, out: Any, gates: tuple, name: str) -> Any:
    """Payloads of the tensors of a result."""
    leaves, spec = pytree.tree_flatten(out)
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    fitting = iter(gates if len(gates) == count else [None] * count)
    made = [payload._made(t, *eager.gates_of_result(next(fitting), t, name)) if isinstance(t, Tensor) else t for t in leaves]
    return pytree.tree_unflatten(made, spec)


def _plainly(func: Callable, payloads: list[Pending], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Without a task: the call on the data."""
    args, kwargs = _replaced((args, kwargs), lambda p: p.unmasked_data)
    return _wrapped(payloads[0], func(*args, **kwargs), (), "")


def _gates_of(leaf: Any) -> tuple[Tensor, State] | None:
    if isinstance(leaf, Pending):
        return leaf._gates()
    if isinstance(leaf, Tensor):
        return constants(leaf.dim()), State.CLEAN
    return None


def _replaced(tree: Any, change: Callable[[Pending], Any]) -> Any:
    return pytree.tree_map(lambda a: change(a) if isinstance(a, Pending) else a, tree)


def _payloads(args: Any, kwargs: Any) -> list[Pending]:
    """The payloads of a call, which must be of one task and scale.

    Raises:
        TaskError: they are not.
    """
    found = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Pending)]
    for other in found[1:]:
        if (other.task_id, other.mask_scale) != (found[0].task_id, found[0].mask_scale):
            raise TaskError(
                "payloads of different tasks or scales do not meet in one operation",
                why=f"task {found[0].task_id} at scale {found[0].mask_scale}, task {other.task_id} at scale {other.mask_scale}",
                fix="payload.like(tensor) makes a payload of the same task and scale",
            )
    return found


def _owned(layer: nn.Module, plan: eager.WeightedPlan) -> None:
    """Marks the weights of a HAT layer, which may be used through their layer only."""
    for use in plan.uses:
        parameter = layer.get_parameter(use.parameter)
        _HAT_WEIGHTS[parameter] = True
        if parameter in _READ_BY_HAND:
            raise _by_hand(parameter)


def _checked_weights(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Notes parameters beside a payload, and refuses weights that no task owns.

    Raises:
        TaskError: a HAT layer's own parameter, whose use would not be locked, or the weight of a plain layer.
    """
    name = getattr(func, "__name__", "")
    if func in functions.IN_PLACE:
        raise TaskError(f"{name} writes in place, which a payload does not", fix="a new tensor: x = x + y, torch.relu(x)")
    for leaf in pytree.tree_leaves((args, kwargs)):
        parameter = leaf if isinstance(leaf, nn.Parameter) else getattr(leaf, "_base", None) if isinstance(leaf, Tensor) else None
        if not isinstance(parameter, nn.Parameter) or parameter in _TASK_COPIES:
            continue
        _READ_BY_HAND[parameter] = True
        if parameter in _HAT_WEIGHTS:
            raise _by_hand(parameter)
        if func in functions.WEIGHTED and parameter.requires_grad:
            raise TaskError(
                f"{name} with a weight of shape {tuple(parameter.shape)} that all tasks would share",
                fix="a HAT layer, such as HATLinear(64, 32, config), or a TaskIndexedParameter",
            )
    if functions.running_statistics(func, args, kwargs):
        raise TaskError(
            f"{name} with statistics that all tasks would share", fix="TaskIndexedBatchNorm2d(64, config) on the payload"
        )


def _by_hand(parameter: nn.Parameter) -> TaskError:
    return TaskError(
        f"a HAT layer's parameter of shape {tuple(parameter.shape)} is also used by hand, where nothing locks it",
        fix="two HAT layers of one weight (head.weight = embedding.weight), or a TaskIndexedParameter",
    )


def _refuse_shared(module: nn.Module, meaning: Layer | None) -> None:
    """Raises where a plain module holds weights or statistics that tasks would share."""
    statistics = isinstance(meaning, ChannelNorm) and getattr(module, "running_mean", None) is not None
    if not statistics and not any(True for _ in module.parameters()):
        return
    name = type(module).__name__
    hat = f"HAT{name}(..., config)" if isinstance(meaning, Weighted) else f"task_indexed_class({name})(..., config)"
    raise TaskError(
        "this layer's weights would be shared by all tasks and protected by none",
        where=_named(module),
        fix=f"{hat} instead, called on the payload",
    )


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's parameters but for those of its maskers."""
    return {
        n: tuple(p.shape) for n, p in layer.named_parameters(remove_duplicate=False) if not n.startswith(("masker.", "maskers."))
    }


def _named(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
