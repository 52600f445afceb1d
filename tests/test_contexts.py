"""Masks are made once for many passes, and never stay behind what they are made from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify import HATConfig, HATModel
from hatify.contexts import LASTING
from hatify.errors import TaskError
from hatify.modules import Masker, TaskContext
from hatify.modules.bank import Bank


def made(tasks: int = 4) -> HATModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3))
    config = HATConfig(num_tasks=tasks, mask_init="normal")
    hat = hatify.convert(model, tasks, example_inputs=torch.randn(2, 5), config=config, verify=False)
    for task in (0, 1):
        finish(hat, task)
    return hat.eval()


def finish(hat: HATModel, task: int) -> None:
    with hat.learning(task, schedule="constant"):
        pass


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def anew(hat: HATModel, task: int) -> Tensor:
    """The output with masks made for this pass alone, masker by masker."""
    context = TaskContext(task, None, lambda name: hat.maskers[name](task, None), hard=True)
    return hat.run([X.to(next(hat.parameters()).dtype)], context)[0]


def fresh(hat: HATModel, task: int = 0) -> bool:
    return torch.equal(hat(X.to(next(hat.parameters()).dtype), task=task), anew(hat, task))


def flipped(state: dict[str, Tensor], hat: HATModel, task: int = 0) -> dict[str, Tensor]:
    """A state in which other channels are live for the task."""
    mine = {id(m.embeddings[task]) for m in hat.maskers.values()}
    names = {n for n, p in hat.named_parameters() if id(p) in mine}
    return {n: -v if n in names else v.clone() for n, v in state.items()}


def test_they_are_kept_for_finished_tasks_only() -> None:
    hat = made()
    with torch.no_grad():
        assert hat.context(0) is hat.context(0) and hat.context(0) is not hat.context(1)
        assert hat.context(2) is not hat.context(2)
    assert copy.deepcopy(hat).context(0) is not hat.context(0)
    for task in (2, 3):
        finish(hat, task)
    for task in range(4):
        hat.context(task)
    assert len(hat.__dict__["_kept_contexts"]) <= LASTING


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading_other_masks(assign: bool) -> None:
    hat = made()
    before = hat(X, task=0)
    state = flipped(hat.state_dict(), hat)
    with pytest.raises(TaskError):
        hat.load_state_dict(state)
    assert torch.equal(hat(X, task=0), before)
    hat.load_state_dict(state, overwrite=True, assign=assign)
    assert fresh(hat) and not torch.equal(hat(X, task=0), before)


def test_writing_to_embeddings() -> None:
    """A finished task's are put back; those of others count at once."""
    hat = made()
    before = hat(X, task=0)
    for write in (lambda e: e.data.neg_(), lambda e: e.detach().neg_()):
        for masker in hat.maskers.values():
            write(masker.embeddings[0])
        assert torch.equal(hat(X, task=0), before) and fresh(hat)
    unfinished = hat(X, task=2)
    for masker in hat.maskers.values():
        masker.embeddings[2].data.neg_()
    assert fresh(hat, 2) and not torch.equal(hat(X, task=2), unfinished)


def test_moved_cast_and_copied() -> None:
    hat = made()
    before = hat(X, task=0)
    twin = copy.deepcopy(hat)
    twin.load_state_dict(flipped(hat.state_dict(), hat), overwrite=True)
    assert fresh(twin) and not torch.equal(twin(X, task=0), before) and torch.equal(hat(X, task=0), before)
    assert hat.double()(X.double(), task=0).dtype is torch.float64 and fresh(hat)
    assert fresh(hat.float()) and torch.equal(hat(X, task=0), before)


def test_other_parameters_for_one_call() -> None:
    hat = made()
    before = hat(X, task=0)
    other = flipped(dict(hat.named_parameters()), hat)
    called = torch.func.functional_call(hat, other, (X,), {"task": 0})
    assert not torch.equal(called, before) and torch.equal(hat(X, task=0), before)
    hat.load_state_dict({**hat.state_dict(), **{n: v.detach() for n, v in other.items()}}, overwrite=True)
    assert torch.equal(hat(X, task=0), called)


def test_trained_again_forgotten_and_grown() -> None:
    hat = made()
    before = hat(X, task=0), hat(X, task=1)
    with hat.learning(0, schedule="constant"):
        for masker in hat.maskers.values():
            masker.embeddings[0].data.neg_()
    assert fresh(hat) and not torch.equal(hat(X, task=0), before[0]) and torch.equal(hat(X, task=1), before[1])
    hat.add_tasks(1)
    assert fresh(hat, 4) and fresh(hat, 1)
    hatify.forget_task(hat, 0)
    assert fresh(hat, 0) and torch.equal(hat(X, task=1), before[1])


def test_made_without_gradients_and_used_with_them() -> None:
    hat = made()
    with torch.inference_mode():
        before = hat(X, task=0).clone()
    x = X.clone().requires_grad_()
    out = hat(x, task=0)
    out.sum().backward()
    assert torch.equal(out, before) and x.grad is not None


