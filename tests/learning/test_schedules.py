"""Scales over an epoch (equations 4 and 6), in functions and in sessions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from training import SMALLEST, inputs, network, step

import hatify
from hatify.errors import TaskError
from hatify.learning import SCHEDULES, mask_scale
from hatify.learning.schedules import progress_of

NAMES = list(SCHEDULES)


@pytest.mark.parametrize("s_max", [1.0, 20.0, 400.0])
@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_linear_is_equation_4(batches: int, s_max: float) -> None:
    for b in range(1, batches + 1):
        part = (b - 1) / (batches - 1) if batches > 1 else 1.0
        expected = 1 / s_max + (s_max - 1 / s_max) * part
        assert mask_scale("linear", progress_of(b - 1, batches, "linear"), s_max) == pytest.approx(expected)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.4, 0.7, 1.0])
def test_cosine_is_equation_6(progress: float) -> None:
    assert mask_scale("cosine", progress, 100.0) == pytest.approx(50 * (1 + math.cos(progress * 2 * math.pi)))
    assert mask_scale("cosine", 0.5, 100.0) == 0.01, "never 0: equation 3 divides by the scale"


def test_exponential_grows_by_a_constant_factor() -> None:
    scales = [mask_scale("exponential", p / 10, 100.0) for p in range(11)]
    assert scales[0] == pytest.approx(0.01) and scales[-1] == pytest.approx(100.0)
    assert all(b / a == pytest.approx(10**0.4) for a, b in zip(scales, scales[1:]))


def test_constant_and_functions() -> None:
    assert [mask_scale("constant", p, 7.0) for p in (0.0, 0.5, 1.0)] == [7.0] * 3
    assert mask_scale(lambda p: 1 + p, 0.5) == 1.5


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_every_scale_of_every_epoch_is_positive_and_finite(schedule: str, steps: int) -> None:
    """Short epochs, and their first batches, divide by zero in other hands."""
    scales = [mask_scale(schedule, progress_of(step, steps, schedule), 100.0) for step in range(4 * steps)]
    assert all(0 < s <= 100.0 for s in scales)
    assert scales[: 2 * steps] * 2 == scales and (steps == 1 or scales[:steps] * 4 == scales), "every epoch is like the first"
    assert schedule == "constant" or (schedule != "cosine" and steps == 1) or min(scales) < 50.1, "masks learn"


def test_epochs_of_one_batch_are_taken_in_twos() -> None:
    """At the largest scale all the time (the control), the gradient of a mask that starts at 1 is exactly zero."""
    moved = {}
    for schedule in ("cosine", "constant"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        hat = hatify.convert(model, 2, example_inputs=torch.randn(4, 6), verify=False).train()
        (masker,), x, optimizer = hat.maskers.values(), torch.randn(16, 6), Adam(hat.parameters(), lr=0.003)
        scales = []
        with hat.learning(0, optimizer, schedule=schedule, steps_per_epoch=1) as run:
            for _ in range(30):
                scales.append(run.scale)
                step(hat, run, optimizer, (x,))
        assert run.epoch == 30 and scales == [100.0, 0.01 if schedule == "cosine" else 100.0] * 15
        moved[schedule] = not torch.equal(masker.embeddings[0], torch.ones(12)), int(masker.live(0).sum())
    assert moved["cosine"][0] and moved["cosine"][1] < 12
    assert moved["constant"] == (False, 12)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_epoch(progress: float) -> None:
    with pytest.raises(TaskError, match="0 to 1"):
        mask_scale("linear", progress)


@pytest.mark.parametrize("schedule", NAMES)
def test_a_session_follows_its_schedule(schedule: str) -> None:
    name, steps = SMALLEST[1], 3
    hat = network(name)
    optimizer = SGD(hat.parameters(), lr=0.01)
    with hat.learning(0, optimizer, schedule=schedule, steps_per_epoch=steps, max_scale=50.0) as run:
        for number in range(2 * steps + 1):
            expected = mask_scale(schedule, progress_of(number, steps, schedule), 50.0)
            assert run.scale == expected and float(run.scale_tensor) == pytest.approx(expected)
            assert (run.step, run.epoch, run.progress) == (number, number // steps, number % steps / steps)
            assert hat.context(0).scale is run.scale_tensor
            step(hat, run, optimizer, inputs(name, 4, key=number))


def test_a_scaler_that_needs_no_epoch() -> None:
    hat = network(SMALLEST[1])
    with hat.learning(0, SGD(hat.parameters(), lr=0.01), schedule="constant") as run:
        assert run.scale == hat.config.max_mask_scale and run.epoch == 0


def test_the_package_has_it() -> None:
    assert hatify.mask_scale is mask_scale
