"""What the continual-learning benchmarks share: tasks, the ways to learn them one after another, and the table.

A record is one method on one setting with one seed: accuracy on every task after every task, forgetting, capacity. Records are
appended to a file of JSON lines, and those that are there already are not measured again.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hatify


@dataclass
class Task:
    """Images, shape ``(n, channels, height, width)``, float32, and labels from 0, int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


@dataclass
class Setting:
    """What is to be learned, and how long.

    ``tasks`` and ``network`` take a seed; ``network`` gives an untrained classifier, whose output layer is ``head`` (a path).
    """

    name: str
    tasks: Callable[[int], list[Task]]
    network: Callable[[], nn.Module]
    head: str
    epochs: int = 5
    batch: int = 64
    rate: float = 1e-3
    channels_last: bool = False
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    device: str = "cpu"


def selection(setting: Setting, share: float = 0.25) -> Setting:
    """The setting without its test images: a share of the training images of every task takes their place.

    Defaults are chosen by this, so that the table on the test images judges them and has not made them.
    """

    def tasks(seed: int) -> list[Task]:
        return [_held_out(task, share, seed) for task in setting.tasks(seed)]

    return replace(setting, name=f"{setting.name}, validation", tasks=tasks)


def _held_out(task: Task, share: float, seed: int) -> Task:
    count = len(task.train_y)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held, rest = order[: int(share * count)], order[int(share * count) :]
    return Task(task.train_x[rest], task.train_y[rest], task.train_x[held], task.train_y[held])


@dataclass
class Method:
    """A way to learn the tasks: ``independent``, ``finetuning``, or ``hat`` with options of its conversion, its masks and its sessions."""

    kind: str
    convert: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    session: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    """Whether the copies of a task start from those of the task before."""
    whole: bool = False
    """Whether the schedule takes all epochs at once."""
    rate: float | None = None
    """A learning rate other than the setting's."""
    drawn: bool = False
    """Whether masks are drawn instead of learned, see :func:`draw_masks`: what learning them costs."""


