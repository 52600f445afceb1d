"""One model of the zoo: built, converted, and proved. Runs in a process of its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from hatify.errors import HatifyError
from hatify.zoo.entry import Entry
from hatify.zoo.records import CONVERTED, FAILED, PROVED, REFUSED, Record, imported_files, versions

TASKS = 3
QUESTIONS = ("proof", "proof and tightness", "conversion")
_LINES = 12  # of a traceback, the innermost


@dataclass
class _Run:
    entry: Entry
    asked: str
    step: str = "build"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def at(self, step: str) -> Iterator[None]:
        self.step, start = step, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(time.perf_counter() - start, 2)


def prove(entry: Entry, asked: str = "proof", tell: Callable[[str], None] = lambda step: None) -> Record:
    """Converts a model and proves what was asked for: parity in eval and train mode and without gradients, at several batch sizes, zero
    drift, state-dict keys; on request the tightness of its locks. ``asked`` is one of :data:`QUESTIONS`.

    Nothing is raised: an error of hatify's is a refusal, any other a failure, both with the reason.
    """
    run = _Run(entry, asked)
    try:
        record = _proved(run, tell)
    except HatifyError as error:
        reason = {"step": run.step, "what": error.what, **dict(error.parts())}
        # the proof itself, or the user's own model, has no business to raise hatify's errors after the conversion
        record = Record(entry.key, entry.family, REFUSED if run.step == "convert" else FAILED, reason=reason)
    except Exception as error:
        last = "".join(traceback.format_exception(error)).splitlines()[-_LINES:]
        reason = {"step": run.step, "what": f"{type(error).__name__}: {str(error)[:600]}", "where": "\n".join(last)}
        record = Record(entry.key, entry.family, FAILED, reason=reason)
    record.asked, record.seconds = asked, run.seconds
    record.libraries, record.files = versions(), imported_files()
    return record


def _proved(run: _Run, tell: Callable[[str], None]) -> Record:
    import hatify
    from hatify.snapshot import snapshot

    entry = run.entry
    tell("build")
    with run.at("build"):
        model = entry.make()
        inputs = entry.inputs(model)
    parameters = sum(p.numel() for p in model.parameters())
    tell("convert")
    with run.at("convert"):
        hat = hatify.convert(model, TASKS, example_inputs=inputs, verify=False)
    record = Record(entry.key, entry.family, CONVERTED, snapshot=snapshot(hat), parameters=parameters)
    broken = _keys(model, hat)
    if run.asked != "conversion":
        del model
        tell("prove")
        with run.at("prove"):
            proof = hatify.verify(hat, tightness=run.asked == "proof and tightness")
        record.proof, record.verdict = proof.to_dict(), PROVED
        broken = broken or ("" if proof.ok else "a promise does not hold")
    if broken:
        record.verdict, record.reason = FAILED, {"step": "prove", "what": broken}
    return record


def _keys(model: nn.Module, hat: nn.Module) -> str:
    """What is wrong with the state dict: the original's keys have to be there, in their order and with their shapes."""
    wanted, got = model.state_dict(), hat.state_dict()
    if [key for key in got if key in wanted] != list(wanted):
        return "the original's state-dict keys are not all there, or in another order"
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor) and got[key].shape != value.shape:
            return f"the shape of {key} in the state dict changed"
    return ""
