"""What is known to go wrong in other implementations, one test each; and where tasks start from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from torch import Tensor, nn
from torch.optim import SGD, SparseAdam
from training import MADE, SMALLEST, TASKS, defenceless, equal, inputs, learn, loss_of, network, outputs, step

import hatify
from hatify import HATConfig, HATModel
from hatify.learning.guard import Guard
from hatify.modules import HATLayer


def test_copies_of_a_task_share_no_storage() -> None:
    hat = network("vit")
    pointers = [t.data_ptr() for task in range(TASKS) for _, of in hat.task_copies() for t in of(task) if t.numel()]
    pointers += [e.data_ptr() for m in hat.maskers.values() for e in m.embeddings]
    assert len(pointers) > 20 and len(set(pointers)) == len(pointers)


def test_layer_norms_never_see_channels_of_other_tasks() -> None:
    """Activations of dead channels are moved; the norm behind them gives the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    config = HATConfig(num_tasks=2, mask_init="normal")
    hat = hatify.convert(model, 2, example_inputs=torch.randn(4, 6), config=config, verify=False).eval()
    x, masker = torch.randn(4, 6), next(iter(hat.maskers.values()))
    before = hat(x, task=0)
    dead = ~masker.live(0)
    assert 0 < int(dead.sum()) < 16
    with torch.no_grad():
        hat[0].weight[dead] += 100.0
    assert torch.equal(hat(x, task=0), before)
    with torch.no_grad():
        hat[0].weight[~dead] += 100.0
    assert not torch.equal(hat(x, task=0), before)


def test_hooks_survive_forward_passes_of_all_tasks() -> None:
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    locks = {n: lock for n, lock in hat.locks([0]).items() if bool(lock.any())}
    for task in (1, 0, None, 2, 1):
        loss_of(hat(*inputs(name, 4), task=task)).backward()
    assert locks
    for parameter, lock in locks.items():
        gradient = hat.get_parameter(parameter).grad
        assert gradient is None or not bool(gradient[lock].any()), parameter


def test_masks_are_never_stale_after_loading() -> None:
    name = SMALLEST[0]
    hat = network(name)
    first = outputs(hat, name, 1)
    state = copy.deepcopy(hat.state_dict())
    for key in state:
        if "embeddings.1" in key:
            state[key] = -state[key]
    hat.load_state_dict(state)
    other = network(name)
    other.load_state_dict(state)
    assert equal(outputs(hat, name, 1), outputs(other, name, 1)) and not equal(outputs(hat, name, 1), first)


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
def test_shortcut_convolutions_are_locked(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat = network("resnet")
    optimizer = SGD(hat.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    learn(hat, "resnet", 0, optimizer)
    shortcuts = {n: p for n, p in hat.named_parameters() if "downsample" in n and p.dim() == 4}
    before = {n: p.detach().clone() for n, p in shortcuts.items()}
    locks = hat.locks([0])
    learn(hat, "resnet", 1, optimizer)
    assert len(shortcuts) > 1
    for name, parameter in shortcuts.items():
        assert 0 < int(locks[name].sum()) < locks[name].numel()
        assert torch.equal(parameter[locks[name]], before[name][locks[name]]) == protected, name
        assert not torch.equal(parameter[~locks[name]], before[name][~locks[name]]), f"what is free in {name} does not learn"


def test_soft_masks_become_binary() -> None:
    """At finishing, whatever the scale of a call, and again after loading."""
    name = SMALLEST[0]
    hat = network(name)
    hat.eval()
    soft = loss_of(hat(*inputs(name, 4), task=0, mask_scale=0.5))
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.0))
    hat.eval()
    binary = loss_of(hat(*inputs(name, 4), task=0))
    other = network(name).eval()
    other.load_state_dict(hat.state_dict())
    for found in (hat, other, copy.deepcopy(hat)):
        assert torch.equal(loss_of(found(*inputs(name, 4), task=0, mask_scale=0.5)), binary)
        assert all(set(m(0, 0.5).unique().tolist()) <= {0.0, 1.0} for m in found.maskers.values())
    assert not torch.equal(soft, binary)


