"""Sizes of one, which the exporter never thinks of: a model's branch on them is followed, or refused."""

from collections.abc import Callable

import pytest
import torch
from tasks import Plain
from torch import nn

import hatify
from hatify import conversion
from hatify.capture import reading
from hatify.errors import CallError
from hatify.proof import parity

EXAMPLE = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
QUESTIONS: dict[str, Callable] = {
    "n > 1": lambda n: n > 1,
    "n != 1": lambda n: n != 1,
    "n == 1": lambda n: n == 1,
    "n < 2": lambda n: n < 2,
    "n - 1": lambda n: bool(n - 1),
    "n // 2": lambda n: n // 2 > 0,
}


class Asks(nn.Module):
    """Another computation for inputs whose size in ``dim`` is such and such."""

    def __init__(self, dim: int, question: Callable, other: Callable = lambda h, dim: h.cumsum(dim) * 2) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.dim, self.question, self.other = dim, question, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        if self.question(h.shape[self.dim]):
            h = self.other(h, self.dim)
        return self.out(h)


class Expands(nn.Module):
    """As masks are made in transformers: expanded unless the batch is one, which makes no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.places = nn.Linear(6, 16), nn.Linear(16, 3), nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.places
        if x.shape[0] != places.shape[0]:
            places = places.expand(x.shape[0], -1, -1)
        return self.out(torch.relu(self.first(x)) + places)


class Scales(nn.Module):
    """A gain of one, until it is trained, for more than one step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.gain = nn.Linear(6, 16), nn.Linear(16, 3), nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.out(h * self.gain if x.shape[1] > 1 else h)


class Product(Plain):
    """Asks about two sizes at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.out(h * 2 if x.shape[0] * x.shape[1] > 1 else h)


class Streams(Plain):
    """A path of its own for single inputs that are long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        if x.shape[0] == 1 and x.shape[1] > 10:
            h = h.cumsum(1)
        return self.out(h)


class Divides(Plain):
    """A condition that cannot be computed where a size is one, which the model itself does not take then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.out(h * 2 if x.shape[0] // (x.shape[1] - 1) < 4 else h)


def of_size(dim: int, size: int) -> torch.Tensor:
    shape = list(EXAMPLE.shape)
    shape[dim] = size
    return torch.randn(shape, generator=torch.Generator().manual_seed(size))


def follows(hat: nn.Module, model: nn.Module, x: torch.Tensor) -> bool:
    return torch.equal(hat.eval()(x), model.eval()(x))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_branch_on_a_size_of_one_is_refused_with_its_line(dim: int, question: str) -> None:
    model = Asks(dim, QUESTIONS[question])
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    for size in (2, 3, 9):
        assert follows(hat, model, of_size(dim, size))
    with pytest.raises(CallError, match=rf"x\.shape\[{dim}\]") as refused:
        hat(of_size(dim, 1))
    assert "test_small_sizes.py" in str(refused.value)


def test_unnoted_the_branch_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the notes of the branches, a call of size one silently follows the path of larger ones."""
    guards = reading.guards_of
    monkeypatch.setattr(reading, "guards_of", lambda signature, placeholders, branches: guards(signature, placeholders, []))
    model = Asks(1, QUESTIONS["n > 1"])
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    assert not follows(hat, model, of_size(1, 1))


def test_a_branch_that_makes_no_difference_refuses_nothing() -> None:
    model = Expands()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    for size in (1, 2, 9):
        assert follows(hat, model, of_size(0, size))


