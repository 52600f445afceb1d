"""The proof's batches, where a model does not take all of them in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extracting import finished
from torch import Tensor, nn
from torchvision.ops import roi_align

import hatify
from hatify import verification
from hatify.calling import flatten
from hatify.errors import VerificationError


class Squeezed(nn.Module):
    """A batch norm after the average over space, and two graphs, since the modes differ in the glue."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        scale = self.norm(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x * (scale.sigmoid() if self.training else scale.sigmoid() + 0.0 * scale)
        return self.head(x.mean((2, 3)))


def test_norms_over_a_batch_of_one_are_not_asked_for_in_train_mode() -> None:
    model, x = Squeezed(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(x[:1])
    hat = hatify.convert(model, 3, example_inputs=x)
    proof = hatify.verify(hat)
    assert hat.train_graph is not None and proof.ok and proof.batch_sizes == [2, 3, 1]
    assert not hatify.verify(hat, without_locks=["conv.weight"]).ok


class Pairs(nn.Module):
    """One answer for every two rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu().reshape(x.shape[0] // 2, 2, 16).mean(1))


def test_batches_that_the_original_does_not_take_are_left_out(tmp_path: Path) -> None:
    hat = hatify.convert(Pairs(), 3, example_inputs=torch.randn(4, 8))
    loaded = hatify.load(hatify.save(hat, tmp_path / "saved"))
    for model, who in ((hat, "the original itself"), (loaded, "the model")):
        proof = hatify.verify(model)
        assert proof.ok and proof.batch_sizes == [4]
        assert sum(note.startswith(f"{who} fails at batch size") for note in proof.notes) == 2
        assert not hatify.verify(model, without_locks=["layer.weight"]).ok


class Parts(Pairs):
    """As many parts as the example has rows of two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.layer(part).relu() for part in x.split(2)]))


def test_batches_that_the_capture_does_not_take_are_left_out() -> None:
    proof = hatify.verify(hatify.convert(Parts(), 3, example_inputs=torch.randn(4, 8)))
    assert proof.ok and proof.batch_sizes == [4]
    assert sum(note.startswith("the capture fails at batch size") for note in proof.notes) == 2


class Edges(nn.Module):
    """A layer over a graph, whose edges number the rows of the other input."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.own, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        gathered = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return self.out(torch.relu(self.message(gathered) + self.own(x)))


class States(nn.Module):
    """A recurrent layer whose first state is an input: its batch is not in front."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found, state = self.layer(x, state)
        return self.out(found), state


class Boxes(nn.Module):
    """Regions of images, by the image's number: an image that is not there is read past the end of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        return self.out(roi_align(self.conv(images).relu(), boxes, 2).mean((2, 3)))


INPUTS = {
    "edges": (Edges, (torch.randn(7, 5), torch.randint(1, 7, (2, 12)))),
    "states": (States, (torch.randn(3, 5, 4), torch.zeros(1, 3, 6))),
    "boxes": (Boxes, (torch.randn(2, 3, 8, 8), torch.tensor([[0.0, 1, 1, 6, 6], [1, 0, 0, 5, 5], [1, 2, 2, 7, 7]]))),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_number_one_another_are_proved_and_extracted(name: str) -> None:
    make, inputs = INPUTS[name]
    hat = hatify.convert(make(), 2, example_inputs=inputs)
    finished(hat, 0)
    for slim in (False, True):
        module = hatify.extract(hat, 0, slim=slim)
        expected, got = hat.eval()(*inputs, task=0), module.eval()(*inputs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(flatten(expected)[0], flatten(got)[0]))


class Field(nn.Module):
    """Colours behind a density of one channel, which the weights that it begins with may close whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.density, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        opaque = 1 - torch.exp(-torch.relu(self.density(h)))
        return (opaque * torch.sigmoid(self.colour(h))).sum(1)


def test_a_gate_that_is_closed_is_opened_by_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    model, x = Field(), torch.randn(5, 6, 3)
    assert bool((model(x) == 0).all())
    hat = hatify.convert(model, 3, example_inputs=x)
    assert hat.verification.ok and hat.verification.control > 0
    proof = hatify.verify(hat, without_locks=["layers.0.weight"])
    assert proof.drift > 0 and not proof.ok
    monkeypatch.setattr(verification, "SEEDS", 1)
    with pytest.raises(VerificationError, match="control 0.0"):
        hatify.convert(model, 3, example_inputs=x)


NEURONS: list[nn.Module] = []


class Neuron(nn.Module):
    """Keeps its state, graph and all, until somebody resets all neurons."""

    def __init__(self) -> None:
        super().__init__()
        NEURONS.append(self)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = x if self.state is None else 0.9 * self.state + x
        return torch.sigmoid(self.state - 1)


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), Neuron(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        for neuron in NEURONS:  # of all models, and of none of their copies
            neuron.state = None
        self.layers(x)
        return self.layers(x)


def test_a_backward_that_fails_in_a_second_call_is_told() -> None:
    torch.manual_seed(0)
    NEURONS.clear()
    model, x = Spiking(), torch.randn(3, 6)
    model(x)
    with pytest.raises(VerificationError, match="backward fails in a second call alone"):
        hatify.convert(model, 2, example_inputs=x)