def test_what_is_protected_follows_a_cast() -> None:
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    hat.double()
    with torch.no_grad():
        before = hat.eval()(inputs(name, 4)[0].double(), task=0)
        for parameter in hat.parameters():
            parameter.data += 1.0
        assert torch.equal(hat(inputs(name, 4)[0].double(), task=0), before)


def test_channels_last_weights_are_put_back_in_their_places() -> None:
    name = SMALLEST[0]
    hat = network(name).to(memory_format=torch.channels_last)
    optimizer = SGD(hat.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    learn(hat, name, 0, optimizer)
    before = outputs(hat, name, 0)
    learn(hat, name, 1, optimizer)
    assert equal(outputs(hat, name, 0), before)


def test_a_tied_weight_has_no_unwatched_name() -> None:
    """A checkpoint that differs under the second name is refused, too."""
    entry = NETWORKS["tied_by_attribute"]
    hat = hatify.convert(entry.make(), 2, example_inputs=entry.inputs(2), verify=False)
    names: dict[int, list[str]] = {}
    for name, parameter in hat.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = next(found for found in names.values() if len(found) > 1)
    with hat.learning(0, SGD(hat.parameters(), lr=0.1), schedule="constant"):
        hat(*entry.inputs(2))
    for name in tied:
        state = {k: v.clone() for k, v in hat.state_dict().items()}
        state[name] += 1.0
        with pytest.raises(hatify.HatifyError, match="overwrite"):
            hat.load_state_dict(state)


def test_an_optimizer_that_is_made_later_is_seen() -> None:
    """As frameworks do: the session knows none."""
    name = SMALLEST[0]
    hat = network(name)
    run = hat.begin_task(0, steps_per_epoch=3)
    optimizer = SGD(hat.parameters(), lr=0.1)
    step(hat, run, optimizer, inputs(name, 4))
    assert run.step == 1
    hat.finish_task()
    before = outputs(hat, name, 0)
    run = hat.begin_task(1, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(name, 4))
    hat.finish_task()
    assert equal(outputs(hat, name, 0), before)


class SparseText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 5)

    def forward(self, ids):
        return self.fc(torch.relu(self.table(ids)).mean(1))


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
@pytest.mark.parametrize("sparse", [lambda p: SparseAdam(p, lr=0.05), lambda p: SGD(p, lr=0.5)], ids=["SparseAdam", "SGD"])
def test_sparse_gradients(sparse, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    ids = [torch.randint(20, (6, 7)) for _ in range(4)]
    config = HATConfig(num_tasks=3, mask_init="normal")
    hat = hatify.convert(SparseText(), 3, example_inputs=ids[0], config=config, verify=False)
    assert isinstance(hat.get_submodule("table"), HATLayer)
    table = hat.get_parameter("table.weight")
    two = [sparse([table]), SGD([p for p in hat.parameters() if p is not table], lr=0.1, momentum=0.9)]

    def train(task: int) -> None:
        with hat.learning(task, two, steps_per_epoch=3) as run:
            for batch in ids[:3]:
                hat.zero_grad()
                (hat(batch) - task).square().mean().backward()
                assert table.grad.is_sparse
                run.regularization().backward()
                for optimizer in two:
                    optimizer.step()

    train(0)
    with torch.no_grad():
        before, free = hat.eval()(ids[3], task=0), table.detach().clone()
    hat.train()
    train(1)
    with torch.no_grad():
        assert torch.equal(hat.eval()(ids[3], task=0), before) == protected
    assert not torch.equal(table, free), "rows of free columns learn"


def test_inference_mode() -> None:
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    before = outputs(hat, name, 0)
    hat.eval()
    with torch.inference_mode():
        assert equal([hat(*inputs(name, 5, key=99), task=0)], before)
    learn(hat, name, 1, SGD(hat.parameters(), lr=0.1))
    assert equal(outputs(hat, name, 0), before)


def test_a_guard_dies_with_its_network() -> None:
    import gc
    import weakref

    hat = network(SMALLEST[0])
    learn(hat, SMALLEST[0], 0, SGD(hat.parameters(), lr=0.1))
    guard, weight = weakref.ref(hat._guard), weakref.ref(next(hat.parameters()))
    assert isinstance(guard(), Guard)
    del hat
    gc.collect()
    assert guard() is None and weight() is None


# where tasks start


@pytest.mark.parametrize("how", ["ones", "normal", "sparse"])
def test_mask_initialisation(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 2))
    config = HATConfig(num_tasks=2, mask_init=how)
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 4), config=config, verify=False)
    masker = next(iter(hat.maskers.values()))
    values = masker.embeddings[0].detach()
    live = float(masker.live(0).float().mean())
    if how == "ones":
        assert torch.equal(values, torch.ones(4000)) and live == 1.0
    else:
        mean = 0.0 if how == "normal" else -1.2816
        assert abs(float(values.mean()) - mean) < 0.06 and abs(float(values.std()) - 1.0) < 0.05
        assert abs(live - (0.5 if how == "normal" else 0.1)) < 0.03
        assert not torch.equal(values, masker.embeddings[1].detach())


