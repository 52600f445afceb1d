"""A conversion shares memory with the original until one of them is written, the proof included."""

import copy
import subprocess
import sys

import pytest
import torch
from memory import real, shared
from safetensors.torch import save_file
from torch import nn

import hatify
from hatify.modules import copies
from hatify.modules.copies import can_share
from hatify.proof import drift


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.conv = nn.Conv2d(64, 64, 3)
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(torch.relu(self.conv(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Net().eval()
    return model, hatify.convert(model, tasks=3, example_inputs=X, verify=False)


def step(module, task=None):
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    module.train()
    (module(X) if task is None else module(X, task=task)).square().sum().backward()
    optimizer.step()
    module.eval()


def test_a_conversion_copies_nothing_that_is_not_written(pair):
    model, hat = pair
    large = {n: p for n, p in hat.named_parameters() if p.nbytes >= copies.PAGE}
    assert {"stem.weight", "conv.weight", "head.weight", "head.tasks.2.weight"} <= large.keys()
    assert all(shared(p) for p in large.values())
    with torch.no_grad():
        hat(X), hat(X, task=1), model(X)
    assert all(shared(p) for p in large.values())


def test_training_the_original_leaves_the_conversion(pair):
    model, hat = pair
    expected = [hat(X).detach(), *(hat(X, task=t).detach() for t in range(3))]
    before = model(X).detach()
    step(model)
    assert not torch.equal(model(X), before)
    assert torch.equal(expected[0], before)
    assert all(torch.equal(a, b) for a, b in zip(expected, [hat(X), *(hat(X, task=t) for t in range(3))]))


def test_training_the_conversion_leaves_the_original_and_the_other_tasks_copies(pair):
    model, hat = pair
    before = model(X).detach()
    copies_before = {n: real(t) for n, t in hat.state_dict().items() if ".tasks.0." in n or ".tasks.2." in n}
    own_before = real(hat.head.tasks[1].weight)
    step(hat, task=1)
    assert torch.equal(model(X), before)
    assert not torch.equal(hat.head.tasks[1].weight, own_before)
    assert copies_before and all(torch.equal(hat.state_dict()[n], t) for n, t in copies_before.items())


def test_other_ways_of_writing_a_model(pair, tmp_path):
    """Saved and loaded, deep-copied, loaded by assignment, moved to shared memory: values stay, and each side is its own."""
    model, hat = pair
    before = model(X).detach()
    hatify.save(hat, tmp_path / "saved")
    save_file({n: t for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert torch.equal(model(X), before) and torch.equal(hat(X), before)
    loaded = hatify.load(tmp_path / "saved", factory=Net)
    twin = copy.deepcopy(hat)
    assert torch.equal(loaded.eval()(X), before) and torch.equal(twin(X), before)
    step(twin, task=0)
    assert torch.equal(hat(X), before) and torch.equal(hat(X, task=0), loaded(X, task=0))
    again = hatify.convert(model, tasks=2, example_inputs=X, verify=False)
    model.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()}, assign=True)
    assert torch.equal(hat(X), before) and torch.equal(again(X), before)
    hat.share_memory()
    with torch.no_grad():
        hat.head.weight.zero_()
    assert torch.equal(again(X), before) and not torch.equal(hat(X), before)


def test_verification_leaves_memory_as_it_was(pair, monkeypatch):
    """Not a bit is written to the model itself: it works on copies that it drops, also when it fails half way."""
    _, hat = pair
    large = {n: p for n, p in hat.named_parameters() if p.nbytes >= copies.PAGE}
    values = {n: real(t) for n, t in hat.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    storages = {n: p.untyped_storage()._cdata for n, p in large.items()}
    assert hatify.verify(hat).ok

    def fail(parameters):
        raise RuntimeError("half way")

    monkeypatch.setattr(drift, "_nan", fail)  # the weights that are worked on are noise by then
    with pytest.raises(RuntimeError, match="half way"):
        hatify.verify(hat)
    state = hat.state_dict(keep_vars=True)
    assert all(torch.equal(state[n], t) for n, t in values.items())
    assert all(p.untyped_storage()._cdata == storages[n] and shared(p) for n, p in large.items())


def test_weights_that_share_memory_are_written_together_by_the_proof():
    """Two parameters over one storage: noise in one must show in the other, so they are not laid aside one by one."""
    torch.manual_seed(0)
    model = Net()
    view = nn.Parameter(model.conv.weight.data)
    hat = hatify.convert(model, tasks=3, example_inputs=X, verify=False)
    alias = nn.Parameter(hat.conv.weight.data)
    before = real(hat.conv.weight)
    assert not can_share(hat.conv.weight) and not can_share(view)
    assert hatify.verify(hat).ok
    assert torch.equal(hat.conv.weight, before) and torch.equal(alias, before)


def test_the_proof_sees_a_task_that_reads_anothers_copy(pair):
    """The control of NaN in copies that a task must not read."""
    _, hat = pair
    assert hatify.verify(hat).drift == 0.0
    hat.head.tasks[0].forward = lambda x: nn.Linear.forward(hat.head.tasks[2], x)
    assert hatify.verify(hat).drift > 0.0


MEASURE = """
import sys, gc, torch, hatify
from hatify.modules import copies
from torch import nn
def mark(name): return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name + ":"))
copies.PAGE = int(sys.argv[1])
def make(n): return nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))
hatify.convert(make(8), tasks=4, example_inputs=torch.randn(2, 8), verify=False)
model = make(2048)
open("/proc/self/clear_refs", "w").write("5")
start = mark("VmRSS")
hat = hatify.convert(model, tasks=4, example_inputs=torch.randn(2, 2048), verify=False)
print((mark("VmHWM") - start) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_conversion_takes_no_memory_for_weights():
    """Three layers of 2,048 (48 MB), the last a head of four tasks; the control clones: 1 + 4/3 models more."""
    sharing, cloning = (
        float(subprocess.run([sys.executable, "-c", MEASURE, str(page)], capture_output=True, text=True, check=True).stdout)
        for page in (4096, 2**40)
    )
    assert sharing < 0.8 and cloning > sharing + 1.8
