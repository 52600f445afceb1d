"""Parity: without a task the model equals the original, run beside it on the same weights."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hatify.calling import flatten
from hatify.errors import CallError, HatifyError
from hatify.model import HATModel
from hatify.original import original_of
from hatify.proof.differences import difference
from hatify.proof.inputs import batch_size, input_batches
from hatify.proof.keeping import buffers_kept, kept, modes_kept, own_buffers, seeded


@dataclass
class Parity:
    """The largest differences that were found: 0.0 for none, None for what was not compared. ``served`` are the inputs that the
    original takes, ``rounding`` what gradients may differ by."""

    evaluation: float | None
    no_grad: float | None
    training: float | None
    gradients: float | None
    served: list[list[Tensor]] | None = None
    rounding: float = 0.0


def measure_parity(hat: HATModel, batches: list[list[Tensor]], seed: int, notes: list[str]) -> Parity:
    """Runs the model and the original's code beside each other, in every mode. What could not be compared is added to ``notes``.

    Args:
        batches: the inputs' tensors, as :func:`hatify.proof.inputs.input_batches` gives them; the first are the example inputs.
    """
    original = original_of(hat)
    with _all_trainable(hat):
        found = [_parity_eval(hat, original, tensors, notes, seed) for tensors in batches]
    served = [tensors for tensors, parity in zip(batches, found) if parity is not None]
    evaluation = max(parity for parity in found if parity is not None)
    no_grad = _parity_without_gradients(hat, served, notes, seed)
    training, gradients, rounding = None, None, rounding_of(hat)
    if hat.can_train:
        training, differences = _parity_train(hat, original, batches[0], seed, notes)
        gradients = _largest(differences)
        rough = {n for n, d in (differences or {}).items() if rounding <= d}
        if rough and gradients < math.inf:
            own = _own_rounding(hat, original, batches[0], seed, rough)
            if all(differences[n] < ROUNDINGS * own[n] for n in rough):
                rounding = ROUNDINGS * max(own.values())
                notes.append(
                    f"gradients of {len(rough)} parameters differ, as the original's own do where weights change by their last bit"
                )
    else:
        notes.append("train mode could not be captured: not compared")
    return Parity(evaluation, no_grad, training, gradients, served, rounding)


def _largest(differences: dict[str, float] | None) -> float | None:
    return None if differences is None else max(differences.values(), default=0.0)


def equals_original(hat: HATModel) -> bool:
    """Whether the outputs without a task equal those of the original's code in eval mode, with and without gradients, to the bit, on the
    inputs of the proof."""
    batches = list(input_batches(hat))
    with kept(hat):
        with _all_trainable(hat):
            original = original_of(hat)
            found = [_parity_eval(hat, original, tensors, [], 0) for tensors in batches]
        served = [tensors for tensors, parity in zip(batches, found) if parity is not None]
        return not any(found) and _parity_without_gradients(hat, served, [], 0) == 0.0


def equals_original_on(hat: HATModel, tensors: list[Tensor]) -> bool:
    """Whether outputs and statistics without a task equal those of the original's code on these inputs, to the bit, in eval and in train
    mode, and gradients do up to rounding (the kernels of some CPUs differ in it). Inputs that either does not take are not equal; a train
    mode that the original itself refuses is not compared."""
    with _all_trainable(hat):
        original = original_of(hat)
        try:
            if _parity_eval(hat, original, tensors, [], 0) != 0.0:
                return False
        except Exception:
            return False
        try:
            _train_step(original, hat, tensors, 0, None)
        except HatifyError:
            raise
        except Exception:
            return True
        try:
            training, differences = _parity_train(hat, original, tensors, 0, []) if hat.can_train else (0.0, None)
        except Exception:
            return False
        return training == 0.0 and (_largest(differences) or 0.0) < rounding_of(hat)


ROUNDING, ROUNDINGS = 1e-4, 16
"""Gradients, not outputs, may differ by less than this, relative to a parameter's largest; or by so many steps of a coarser type."""


