"""Where another type takes another path: calls are refused there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tasks import finish
from torch import Tensor, nn
from typed_networks import BRAIN, HALF, WAYS, AsksAutocast, Clamped, Eps, Tokens, checked, given, pair, within

import hatify
from hatify import forward
from hatify.capture.captured import Way
from hatify.errors import CallError

REFUSED = {Clamped: {WAYS[0], WAYS[4]}, AsksAutocast: {WAYS[3], WAYS[4]}}


class ClampedInTraining(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return Clamped.body(self, x.sin(), mask) if self.training else x


@pytest.mark.parametrize("make", REFUSED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("loaded", [False, True], ids=["converted", "loaded"])
def test_another_path_is_refused_where_it_is_taken(make: type, loaded: bool, tmp_path: Path) -> None:
    model, hat = pair(make)
    assert hat.verification.ok and any("takes another path" in note for note in hat.report.notes)
    if loaded:
        hatify.save(hat, tmp_path / "saved")
        hat = hatify.load(tmp_path / "saved").eval()
    for way in WAYS:
        if way not in REFUSED[make]:
            checked(model, hat, way)
            continue
        for task in (None, 0):
            cast, x = copy.deepcopy(hat).to(way.dtype), given()[0].to(way.dtype)
            with within(way), pytest.raises(CallError, match=f"another path {way}") as refused:
                cast(x, given()[1], task=task)
            assert "typed_networks.py" in refused.value.where


def test_a_refusal_names_a_call_that_works() -> None:
    torch.manual_seed(0)
    model, (x, mask) = Clamped().eval().to(HALF), given()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=(x.to(HALF), mask)).eval()
    assert torch.equal(hat(x.to(HALF), mask), model(x.to(HALF), mask)) and "clamp" in hat.code
    with pytest.raises(CallError, match="another path in torch.float32"):
        copy.deepcopy(hat).float()(x, mask)


def test_a_path_of_train_mode_is_refused_in_train_mode() -> None:
    model, hat = pair(ClampedInTraining)
    model, hat, (x, mask) = model.to(HALF), hat.to(HALF), given()
    assert torch.equal(hat(x.to(HALF), mask), model(x.to(HALF), mask))
    with pytest.raises(CallError, match="another path in torch.float16"):
        hat.train()(x.to(HALF), mask)


def test_an_extracted_task_notes_which_types_take_another_path() -> None:
    for make, ways in ((Eps, ()), (Clamped, REFUSED[Clamped])):
        _, hat = pair(make)
        finish(hat, 1)
        notes = hatify.extract(hat, 1).extraction["notes"]
        assert len(notes) == len(ways) and all(any(str(way) in note for note in notes) for way in ways)


class Normed(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.layer_norm(x * 0.01, (8,), eps=torch.finfo(x.dtype).eps)


class OnlyInTraining(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.clamp(-0.1, 0.1) if self.training and x.dtype == BRAIN else x


class Measures(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.clamp(-0.1, 0.1) if x.element_size() == 2 else x


class AsksWhich(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == HALF
        return x.clamp(-0.1, 0.1) if half else x


class Gives(Tokens):
    def forward(self, x: Tensor, mask: Tensor) -> tuple:
        return super().forward(x, mask), torch.finfo(self.embed(x).dtype).max

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "way", "training"),
    [(Normed, WAYS[1], False), (OnlyInTraining, WAYS[1], True), (OnlyInTraining, WAYS[3], True), (Measures, WAYS[0], False),
     (AsksWhich, WAYS[4], False), (Gives, WAYS[2], False)],
)  # fmt: skip
def test_other_paths_are_refused(make: type, way: Way, training: bool) -> None:
    _, hat = pair(make)
    x, mask = given()
    assert hat.verification.ok
    hat = hat.to(way.dtype).train(training)
    with within(way), pytest.raises(CallError, match="another path"):
        hat(x.to(way.dtype), mask)


def test_inputs_are_not_cast_behind_the_back_of_code_that_looks_at_types() -> None:
    class Scales(Tokens):
        def body(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask[..., None] if mask.dtype == torch.int64 else x

    model, hat = pair(Scales)
    x, mask = given()
    assert torch.equal(hat(x, mask), model(x, mask))
    for call in ((x, mask.bool()), (x.double(), mask)):
        with pytest.raises(CallError, match="looks at types"):
            hat(*call)
    assert torch.equal(hat.double()(x.double(), mask), model.double()(x.double(), mask))


class OwnNorm(nn.Module):
    """LLaMA's: computed in the type of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.to(self.weight.dtype)
        return (self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True))).to(given)


class Mixed(nn.Module):
    """A network whose norms are kept in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 8), OwnNorm(), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return self.head(x + self.norm(x))


def in_parts(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).to(BRAIN)
    model.norm.float()
    return model


def test_a_network_of_several_types_is_followed_as_it_was_converted(tmp_path: Path) -> None:
    model, hat = pair(Mixed)
    x, mask = given()
    x = x.to(BRAIN)
    with pytest.raises(CallError, match="parameters are of torch.bfloat16, torch.float32"):
        in_parts(hat)(x, mask)
    assert torch.equal(copy.deepcopy(hat).to(BRAIN)(x, mask), copy.deepcopy(model).to(BRAIN)(x, mask))
    mixed = in_parts(model)
    hat = hatify.convert(copy.deepcopy(mixed), 2, example_inputs=(x, mask)).eval()
    hatify.save(hat, tmp_path / "saved")
    for found in (hat, hatify.load(tmp_path / "saved").eval()):
        assert torch.equal(found(x, mask), mixed(x, mask))
        with pytest.raises(CallError, match="captured with parameters of torch.bfloat16, torch.float32"):
            found.to(BRAIN)(x, mask)


def test_unless_it_is_asked_for_the_norm_is_computed_in_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(forward, "check_parameter_types", lambda facts, types: None)
    model, hat = pair(Mixed)
    x, mask = given()
    assert not torch.equal(in_parts(hat)(x.to(BRAIN), mask), in_parts(model)(x.to(BRAIN), mask))