MANY = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))


def kept(hat: HATModel) -> int:
    """How many weights with masks in them are kept, of all tasks."""
    return sum(len(context._made) for _, context in hat.__dict__.get("_kept_contexts", {}).values())


@torch.no_grad()
def evaluated(hat: HATModel, task: int = 0) -> Tensor:
    """A finished task evaluated until what is kept of it is there; each time to the bit the same."""
    first = hat(MANY, task=task)
    assert all(torch.equal(hat(MANY, task=task), first) for _ in range(3)) and kept(hat) > 0
    return first


def test_weights_with_masks_in_them_are_kept_for_the_task_that_is_evaluated() -> None:
    hat = made()
    with torch.no_grad():
        hat(MANY, task=0)
        assert kept(hat) == 0, "a single pass keeps nothing"
    first, of_one = evaluated(hat), kept(hat)
    evaluated(hat, 1)
    assert kept(hat) == of_one, "those of one task at a time"
    with torch.no_grad():
        assert torch.equal(hat(MANY, task=0), first)
    evaluated(hat)
    with hat.learning(2, optimizer=torch.optim.SGD(hat.parameters(), lr=0.1), steps_per_epoch=2):
        hat.train()(MANY).sum().backward()
        assert kept(hat) == 0, "training has the memory to itself"
    assert torch.equal(evaluated(hat.eval()), first)


def test_kept_weights_follow_what_they_are_made_of() -> None:
    hat = made()
    before, other = evaluated(hat), evaluated(hat, 1)
    evaluated(hat)
    for parameter in hat.parameters():
        parameter.data.mul_(2)
    assert torch.equal(evaluated(hat), before)
    with torch.no_grad():
        doubled = {n: p * 2 for n, p in hat.named_parameters() if ".masker." not in n and not n.startswith("hat.")}
        called = torch.func.functional_call(hat, doubled, (MANY,), {"task": 0})
        assert not torch.equal(called, before) and torch.equal(hat(MANY, task=0), before)
    evaluated(hat)
    state = {n: t * 2 if t.dim() == 2 and "mask" not in n else t.clone() for n, t in hat.state_dict().items()}
    hat.load_state_dict(state, overwrite=True)
    assert not torch.equal(evaluated(hat), before)
    evaluated(hat)
    hat.double(), hat.float()
    evaluated(hat, 1), evaluated(hat)
    with torch.inference_mode():
        inside = [hat(MANY, task=0) for _ in range(3)]
    assert all(torch.equal(a, evaluated(hat)) for a in inside)
    hat.load_state_dict({n: t / 2 if t.dim() == 2 and "mask" not in n else t for n, t in state.items()}, overwrite=True)
    assert torch.equal(evaluated(hat), before)
    hatify.forget_task(hat, 0)
    assert torch.equal(evaluated(hat, 1), other)


class ReadsTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).clamp(min=torch.finfo(x.dtype).min).relu())


def test_a_model_that_looks_at_types_reads_its_protected_values_too() -> None:
    hat = hatify.convert(ReadsTypes(), 2, example_inputs=torch.randn(2, 5), verify=False)
    finish(hat, 0)
    with torch.no_grad():
        hat.eval()(MANY, task=0)
    assert hat._facts.input_types, "the model does look at types"
    assert all(not reading.rest for reading in hat._guard._readings.values()) and hat._guard._readings


@pytest.mark.parametrize("scale", [None, 3.0], ids=["binary", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_all_at_once_are_each_by_itself(scale: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maskers = {f"m{n}": Masker(n, HATConfig(num_tasks=2, mask_init="normal")).to(dtype) for n in (1, 7, 4, 16, 333, 40000)}
    with torch.no_grad():
        maskers["m4"].embeddings[0].copy_(torch.tensor([-2.0, -0.5, -0.5, -1.0]))  # none is positive: the largest live
        maskers["m7"].embeddings[0][:3] = torch.tensor([0.0, torch.inf, -torch.inf])
    found = Bank(maskers).masks(0, scale)
    for name, masker in maskers.items():
        alone = masker(0, scale)
        assert torch.equal(found[name], alone) and found[name].dtype is torch.float32
        if scale is not None:
            along = torch.randn_like(alone)
            (a,) = torch.autograd.grad(found[name], masker.embeddings[0], along, retain_graph=True)
            (b,) = torch.autograd.grad(alone, masker.embeddings[0], along)
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_one_that_has_finished_is_binary_beside_others() -> None:
    maskers = {f"m{n}": Masker(n, HATConfig(num_tasks=2, mask_init="normal")) for n in (5, 6)}
    maskers["m5"].finished.add(0)
    found = Bank(maskers).masks(0, 3.0)
    assert torch.equal(found["m5"], maskers["m5"](0, None)) and torch.equal(found["m6"], maskers["m6"](0, 3.0))
