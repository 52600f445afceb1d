"""The proof: parity with the original, and zero drift under replacing every unlocked weight by noise."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hatify.errors import HatifyError
from hatify.gradient_proof import GradientProof, measure_gradients
from hatify.model import HATModel
from hatify.modules import HATRecurrent, TaskContext
from hatify.modules.copies import can_share, copy_of, shareable
from hatify.original import original_of

ROUNDING = 1e-4
"""Gradients, not outputs, may differ by less than this, relative to a parameter's largest."""


SEEDS = 4
"""How often masks are drawn anew while the control sees nothing."""


class VerificationError(HatifyError):
    """A promise does not hold for this model."""


@dataclass
class VerificationReport:
    """What was measured. Differences are the largest absolute ones; 0.0 means equal to the last bit.

    ``parity`` and ``parity_train``: outputs without a task against the original's own code, in eval and in train mode (same
    seed, dropout on, statistics compared too); ``parity_no_grad``: in eval mode under ``torch.no_grad()`` and
    ``torch.inference_mode()``, where a model may take another path (torch's transformer layers do); ``parity_train`` is None where
    train mode could not be captured. ``gradients``: the largest relative
    difference of a parameter's gradient in that step. Outputs are promised to the bit; a gradient may differ by
    rounding (below 1e-4) where a library chooses another kernel while it is traced; a lost region or function shows as more.
    ``drift``: a finished task's outputs before and after all that is not locked was replaced by noise. ``control``: the same with
    the locks taken away, which must not be zero, or the check was blind (None for a model that shares no weights).
    ``batch_sizes``: those it was tried at. ``tightness`` and ``leak``, None unless asked for: the share of locked weights that a
    finished task feels (its gradient is not zero), and the largest gradient that it feels of an unlocked one, which must be zero.
    The parities are None for a model that was loaded without the original's code: the note says so.
    """

    parity: float | None
    parity_no_grad: float | None
    parity_train: float | None
    gradients: float | None
    drift: float
    control: float | None
    batch_sizes: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tightness: float | None = None
    leak: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        parities = (self.parity, self.parity_no_grad, self.parity_train)
        parity = all(p in (0.0, None) for p in parities) and (self.gradients or 0.0) < ROUNDING
        return parity and self.drift == 0.0 and self.control != 0.0 and self.leak in (0.0, None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def verify(
    hat: HATModel,
    *,
    tightness: bool = False,
    without_locks: Sequence[str] = (),
    without_masks: Sequence[str] = (),
    seed: int = 0,
) -> VerificationReport:
    """Runs the proof on a HAT model, whose weights, statistics and modes are as before afterwards.

    Parity compares with the original's code run on the model's own weights without a task, so it also holds after training.

    Args:
        tightness: measure by gradients too how many locked weights count, and that no unlocked one does: ``report.tightness`` and
            ``report.leak``.
        without_locks: parameters whose locks are left out: a negative control, which must find drift (and leak).
        without_masks: mask nodes (names in ``hat.hat.masks``) that are left out, or maskers of recurrent layers (names in
            ``hat.maskers``) that are not folded into their weights: likewise.
        seed: of masks, noise and dropout.
    """
    with _kept(hat, {}):
        report = _measure(hat, without_locks, without_masks, seed)
    if tightness:
        start = time.perf_counter()
        proof = prove_by_gradients(hat, without_locks=without_locks, seed=seed)
        report.tightness, report.leak = proof.tightness, proof.leak
        if proof.leak is None:
            report.notes.append("gradients are never finite under random masks: tightness and leak were not measured")
        report.seconds["tightness"] = time.perf_counter() - start
    return report


def prove_by_gradients(
    hat: HATModel, *, without_locks: Sequence[str] = (), whole: Sequence[str] = (), seed: int = 0
) -> GradientProof:
    """Only the part of :func:`verify` that looks at gradients; ``whole`` are parameters locked as a whole, for a control."""

    @contextlib.contextmanager
    def drawn(generator: torch.Generator, tasks: Sequence[int]) -> Iterator[None]:
        others = [t for t in range(hat.config.num_tasks) if t not in tasks]
        unread = {id(c) for _, copies in hat.task_copies() for t in others for c in copies(t)}
        with _kept(hat, {}):
            written = [p for p in hat.parameters() if p.dtype.is_floating_point and id(p) not in unread]
            _draw(hat, written, generator, tasks)
            yield

    with _seeded(seed):
        return measure_gradients(hat, drawn, without_locks=without_locks, whole=whole, seed=seed)


def measure_drift(
    hat: HATModel, *, without_locks: Sequence[str] = (), without_masks: Sequence[str] = (), seed: int = 0
) -> tuple[float, float | None]:
    """Only the drift part of :func:`verify`, on the example inputs: ``(drift, control)``."""
    with _kept(hat, {}):
        return _drift(hat, [next(input_batches(hat, seed))], without_locks, without_masks, seed, [])


def prove(hat: HATModel, original: nn.Module | None) -> VerificationReport:
    """:func:`verify` for a fresh conversion; raises where a promise does not hold. ``original`` saves a backup of its weights.

    Raises:
        VerificationError: with what differed.
    """
    held = {} if original is None else {**dict(original.named_parameters()), **dict(original.named_buffers())}
    with _kept(hat, held):
        report = _measure(hat, (), (), 0)
    if not report.ok:
        raise VerificationError(
            "a promise does not hold for this model",
            where=hat._facts.name,
            why=f"parity {report.parity}, without gradients {report.parity_no_grad}, in train mode {report.parity_train}, "
            f"gradients {report.gradients}, drift {report.drift}, control {report.control}"
            + "".join(f"; {note}" for note in report.notes),
            fix="hatify.convert(..., verify=False) gives the model to look into; please report it",
        )
    return report


def _measure(hat: HATModel, without_locks: Sequence[str], without_masks: Sequence[str], seed: int) -> VerificationReport:
    notes: list[str] = []
    seconds: dict[str, float] = {}
    batches = list(input_batches(hat, seed))
    start = time.perf_counter()
    parity = no_grad = train = gradients = None
    if hat._facts.reference is None:
        notes.append("loaded without the original's code, so parity is not measured: hatify.load(directory, factory=make_model)")
    else:
        original = original_of(hat)
        with _all_trainable(hat):
            parity = max((_parity_eval(hat, original, tensors, notes, seed) for tensors in batches), default=0.0)
        no_grad = _parity_without_gradients(hat, batches, notes, seed)
        if hat.can_train:
            train, gradients = _parity_train(hat, original, batches[0], seed, notes)
    seconds["parity"] = time.perf_counter() - start
    start = time.perf_counter()
    for attempt in range(SEEDS):
        drift, control = _drift(hat, [batches[0], *batches[2:]], without_locks, without_masks, seed + attempt, notes)
        if drift != 0.0 or control != 0.0:  # masks may leave one channel of a narrow layer, which hides everything: draw again
            break
    seconds["drift"] = time.perf_counter() - start
    return VerificationReport(parity, no_grad, train, gradients, drift, control, [_batch(b) for b in batches], seconds, notes)


def input_batches(hat: HATModel, seed: int = 0) -> Iterator[list[Tensor]]:
    """The example inputs, and the same model's inputs at another batch size and at one (where the batch is open)."""
    generator = torch.Generator().manual_seed(seed)
    examples = hat._facts.inputs
    yield [t.clone() for t in examples]
    open_batch = [t for t in examples if t.dim()]
    if not open_batch:
        return
    size = open_batch[0].shape[0]
    names = hat.signature.names
    batched = [t.dim() > 0 and t.shape[0] == size and (n, 0) not in hat._facts.check_sizes.fixed for n, t in zip(names, examples)]
    if not batched[0]:
        return
    for other in (size + 1, 1):
        tensors = []
        for tensor, moves in zip(examples, batched):
            if moves:
                tensor = tensor[torch.arange(other) % size]
                if tensor.dtype.is_floating_point:
                    tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
            tensors.append(tensor)
        yield tensors


def _batch(tensors: list[Tensor]) -> int:
    return next((int(t.shape[0]) for t in tensors if t.dim()), 0)


def _parity_eval(hat: HATModel, original: nn.Module, tensors: list[Tensor], notes: list[str], seed: int) -> float:
    args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
    hat.eval(), original.eval()
    with _own_buffers(original), _seeded(seed):
        try:
            expected = [o.detach() for o in _flat(original(*args, **kwargs))]  # its activations must not live on beside ours
        except Exception as error:
            if tensors[0].shape == hat._facts.inputs[0].shape:
                raise
            notes.append(f"the original itself fails at batch size {_batch(tensors)} ({type(error).__name__}): not compared there")
            return 0.0
    args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
    with _buffers_kept(hat), _seeded(seed):
        return difference(expected, [o.detach() for o in _flat(hat(*args, task=None, **kwargs))])


def _parity_without_gradients(hat: HATModel, batches: list[list[Tensor]], notes: list[str], seed: int) -> float:
    """Eval parity on the example inputs under ``no_grad``, and on the smallest batch in inference mode.

    Both sides are fresh copies of the code: what it caches on itself in inference mode cannot take part in a backward later.
    """
    worst = 0.0
    for mode, tensors in ((torch.no_grad, batches[0]), (torch.inference_mode, batches[-1])):
        hat.__dict__.pop("_own_code_made", None)
        with mode():
            worst = max(worst, _parity_eval(hat, original_of(hat), tensors, notes, seed))
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
) -> tuple[float, float | None]:
    """Outputs and statistics of one train-mode step, and its gradients (None where the original itself has no backward)."""
    (expected, wanted, statistics), (got, digests, own) = (_train_step(m, hat, tensors, seed, None) for m in (original, hat))
    names = list(statistics)
    parity = max(difference(expected, got), difference([statistics[n] for n in names], [own[n] for n in names]))
    if isinstance(wanted, Exception):
        reason = (str(wanted).strip().splitlines() or [""])[0]
        notes.append(f"the original's own backward fails ({type(wanted).__name__}: {reason}): gradients not compared")
        return parity, None
    if isinstance(digests, Exception):
        notes.append(f"backward fails, the original's does not ({type(digests).__name__}: {digests})")
        return parity, float("inf")
    if wanted.keys() != digests.keys():
        return parity, float("inf")
    unequal = {n for n in wanted if wanted[n] != digests[n]}
    if not unequal:
        return parity, 0.0
    (_, a, _), (_, b, _) = (_train_step(m, hat, tensors, seed, unequal) for m in (original, hat))
    return parity, max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)) for n in unequal)


