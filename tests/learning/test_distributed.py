"""Two processes that share their gradients, and forward passes that are compiled to machine code."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from training import ARCHITECTURES, SMALLEST, defenceless, equal, finite, inputs, network, outputs, step

import hatify
from hatify import HATConfig, HATModel
from hatify.errors import NonFiniteError

NAME = SMALLEST[0]


def three_tasks(name: str, rank: int, wrapped: bool = True) -> tuple[HATModel, nn.Module, AdamW, list[list[Tensor]]]:
    """Tasks 0 to 2, another half of each batch on every rank; what they gave when they were finished."""
    hat = network(name)
    shared = DistributedDataParallel(hat, find_unused_parameters=True) if wrapped else hat
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    before = []
    for task in range(3):
        with hat.learning(task, optimizer, steps_per_epoch=3) as run:
            for number in range(3):
                step(shared, run, optimizer, inputs(name, 4, key=100 * rank + 10 * task + number))
        before.append(outputs(hat, name, task))
    return hat, shared, optimizer, before


def ranks_agree(hat: HATModel) -> bool:
    agree = True
    for parameter in hat.parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, 0)
        agree &= torch.equal(other, parameter)
    disagreements = torch.tensor(0.0 if agree else 1.0)
    dist.all_reduce(disagreements)
    return not disagreements


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=600))
    try:
        for name in dict.fromkeys((NAME, *ARCHITECTURES)):
            hat, shared, optimizer, before = three_tasks(name, rank)
            assert all(equal(outputs(hat, name, t), before[t]) for t in range(3)), name
            assert ranks_agree(hat), name
        # one rank's batch is bad: all ranks refuse the step
        hat, shared, optimizer, before = three_tasks(NAME, rank)
        weights = [p.detach().clone() for p in hat.parameters()]
        with pytest.raises(NonFiniteError), hat.learning(3, optimizer, steps_per_epoch=3) as run:
            bad = tuple(x * (torch.nan if rank == 1 else 1.0) for x in inputs(NAME, 4))
            step(shared, run, optimizer, bad)
        assert equal([p.detach() for p in hat.parameters()], weights) and finite(hat)
        assert all(equal(outputs(hat, NAME, t), before[t]) for t in range(3))
        # controls: ranks that train alone learn different things, and without the guard tasks drift
        assert not ranks_agree(three_tasks(NAME, rank, wrapped=False)[0])
        with pytest.MonkeyPatch.context() as monkeypatch:
            defenceless(monkeypatch)
            hat, _, _, before = three_tasks(NAME, rank)
            assert not any(equal(outputs(hat, NAME, t), before[t]) for t in range(2))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_distributed_data_parallel() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    config = HATConfig(num_tasks=2, mask_init="normal")
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    hat = hatify.convert(model, 2, example_inputs=x, config=config, verify=False).train()
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    compiled = torch.compile(hat, fullgraph=True)
    with hat.learning(0, optimizer, schedule="constant") as run:
        step(hat, run, optimizer, (x,))
    before = hat(x, task=0)
    torch._dynamo.utils.counters.clear()
    scales = set()
    with hat.learning(1, optimizer, schedule="linear", steps_per_epoch=4) as run:
        for _ in range(4):
            scales.add(run.scale)
            step(compiled, run, optimizer, (x,))
    assert len(scales) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled once for all scales"
    assert torch.equal(hat(x, task=0), before)
    torch._dynamo.reset()
