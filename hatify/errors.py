"""The one family of errors: each says what happened, where, why, and the call that fixes it.

Context is added once, at the boundary where it is known: the code that knows the module path raises with ``where=``. What cannot
know the line in the user's code raises without, and the capture adds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "CallError",
    "CaptureError",
    "CheckpointError",
    "ConversionError",
    "ExampleInputsError",
    "ExtractionError",
    "HatifyError",
    "NonFiniteError",
    "TaskError",
    "UnknownModelError",
    "VerificationError",
]


class HatifyError(Exception):
    """Base of all errors that hatify raises on purpose.

    Args:
        what: one sentence, what went wrong.
        where: module path, file and field, argument or source line.
        why: the reason, in terms of the model or the data.
        fix: what to write or run instead, literally where possible.

    ``str(error)`` is one to four parts, each on a line of its own::

        example inputs are missing
          where: MyNet
          why:   the model is neither from timm, torchvision nor transformers
          fix:   hatify.convert(model, example_inputs=torch.randn(2, 3, 224, 224))
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        # Only `what` goes into `args`: pickle and copy rebuild from `args` and then restore `__dict__`.
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def parts(self) -> list[tuple[str, str]]:
        """The labelled parts that are present, in reading order, for those who lay them out themselves."""
        labelled = [("where", self.where), ("why", self.why), ("fix", self.fix)]
        return [(label, text) for label, text in labelled if text]

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in self.parts():
            # Text of several lines stays aligned under its label.
            lines.append(f"  {label + ':':<7}" + text.replace("\n", "\n" + " " * 9))
        return "\n".join(lines)


class CaptureError(HatifyError):
    """The model could not be captured as a graph. ``module`` is the path of the module that was being traced, if known."""

    module: str | None = None


class ConversionError(HatifyError):
    """A captured model could not be converted without dropping a layer or a guarantee."""


class UnknownModelError(HatifyError):
    """A model name that no library knows."""


class ExampleInputsError(HatifyError):
    """Example inputs are missing, or the model does not take them."""


class CallError(HatifyError):
    """A converted model was called in another way than it was captured."""


class CheckpointError(HatifyError):
    """A weights file is no checkpoint, or not one of this model."""


class VerificationError(HatifyError):
    """A promise does not hold for this model. ``equal`` says whether parity does."""

    equal: bool = True


class ExtractionError(HatifyError):
    """A task's network cannot be taken out, or does not give what the task gave."""


class ArtifactError(HatifyError):
    """A saved directory could not be written or read."""


class NonFiniteError(HatifyError):
    """A step, a weight or a statistic is not finite; finished tasks would not survive it."""


class TaskError(HatifyError):
    """A task that does not exist, or is not in the state the call needs."""


class ArtifactWarning(UserWarning):
    """Something that a model does is not in its directory, or something is that was not written."""


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are: ``a, b, c and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def without_place(text: str) -> str:
    """Source lines in ``text`` without the folder that their library is installed in, which differs from machine to machine."""
    return re.sub(r"[^\s()]*site-packages/", "", text)