def _train_step(model: nn.Module, hat: HATModel, tensors: list[Tensor], seed: int, whole: set[str] | None):
    """Outputs, gradients (digests, or the ``whole`` ones of some parameters) and statistics of one step in train mode."""
    model.train()
    held = hat.original_state()
    with _buffers_kept(model) if model is hat else _own_buffers(model), _seeded(seed):
        args, kwargs = hat.signature.rebuild([t.clone() for t in tensors])
        out = _flat(model(*args, **kwargs))
        gradients = _gradients(out, {n: t for n, t in held.items() if isinstance(t, nn.Parameter)}, seed, whole)
        named = dict(model.named_buffers(remove_duplicate=False))
        # a buffer that the original replaced by one of another shape is a cache, no statistic
        statistics = {n: b.clone() for n, b in named.items() if n in held and held[n].shape == b.shape}
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


def _drift(hat: HATModel, batches: list[list[Tensor]], without_locks, without_masks, seed: int, notes: list[str]):
    """Two tasks with random binary masks; all that the first does not lock becomes noise (copies of other tasks NaN, where that can be
    put back); its outputs are compared."""
    generator = torch.Generator().manual_seed(seed)
    task, other = 0, 1 if hat.config.num_tasks > 1 else None
    own, unread = _of_task(hat, task), _unread(hat, task)
    kept_out = {id(p) for p in unread}
    written = [p for p in hat.parameters() if p.dtype.is_floating_point and id(p) not in kept_out]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        _draw(hat, written, generator, [t for t in (task, other) if t is not None])
        before = _outputs(hat, batches, task, seed, without_masks)
        if not all(torch.isfinite(o).all() for o in before if o.dtype.is_floating_point):
            notes.append("outputs are not finite under random weights: drift means little")
        stack.enter_context(_nan(unread))  # only now: NaN before and after would look equal
        locked: list[nn.Parameter] = []
        sharing = False
        for name, lock in hat.each_lock([task], without=tuple(without_locks)):
            parameter = hat.get_parameter(name)
            sharing = sharing or bool(lock.any())
            locked.append(parameter)
            if id(parameter) not in own and parameter.dtype.is_floating_point:
                parameter.copy_(torch.where(lock.to(parameter.device), parameter, _noise(parameter, generator)))
        done = own | {id(p) for p in locked}
        for parameter in written:
            if id(parameter) not in done:
                parameter.copy_(_noise(parameter, generator))
        for buffer in _copied_buffers(hat):
            if id(buffer) not in own and buffer.dtype.is_floating_point:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        drift = difference(before, _outputs(hat, batches, task, seed, without_masks))
        if without_locks or without_masks or not sharing:
            return drift, None  # a control already, or nothing is shared
        for parameter in locked:
            parameter.copy_(_noise(parameter, generator))
        control = difference(before, _outputs(hat, batches, task, seed, without_masks))
    return drift, control