def rounding_of(hat: HATModel) -> float:
    """What gradients may differ by: sums of another kernel, rounded to the coarsest type among the parameters."""
    steps = [torch.finfo(p.dtype).eps for p in hat.parameters() if p.is_floating_point() and p.element_size() > 1]
    return max([ROUNDING, *(ROUNDINGS * step for step in steps)])


def _own_rounding(hat: HATModel, original: nn.Module, tensors: list[Tensor], seed: int, names: set[str]) -> dict[str, float]:
    """How far the original's own gradients of these parameters go, relative to their largest element, where every weight changes by its
    last bit: far, where a batch norm sees two samples, whose true gradients are almost zero."""
    _, before, _ = _train_step(original, hat, tensors, seed, names)
    generator = torch.Generator().manual_seed(seed)
    with kept(hat):
        with torch.no_grad():
            for parameter in hat.parameters():
                if parameter.is_floating_point() and parameter.element_size() > 1:
                    up = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device, torch.bool)
                    near = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
                    parameter.copy_(torch.nextafter(parameter, near))
        _, after, _ = _train_step(original, hat, tensors, seed, names)
    failed = isinstance(before, Exception) or isinstance(after, Exception)
    return dict.fromkeys(names, 0.0) if failed else {n: _relative(before[n], after[n]) for n in names}


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest of ``a``; infinite where one is a number and the other is not."""
    gap = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    found = float(gap.max() / a.abs().nan_to_num(0.0).max().clamp(min=1e-12))
    return math.inf if math.isnan(found) else found


def _parity_eval(hat: HATModel, original: nn.Module, tensors: list[Tensor], notes: list[str], seed: int) -> float | None:
    """None where the original itself, or the capture, does not take other inputs than the example's."""
    args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
    hat.eval(), original.eval()
    with own_buffers(original), seeded(seed):
        try:
            expected = [o.detach() for o in flatten(original(*args, **kwargs))[0]]  # its activations must not live on beside ours
        except Exception as error:
            if tensors[0].shape == hat._facts.inputs[0].shape:
                raise
            notes.append(_left_out("the original itself", tensors, error))
            return None
    try:
        hat._facts.check_sizes(tensors)
    except CallError as error:
        notes.append(_left_out("the capture", tensors, error))
        return None
    args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
    with buffers_kept(hat), seeded(seed):
        return difference(expected, [o.detach() for o in flatten(hat(*args, task=None, **kwargs))[0]])


def takes(hat: HATModel, tensors: list[Tensor], notes: list[str]) -> bool:
    """Whether a model whose original is not there takes these inputs: the original may not take every batch."""
    device = next((p.device for p in hat.parameters()), torch.device("cpu"))
    args, kwargs = hat.signature.rebuild([t.clone().to(device) for t in tensors])
    try:
        with buffers_kept(hat.eval()), torch.no_grad():
            hat(*args, task=None, **kwargs)
    except Exception as error:
        notes.append(_left_out("the model", tensors, error))
        return False
    return True


def taken_batches(hat: HATModel) -> list[list[Tensor]]:
    """The example inputs, and those of :func:`hatify.proof.inputs.input_batches` that the capture and the model take."""
    example, *others = input_batches(hat)
    with modes_kept(hat):
        return [example, *(t for t in others if hat._facts.check_sizes.fit(t) and takes(hat, t, []))]


def _left_out(who: str, tensors: list[Tensor], error: Exception) -> str:
    return f"{who} fails at batch size {batch_size(tensors)} ({type(error).__name__}): not compared there"


def _parity_without_gradients(hat: HATModel, batches: list[list[Tensor]], notes: list[str], seed: int) -> float:
    """Eval parity on the example inputs under ``no_grad``, and on the smallest batch in inference mode.

    Both sides are fresh copies of the code: what it caches on itself in inference mode cannot take part in a backward later.
    """
    worst = 0.0
    for mode, tensors in ((torch.no_grad, batches[0]), (torch.inference_mode, batches[-1])):
        hat.__dict__.pop("_own_code_made", None)
        with mode():
            parity = _parity_eval(hat, original_of(hat), tensors, notes, seed)
            worst = worst if parity is None else max(worst, parity)
    hat.__dict__.pop("_own_code_made", None)
    return worst


