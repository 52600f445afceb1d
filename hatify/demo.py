"""Five tasks in a row, none forgotten, then one forgotten on purpose: the paper's table 2 in small, offline."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hatify.conversion import convert
from hatify.errors import HatifyError
from hatify.lifecycle.capacity import CapacityWarning, Usage, usage
from hatify.lifecycle.forgetting import forget_task
from hatify.model import HATModel

TASKS, CLASSES, SIZE = 5, 2, 32
TRAINED = 1297  # of 1,797 digits; the other 500 are for testing
BATCH, EPOCHS, RATE, REGULARIZATION = 32, 12, 3e-3, 4.0
MODEL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_width": 16}
"""A ResNet of 0.13 million parameters."""


@dataclass
class Row:
    """One line of the table: accuracies in percent after a step, None for tasks that are not learned yet."""

    step: str
    accuracies: list[float | None]
    used: float
    """Share of the shared weights that finished tasks use, in percent."""


@dataclass
class Demonstration:
    """What happened.

    Attributes:
        rows: after every task, and after forgetting task 0.
        forgetting: the largest loss of accuracy, in percent points, of a finished task by learning later ones.
        learned_equal: after every task, the test outputs of all earlier ones were what they had been, to the last bit.
        forgotten_equal: after forgetting task 0 too, for all other tasks.
        freed: weights and copies that were reset, by kind.
    """

    seed: int
    model: str
    parameters: int
    rows: list[Row] = field(default_factory=list)
    forgetting: float = 0.0
    learned_equal: bool = True
    forgotten_equal: bool = True
    freed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Tell = Callable[[str, float], None]
"""Told what runs, and how far it is (0 to 1)."""


def demonstrate(seed: int = 0, tell: Tell = lambda step, share: None, epochs: int = EPOCHS) -> tuple[Demonstration, Usage]:
    """Learns the ten digits of scikit-learn as five tasks of two classes with a converted ResNet, then forgets task 0.

    Args:
        seed: of weights, batches and the split.
        tell: called as it goes.
        epochs: passes over each task's images.

    Returns:
        What happened, and the capacity used before task 0 was forgotten.

    Raises:
        HatifyError: scikit-learn is not installed.
    """
    start = time.perf_counter()
    tell("convert", 0.0)
    train, test = _digits(seed)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        hat, name = _network(train[0])
        shown = Demonstration(seed, name, sum(p.numel() for p in hat.original_state().values() if p.requires_grad))
        known: dict[int, list[Tensor]] = {}
        for task in range(TASKS):
            _learn(hat, task, _of_task(train, task), epochs, tell)
            now = {t: _outputs(hat, test, t) for t in range(task + 1)}
            shown.learned_equal &= all(torch.equal(now[t], known[t]) for t in known)
            known = now
            used = _usage(hat)
            shown.rows.append(_row(f"after learning task {task}", known, test, used))
        tell("forget task 0", 1.0)
        result = forget_task(hat, 0)
        after = {t: _outputs(hat, test, t) for t in range(TASKS)}
    shown.forgotten_equal = all(torch.equal(after[t], known[t]) for t in range(1, TASKS))
    shown.freed = {kind: result.of(kind).count for kind in ("weights", "copies", "statistics", "masks")}
    shown.forgetting = max(shown.rows[t].accuracies[t] - shown.rows[-1].accuracies[t] for t in range(TASKS))
    shown.rows.append(_row("after forgetting task 0", after, test, _usage(hat)))
    shown.seconds = time.perf_counter() - start
    return shown, used


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Layers as small as these are not faster on two cores, and where something else runs, threads that wait for each other take ten
    times as long; and the figures are the same on every number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of 32 x 32, one channel, and their digits: for training and for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HatifyError(
            "the demo needs the digits of scikit-learn", why="it is not installed", fix='pip install "hatify[demo]"'
        ) from error
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
    labels = torch.tensor(digits.target)[order]
    return (images[:TRAINED], labels[:TRAINED]), (images[TRAINED:], labels[TRAINED:])


def _network(images: Tensor) -> tuple[HATModel, str]:
    import timm

    model = timm.create_model("resnet10t", pretrained=False, in_chans=1, num_classes=10, **MODEL)
    return convert(model, [CLASSES] * TASKS, example_inputs=images[:4], verify=False), "resnet10t, narrow"


def _of_task(data: tuple[Tensor, Tensor], task: int) -> tuple[Tensor, Tensor]:
    images, digits = data
    mine = digits // CLASSES == task
    return images[mine], digits[mine] % CLASSES


def _learn(hat: HATModel, task: int, data: tuple[Tensor, Tensor], epochs: int, tell: Tell) -> None:
    images, labels = data
    optimizer = torch.optim.Adam(hat.parameters(), lr=RATE)
    steps = len(images) // BATCH
    hat.train()
    with hat.learning(task, optimizer, schedule="cosine", steps_per_epoch=steps, weight=REGULARIZATION) as run:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for batch in order[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(hat(images[batch]), labels[batch]) + run.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tell(f"learn task {task}", run.step / (epochs * steps))
    hat.eval()


@torch.no_grad()
def _outputs(hat: HATModel, test: tuple[Tensor, Tensor], task: int) -> Tensor:
    return hat(_of_task(test, task)[0], task=task)


def _usage(hat: HATModel) -> Usage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)  # a small network that fills up is what is shown
        return usage(hat)


def _row(step: str, outputs: dict[int, Tensor], test: tuple[Tensor, Tensor], used: Usage) -> Row:
    accuracies: list[float | None] = [None] * TASKS
    for task, out in outputs.items():
        accuracies[task] = 100 * float((out.argmax(1) == _of_task(test, task)[1]).double().mean())
    total = used.total
    return Row(step, accuracies, 100 * total.weights_used() / total.weights)
