"""Why a model cannot be captured, in terms of the user's own code."""

from __future__ import annotations

import traceback
from collections.abc import Collection

from torch import nn

from hatify.capture.questions import is_inside
from hatify.errors import CaptureError, HatifyError


def untraceable(error: Exception, model: nn.Module, root: nn.Module, called: Collection[str] = ()) -> CaptureError:
    """The user's own line out of an exporter's error. ``called`` are the paths of the leaves that had been called by then."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_inside(f.filename) and f.filename != "<string>"]
    line = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else type(model).__name__
    reason = str(error).strip().splitlines()
    first = next((text for text in reason if text.strip()), type(error).__name__)
    data_dependent = "data-dependent" in str(error) or "Unbacked" in str(error) or "unbacked" in str(error)
    ways = (
        "take the decision out of forward (torch.where instead of if, a fixed number of steps), or keep the module whole: "
        "hatify.register(ThatModule, hatify.TaskIndexedLayer())"
    )
    module = _failing_module(error, root)
    part = _largest_part(model, module, {path.partition(".")[0] for path in called})
    if part:
        ways += f"; or convert a part of it alone: model.{part} = hatify.convert(model.{part}, example_inputs=...)"
    if isinstance(error, HatifyError):  # what stood in the way is known already
        found = CaptureError(f"{type(model).__name__} cannot be traced: {error.what}", **{"where": line, **dict(error.parts())})
        found.module = module
        return found
    found = CaptureError(
        f"{type(model).__name__} cannot be traced" + (": its control flow depends on data" if data_dependent else ""),
        where=line,
        why=f"{type(error).__name__}: {first.partition('(Size-like symbols')[0].strip()[:300]}",  # in any order
        fix=ways,
    )
    found.module = module
    return found


def _largest_part(model: nn.Module, failing: str | None, begun: Collection[str]) -> str | None:
    """The child with the most weights of those that were traced before tracing stopped, in another one or in the model's own code: a
    detector's backbone. A container does not run as a whole, so it is none."""
    containers = nn.ModuleList | nn.ModuleDict
    children = {name: child for name, child in model.named_children() if name in begun and not isinstance(child, containers)}
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in children.items()}
    sizes.pop((failing or "").partition(".")[0], None)
    return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else None


def _failing_module(error: Exception, root: nn.Module) -> str | None:
    """The path of the innermost module whose forward was running."""
    paths = {id(m): path for path, m in root.named_modules()}
    innermost = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            innermost = paths[id(owner)]
        trace = trace.tb_next
    return innermost


def not_functional(error: Exception, model: nn.Module, line: str | None) -> CaptureError:
    """The refusal of writes through views that PyTorch's functionalisation fails at."""
    first = next((text for text in str(error).strip().splitlines() if text.strip()), "")
    return CaptureError(
        f"{type(model).__name__} writes through views in a way that PyTorch cannot make functional",
        where=line,
        why=f"{type(error).__name__}: {first.strip()[:300]}",
        fix="write x = x.op() instead of x.op_() there; two buffers that are one, or take one value, are known to be in its way",
    )


def writes_parameter(names: list[str], line: str | None) -> CaptureError:
    """The refusal of a forward that writes into parameters."""
    return CaptureError(
        f"forward writes into the parameter {', '.join(n.removeprefix('root.') for n in dict.fromkeys(names))}",
        where=line,
        why="all tasks share it; only a module that is kept whole can have one copy of it per task",
        fix="nn.Embedding(..., max_norm=...) or nn.EmbeddingBag(..., max_norm=...) instead of the function; otherwise keep the module "
        "whole: hatify.register(ThatModule, hatify.TaskIndexedLayer())",
    )
