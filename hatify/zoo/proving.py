"""One model of the zoo: built, converted, and proved. Runs in a process of its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hatify.errors import HatifyError
from hatify.zoo.entry import Entry
from hatify.zoo.hollow import build_hollow
from hatify.zoo.records import CONVERTED, FAILED, PROVED, REFUSED, Record, imported_files, read, structure_key, versions
from hatify.zoo.structure import structure_of

TASKS = 3
QUESTIONS = ("proof", "proof and tightness", "conversion")
_LINES = 12  # of a traceback, the innermost


@dataclass
class _Run:
    entry: Entry
    asked: str
    tell: Callable[[str], None]
    known: Path | None
    step: str = "build"
    seconds: dict[str, float] = field(default_factory=dict)
    structure: str | None = None

    @contextmanager
    def at(self, step: str) -> Iterator[None]:
        self.tell(step)
        self.step, start = step, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(time.perf_counter() - start, 2)


def prove(entry: Entry, asked: str = "proof", tell: Callable[[str], None] = lambda step: None, known: Path | None = None) -> Record:
    """Converts a model and proves what was asked for: parity in eval and train mode and without gradients, at several batch sizes, zero
    drift, state-dict keys; on request the tightness of its locks.

    Nothing is raised: an error of hatify's is a refusal, any other a failure, both with the reason.

    Args:
        entry: the model.
        asked: one of :data:`QUESTIONS`. For a ``conversion`` the model is built without its weights.
        tell: called with the name of each step as it begins.
        known: a directory of records. A model of the same structure that is converted already answers for a ``conversion``.
    """
    run = _Run(entry, asked, tell, known)
    try:
        record = _converted(run) if asked == "conversion" else _proved(run)
    except HatifyError as error:
        reason = {"step": run.step, "what": error.what, **dict(error.parts())}
        # the proof itself, or the user's own model, has no business to raise hatify's errors after the conversion
        record = Record(entry.key, entry.family, REFUSED if run.step == "convert" else FAILED, reason=reason)
    except Exception as error:
        last = "".join(traceback.format_exception(error)).splitlines()[-_LINES:]
        reason = {"step": run.step, "what": f"{type(error).__name__}: {str(error)[:600]}", "where": "\n".join(last)}
        record = Record(entry.key, entry.family, FAILED, reason=reason)
    record.asked, record.seconds, record.structure = asked, run.seconds, run.structure
    record.libraries = versions()
    if not _out_of_memory(record):  # which is no result of the code
        record.files = imported_files()
    return record


def _out_of_memory(record: Record) -> bool:
    said = record.reason.get("what", "")
    return record.verdict == FAILED and ("MemoryError" in said or "can't allocate memory" in said)


def _converted(run: _Run) -> Record:
    import hatify
    from hatify.snapshot import snapshot

    entry = run.entry
    with run.at("build"):
        model = build_hollow(entry.build).train()
        inputs = entry.inputs(model)
        run.structure = structure_of(model, inputs)
    same = read(run.known, structure_key(run.structure)) if run.known is not None and run.structure is not None else None
    if same is not None and same.key != entry.key and same.current("conversion"):
        return replace(same, key=entry.key, family=entry.family, shares=same.key)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    parameters = sum(p.numel() for p in model.parameters())
    with run.at("convert"):
        hat = hatify.convert(model, TASKS, example_inputs=inputs, inplace=True, verify=False)
    record = Record(entry.key, entry.family, CONVERTED, snapshot=snapshot(hat), parameters=parameters)
    return _with_keys(record, wanted, hat)


def _proved(run: _Run) -> Record:
    import hatify
    from hatify.snapshot import snapshot

    entry = run.entry
    with run.at("build"):
        model = entry.make()
        inputs = entry.inputs(model)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    parameters = sum(p.numel() for p in model.parameters())
    with run.at("convert"):
        hat = hatify.convert(model, TASKS, example_inputs=inputs, verify=False)
    del model
    record = Record(entry.key, entry.family, PROVED, snapshot=snapshot(hat), parameters=parameters)
    with run.at("prove"):
        proof = hatify.verify(hat, tightness=run.asked == "proof and tightness")
    record.proof = proof.to_dict()
    if not proof.ok:
        record.verdict, record.reason = FAILED, {"step": "prove", "what": "a promise does not hold"}
    return _with_keys(record, wanted, hat)


def _with_keys(record: Record, wanted: dict[str, torch.Size], hat: nn.Module) -> Record:
    """A failure, if the original's state-dict keys are not there, in their order and with their shapes."""
    got = {name: tensor.shape for name, tensor in hat.state_dict().items() if name in wanted and isinstance(tensor, Tensor)}
    if list(got.items()) != list(wanted.items()):
        name = next((n for n in wanted if got.get(n) != wanted[n]), "their order")
        record.verdict, record.reason = FAILED, {"step": "prove", "what": "the original's state-dict keys changed", "where": name}
    return record
