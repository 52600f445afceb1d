"""Sizes that a model's code spells out: as text they are fixed, and by ``len`` they stay open."""

import builtins
import contextlib
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify import conversion
from hatify.capture import export, spelled
from hatify.errors import CallError
from hatify.verification import VerificationError

TEXTS: dict[str, Callable[[Tensor], str]] = {
    "str": lambda x: str(x.shape[-1]),
    "repr": lambda x: repr(x.shape[-1]),
    "format": lambda x: "{}".format(x.shape[-1]),  # noqa: UP032
    "percent": lambda x: "%s" % x.shape[-1],  # noqa: UP031
    "shape": lambda x: str(tuple(x.shape[2:])).strip("(),"),
    "f-string": lambda x: f"{x.shape[-1]}",
    "f-string with a form": lambda x: f"{x.shape[-1]:>02d}",
    "half": lambda x: str(x.shape[-1] / 2).replace(".0", "").replace("8", "16"),
}


class Tables(nn.Module):
    """A gain for the size of pretraining, and none for others."""

    def __init__(self, text: Callable[[Tensor], str]) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.text, self.gains = text, {"16": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.relu(h * self.gains.get(self.text(h), 1.0)).mean(-1))


class Counts(nn.Module):
    """Asks for the batch as people do."""

    def __init__(self, expand: bool = False) -> None:
        super().__init__()
        self.first, self.head, self.token = nn.Conv2d(2, 4, 3), nn.Linear(36, 3), nn.Parameter(torch.randn(1, 36))
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).view(len(x), -1)
        return self.head(h + self.token.expand(len(h), -1) if self.expand else h)


def inputs(size: int) -> Tensor:
    return torch.randn(3, 1, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("example", [16, 24])
def test_a_size_in_a_text_is_fixed(text: str, example: int) -> None:
    model = Tables(TEXTS[text])
    hat = hatify.convert(model, 2, example_inputs=inputs(example)).eval()
    assert torch.equal(hat(inputs(example)), model.eval()(inputs(example)))
    for other in {16, 24, 32} - {example}:
        with pytest.raises(CallError):
            hat(inputs(other))
    assert torch.equal(hat(inputs(example)[:1]), model(inputs(example)[:1]))  # the batch is open


def test_the_text_of_a_comparison_is_a_condition() -> None:
    model = Tables(lambda x: {"True": "16", "False": "0"}[str(x.shape[-1] == 16)]).eval()
    hat = hatify.convert(model, 2, example_inputs=inputs(24)).eval()
    assert torch.equal(hat(inputs(32)), model(inputs(32)))
    with pytest.raises(CallError, match="takes another path"):
        hat(inputs(16))


class Checks(Tables):
    """Messages, shown and not shown, in the ways that people make them."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-1] % 2 == 0, f"{x.shape[-1]} is odd")
        torch._check(
            x.shape[-1] > 2,
            lambda: f"{x.shape[-1]} is small",
        )
        logging.getLogger("hatify.tests").info(
            "a signal of "
            f"{x.shape[-1]:4d} samples"
        )  # fmt: skip
        if x.shape[-1] % 2:
            raise ValueError("%s is odd" % x.shape[-1])  # noqa: UP031
        assert x.shape[-1] > 2, str(x.shape[-1])
        return self.head(torch.relu(self.first(x)).mean(-1))


class Remembers(Tables):
    """A text in a statement of its own that is no message."""

    def forward(self, x: Tensor) -> Tensor:
        h, self.names = self.first(x), []
        self.remember(x)
        return self.head(torch.relu(h * self.gains.get(self.names[0], 1.0)).mean(-1))

    def remember(self, x: Tensor) -> None:
        self.names.append(f"{x.shape[-1]}")


class Logs(Remembers):
    """A method of its own with the name of one that shows messages."""

    def remember(self, x: Tensor) -> None:
        self.log_size(f"{x.shape[-1]}")

    def log_size(self, size: str) -> None:
        self.names.append(size)


class OnOneLine(Remembers):
    def remember(self, x: Tensor) -> None:
        warnings.warn("", stacklevel=1); self.names.append(f"{x.shape[-1]}")  # fmt: skip  # noqa: E702


def test_a_message_leaves_its_size_open() -> None:
    model = Checks(str)
    hat = hatify.convert(model, 2, example_inputs=inputs(16)).eval()
    assert all(torch.equal(hat(inputs(n)), model.eval()(inputs(n))) for n in (16, 24, 32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Remembers, Logs, OnOneLine])
def test_a_text_that_is_kept_is_no_message(make: type) -> None:
    model = make(str)
    hat = hatify.convert(model, 2, example_inputs=inputs(16)).eval()
    assert torch.equal(hat(inputs(16)), model.eval()(inputs(16)))
    with pytest.raises(CallError):
        hat(inputs(24))


def test_messages_are_found_by_the_statement_that_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls of both: every text taken for a message, and none."""
    monkeypatch.setattr(spelled, "_in_a_message", lambda frame: True)
    model = Remembers(str)
    hat = hatify.convert(model, 2, example_inputs=inputs(24), verify=False).eval()
    assert not torch.equal(hat(inputs(16)), model.eval()(inputs(16)))
    monkeypatch.setattr(spelled, "_in_a_message", lambda frame: False)
    with pytest.raises(CallError):
        hatify.convert(Checks(str), 2, example_inputs=inputs(16))(inputs(24))


def test_code_without_a_source_keeps_no_message() -> None:
    names: dict = {}
    exec("def text(x):\n    return f'{x.shape[-1]}'\n", names)
    hat = hatify.convert(Tables(names["text"]), 2, example_inputs=inputs(16)).eval()
    with pytest.raises(CallError):
        hat(inputs(24))


def test_unless_it_is_followed_a_text_has_no_number_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "spelled_sizes", contextlib.nullcontext)
    monkeypatch.setattr(conversion, "_verified", conversion._with_proof)  # which would fix all sizes then
    model = Tables(TEXTS["str"])
    with pytest.raises(VerificationError):
        hatify.convert(model, 2, example_inputs=inputs(16))
    hat = hatify.convert(model, 2, example_inputs=inputs(24)).eval()
    assert not torch.equal(hat(inputs(16)), model.eval()(inputs(16)))


@pytest.mark.parametrize("expand", [False, True])
def test_len_leaves_the_batch_open(expand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Counts(expand), torch.randn(7, 2, 5, 5)
    hat = hatify.convert(model, 2, example_inputs=x[:3]).eval()
    assert all(torch.equal(hat(x[:n]), model.eval()(x[:n])) for n in (1, 2, 7))
    monkeypatch.setattr(export, "spelled_sizes", contextlib.nullcontext)
    with pytest.raises(CallError):
        hatify.convert(model, 2, example_inputs=x[:3])(x)


def test_everything_is_as_before_afterwards() -> None:
    before = builtins.len, torch.SymInt.__repr__, torch.SymInt.__str__, torch.SymFloat.__str__
    hatify.convert(Counts(), 2, example_inputs=torch.randn(3, 2, 5, 5), verify=False)
    assert (builtins.len, torch.SymInt.__repr__, torch.SymInt.__str__, torch.SymFloat.__str__) == before
