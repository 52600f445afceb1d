"""``README.md``: a model card."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..model import HATModel

__all__ = ["card"]


def card(hat: HATModel, inputs: list[Tensor], dtype: torch.dtype | None) -> str:
    """What the model is, what it has learned, how to use it; with the metadata of the Hub in front.

    Args:
        inputs: the example inputs as they are stored.
        dtype: the type that the model is stored in, where it is another one than its own.
    """
    report, proof, name = hat.report, hat.verification, _plain(hat._facts.name)
    source = _plain(hat.source.text) if hat.source is not None else name
    done = sorted(hat.finished_tasks)
    lines = ["---", "library_name: hatify", "tags:", "- hatify", "- continual-learning", "- hard-attention-to-the-task", "---", ""]
    lines += [f"# {source}, for {hat.config.num_tasks} tasks", ""]
    lines += ["Converted by hatify: it learns one task after another, and the outputs of a finished task never change again.", ""]
    lines += ["| | |", "|---|---|", f"| original | `{source}` (`{name}`) |", f"| tasks | {hat.config.num_tasks} |"]
    lines.append(f"| finished | {', '.join(map(str, done)) or 'none'} |")
    if report is not None:
        lines.append(f"| classes | {', '.join('-' if c is None else str(c) for c in report.classes)} |")
        lines.append(f"| parameters of the original | {report.parameters:,} |")
        lines += [f"| on the rung {rung} | {e['parameters']:,} in {e['layers']} layers |" for rung, e in report.rungs.items()]
        lines.append(f"| maskers, mask nodes | {report.maskers}, {report.mask_nodes} |")
        lines += [f"| fixed size | {_plain(f['input'])} dim {f['dim']} is {f['size']} |" for f in report.fixed_sizes]
    if proof is not None:
        lines.append(f"| verification | {'proved' if proof.ok else 'FAILED'}: parity {proof.parity}, drift {proof.drift} |")
    if dtype is not None:
        lines.append(f"| stored in | {_plain(str(dtype))}; what is said above was measured before |")
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import hatify, torch",
        "",
        'hat = hatify.load("this/directory")  # needs no other library',
    ]
    call = ", ".join(f"torch.zeros({', '.join(map(str, t.shape))}, dtype={t.dtype})" for t in inputs)
    lines += [f"inputs = [{call}]", "args, kwargs = hat.signature.rebuild(inputs)"]
    lines += ["hat(*args, **kwargs)  # without a task: the original network", "hat(*args, task=0, **kwargs)", "```", ""]
    lines += ["`graph.py` shows the generated code. It is there to be read; loading runs nothing of this directory.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return re.sub(r"[^\w .:/@-]", "_", text)[:200]
