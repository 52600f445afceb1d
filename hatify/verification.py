"""The proof: parity with the original, and zero drift under replacing every unlocked weight by noise."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from hatify.errors import VerificationError
from hatify.model import HATModel
from hatify.proof.drift import drift_and_control
from hatify.proof.gradients import prove_by_gradients
from hatify.proof.inputs import batch_size, input_batches
from hatify.proof.keeping import kept
from hatify.proof.parity import ROUNDING, Parity, measure_parity, rounding_of, takes

__all__ = ["VerificationError", "VerificationReport", "measure_drift", "prove", "prove_by_gradients", "verify"]

SEEDS = 16
"""How often masks and weights are drawn anew while the control sees nothing."""


@dataclass
class VerificationReport:
    """What was measured. Differences are the largest absolute ones; 0.0 means equal to the last bit.

    ``parity`` and ``parity_train``: outputs without a task against the original's own code, in eval and in train mode (same
    seed, dropout on, statistics compared too); ``parity_no_grad``: in eval mode under ``torch.no_grad()`` and
    ``torch.inference_mode()``, where a model may take another path (torch's transformer layers do); ``parity_train`` is None where
    train mode could not be captured. ``gradients``: the largest relative
    difference of a parameter's gradient in that step. Outputs are promised to the bit; a gradient may differ by
    rounding (less than ``rounding``, which is larger where the original's own gradients differ as much when its weights change by their
    last bit) where a library chooses another kernel while it is traced; a lost region or function shows as more.
    ``drift``: a finished task's outputs before and after all that is not locked was replaced by noise. ``control``: the same with
    the locks taken away, which must not be zero, or the check was blind (None for a model that shares no weights).
    ``batch_sizes``: those it was tried at. ``tightness`` and ``leak``, None unless asked for: the share of locked weights that a
    finished task feels (its gradient is not zero), and the largest gradient that it feels of an unlocked one, which must be zero.
    ``unreached`` is the share of locked weights that the tightness leaves out, for none of the inputs tried could show anything of
    them: taps that met padding only, experts that no token chose, rows of tables that no index named.
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
    unreached: float | None = None
    rounding: float = ROUNDING

    @property
    def equal(self) -> bool:
        """Whether the network is the original as far as that was measured."""
        parities = (self.parity, self.parity_no_grad, self.parity_train)
        return all(p in (0.0, None) for p in parities) and (self.gradients or 0.0) < self.rounding

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return self.equal and self.drift == 0.0 and self.control != 0.0 and self.leak in (0.0, None)

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
    with kept(hat):
        report = _measure(hat, without_locks, without_masks, seed)
    if tightness:
        start = time.perf_counter()
        proof = prove_by_gradients(hat, without_locks=without_locks, seed=seed)
        report.tightness, report.leak, report.unreached = proof.tightness, proof.leak, proof.unreached
        if proof.leak is None:
            report.notes.append("gradients are never finite under random masks: tightness and leak were not measured")
        report.seconds["tightness"] = time.perf_counter() - start
    return report


def measure_drift(
    hat: HATModel, *, without_locks: Sequence[str] = (), without_masks: Sequence[str] = (), seed: int = 0
) -> tuple[float, float | None]:
    """Only the drift part of :func:`verify`, on the example inputs: ``(drift, control)``."""
    with kept(hat):
        return drift_and_control(hat, [next(input_batches(hat, seed))], without_locks, without_masks, seed, [])


def prove(hat: HATModel, original: nn.Module | None) -> VerificationReport:
    """:func:`verify` for a fresh conversion; raises where a promise does not hold. ``original`` saves a backup of its weights.

    Raises:
        VerificationError: with what differed.
    """
    held = {} if original is None else {**dict(original.named_parameters()), **dict(original.named_buffers())}
    with kept(hat, held):
        report = _measure(hat, (), (), 0)
    if not report.ok:
        error = VerificationError(
            "a promise does not hold for this model",
            where=hat._facts.name,
            why=f"parity {report.parity}, without gradients {report.parity_no_grad}, in train mode {report.parity_train}, "
            f"gradients {report.gradients}, drift {report.drift}, control {report.control}"
            + "".join(f"; {note}" for note in report.notes),
            fix="hatify.convert(..., verify=False) gives the model to look into; please report it",
        )
        error.equal = report.equal
        raise error
    return report


def _measure(hat: HATModel, without_locks: Sequence[str], without_masks: Sequence[str], seed: int) -> VerificationReport:
    notes: list[str] = []
    seconds: dict[str, float] = {}
    batches = list(input_batches(hat, seed))
    start = time.perf_counter()
    parity = Parity(None, None, None, None, rounding=rounding_of(hat))
    if hat._facts.reference is None:
        notes.append("loaded without the original's code, so parity is not measured: hatify.load(directory, factory=make_model)")
        batches = [batches[0], *(tensors for tensors in batches[1:] if takes(hat, tensors, notes))]
    else:
        parity = measure_parity(hat, batches, seed, notes)
        batches = parity.served or batches
    seconds["parity"] = time.perf_counter() - start
    start = time.perf_counter()
    tried = [batches[0], *batches[1:][-1:]]  # the example's and the smallest batch
    for attempt in range(SEEDS):
        # masks may leave one channel of a narrow layer, or a task's own weights close a gate, which hides everything: draw again
        strength = 0.5 if attempt else 0.1
        drift, control = drift_and_control(hat, tried, without_locks, without_masks, seed + attempt, notes, strength)
        nothing_to_see = control is None and not (without_locks or without_masks)
        if drift != 0.0 or control or nothing_to_see:
            break
    seconds["drift"] = time.perf_counter() - start
    control = None if control is None else min(control, sys.float_info.max)  # noise may overflow, and JSON has no infinity
    found = (parity.evaluation, parity.no_grad, parity.training, parity.gradients, drift, control)
    return VerificationReport(*found, [batch_size(b) for b in batches], seconds, notes, rounding=parity.rounding)