def batches(task: Task, setting: Setting, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; a remainder of a single image is left out, for batch statistics."""
    order = torch.randperm(len(task.train_y), generator=generator)
    for part in order.split(setting.batch):
        if len(part) > 1:
            x, y = task.train_x[part].to(setting.device), task.train_y[part].to(setting.device)
            yield (x if setting.augment is None else setting.augment(x, generator)), y


def steps_per_epoch(task: Task, size: int) -> int:
    return len(task.train_y) // size + (len(task.train_y) % size > 1)


@torch.no_grad()
def outputs(call: Callable[[Tensor], Tensor], task: Task, setting: Setting) -> Tensor:
    """Logits of the test images: shape ``(n, classes)``."""
    return torch.cat([call(part.to(setting.device)).cpu() for part in task.test_x.split(200)])


def accuracy(logits: Tensor, task: Task) -> float:
    """Per cent."""
    return 100 * float((logits.argmax(1) == task.test_y).float().mean())


def with_head(network: nn.Module, path: str, classes: int) -> nn.Module:
    """The network with a new output layer for ``classes`` classes."""
    old = network.get_submodule(path)
    network.set_submodule(path, nn.Linear(old.in_features, classes, device=old.weight.device))
    return network


def train_plain(network: nn.Module, task: Task, setting: Setting, generator: torch.Generator) -> None:
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=setting.rate)
    for _ in range(setting.epochs):
        for x, y in batches(task, setting, generator):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


def independent(setting: Setting, tasks: list[Task], network: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """One network per task, each from the same start: what one can hope for without transfer."""
    reached = []
    for task in tasks:
        own = with_head(copy.deepcopy(network), setting.head, task.classes)
        train_plain(own, task, setting, generator)
        reached.append(accuracy(outputs(own, task, setting), task))
    return {"final": reached, "learned": reached, "forgetting": 0.0}


def finetuning(setting: Setting, tasks: list[Task], network: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """One network that goes on to the next task, a head per task: what one wants to be better than."""
    heads, learned = [], []
    for task in tasks:
        with_head(network, setting.head, task.classes)
        train_plain(network, task, setting, generator)
        heads.append(network.get_submodule(setting.head))
        learned.append(accuracy(outputs(network, task, setting), task))
    final = []
    for task, head in zip(tasks, heads):
        network.set_submodule(setting.head, head)
        final.append(accuracy(outputs(network, task, setting), task))
    return {"final": final, "learned": learned, "forgetting": sum(a - b for a, b in zip(learned, final)) / len(tasks)}


def hat(
    setting: Setting, tasks: list[Task], network: nn.Module, generator: torch.Generator, method: Method
) -> tuple[hatify.HATModel, dict[str, Any]]:
    """One network, masks, locks. Forgetting is measured on the logits of all test images: zero means to the bit."""
    config = hatify.HATConfig(**method.config)
    classes = [task.classes for task in tasks]
    example = tasks[0].train_x[:2].to(setting.device)
    network = hatify.convert(network, classes, example_inputs=example, config=config, verify=False, **method.convert)
    learned, kept, live, capacity = [], [], [], []
    for number, task in enumerate(tasks):
        network.train()
        optimizer = torch.optim.Adam(network.parameters(), lr=setting.rate)
        steps = steps_per_epoch(task, setting.batch)
        start = number - 1 if method.warm and number else None
        options = {"steps_per_epoch": steps * setting.epochs if method.whole else steps, **method.session}
        if method.drawn:
            draw_masks(network, number)
            options |= {"schedule": "constant", "mask_rate": 0.0, "weight": 0.0}
        with network.learning(number, optimizer, warm_start=start, **options) as run:
            for _ in range(setting.epochs):
                for x, y in batches(task, setting, generator):
                    loss = F.cross_entropy(network(x), y) + run.regularization()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        network.eval()
        kept.append(outputs(lambda x, t=number: network(x, task=t), task, setting))
        learned.append(accuracy(kept[-1], task))
        live.append(100 * live_share(network, number))
        capacity.append(100 * locked_share(network, range(number + 1)))
    now = [outputs(lambda x, t=t: network(x, task=t), task, setting) for t, task in enumerate(tasks)]
    final = [accuracy(logits, task) for logits, task in zip(now, tasks)]
    return network, {
        "final": final,
        "learned": learned,
        "forgetting": sum(a - b for a, b in zip(learned, final)) / len(tasks),
        "drift": max(float((a - b).abs().max()) for a, b in zip(kept, now)),
        "live": live,
        "capacity": capacity,
    }


@torch.no_grad()
def draw_masks(network: hatify.HATModel, task: int) -> None:
    """Binary masks for a task: every channel that an earlier task uses, and of the others an equal share of what is left, at random."""
    generator = torch.Generator().manual_seed(task)
    for masker in network.maskers.values():
        used = torch.stack([torch.zeros(masker.channels, dtype=torch.bool), *(masker.live(t).cpu() for t in range(task))]).any(0)
        free = torch.nonzero(~used).flatten()
        taken = free[torch.randperm(len(free), generator=generator)[: round(len(free) / (len(masker.embeddings) - task))]]
        used[taken] = True
        limit = masker.config.max_embedding
        masker.embeddings[task].copy_(torch.where(used, limit, -limit))


def live_share(network: hatify.HATModel, task: int) -> float:
    """Share of channels that are live for a task."""
    live = [m.live(task) for m in network.maskers.values()]
    return float(torch.cat(live).float().mean())


def locked_share(network: hatify.HATModel, tasks: Any) -> float:
    """Share of the shared weights that the tasks lock."""
    locks = network.locks(tasks).values()
    return sum(int(lock.sum()) for lock in locks) / sum(lock.numel() for lock in locks)


def measure(setting: Setting, name: str, method: Method, seed: int) -> dict[str, Any]:
    """One record."""
    started = time.perf_counter()
    if method.rate is not None:
        setting = replace(setting, rate=method.rate)
    tasks = setting.tasks(seed)
    torch.manual_seed(seed)
    network = setting.network().to(setting.device)
    if setting.channels_last:
        network = network.to(memory_format=torch.channels_last)
        for task in tasks:
            task.train_x = task.train_x.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    if method.kind == "hat":
        _, result = hat(setting, tasks, network, generator, method)
    else:
        result = {"independent": independent, "finetuning": finetuning}[method.kind](setting, tasks, network, generator)
    average = sum(result["final"]) / len(tasks)
    return {"setting": setting.name, "method": name, "seed": seed, "average": average, **result,
            "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip


def run(settings: list[Setting], methods: dict[str, Method], seeds: list[int], path: Path | None) -> list[dict[str, Any]]:
    """All records, those of ``path`` included; seeds outermost, so that a first table is there early."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path is not None and path.exists() else []
    done = {(r["setting"], r["method"], r["seed"]) for r in records}
    for seed in seeds:
        for setting in settings:
            for name, method in methods.items():
                if (setting.name, name, seed) in done:
                    continue
                record = measure(setting, name, method, seed)
                records.append(record)
                if path is not None:
                    with path.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                print(f"{setting.name} / {name} / seed {seed}: {record['average']:.2f} % in {record['seconds']:.0f} s", flush=True)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: mean and spread (standard deviation) over seeds."""
    lines = ["| setting | method | seeds | accuracy, % | forgetting | drift | live per task, % | weights locked at the end, % |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["setting"], record["method"]), []).append(record)
    for (setting, method), group in groups.items():
        averages = [r["average"] for r in group]
        spread = f" ± {statistics.stdev(averages):.2f}" if len(group) > 1 else ""
        forgetting = statistics.mean(r["forgetting"] for r in group)
        has = "drift" in group[0]
        drift = f"{max(r['drift'] for r in group):.3g}" if has else ""
        live = f"{statistics.mean(statistics.mean(r['live']) for r in group):.0f}" if has else ""
        locked = f"{statistics.mean(r['capacity'][-1] for r in group):.0f}" if has else ""
        lines.append(
            f"| {setting} | {method} | {len(group)} | {statistics.mean(averages):.2f}{spread} | {forgetting:.2f} | {drift} "
            f"| {live} | {locked} |"
        )
    return "\n".join(lines)
