"""The story on one page: capture, analyse, rewrite, verify."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from hatify.analysis import Analysis, analyse
from hatify.calling import Signature
from hatify.capture import Captured, capture
from hatify.capture.modes import ONE_AT_A_TIME
from hatify.capture.questions import answered
from hatify.capture.regions import SWITCHES
from hatify.capture.tree import copy_tree
from hatify.errors import CaptureError, ConversionError, HatifyError, VerificationError
from hatify.facts import Facts, Sizes
from hatify.gates import compile_gates
from hatify.model import HATModel
from hatify.modules import HATConfig
from hatify.modules.copies import copy_module
from hatify.modules.types import type_of_parameters
from hatify.proof.parity import equals_original
from hatify.proof.small_sizes import settle
from hatify.report import make_report
from hatify.rewrite import Surgery, rewrite_graph
from hatify.rewrite.scope import scoped
from hatify.sources import find_example_inputs

OPTIONS = {
    "heads": ("task-indexed", "hat"),
    "locking": ("exact", "paper"),
    "norms": ("live", "plain"),
    "residuals": ("or", "tied"),
}
"""What can be chosen, the default first."""
Progress = Callable[[str], None]


def convert(
    model: nn.Module,
    tasks: int | Sequence[int | None] = 10,
    *,
    example_inputs: Any = None,
    config: HATConfig | None = None,
    heads: str = "task-indexed",
    locking: str = "exact",
    norms: str = "live",
    residuals: str = "or",
    inplace: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> HATModel:
    """Turns any trained network into one that learns ``tasks`` tasks, one after another, without forgetting.

    Args:
        model: any ``nn.Module``; neither run nor changed.
        tasks: how many tasks, or the class count of each (None keeps the original's).
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keywords; found by itself for models of
            timm, torchvision and transformers.
        config: masks' initialisation and scale; its ``num_tasks`` is replaced by ``tasks``.
        heads: ``task-indexed`` (one output layer per task) or ``hat`` (shared and masked, as in the paper's figure 1).
        locking: ``exact`` (a weight is locked iff one finished task has its output and its input live) or ``paper`` (equation 2).
        norms: statistics of layer, group and RMS norms over ``live`` channels (a task's subnetwork is an ordinary smaller network) or
            ``plain``, over the masked tensor, where dead channels are zeros.
        residuals: a residual stream is live where any of the layers is that write to it (``or``), or these layers share one mask
            (``tied``).
        inplace: take the model's weights over instead of copying them; ``model`` must not be used afterwards.
        verify: prove parity and zero drift on the result, and raise if they do not hold.
        progress: called with the name of each step as it begins.

    Raises:
        CaptureError: the model cannot be traced; says the source line.
        ConversionError: options that make no sense, or a layer that no rung of the ladder takes.
        ExampleInputsError: example inputs are missing, or the model does not take them.
        VerificationError: a promise does not hold for this model.
    """
    options = dict(heads=heads, locking=locking, norms=norms, residuals=residuals)
    config, classes = _settings(model, tasks, config, options)
    check_materialised(model)
    tell, seconds = progress or (lambda step: None), {}
    job = _Job(model, *example_call(model, example_inputs), config, classes, options, inplace, seconds, tell)
    with _as_anywhere(model):
        hat = _for_the_example(job)
        return _verified(hat, job) if verify else hat


@contextlib.contextmanager
def _as_anywhere(model: nn.Module) -> Iterator[None]:
    """What is on around a conversion is no part of the model; calls follow what is on around them."""
    with contextlib.ExitStack() as off:
        off.enter_context(torch.inference_mode(False))  # or what is copied could never learn
        for device in {"cpu", *(t.device.type for t in (*model.parameters(), *model.buffers()))}:
            if torch.amp.is_autocast_available(device):
                off.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass
class _Job:
    """What is to be converted, and how; ``seconds`` is filled in. A batch of one is ``doubled`` while the model is captured."""

    model: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    config: HATConfig
    classes: list[int | None] | None
    options: dict[str, str]
    inplace: bool
    seconds: dict[str, float]
    tell: Progress
    doubled: bool = True
    open_sizes: bool = True
    repeats: bool = True


def _verified(hat: HATModel, job: _Job) -> HATModel:
    """With its proof. Blocks may have to do with one another past what they are given (a global), and code that tells a size which is left
    open from an ordinary number (``isinstance(n, int)``) computes something else with it: where parity does not hold, blocks that are
    alike are traced one by one, and then all sizes but the batch are fixed.

    Raises:
        VerificationError: a promise does not hold either way.
    """
    try:
        return _with_proof(hat, job)
    except VerificationError as error:
        if job.inplace or error.equal:
            raise
        first = error
    alone, fixed = replace(job, repeats=False), replace(job, repeats=False, open_sizes=False)
    for other, note in (
        (alone, "blocks that are alike have to do with one another past what they are given: each is traced by itself"),
        (fixed, "computes something else where sizes are left open: all but the batch are fixed"),
    ):
        try:
            hat = _with_proof(_for_the_example(other), job)
        except HatifyError:
            continue
        hat.report.notes.append(note)
        return hat
    raise first


def _with_proof(hat: HATModel, job: _Job) -> HATModel:
    from hatify.verification import prove

    with _timed("verify", job.seconds, job.tell):
        hat.verification = prove(hat, None if job.inplace else job.model)
    hat.report.seconds = dict(job.seconds)
    return hat


def _for_the_example(job: _Job) -> HATModel:
    """Converted, for the example inputs at least: a model that takes another path for a batch of one is captured as it is called."""
    hat = _as_the_model_runs(job)
    _, tensors = Signature.from_call(job.model.forward, job.args, job.kwargs)
    if hat._facts.check_sizes.fit(tensors):
        return hat
    return _as_the_model_runs(replace(job, doubled=False))


def _as_the_model_runs(job: _Job) -> HATModel:
    """Converted. A model that asks whether it is traced is captured on the path that it takes then, which leaves more sizes open; where
    that cannot be followed, or computes something else, on that of an ordinary call.

    Raises:
        CaptureError: neither can be traced; says why the first cannot.
    """
    asked: list[str] = []
    hat = first = None
    traced = True
    try:
        hat = _converted(job, asked, traced=True)
    except CaptureError as error:
        first = error
    if asked and (hat is None or not (job.inplace or equals_original(hat))):
        asks = f"asks whether it is traced, and computes something else then\n{', '.join(asked)}"
        try:
            hat, traced = _converted(job, asked, traced=False), False
            hat.report.notes.append(f"{asks}: captured as in an ordinary call")
        except CaptureError as error:
            if hat is not None:  # the proof refuses it
                hat.report.notes.append(f"{asks}: parity does not hold, and an ordinary call cannot be traced\n{error}")
    if hat is None:
        raise first
    settle(hat, traced)
    return hat


def _converted(job: _Job, asked: list[str], traced: bool) -> HATModel:
    """Captured, analysed and rewritten; a model that asks whether it is traced is answered ``traced``, and ``asked`` gets the places."""
    model, options = job.model, job.options
    with _timed("capture", job.seconds, job.tell), ONE_AT_A_TIME, answered(traced, asked):
        evaluated, trained, notes = capture(model, job.args, job.kwargs, job.doubled, job.open_sizes, job.repeats)
    graphs = [g for g in (evaluated, trained) if g is not None]
    with _timed("analyse", job.seconds, job.tell), _without_collections():
        analysis = analyse(graphs, model, options["heads"], options["norms"], options["residuals"], options["locking"])
        if job.classes is not None and any(c is not None for c in job.classes):
            check_class_heads(analysis, fix="hatify.convert(model, tasks=3) without class counts")
    with _timed("rewrite", job.seconds, job.tell), _without_collections():
        hat = _rewrite(model, graphs, analysis, job.config, job.classes, job.inplace, options)
    hat.report = make_report(hat, analysis, graphs, notes, job.seconds)
    return hat


def check_materialised(model: nn.Module) -> None:
    """Whether all weights have values.

    Raises:
        ConversionError: some are on the meta device, which has shapes alone.
    """
    names = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if names:
        raise ConversionError(
            f"{len(names)} of the model's tensors are on the meta device",
            where=", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
            why="there are no values in them to convert",
            fix="load the weights first: model.to_empty(device='cpu'), model.load_state_dict(...)",
        )


def _settings(model: nn.Module, tasks: Any, config: HATConfig | None, options: dict[str, str]):
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"convert takes a torch.nn.Module, not {type(model).__name__}", fix="hatify.convert(timm.create_model('resnet18'))"
        )
    if isinstance(model, HATModel):
        raise ConversionError("this model is converted already", fix="hat.add_tasks(n) for more tasks")
    for name, value in options.items():
        if value not in OPTIONS[name]:
            raise ConversionError(f"{name} is one of {OPTIONS[name]}, not {value!r}", fix=f"{name}={OPTIONS[name][0]!r}")
    tasks, classes = task_counts(tasks, fix="hatify.convert(model, tasks=10) or hatify.convert(model, tasks=[2, 2, 3])")
    return replace(config or HATConfig(), num_tasks=tasks), classes


def task_counts(tasks: Any, fix: str) -> tuple[int, list[int | None] | None]:
    """How many tasks, and the class count of each if they were given.

    Raises:
        ConversionError: neither a positive count nor a list of positive class counts.
    """
    classes: list[int | None] | None = None
    count = tasks
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        classes = list(tasks)
        count = len(classes)
    bad = isinstance(count, bool) or not isinstance(count, int) or count < 1
    bad = bad or any(c is not None and (isinstance(c, bool) or not isinstance(c, int) or c < 1) for c in classes or ())
    if bad:
        raise ConversionError(f"tasks must be a positive count or a list of positive class counts, not {tasks!r}", fix=fix)
    return count, classes


def example_call(model: nn.Module, example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if example_inputs is None:
        return find_example_inputs(model)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return _dict_call(model, example_inputs)
    return (example_inputs,), {}


def _dict_call(model: nn.Module, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A dict is keywords; where forward takes no such keywords but one argument, it is that argument."""
    import inspect

    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not open_ended and names and not set(given) <= set(names) and len([p for p in parameters if p.default is p.empty]) == 1:
        return (given,), {}
    return (), dict(given)


def check_class_heads(analysis: Analysis, fix: str) -> None:
    """Whether class counts can be given at all.

    Raises:
        ConversionError: no output layer has classes that reach the output untouched.
    """
    heads = [p.path for p in analysis.layers.values() if p.role == "head"]
    if not any(path in analysis.class_heads for path in heads):
        raise ConversionError(
            "class counts need an output layer whose classes reach the output untouched",
            where=", ".join(heads) or "no task-indexed output layer",
            fix=fix,
        )


def _rewrite(
    model, graphs: list[Captured], analysis: Analysis, config: HATConfig, classes, inplace: bool, options: dict
) -> HATModel:
    keys = list(model.state_dict().keys())
    names = [n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))]
    reference = on_meta(model)
    root = scoped(model if inplace else own_copy(model))
    surgery = Surgery(root, analysis, config, classes)
    surgery.operate()
    rewritten: list[fx.Graph] = [rewrite_graph(g, analysis, surgery) for g in graphs]
    indexed = [n for n, p in analysis.parameters.items() if p.role == "task-indexed"]
    facts = Facts(
        name=type(model).__name__,
        config=config,
        settings={"tasks": config.num_tasks, "classes": classes, **options, "config": asdict(config)},
        signature=graphs[0].signature,
        inputs=[t.detach() for t in graphs[0].inputs],
        output=graphs[0].output,
        train_output=graphs[-1].output,
        check_sizes=Sizes(graphs),
        room=surgery.room,
        masker_paths=surgery.masker_paths,
        indexed_paths=surgery.indexed_paths,
        program=compile_gates(analysis.table, analysis.sizes),
        uses=analysis.uses,
        indexed=indexed,
        indexed_buffers=sorted(analysis.buffers),
        original_keys=keys,
        original_names=names,
        reference=reference,
        analysis=analysis,
        values=analysis.values,
        switches=any(n.target in SWITCHES for g in graphs for n in g.graph.nodes),
        can_train=not graphs[0].eval_only,
        asks=graphs[0].asks,
        own_modes=graphs[0].own_modes,
        unlike={training: graph.unlike for training, graph in zip((False, True), (graphs[0], graphs[-1]))},
        parameter_types=sorted({p.dtype for p in model.parameters() if p.is_floating_point()}, key=str),
        input_types=_input_types(model, graphs),
        selections=graphs[0].selections,
    )
    return HATModel(root, rewritten[0], rewritten[1] if len(rewritten) > 1 else None, facts)


def _input_types(model: nn.Module, graphs: list[Captured]) -> list[torch.dtype | None]:
    if not any(g.reads or g.reads_whole for g in graphs):
        return []
    own = type_of_parameters(model)
    return [None if t.dtype == own else t.dtype for t in graphs[0].inputs]


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy, weights included (memory is shared until written), also of models that hold computed tensors."""
    copied = copy_module(model)
    for module in copied.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.grad = None
    return copied


def on_meta(model: nn.Module) -> nn.Module:
    """The model's code without its weights: a copy of the tree with every tensor on the meta device."""
    tree = copy_tree(model)
    for module in tree.modules():
        for shelf in (module._parameters, module._buffers):
            for name, tensor in shelf.items():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device="meta")
                    shelf[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return tree


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Millions of gate expressions are made to stay: to look through them for cycles, again and again, takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _timed:
    """Announces a step and keeps its seconds."""

    def __init__(self, step: str, seconds: dict[str, float], tell: Progress) -> None:
        self.step, self.seconds, self.tell = step, seconds, tell

    def __enter__(self) -> None:
        self.tell(self.step)
        self.start = time.perf_counter()

    def __exit__(self, *exc: Any) -> None:
        self.seconds[self.step] = self.seconds.get(self.step, 0.0) + time.perf_counter() - self.start
