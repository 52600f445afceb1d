"""Capacity: what tasks use, share and leave."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from itertools import combinations

import hand_networks
import pytest
import torch
from learned import converted
from networks import NETWORKS
from rich.console import Console
from tasks import draw_masks, finish
from test_forgetting import Net, network

import hatify
from hatify import HATPayload
from hatify.errors import HatifyError, TaskError
from hatify.lifecycle.capacity import CapacityWarning


def quietly(hat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        return hatify.usage(hat)


def expected(locks: list[dict]) -> dict[str, dict[frozenset, int]]:
    """Counts by sets of tasks, from the locks of single tasks, set by set."""
    found = {}
    for name in locks[0]:
        found[name] = {}
        for size in range(len(locks) + 1):
            for tasks in combinations(range(len(locks)), size):
                exactly = torch.ones_like(locks[0][name])
                for task, lock in enumerate(locks):
                    exactly &= lock[name] if task in tasks else ~lock[name]
                if bool(exactly.any()):
                    found[name][frozenset(tasks)] = int(exactly.sum())
    return found


def summed(counts: dict[str, dict], names: list[str]) -> dict[frozenset, int]:
    total: dict[frozenset, int] = {}
    for name in names:
        for tasks, number in counts[name].items():
            total[tasks] = total.get(tasks, 0) + number
    return total


@pytest.mark.parametrize(
    "name",
    ["resnext", "vit", "tied_autoencoder", "shared_layers", "functional_weights", "transformer_encoder", "grouped", "text_gru"],
)
def test_counts_are_those_of_the_locks(name):
    if name in NETWORKS:
        hat = hatify.convert(NETWORKS[name].make(), 3, example_inputs=NETWORKS[name].inputs(3), verify=False).eval()
    else:
        hat = converted(name)
    draw_masks(hat, 3, range(3))
    finish(hat, 0, 1, 2)
    counts = expected([hat.locks([task]) for task in range(3)])
    used = quietly(hat)
    paths = {layer.path for layer in used.layers}
    for layer in used.layers:
        names = [n for n in counts if n == layer.path or (n.rpartition(".")[0] == layer.path and n not in paths)]
        assert {s: n for s, n in layer.weights_by.items() if n} == summed(counts, names), layer.path
        assert layer.weights == sum(hat.get_parameter(n).numel() for n in names)
        found = [m for n, m in hat.maskers.items() if n == layer.path or (n.startswith(f"{layer.path}.") and n not in paths)]
        assert layer.channels_used(1) == sum(int(m.live(1).sum()) for m in found)
    locks = hat.locks(range(3))
    total = used.total
    assert total.locked == sum(int(lock.sum()) for lock in locks.values()) == total.weights_used()
    assert total.free + total.locked == total.weights == sum(lock.numel() for lock in locks.values())
    assert used.filled() == [(t, sum(int(lock.sum()) for lock in hat.locks(range(t + 1)).values())) for t in range(3)]
    assert used.own == {t: sum(c.numel() for _, of in hat.task_copies() for c in of(t) if c.requires_grad) for t in range(3)}


def test_more_tasks_than_fit_into_one_word():
    torch.manual_seed(0)
    hat = hatify.convert(Net(), 70, example_inputs=torch.randn(2, 3, 6, 6), verify=False)
    draw_masks(hat, 1, range(70))
    finish(hat, *range(70))
    layer, locks = quietly(hat)["conv2"], [hat.locks([task]) for task in range(70)]
    assert [layer.weights_used(t) for t in range(70)] == [
        sum(int(lk[f"conv2.{n}"].sum()) for n in ("weight", "bias")) for lk in locks
    ]
    assert sum(layer.weights_by.values()) == layer.weights and any(len(s) > 30 and max(s) > 62 for s in layer.weights_by)


def test_only_finished_tasks_count():
    hat = network(trained=1)
    assert quietly(hat).tasks == [0]
    hatify.forget_task(hat, 0)
    used = hatify.usage(hat)
    assert (
        used.tasks == []
        and used.total.free == used.total.weights
        and used.total.channels == 16
        and "no finished task" in repr(used)
    )


def test_forgetting_gives_back_what_one_task_alone_used():
    hat = network()
    before = quietly(hat)
    alone = sum(n for layer in before.layers for s, n in layer.weights_by.items() if s == {1})
    assert hatify.forget_task(hat, 1).of("weights").count == alone
    assert quietly(hat).total.free == before.total.free + alone


def test_paper_locking_leaves_less_free():
    exact, paper = network(), network(locking="paper")
    used = quietly(paper)
    assert used.total.locked == sum(int(lock.sum()) for lock in paper.locks(range(3)).values())
    assert (
        used.total.locked > used.total.weights_used() == quietly(exact).total.weights_used()
        and used.total.free < quietly(exact).total.free
    )


def test_a_full_layer_is_announced():
    hat = network(trained=1)
    for masker in hat.maskers.values():
        masker.embeddings[0].data.fill_(1.0)
    hat._guard.refresh()
    with pytest.warns(CapacityWarning, match="nearly all weights are locked in conv1, conv2"):
        used = hatify.usage(hat)
    assert used.nearly_full == ["conv1", "conv2"]
    sparse = copy.deepcopy(hat)
    with torch.no_grad(), sparse._guard.opened():
        sparse.conv2.masker.embeddings[0][:4] = -1.0
    with pytest.warns(CapacityWarning):
        assert hatify.usage(sparse).nearly_full == ["conv1"]


def test_as_table_dict_and_text():
    used = quietly(network())
    data = json.loads(json.dumps(used.to_dict()))
    layer = next(row for row in data["layers"] if row["path"] == "conv2")
    assert layer["weights_used"]["2"] == used["conv2"].weights_used(2) and sum(layer["weights_by"].values()) == layer["locked"]
    assert data["filled"][-1]["used"] == data["total"]["locked"] and set(data["own"]) == {"0", "1", "2"}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(used)
    text = console.export_text()
    assert "conv2" in text and "all layers" in text and "after task 2:" in text and repr(used).startswith("<usage of ")


def test_as_a_picture(tmp_path, monkeypatch):
    used = quietly(network())
    assert used.plot(tmp_path / "usage.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        quietly(hatify.convert(Net(), 2, example_inputs=torch.randn(2, 3, 6, 6), verify=False))
        .plot(tmp_path / "none.svg")
        .is_file()
    )
    for wrong in ("none/usage.png", "usage.nothing"):
        with pytest.raises(HatifyError, match="could not be written"):
            used.plot(tmp_path / wrong)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HatifyError, match="needs matplotlib") as caught:
        used.plot(tmp_path / "again.png")
    assert "hatify[plot]" in caught.value.fix


def test_networks_written_by_hand():
    net = hand_networks.draw_masks(hand_networks.made(hand_networks.MLP), seed=3)
    net(HATPayload(hand_networks.INPUTS[hand_networks.MLP](), task_id=0))
    for masker in hand_networks.maskers(net):
        masker.finished.update({0, 2})
    used = quietly(net)
    locks = [hatify.modules.hand_written.locks(net, [t]) for t in (0, 2)]
    assert used.tasks == [0, 2] and used["up"].channels == 24
    assert used["up"].weights_used(2) == int(locks[1]["up.weight"].sum() + locks[1]["up.bias"].sum())
    assert used["up"].shared == sum(int((locks[0][n] & locks[1][n]).sum()) for n in ("up.weight", "up.bias"))
    with pytest.raises(TaskError, match="no HAT layers"):
        hatify.usage(torch.nn.Linear(2, 2))
