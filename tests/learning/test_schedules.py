"""Scales over an epoch (equations 4 and 6), in functions and in sessions."""

from __future__ import annotations

import math

import pytest
from torch.optim import SGD
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
    scales = [mask_scale(schedule, progress_of(step, steps, schedule), 100.0) for step in range(3 * steps)]
    assert all(0 < s <= 100.0 for s in scales)
    assert scales[:steps] * 3 == scales, "every epoch is like the first"
    assert steps == 1 or schedule == "constant" or min(scales) < 50.1, "masks learn in each epoch"


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