@pytest.mark.parametrize("off", [1e-6, 1e-2], ids=["rounding", "more"])
def test_a_trial_judges_gradients_as_the_proof_does(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs take another kernel for a batch of one: gradients differ by rounding then, outputs do not."""
    monkeypatch.setattr(parity, "_parity_train", lambda *given: (0.0, {"scale": off}))
    model = Expands()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE, verify=False)
    assert follows(hat, model, of_size(0, 2))
    if off < parity.ROUNDING:
        assert follows(hat, model, of_size(0, 1))
    else:
        with pytest.raises(CallError):
            hat(of_size(0, 1))


def test_it_would_be_refused_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "settle", lambda hat, traced: None)
    hat = hatify.convert(Expands(), 2, example_inputs=EXAMPLE)
    with pytest.raises(CallError):
        hat(of_size(0, 1))


def test_a_weight_that_does_nothing_yet_does_not_hide_a_branch() -> None:
    hat = hatify.convert(Scales(), 2, example_inputs=EXAMPLE)
    with pytest.raises(CallError, match=r"x\.shape\[1\] > 1"):
        hat(of_size(1, 1))


def test_the_trial_leaves_the_model_as_it_was() -> None:
    model = Expands()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE, verify=False)
    held = hat.state_dict()
    assert all(torch.equal(held[name], tensor) and torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_example_of_batch_one_decides_the_branch() -> None:
    model = Asks(0, QUESTIONS["n > 1"])
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE[:1])
    assert follows(hat, model, of_size(0, 1))
    with pytest.raises(CallError, match="dimension 0 is 2"):
        hat(of_size(0, 2))


def test_an_example_of_batch_one_leaves_the_batch_open_otherwise() -> None:
    model = Expands()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE[:1])
    for size in (1, 2, 5):
        assert follows(hat, model, of_size(0, size))


def test_two_sizes_are_tried_together() -> None:
    """The product of both is one only if both are."""
    model = Product()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    assert follows(hat, model, of_size(0, 1)) and follows(hat, model, of_size(1, 1))
    with pytest.raises(CallError):
        hat(EXAMPLE[:1, :1])


def test_a_stored_model_refuses_and_takes_the_same(tmp_path) -> None:
    for model, taken in ((Expands(), True), (Scales(), False)):
        hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
        hat.save_pretrained(tmp_path / str(taken))
        loaded = hatify.load(tmp_path / str(taken))
        dim = 0 if taken else 1
        if taken:
            assert follows(loaded, model, of_size(dim, 1))
        else:
            with pytest.raises(CallError):
                loaded(of_size(dim, 1))


def test_what_is_asked_of_other_sizes_on_that_path_is_kept(tmp_path) -> None:
    model = Streams()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    for some in (hat, hatify.load(hatify.save(hat, tmp_path / "hat"))):
        assert follows(some, model, EXAMPLE[:1]) and follows(some, model, torch.randn(2, 20, 6))
        with pytest.raises(CallError, match=r"x\.shape\[1\] <= 10"):
            some(torch.randn(1, 20, 6))


def test_only_sizes_of_one_that_were_tried_are_taken() -> None:
    class Flips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x.flip(3).flip(2) if x.shape[2] * x.shape[3] > 2 else x)

    model = Flips().eval()
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 3, 9, 11)).eval()
    for sizes in ((1, 1), (3, 3), (1, 3)):
        x = torch.randn(2, 3, *sizes)
        assert torch.equal(hat(x), model(x))
    with pytest.raises(CallError):
        hat(torch.randn(2, 3, 1, 2))


def test_a_condition_that_cannot_be_computed_is_refused() -> None:
    model = Divides()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    assert follows(hat, model, torch.randn(3, 4, 6))
    with pytest.raises(ZeroDivisionError):
        model(of_size(1, 1))
    with pytest.raises(CallError):
        hat(of_size(1, 1))


LONG = """
import torch
from torch import nn


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        if x.shape[1] < 20:
            h = h * 2
        return self.out(h)
"""


@pytest.mark.parametrize("folder", ["plain", "torch", "hatify/capture"])
def test_a_condition_is_kept_wherever_the_file_lies(folder: str, tmp_path) -> None:
    file = tmp_path / folder / "long.py"
    file.parent.mkdir(parents=True)
    file.write_text(LONG)
    names: dict = {}
    exec(compile(LONG, str(file), "exec"), names)
    model = names["Long"]()
    hat = hatify.convert(model, 2, example_inputs=EXAMPLE)
    assert follows(hat, model, of_size(1, 19))
    with pytest.raises(CallError) as refused:
        hat(of_size(1, 30))
    assert f"{file}:13" in str(refused.value)
