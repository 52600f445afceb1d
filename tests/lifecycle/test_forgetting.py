"""Forgetting and pruning: exactly what one task alone uses."""

from __future__ import annotations

import copy
import json

import hand_networks
import pytest
import torch
from learned import allowed, answers, changed, learn, learned, state
from networks import NETWORKS
from rich.console import Console
from tasks import draw_masks, same
from test_families import forgets
from torch import nn

import hatify
from hatify import HATConfig, HATPayload
from hatify.errors import TaskError
from hatify.lifecycle import forgetting


class Net(nn.Module):
    """A convolution, a norm, a raw parameter, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x))) + self.shift
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def network(tasks=3, trained=3, **options):
    torch.manual_seed(0)
    hat = hatify.convert(Net(), tasks, example_inputs=torch.randn(4, 3, 6, 6), verify=False, **options).eval()
    return learned(hat, trained)


@pytest.fixture(scope="module")
def three():
    return network()


@pytest.fixture
def hat(three):
    return copy.deepcopy(three)


# exactness


def test_one_weight_too_many_is_seen(hat, monkeypatch):
    """The control of the check itself: one element that another task needs as well."""
    exact = forgetting.shared_weights

    def too_many(network, tasks, kept):
        freed = exact(network, tasks, kept)
        conv = next(f for f in freed if f.name == "conv2.weight")
        shared = hat.locks(tasks)["conv2.weight"] & hat.locks(kept)["conv2.weight"]
        conv.where.view(-1)[shared.view(-1).nonzero()[0]] = True
        return freed

    monkeypatch.setattr(forgetting, "shared_weights", too_many)
    with pytest.raises(AssertionError):
        forgets(hat, 1, answers(hat, range(3)))


def test_a_weight_that_another_task_needs_shows_in_its_outputs(hat):
    before = answers(hat, [0])
    shared = hat.locks([0])["conv2.weight"] & hat.locks([1])["conv2.weight"]
    with torch.no_grad(), hat._guard.opened():
        hat.conv2.weight[shared] += 1
    assert not same(answers(hat, [0])[0], before[0])


def test_the_only_task(hat):
    alone = network(trained=1)
    old, needed = state(alone), alone.locks([0])
    result = hatify.forget_task(alone, 0)
    moved = changed(alone, old)
    assert all(torch.equal(moved[n], needed[n]) for n in needed)
    assert result["conv1.weight"].count == int(needed["conv1.weight"].sum())
    assert alone.finished_tasks == set() and alone.room.status.begun == set()


def test_a_forgotten_task_falls_to_chance_and_the_slot_is_free():
    torch.manual_seed(0)
    hat = hatify.convert(Net(), [2, 2], example_inputs=torch.randn(4, 3, 6, 6), verify=False)
    x = torch.randn(64, 3, 6, 6)
    labels = [(x[:, 0].mean((1, 2)) > 0).long(), (x[:, 1].mean((1, 2)) > 0).long()]

    def fit(task, y):
        optimizer = torch.optim.Adam(hat.parameters(), lr=0.02)
        hat.train()
        with hat.learning(task, optimizer, schedule="constant") as run:
            for _ in range(200):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(hat(x), y) + 0.01 * run.regularization()).backward()
                optimizer.step()
        hat.eval()

    def accuracy(task, y):
        with torch.no_grad():
            return float((hat(x, task=task).argmax(1) == y).float().mean())

    draw_masks(hat)
    fit(0, labels[0])
    fit(1, labels[1])
    kept = answers(hat, [1])
    assert accuracy(0, labels[0]) > 0.9 and accuracy(1, labels[1]) > 0.9
    hatify.forget_task(hat, 0)
    assert accuracy(0, labels[0]) < 0.75
    fit(0, 1 - labels[0])
    assert accuracy(0, 1 - labels[0]) > 0.9
    assert same(answers(hat, [1])[1], kept[1])


def test_a_tampered_mask_does_not_change_the_sets(hat):
    expected = hatify.forget_task(copy.deepcopy(hat), 1, dry_run=True)
    for masker in hat.maskers.values():
        masker.embeddings[0].data.fill_(-1.0)
    assert dict(hatify.forget_task(hat, 1)) == dict(expected)


def test_gradients_of_what_is_forgotten_go_too(hat):
    hat.conv1.weight.grad = torch.ones_like(hat.conv1.weight)
    hatify.forget_task(hat, 0)
    assert hat.conv1.weight.grad is None


def test_frozen_weights_hold_nothing_of_a_task():
    frozen = NETWORKS["frozen_stem"]
    hat = learned(hatify.convert(frozen.make(), 2, example_inputs=frozen.inputs(3), verify=False).eval(), 2)
    fixed = {n for n, p in hat.named_parameters() if not p.requires_grad}
    old = state(hat)
    result = hatify.forget_task(hat, 0)
    assert fixed and not fixed & set(changed(hat, old))
    assert all(result[n].count == 0 for n in fixed if n in result and result[n].kind == "weights")


@pytest.mark.parametrize(
    "name", ["weight_norm", "tied_autoencoder", "shared_layers", "functional_weights", "mutating_buffer", "text_lstm", "depthwise"]
)
def test_unusual_weights(name):
    odd = NETWORKS[name]
    hat = learned(hatify.convert(odd.make(), 3, example_inputs=odd.inputs(3), verify=False).eval())
    before = answers(hat, range(3))
    for task in range(3):
        copied = copy.deepcopy(hat)
        may, old = allowed(copied, task, [t for t in range(3) if t != task]), state(copied)
        hatify.forget_task(copied, task)
        after = answers(copied, range(3))
        assert [same(after[t], before[t]) for t in range(3)] == [t != task for t in range(3)]
        assert all(bool((where & ~may[n]).sum() == 0) for n, where in changed(copied, old).items())


# what freed weights become


def test_initial_is_what_the_layers_own_initialiser_draws(hat):
    with torch.no_grad(), hat._guard.opened():
        hat.conv2.weight.add_(5.0)
    freed = hat.locks([1])["conv2.weight"] & ~hat.locks([0, 2])["conv2.weight"]
    hatify.forget_task(hat, 1)
    weight = hat.conv2.weight.detach()
    bound = (8 * 9) ** -0.5
    assert float(weight[freed].abs().max()) <= bound and float(weight[freed].std()) > 0.2 * bound
    assert float(weight[~freed].min()) > 1.0
    norm = hat.norm1.tasks[1]
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all() and norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    assert int(norm.num_batches_tracked) == 0
    assert float(hat.head.tasks[1].weight.detach().abs().max()) <= 8**-0.5
    assert torch.equal(hat.indexed("shift").of(1), hat.shift)
    assert all(bool(m.embeddings[1].eq(1).all()) for m in hat.maskers.values())


@pytest.mark.parametrize("init", ["normal", "sparse"])
def test_masks_start_by_the_configuration(init):
    hat = network(2, 2, config=HATConfig(mask_init=init))
    old = [m.embeddings[0].detach().clone() for m in hat.maskers.values()]
    hatify.forget_task(hat, 0)
    new = torch.cat([m.embeddings[0].detach() for m in hat.maskers.values()])
    assert not torch.equal(new, torch.cat(old)) and float(new.std()) > 0.4
    assert (float(new.mean()) < -0.5) == (init == "sparse")


def test_pretrained_values():
    torch.manual_seed(0)
    original = Net()
    held = {n: t.clone() for n, t in original.state_dict().items()}
    hat = learned(hatify.convert(original, [4, 2, 4], example_inputs=torch.randn(4, 3, 6, 6), verify=False).eval())
    before = answers(hat, range(3))
    freed = {n: hat.locks([1])[n] & ~hat.locks([0, 2])[n] for n in hat.locks([1])}
    kept = state(hat)
    with pytest.raises(TaskError, match="pretrained values") as caught:
        hatify.forget_task(hat, 1, reset="pretrained")
    assert "state_dict=" in caught.value.fix
    for wrong in ({}, {**held, "conv1.weight": torch.zeros(1)}):
        with pytest.raises(TaskError, match="not the original's"):
            hatify.forget_task(hat, 1, reset="pretrained", state_dict=wrong)
    assert changed(hat, kept) == {}
    hatify.forget_task(hat, 1, reset="pretrained", state_dict=held)
    for name, where in freed.items():
        assert torch.equal(hat.get_parameter(name)[where], held[name][where])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(hat.norm1.tasks[1], name), getattr(hat.norm1, name))
    assert hat.head.tasks[1].weight.shape == (2, 8)  # of another class count: drawn
    assert all(same(answers(hat, range(3))[t], before[t]) for t in (0, 2))


def test_an_initialiser_that_fails_changes_nothing(hat, monkeypatch):
    old = state(hat)
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda self: 1 / 0)
    with pytest.raises(TaskError, match="initialiser failed") as caught:
        hatify.forget_task(hat, 0)
    assert caught.value.where in ("conv1", "conv2") and changed(hat, old) == {} and 0 in hat.finished_tasks


# results and refusals


def test_a_dry_run_only_counts(hat):
    old, generator = state(hat), torch.get_rng_state()
    result = hatify.forget_task(hat, 1, dry_run=True)
    assert changed(hat, old) == {} and torch.equal(generator, torch.get_rng_state()) and hat.finished_tasks == {0, 1, 2}
    assert dict(result) == dict(hatify.forget_task(hat, 1))


def test_the_result_reads_as_dict_table_and_text(hat):
    result = hatify.forget_task(hat, 1)
    assert result["conv1.weight"].total == 8 * 3 * 9 and result["norm1.tasks.1.running_mean"] == (8, 8, "statistics")
    assert result.count == sum(c.count for c in result.values()) and result.tasks == [1] and result.kept == [0, 2]
    assert json.loads(json.dumps(result.to_dict()))["parameters"]["conv1.weight"]["total"] == 216
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    text = console.export_text()
    assert "conv1.weight" in text and "statistics of the forgotten tasks alone" in text
    assert repr(result).startswith("<tasks forgotten: 1 (kept: 0, 2): ")


def test_bad_requests(hat):
    old = state(hat)
    for call, match in (
        (lambda: hatify.forget_task(hat, 7), "no task 7"),
        (lambda: hatify.forget_task(hat, True), "no task True"),
        (lambda: hatify.forget_task(hat, 0, reset="zero"), "reset is one of"),
        (lambda: hatify.prune(hat, keep=[]), "forget every task"),
        (lambda: hatify.prune(hat, keep=[0, 9]), "no task 9"),
        (lambda: hatify.forget_task(nn.Linear(2, 2), 0), "no HAT layers"),
    ):
        with pytest.raises(TaskError, match=match):
            call()
    for keep, fix in (([0, 9], "keep=[0])"), ([7], "keep=[0, 1, 2])")):
        with pytest.raises(TaskError) as caught:
            hatify.prune(hat, keep=keep)
        assert fix in caught.value.fix and "trained are [0, 1, 2]" in caught.value.why
    with pytest.raises(TaskError) as caught:
        hatify.forget_task(hat, 7)
    assert "task=0" not in caught.value.fix  # what is forgotten is gone: no task that nobody asked for
    assert changed(hat, old) == {} and hat.finished_tasks == {0, 1, 2}
    hat.begin_task(1, schedule="constant")
    for call in (lambda: hatify.forget_task(hat, 1), lambda: hatify.prune(hat, keep=[0])):
        with pytest.raises(TaskError, match="being learned"):
            call()
    hat.abandon_task()
    assert hat.finished_tasks == {0, 1, 2}


def test_tasks_never_trained_and_tasks_only_begun(tmp_path):
    hat = network(trained=1)
    with pytest.raises(TaskError, match="never trained"):
        hatify.forget_task(hat, 1)
    with pytest.raises(TaskError, match="not finished"):
        hatify.prune(hat, keep=[1])
    hat.begin_task(1, schedule="constant")
    hat.abandon_task()
    draw_masks(hat, 3, [1])
    hatify.save(hat, tmp_path / "saved")
    hat = hatify.load(tmp_path / "saved", factory=Net).eval()  # which tasks were begun is part of the state
    before, may = answers(hat, [0]), allowed(hat, 1, [0])
    result = hatify.forget_task(hat, 1)
    assert {n: c.count for n, c in result.items()} == {n: int(w.sum()) for n, w in may.items()}
    assert same(answers(hat, [0])[0], before[0]) and hat.finished_tasks == {0}
    with pytest.raises(TaskError, match="never trained"):
        hatify.forget_task(hat, 1)


def test_pruning_is_forgetting_whatever_the_order(hat):
    once, forwards, backwards = copy.deepcopy(hat), copy.deepcopy(hat), hat
    needed = {n: (hat.locks([0])[n] | hat.locks([2])[n]) & ~hat.locks([1])[n] for n in hat.locks([0])}
    result = hatify.prune(once, keep=[1])
    assert {n: c.count for n, c in result.items() if c.kind == "weights"} == {n: int(w.sum()) for n, w in needed.items()}
    for model, order in ((forwards, (0, 2)), (backwards, (2, 0))):
        counts = [hatify.forget_task(model, t).of("weights").count for t in order]
        assert sum(counts) == result.of("weights").count
    assert result.tasks == [0, 2] and once.finished_tasks == {1}
    assert hatify.prune(once, keep=[1]).count == 0


def test_paper_locking_frees_only_what_stays_unlocked():
    hat = network(locking="paper")
    before, may = answers(hat, range(3)), {n: hat.locks([1])[n] & ~hat.locks([0, 2])[n] for n in hat.locks([1])}
    result = hatify.forget_task(hat, 1)
    assert {n: c.count for n, c in result.items() if c.kind == "weights"} == {n: int(w.sum()) for n, w in may.items()}
    assert all(same(answers(hat, range(3))[t], before[t]) for t in (0, 2))


def test_saved_after_forgetting(hat, tmp_path):
    hatify.forget_task(hat, 1)
    hatify.save(hat, tmp_path / "saved")
    loaded = hatify.load(tmp_path / "saved", factory=Net).eval()
    assert loaded.finished_tasks == {0, 2} and same(answers(loaded, [0])[0], answers(hat, [0])[0])
    learn(loaded, 1)
    assert same(answers(loaded, [0, 2])[2], answers(hat, [2])[2])


# networks written by hand


@pytest.mark.parametrize("net", [hand_networks.MLP, hand_networks.ConvNet, hand_networks.Depthwise], ids=lambda n: n.__name__)
def test_networks_written_by_hand(net):
    network, x = hand_networks.draw_masks(hand_networks.made(net).train(), seed=4), hand_networks.INPUTS[net]()
    for task in range(3):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.001)
        with hatify.Learning(network, task, optimizer, schedule="constant", max_scale=10.0) as run:
            for _ in range(2):
                optimizer.zero_grad()
                network(HATPayload(x, task_id=task, mask_scale=run.scale)).data.square().mean().backward()
                optimizer.step()
        network.train()
    before = [hand_networks.outputs(network, x, task) for task in range(3)]
    old = state(network)
    result = hatify.forget_task(network, 1)
    after = [hand_networks.outputs(network, x, task) for task in range(3)]
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, False, True]
    moved = changed(network, old)
    assert set(moved) <= set(result) and result.of("weights").count > 0
    assert all(int(where.sum()) <= result[n].count for n, where in moved.items())
    hatify.prune(network, keep=[2])
    assert torch.equal(hand_networks.outputs(network, x, 2), before[2])
