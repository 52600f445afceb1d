"""Autograd functions of the user's: their code is in no directory, so loading asks for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks.functional import ScaledSign
from test_artifact_safety import reseal
from torch import Tensor, nn

import hatify
from hatify.errors import ArtifactError


class Split(torch.autograd.Function):
    """Two results, an argument that is no tensor, and a gradient of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return x * factor, x + 1

    @staticmethod
    def backward(ctx, grad: Tensor, other: Tensor) -> tuple[Tensor, None]:
        return 3 * grad + other, None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = Split.apply(self.fc1(x), 0.5)
        return self.fc2(ScaledSign.apply(a) * b)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[hatify.HATModel, Path]:
    hat = hatify.convert(Net(), tasks=2, example_inputs=torch.randn(4, 6))
    hatify.save(hat, tmp_path / "net")
    return hat, tmp_path / "net"


def call_instead(path: Path, name: str) -> None:
    """Another name in the place of the first thing of the user's that the stored graph calls, with digests that agree."""
    data = json.loads((path / "model.json").read_text())
    node = next(n for n in data["graphs"]["eval"] if str(n.get("target", "")).startswith("your "))
    node["target"] = f"your {name}"
    (path / "model.json").write_text(json.dumps(data))
    reseal(path)


def gradients(hat: hatify.HATModel, x: Tensor, task: int | None) -> list[Tensor]:
    hat.zero_grad()
    hat.train()(x, task=task).square().sum().backward()
    return [p.grad for p in hat.parameters() if p.grad is not None]


def test_outputs_and_gradients_are_the_same_with_the_functions(saved):
    hat, path = saved
    again = hatify.load(path, layers=[Split, ScaledSign])
    x = torch.randn(5, 6)
    for task in (None, 1):
        assert torch.equal(again(x, task=task), hat(x, task=task))
        mine, theirs = gradients(hat, x, task), gradients(again, x, task)
        assert len(mine) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert hatify.verify(hatify.load(path, layers=[Split, ScaledSign], factory=Net)).ok


def test_what_was_loaded_is_saved_again(saved, tmp_path):
    hat, path = saved
    hatify.save(hatify.load(path, layers=[Split, ScaledSign]), tmp_path / "again")
    x = torch.randn(5, 6)
    assert torch.equal(hatify.load(tmp_path / "again", layers=[Split, ScaledSign])(x, task=1), hat(x, task=1))


@pytest.mark.parametrize(("given", "missing"), [((), "Split"), ((Split,), "ScaledSign"), ((ScaledSign, nn.ReLU), "Split")])
def test_a_function_that_is_missing_is_named(saved, given, missing):
    with pytest.raises(ArtifactError, match=rf"calls your own function .*{missing}\n(.*\n)*.*layers=\[{missing}\]"):
        hatify.load(saved[1], layers=given)


def test_a_function_is_never_imported(saved):
    """Another process in which its module could be imported, but is not."""
    code = "import hatify, sys\ntry: hatify.load(sys.argv[1])\nexcept hatify.HatifyError: print('test_artifact_functions' in sys.modules)"
    places = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True, env=places, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.autograd.function.Function", f"{__name__}.Net", "pickle.loads"]
)
def test_another_name_is_not_called(saved, name):
    _, path = saved
    call_instead(path, name)
    with pytest.raises(ArtifactError, match="calls your own function"):
        hatify.load(path, layers=[Split, ScaledSign, Net])


@torch.library.custom_op("hatify_tests::spike", mutates_args=())
def spike(x: Tensor, threshold: float) -> Tensor:
    return (x > threshold).to(x.dtype)


spike.register_fake(lambda x, threshold: torch.empty_like(x))
spike.register_autograd(
    lambda ctx, grad: (grad / (1 + ctx.x**2), None), setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0])
)


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(spike(self.fc1(x), threshold=0.25))


@pytest.fixture
def spiking(tmp_path: Path) -> tuple[hatify.HATModel, Path]:
    hat = hatify.convert(Spiking(), tasks=2, example_inputs=torch.randn(4, 6))
    hatify.save(hat, tmp_path / "net")
    return hat, tmp_path / "net"


@pytest.mark.parametrize("operator", [torch.ops.hatify_tests.spike, torch.ops.hatify_tests.spike.default])
def test_operators_are_brought_by_the_user(spiking, operator, tmp_path):
    hat, path = spiking
    with pytest.raises(ArtifactError, match=r"layers=\[torch.ops.hatify_tests.spike.default\]"):
        hatify.load(path)
    again = hatify.load(path, layers=[operator])
    again = hatify.load(hatify.save(again, tmp_path / "again"), layers=[operator])
    x = torch.randn(5, 6)
    for task in (None, 1):
        assert torch.equal(again(x, task=task), hat(x, task=task))
        mine, theirs = gradients(hat, x, task), gradients(again, x, task)
        assert len(mine) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("name", ["aten.set_.source_Tensor", "hatify_tests.spike.out", "os.system.default", "aten.relu.default"])
def test_another_operator_is_not_called(spiking, name):
    """Not even where the user passes it: torch's own are on a list, or are none that a directory may call."""
    path = spiking[1]
    call_instead(path, f"torch.ops.{name}")
    with pytest.raises(ArtifactError, match="calls your own function"):
        hatify.load(path, layers=[torch.ops.hatify_tests.spike, torch.ops.aten.set_, torch.ops.aten.relu])


class Transformer(nn.Module):
    """A spatial transformer, and a quantile: functions whose names hold those of others that no directory may call."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.last = nn.Linear(16, 6), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = nn.functional.affine_grid(self.place(x.flatten(1)).view(-1, 2, 3), [x.shape[0], 1, 4, 4], align_corners=False)
        x = nn.functional.grid_sample(x, grid, align_corners=False).flatten(1)
        return self.last(x) + x.quantile(0.5, dim=1, keepdim=True)


def test_functions_of_torch_are_called_without_being_brought(tmp_path):
    hat = hatify.convert(Transformer(), tasks=2, example_inputs=torch.randn(4, 1, 4, 4))
    again = hatify.load(hatify.save(hat, tmp_path / "net"))
    x = torch.randn(3, 1, 4, 4)
    assert all(torch.equal(again(x, task=task), hat(x, task=task)) for task in (None, 1))
