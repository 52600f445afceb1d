"""Parameters sharded over two processes (``fully_shard``), the model as a whole or its layers too: the same promises."""

from __future__ import annotations

import copy
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim import AdamW
from training import SMALLEST, equal, inputs, network, outputs, step

from hatify.errors import NonFiniteError
from hatify.learning.protection import Protection
from hatify.modules import HATLayer
from hatify.modules.shards import local, shard_again

NAME = SMALLEST[0]


def sharded_worker(rank: int, port: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        for leaves in (False, True):
            hat = network(NAME)
            whole = copy.deepcopy(hat)
            if leaves:
                for module in list(hat.modules()):
                    if isinstance(module, HATLayer):
                        fully_shard(module)
            fully_shard(hat)
            optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
            plain = AdamW(whole.parameters(), lr=0.05, weight_decay=0.1)
            before = []
            for task in range(3):
                with (
                    hat.learning(task, optimizer, steps_per_epoch=3) as run,
                    whole.learning(task, plain, steps_per_epoch=3) as other,
                ):
                    for number in range(3):
                        batch = inputs(NAME, 4, key=10 * task + number)  # the same on both: as without sharding
                        step(hat, run, optimizer, batch)
                        step(whole, other, plain, batch)
                before.append(outputs(hat, NAME, task))
                assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before[-1], outputs(whole, NAME, task)))
            assert all(equal(outputs(hat, NAME, t), before[t]) for t in range(3))
            shared = hat._guard.protection.shared
            assert shared and all(e.kept.numel() < e.tensor.numel() for e in shared), "every process keeps its own part"
            # weights that are written past all hooks are put back where they are, and gathered anew
            shard_again(hat)
            for parameter in hat.parameters():
                local(parameter).add_(0.5)
            assert all(equal(outputs(hat, NAME, t), before[t]) for t in range(3))
            if not leaves:  # negative control: without what is kept they drift
                hat._guard.protection = Protection()
                optimizer.step()
                shard_again(hat)
                for parameter in hat.parameters():
                    local(parameter).add_(0.5)
                assert not equal(outputs(hat, NAME, 0), before[0])
                continue
            with pytest.raises(NonFiniteError), hat.learning(3, optimizer, steps_per_epoch=3) as run:
                bad = tuple(x * (torch.nan if rank == 1 else 1.0) for x in inputs(NAME, 4))
                step(hat, run, optimizer, bad)
            assert all(equal(outputs(hat, NAME, t), before[t]) for t in range(3))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_sharded_over_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded_worker, (port,), nprocs=2)
