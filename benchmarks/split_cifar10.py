"""CIFAR-10 in five tasks of two classes, then the first one forgotten: table 2 of the paper.

The set-up is that of the paper's notebook: ResNet-18 for small images, tasks in the order of classes, five epochs of Adam at 1e-2 in
batches of 128, random crops and flips. Masks, schedule and regularization are the library's defaults. CIFAR-10 must be on disk, as
torchvision keeps it (``DIR/cifar-10-batches-py``); nothing is downloaded.

``python benchmarks/split_cifar10.py --data DIR`` trains on a GPU where there is one. The notebook reports 90.66 % on average; the paper's
table 99.65, 95.05, 96.55, 98.75 and 97.80 %, and 50.00 % for the first task once it is forgotten, others unchanged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from continual import Method, Setting, Task, accuracy, hat, outputs
from split_digits import small_resnet18
from torch import Tensor

import hatify


def cifar(root: Path) -> list[Task]:
    """Five tasks; images of unit variance, shape ``(n, 3, 32, 32)``."""
    from torchvision.datasets import CIFAR10

    def load(train: bool) -> tuple[Tensor, Tensor]:
        found = CIFAR10(root, train=train, download=False)
        return torch.tensor(found.data).permute(0, 3, 1, 2).float() / 255, torch.tensor(found.targets)

    (train_x, train_y), (test_x, test_y) = load(True), load(False)
    mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True)
    tasks = []
    for first in range(0, 10, 2):
        train, test = train_y // 2 == first // 2, test_y // 2 == first // 2
        tasks.append(Task((train_x[train] - mean) / std, train_y[train] - first, (test_x[test] - mean) / std, test_y[test] - first))
    return tasks


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels, and half of them mirrored."""
    n, _, height, width = x.shape
    moves = torch.randint(0, 9, (2, n), generator=generator).to(x.device)
    rows = moves[0, :, None] + torch.arange(height, device=x.device)
    columns = moves[1, :, None] + torch.arange(width, device=x.device)
    columns = torch.where((torch.rand(n, 1, generator=generator) < 0.5).to(x.device), columns.flip(1), columns)
    padded = F.pad(x, (4, 4, 4, 4)).movedim(1, -1)
    return padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()


def measure(tasks: list[Task], setting: Setting, seed: int = 0) -> dict:
    """Accuracies of every task: when it was learned, after the last one, and once the first is forgotten."""
    torch.manual_seed(seed)
    network, result = hat(setting, tasks, setting.network().to(setting.device), torch.Generator().manual_seed(seed), Method("hat"))
    hatify.forget_task(network, 0)
    network.eval()
    after = [accuracy(outputs(lambda x, t=t: network(x, task=t), task, setting), task) for t, task in enumerate(tasks)]
    return {**result, "forgotten": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tasks = cifar(args.data)
    setting = Setting(
        "split-cifar10", lambda seed: tasks, lambda: small_resnet18(args.width, channels=3), head="fc", epochs=args.epochs,
        batch=128, rate=1e-2, augment=crop_and_flip, device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    found = measure(tasks, setting, args.seed)
    print("| | " + " | ".join(f"task {t}" for t in range(5)) + " | average |\n" + "|---" * 7 + "|")
    for title, key in (("when learned", "learned"), ("at the end", "final"), ("task 0 forgotten", "forgotten")):
        row = found[key]
        print(f"| {title} | " + " | ".join(f"{a:.2f}" for a in row) + f" | {sum(row) / len(row):.2f} |")
    print(f"\ndrift of finished tasks {found['drift']:.3g}; live channels, % per task: {[round(a) for a in found['live']]}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