@contextlib.contextmanager
def _all_trainable(hat: HATModel) -> Iterator[None]:
    """Where the model asks whether gradients are on, the graph is proved for a network that trains as a whole; see ``runs_own_code``."""
    frozen = [p for p in hat.parameters() if not p.requires_grad and p.is_floating_point()] if any(hat._facts.asks.values()) else []
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _parity_train(
    hat: HATModel, original: nn.Module, tensors: list[Tensor], seed: int, notes: list[str]
) -> tuple[float, dict[str, float] | None]:
    """Outputs and statistics of one train-mode step, and the gradients that are not equal to the bit, relative to a parameter's largest
    element; infinity where one has them and the other has not, None where the original itself has no backward."""
    (expected, wanted, statistics), (got, digests, own) = (_train_step(m, hat, tensors, seed, None) for m in (original, hat))
    names = list(statistics)
    parity = max(difference(expected, got), difference([statistics[n] for n in names], [own[n] for n in names]))
    if isinstance(wanted, Exception):
        reason = (str(wanted).strip().splitlines() or [""])[0]
        notes.append(f"the original's own backward fails ({type(wanted).__name__}: {reason}): gradients not compared")
        return parity, None
    if isinstance(digests, Exception):
        notes.append(f"backward fails, the original's does not ({type(digests).__name__}: {digests})")
        return parity, dict.fromkeys(wanted, math.inf)
    if wanted.keys() != digests.keys():
        return parity, dict.fromkeys(wanted.keys() ^ digests.keys(), math.inf)
    unequal = {n for n in wanted if wanted[n] != digests[n]}
    if not unequal:
        return parity, {}
    (_, a, _), (_, b, _) = (_train_step(m, hat, tensors, seed, unequal) for m in (original, hat))
    failed = next((found for found in (a, b) if isinstance(found, Exception)), None)
    if failed is not None:  # it keeps something of a call, and the next one trips over it
        notes.append(f"backward fails in a second call alone ({type(failed).__name__}: {failed}): gradients could not be compared")
        return parity, dict.fromkeys(unequal, math.inf)
    return parity, {n: _relative(a[n], b[n]) for n in unequal}


def _train_step(model: nn.Module, hat: HATModel, tensors: list[Tensor], seed: int, whole: set[str] | None):
    """Outputs, gradients (digests, or the ``whole`` ones of some parameters) and statistics of one step in train mode."""
    model.train()
    held = hat.original_state()
    with buffers_kept(model) if model is hat else own_buffers(model), seeded(seed):
        args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
        out = flatten(model(*args, **kwargs))[0]
        named = dict(model.named_buffers(remove_duplicate=False))
        # before the backward pass, in which checkpoints compute again what counts once; a buffer that the original replaced by one of
        # another shape is a cache, no statistic
        statistics = {n: b.clone() for n, b in named.items() if n in held and held[n].shape == b.shape}
        gradients = _gradients(out, {n: t for n, t in held.items() if isinstance(t, nn.Parameter)}, seed, whole)
    return [o.detach() for o in out], gradients, statistics


def _gradients(
    out: list[Tensor], parameters: dict[str, nn.Parameter], seed: int, whole: set[str] | None
) -> dict[str, Any] | Exception:
    """A digest of every gradient, freed as soon as it is there; or the gradients named in ``whole`` themselves; or the error of a
    backward that fails."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((o.float() * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in out if o.requires_grad)
    found: dict[str, Any] = {}
    if not isinstance(loss, Tensor):
        return found
    hooks = []
    distinct = {id(p): (n, p) for n, p in reversed(parameters.items())}
    for name, parameter in distinct.values():
        if parameter.requires_grad:

            def keep(p: Tensor, name: str = name) -> None:
                grad = p.grad.detach().to_dense() if p.grad.is_sparse else p.grad.detach()
                if whole is None:
                    found[name] = zlib.crc32((grad + 0.0).reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
                elif name in whole:
                    found[name] = grad.float()
                p.grad = None

            hooks.append(parameter.register_post_accumulate_grad_hook(keep))
    kept = {n: p.grad for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        loss.backward()
    except Exception as error:  # whatever the user's own backward raises: the caller says whose it was
        return error
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    return found
