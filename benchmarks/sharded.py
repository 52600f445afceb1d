"""Two tasks on processes that share the parameters (``fully_shard``) or copy them (``DistributedDataParallel``): does the first one drift?

    torchrun --nproc-per-node 2 benchmarks/sharded.py
    torchrun --nproc-per-node 2 benchmarks/sharded.py --replicated

Every process trains on batches of its own. Printed are seconds per step, and whether the first task's outputs are the same, to the bit,
after the second one was trained with AdamW and weight decay.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hatify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicated", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    w = given.width
    net = nn.Sequential(
        nn.Conv2d(3, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 10),
    )  # fmt: skip
    hat = hatify.convert(net, 2, example_inputs=torch.randn(2, 3, 16, 16), verify=False)
    called: nn.Module = hat
    if given.replicated:
        called = nn.parallel.DistributedDataParallel(hat, find_unused_parameters=True)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(hat)
    optimizer = torch.optim.AdamW(hat.parameters(), lr=1e-3, weight_decay=0.05)
    probe = torch.randn(8, 3, 16, 16)
    torch.manual_seed(1 + dist.get_rank())
    before = None
    for task in range(2):
        start = time.perf_counter()
        called.train()
        with hat.learning(task, optimizer, steps_per_epoch=given.steps, refresh=0) as run:
            for _ in range(given.steps):
                x, y = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
                loss = F.cross_entropy(called(x), y) + run.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seconds = (time.perf_counter() - start) / given.steps
        called.eval()
        with torch.no_grad():
            out = hat(probe, task=0).clone()
        if before is None:
            before = out
        if dist.get_rank() == 0:
            print(f"task {task}: {seconds:.3f} s per step, task 0 equal to the bit: {torch.equal(out, before)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