def classed() -> HATModel:
    model = MADE["vit"][0]()
    return hatify.convert(model, [3, None, 5, 3], example_inputs=inputs("vit", 2), verify=False).train()


def test_class_counts_per_task() -> None:
    hat = classed()
    optimizer = SGD(hat.parameters(), lr=0.1, momentum=0.9)
    shapes, kept = [], []
    for task in range(4):
        with hat.learning(task, optimizer, steps_per_epoch=2) as run:
            for key in range(2):
                out = hat(*inputs("vit", 4, key=key))
                optimizer.zero_grad()
                (F.cross_entropy(out, torch.arange(4) % out.shape[1]) + run.regularization()).backward()
                optimizer.step()
        shapes.append(out.shape[1])
        kept.append(outputs(hat, "vit", task))
    assert shapes == [3, 3, 5, 3]
    assert all(equal(outputs(hat, "vit", t), kept[t]) for t in range(4))


def test_warm_start_from_the_original_or_from_an_earlier_task() -> None:
    hat = classed()
    optimizer = SGD(hat.parameters(), lr=0.1)
    learn(hat, "vit", 0, optimizer)
    position = hat.indexed("pos_embed")
    first, plain = position.of(0).detach().clone(), hat.get_parameter("pos_embed").detach().clone()
    with torch.no_grad():
        for task in (1, 2, 3):
            position.of(task).zero_()
    head = hat.get_submodule("head").tasks
    counted = head[2].weight.detach().clone()
    hat.begin_task(1, optimizer, steps_per_epoch=1, warm_start="pretrained")
    assert torch.equal(position.of(1), plain)
    hat.finish_task()
    hat.begin_task(2, optimizer, steps_per_epoch=1, warm_start=0)
    assert torch.equal(position.of(2), first) and not torch.equal(first, plain)
    assert torch.equal(head[2].weight, counted), "a head of another class count keeps its own"
    hat.finish_task()
    hat.begin_task(3, optimizer, steps_per_epoch=1, warm_start=0)
    assert torch.equal(head[3].weight, head[0].weight)
    hat.abandon_task()
    hat.begin_task(3, optimizer, steps_per_epoch=1)
    assert torch.equal(head[3].weight, head[0].weight), "as it is"
    hat.finish_task()


def test_bare_writes_between_two_looks_at_a_task() -> None:
    """No session, no forward pass with gradients, no hook and no version: only the bits differ, of one element even. In train mode the
    tensors themselves are read, and looked at."""
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    hat.train()

    def look() -> list[Tensor]:
        with torch.no_grad():
            return [hat(*inputs(name, 5, key=99), task=0)]

    before = look()
    locks = hat.locks([0])
    for parameter in hat.parameters():
        parameter.data -= 0.1 * torch.randn_like(parameter)
    assert equal(look(), before)
    for parameter, lock in locks.items():
        if bool(lock.any()):
            tensor = hat.get_parameter(parameter)
            place = lock.nonzero()[0].tolist()
            kept = float(tensor.detach()[tuple(place)])
            tensor.data[tuple(place)] += 1.0
            assert equal(look(), before) and float(tensor.detach()[tuple(place)]) == kept, parameter
