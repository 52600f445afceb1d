"""The original's own code for a loaded model, where the user gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..conversion import on_meta
from ..errors import ArtifactError

if TYPE_CHECKING:
    from ..model import HATModel

_SHOWN = 5


def take_reference(hat: HATModel, factory: Callable[[], nn.Module], directory: Path) -> None:
    """Gives ``hat`` the code of the model that ``factory`` returns, to be verified against.

    Raises:
        ArtifactError: it is no model, or another one.
    """
    model = factory()
    if not isinstance(model, nn.Module):
        raise ArtifactError("the factory does not give a model", why=f"it returned a {type(model).__name__}")
    own = hat.original_state()
    theirs = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    lists = {
        "missing": [n for n in own if n not in theirs],
        "unexpected": [n for n in theirs if n not in own],
        "of another shape": [n for n, t in theirs.items() if n in own and t.shape != own[n].shape],
    }
    lines = [f"{title} ({len(names)}): {', '.join(names[:_SHOWN])}" for title, names in lists.items() if names]
    if lines:
        raise ArtifactError(
            "the factory gives another model", where=str(directory), why="\n".join(lines), fix="the very model that was converted"
        )
    hat._learn(reference=on_meta(model))