@torch.no_grad()
def _draw(hat: HATModel, parameters: Sequence[Tensor], generator: torch.Generator, tasks: Sequence[int]) -> None:
    """Noise on weights (zero-initialised gains would hide whole branches), and random masks for ``tasks``."""
    for parameter in parameters:
        parameter.add_(0.1 * _noise(parameter, generator))
    for masker in hat.maskers.values():
        for embedding in (masker.embeddings[t] for t in tasks):
            embedding.copy_(torch.randn(embedding.shape, generator=generator))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise as large as the weights it replaces."""
    scale = float(like.float().std()) if like.numel() > 1 else float(like.float().abs().max()) if like.numel() else 0.0
    scale = scale if scale > 1e-3 else 0.5
    return torch.empty(like.shape).normal_(0.0, scale, generator=generator).to(like)


def _outputs(hat: HATModel, batches: list[list[Tensor]], task: int, seed: int, without_masks: Sequence[str]) -> list[Tensor]:
    """Outputs of a task with binary masks, in eval mode and, where the modes have graphs of their own, in train mode."""
    maskers = hat.maskers
    out: list[Tensor] = []
    modes = [False, True] if hat.train_graph is not None else [False]
    with _without(hat, without_masks):
        for training in modes:
            hat.train(training)
            for tensors in batches:
                context = TaskContext(task, None, lambda name: maskers[name](task, None), hard=True)
                with _buffers_kept(hat), _seeded(seed):
                    out += [o.detach().clone() for o in hat.run([t.clone() for t in tensors], context)]
    return out


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random numbers for both sides; the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _without(hat: HATModel, names: Sequence[str]) -> Iterator[None]:
    masks = hat.room.masks
    removed = {name: masks._modules[name] for name in names if name in masks._modules}
    unfolded = {name: hat.get_submodule(name.rpartition(".")[0]) for name in names if name not in removed}
    for name in removed:
        masks._modules[name] = _Unmasked()
    for name, layer in unfolded.items():
        layer.__dict__["folded"] = partial(_folded_without, layer, name.rpartition(".")[2])
    try:
        yield
    finally:
        masks._modules.update(removed)
        for layer in unfolded.values():
            layer.__dict__.pop("folded", None)


def _folded_without(layer: HATRecurrent, masker: str, mask_of: Callable[[str], Tensor], soft: bool) -> dict[str, Tensor]:
    """The weights of a recurrent layer with one masker left out."""
    return type(layer).folded(layer, lambda name: torch.ones_like(mask_of(name)) if name == masker else mask_of(name), soft)


class _Unmasked(nn.Module):
    def forward(self, x: Tensor, task: TaskContext | None = None) -> Tensor:
        return x


def _of_task(hat: HATModel, task: int) -> set[int]:
    """Ids of the tensors that belong to one task alone."""
    own: set[int] = set()
    for masker in hat.maskers.values():
        own.add(id(masker.embeddings[task]))
    for _, copies in hat.task_copies():
        own.update(id(t) for t in copies(task))
    return own


def _unread(hat: HATModel, task: int) -> list[nn.Parameter]:
    """Parameters that belong to other tasks alone, so that ``task`` reads none of them. (Buffers, which forward restores, and tensors
    that share memory with others are left to the noise.)"""
    others = [t for t in range(hat.config.num_tasks) if t != task]
    found = [p for _, copies in hat.task_copies() for other in others for p in copies(other) if isinstance(p, nn.Parameter)]
    return [p for p in found if p.dtype.is_floating_point and can_share(p)]


@contextlib.contextmanager
def _nan(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters are NaN throughout, which takes no memory and which one read would show."""
    held = [(p, p.data) for p in parameters]
    try:
        for parameter, value in held:
            parameter.data = value.new_full((), float("nan")).expand(value.shape)
        yield
    finally:
        for parameter, value in held:
            parameter.data = value


def _copied_buffers(hat: HATModel) -> list[Tensor]:
    """Buffers of task-indexed modules: the one without a task and those of every task."""
    found: list[Tensor] = []
    for module, copies in hat.task_copies():
        found += [b for b in module if not isinstance(b, nn.Parameter)]
        for task in range(hat.config.num_tasks):
            found += [b for b in copies(task) if not isinstance(b, nn.Parameter)]
    return found


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinity where shapes, types or the places of NaN differ."""
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b):
            continue
        if a.dtype.is_floating_point or a.dtype.is_complex:
            same = (a == b) | (torch.isnan(a) & torch.isnan(b))
            gap = torch.where(same, torch.zeros((), dtype=a.dtype), (a - b)).abs().max().item()
            worst = max(worst, gap if gap == gap else float("inf"))
        else:
            worst = max(worst, float((a != b).any()))
    return worst


def _flat(out: Any) -> list[Tensor]:
    from hatify.calling import flatten

    return flatten(out)[0]


@contextlib.contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Forward may change buffers: it gets clones."""
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in held:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """The same in place: converted buffers are written where they are."""
    held = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)


@contextlib.contextmanager
def _kept(hat: HATModel, elsewhere: dict[str, Tensor]) -> Iterator[None]:
    """Weights, statistics and modes are as before afterwards.

    Tensors that may share memory until written are laid aside for a copy to work on, which costs what is written to it, and only as long as
    it lasts. The others are written in place and restored, from ``elsewhere`` where that holds them, so that whatever
    shares memory with them goes along.
    """
    named = {**dict(hat.named_parameters()), **dict(hat.named_buffers())}
    copies = [(t, copy_of(t)) for t in shareable(hat)]
    aside = {id(t) for t, _ in copies}
    laid_aside = [(t, t.data) for t, _ in copies]
    backup = {n: elsewhere[n] if n in elsewhere else t.detach().clone() for n, t in named.items() if id(t) not in aside}
    modes = [(m, m.training) for m in hat.modules()]
    try:
        while copies:
            tensor, working = copies.pop()
            tensor.data = working
        yield
    finally:
        for tensor, own in laid_aside:
            tensor.data = own
        with torch.no_grad():
            for name, tensor in named.items():
                if name in backup:
                    tensor.copy_(backup[name])
        for module, training in modes:
            module.training = training
