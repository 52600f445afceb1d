"""Wrong arguments: a clear error before anything has changed, and no session left open."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from training import SMALLEST, TASKS, inputs, learn, loss_of, network, step

import hatify
from hatify import HATConfig, HATLinear, HATModel, HATPayload, Learning, TaskIndexedBatchNorm1d
from hatify.calling import flatten
from hatify.errors import HatifyError, NonFiniteError, TaskError

NAME = SMALLEST[0]
MASKER = next(iter(network(NAME).maskers))


@pytest.fixture(scope="module")
def hat() -> HATModel:
    hat = network(NAME)
    learn(hat, NAME, 0, SGD(hat.parameters(), lr=0.1, momentum=0.9))
    return hat


@pytest.fixture(autouse=True)
def nothing_changes(hat: HATModel) -> Any:
    state, modes = copy.deepcopy(hat.state_dict()), [m.training for m in hat.modules()]
    yield
    assert hat._guard.session is None and hat.active_task is None and hat.finished_tasks == {0}
    assert modes == [m.training for m in hat.modules()]
    for key, value in hat.state_dict().items():
        assert torch.equal(value, state[key]), key


def optimizer(hat: HATModel) -> SGD:
    return SGD(hat.parameters(), lr=0.1)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps_per_epoch": None}, "needs steps_per_epoch"),
    "zero steps": ({"steps_per_epoch": 0}, "at least 1, not 0"),
    "negative steps": ({"steps_per_epoch": -3}, "at least 1, not -3"),
    "half a step": ({"steps_per_epoch": 2.5}, "at least 1, not 2.5"),
    "steps as a flag": ({"steps_per_epoch": True}, "at least 1, not True"),
    "unknown schedule": ({"schedule": "sine"}, "no schedule 'sine'"),
    "schedule of nothing": ({"schedule": None}, "no schedule None"),
    "schedule of zeros": ({"schedule": lambda p: 0.0}, "scale 0.0"),
    "negative schedule": ({"schedule": lambda p: -1.0}, "scale -1.0"),
    "infinite schedule": ({"schedule": lambda p: math.inf}, "scale inf"),
    "undefined schedule": ({"schedule": lambda p: math.nan}, "scale nan"),
    "schedule without a result": ({"schedule": lambda p: None}, "scale None"),
    "zero in the third step": ({"schedule": lambda p: 0.0 if 0.4 < p < 0.6 else 1.0}, "scale 0.0"),
    "largest scale by a word": ({"max_scale": "large"}, "max_scale is 'large'"),
    "largest scale of 0": ({"max_scale": 0.0}, "largest scale"),
    "infinite largest scale": ({"max_scale": math.inf}, "max_scale is inf"),
    "unknown kind": ({"kind": "l1"}, "kind is one of"),
    "unknown reaction": ({"on_nonfinite": "ignore"}, "on_nonfinite one of"),
    "unknown masker": ({"weights": {"nowhere": 1.0}}, "no masker 'nowhere'"),
    "quota of an unknown masker": ({"quota": {"nowhere": 1.0}}, "no masker 'nowhere'"),
    "quotas of a network": ({"kind": "network", "quota": {"stem": 0.1}}, "one quota"),
    "negative quota": ({"quota": -0.1}, r"quota is -0.1"),
    "quota above 1": ({"quota": 1.5}, r"quota is 1.5"),
    "undefined quota": ({"quota": math.nan}, r"quota is nan"),
    "infinite quota": ({"quota": math.inf}, r"quota is inf"),
    "quota by a word": ({"quota": "much"}, r"quota is 'much'"),
    "undefined quota of a network": ({"kind": "network", "quota": math.nan}, r"quota is nan"),
    "negative quota of a masker": ({"quota": {MASKER: -1.0}}, r"quota\['.*'\] is -1.0"),
    "undefined factor of a masker": ({"weights": {MASKER: math.nan}}, r"weights\['.*'\] is nan"),
    "negative factor of a masker": ({"kind": "network", "weights": {MASKER: -1.0}}, r"weights\['.*'\] is -1.0"),
    "negative weight": ({"weight": -1.0}, r"weight is -1.0"),
    "undefined weight": ({"weight": math.nan}, r"weight is nan"),
    "infinite weight": ({"weight": math.inf}, r"weight is inf"),
    "negative pace of masks": ({"mask_rate": -1.0}, "mask_rate is -1.0"),
    "undefined pace of masks": ({"mask_rate": math.nan}, "mask_rate is nan"),
    "infinite pace of masks": ({"mask_rate": math.inf}, "mask_rate is inf"),
    "pace of masks by a word": ({"mask_rate": "fast"}, "mask_rate is 'fast'"),
    "negative refresh": ({"refresh": -1}, "refresh is a number of batches, not -1"),
    "refresh by half a batch": ({"refresh": 2.5}, "not 2.5"),
    "refresh by a word": ({"refresh": "all"}, "not 'all'"),
    "giving back by a word": ({"give_back": "all"}, "give_back is True or False"),
    "warm start from nowhere": ({"warm_start": TASKS}, f"cannot start from {TASKS}"),
    "warm start by a word": ({"warm_start": "original"}, "cannot start from 'original'"),
    "warm start from itself": ({"warm_start": 1}, "task 1 cannot start from 1"),
    "warm start from a flag": ({"warm_start": True}, "cannot start from True"),
    "locking an unfinished task": ({"locked_task_ids": [0, 2]}, r"tasks \[2\] are not finished"),
    "locking one task": ({"locked_task_ids": 0}, "several task numbers, not 0"),
    "locking by a word": ({"locked_task_ids": "all"}, "several task numbers, not 'all'"),
    "locking itself": ({"locked_task_ids": [1]}, r"tasks \[1\] are not finished"),
}


@pytest.mark.parametrize("label", OPTIONS)
def test_options(hat: HATModel, label: str) -> None:
    options, message = OPTIONS[label]
    for call in (hat.learning, hat.begin_task, lambda *a, **k: hatify.Learning(hat, *a, **k)):
        with pytest.raises(TaskError, match=message):
            call(1, optimizer(hat), **{"steps_per_epoch": 5, **options})


@pytest.mark.parametrize("task", [-1, TASKS, "1", 1.0, None, True])
def test_no_such_task(hat: HATModel, task: Any) -> None:
    with pytest.raises(TaskError, match="no task"):
        hat.learning(task=task, optimizer=optimizer(hat), steps_per_epoch=5)


@pytest.mark.parametrize("other", [None, 0])
def test_no_active_task_in_training(hat: HATModel, other: int | None) -> None:
    """Somebody has put the active task back, and the loop names none: the step that would train nothing of the task is refused."""
    hat = copy.deepcopy(hat)
    optimizer = AdamW(hat.parameters(), lr=0.1)
    with hat.learning(task=1, optimizer=optimizer, schedule="constant") as run:
        hat.active_task = other
        before = [p.detach().clone() for p in hat.parameters()]
        with pytest.raises(TaskError, match="no call was one of it"):
            step(hat, run, optimizer, inputs(NAME, 4))
        assert all(map(torch.equal, before, hat.parameters())) and run.step == 0
        step(hat, run, optimizer, inputs(NAME, 4), task=1)  # a call that names it
        step(hat, run, optimizer, inputs(NAME, 4))  # and from there on others are the user's own business
        assert run.step == 2


def test_no_payload_of_the_task_in_training() -> None:
    config = HATConfig(num_tasks=2)
    net = nn.ModuleDict({"fc": HATLinear(6, 8, config), "norm": TaskIndexedBatchNorm1d(8, config=config)})
    net.forward = lambda x: net["norm"](net["fc"](x))
    optimizer = SGD(net.parameters(), lr=0.1)
    with Learning(net, task=1, optimizer=optimizer, schedule="constant") as run:
        for payload in (HATPayload(torch.randn(5, 6)), HATPayload(torch.randn(5, 6), task_id=1, mask_scale=run.scale)):
            optimizer.zero_grad()
            net(payload).data.square().sum().backward()
            if payload.task_id is None:
                with pytest.raises(TaskError, match="no payload had its number"):
                    optimizer.step()
            else:
                optimizer.step()
    assert run.step == 1


def test_a_task_number_may_be_one_of_numpys(hat: HATModel) -> None:
    """As in ``for task in rng.permutation(5)``."""
    hat, task, x = copy.deepcopy(hat), np.int64(1), inputs(NAME, 4)
    assert hat.context(task).id == 1 and type(hat.context(task).id) is int
    hat.active_task = task
    assert hat.active_task == 1 and type(hat.active_task) is int
    hat.active_task = None
    with hat.learning(
        task=task, steps_per_epoch=np.int32(4), refresh=np.int64(2), warm_start=np.int64(0), locked_task_ids=[np.int64(0)]
    ) as run:
        assert run.progress == 0.0 and run.locking == {0}
    hat.eval()
    assert hat.finished_tasks == {0, 1}
    with torch.no_grad():
        assert torch.equal(flatten(hat(*x, task=task))[0][0], flatten(hat(*x, task=1))[0][0])
    hatify.extract(hat, task)
    hatify.prune(hat, keep=[task])
    hatify.forget_task(hat, task)
    assert hat.finished_tasks == set()


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, math.inf, True, "much"])
def test_the_function_checks_as_the_session_does(hat: HATModel, wrong: Any) -> None:
    with pytest.raises(TaskError, match="quota is"):
        hatify.regularization(hat, 1, 5.0, quota=wrong)
    with pytest.raises(TaskError, match=r"quota\['"):
        hatify.regularization(hat, 1, 5.0, quota={MASKER: wrong})
    if wrong != 1.5:
        with pytest.raises(TaskError, match=r"weights\['"):
            hatify.regularization(hat, 1, 5.0, weights={MASKER: wrong})


def test_nothing_to_end(hat: HATModel) -> None:
    run = hat.learning(task=1, optimizer=optimizer(hat), steps_per_epoch=5)
    for call in (hat.finish_task, hat.abandon_task):
        with pytest.raises(TaskError, match="no task is being learned"):
            call()
    for call in (run.finish, run.abandon, run.regularization, run.advance):
        with pytest.raises(TaskError, match="is over|not begun"):
            call()


def test_a_session_inside_a_session() -> None:
    hat = network(NAME)
    with pytest.raises(TaskError, match="task 1 is being learned"), hat.learning(1, optimizer(hat), steps_per_epoch=5):
        with pytest.raises(TaskError, match="task 1 is being learned"), hat.learning(2, optimizer(hat), steps_per_epoch=5):
            pytest.fail("it began")
        assert hat._guard.session.task == 1 and hat.active_task == 1
        hat.begin_task(1, optimizer(hat), steps_per_epoch=5)


def test_optimizers_that_lack_what_is_trained(hat: HATModel) -> None:
    original = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    part = SGD([p for n, p in hat.named_parameters() if "masker" not in n], lr=0.1)
    for wrong, message in ((original, "holds none"), (part, "lacks parameters"), ([original, part], "lacks parameters")):
        with pytest.raises(TaskError, match=message):
            hat.begin_task(1, wrong, steps_per_epoch=5)
    with pytest.raises(TaskError, match="holds none"):
        hat.protect(original)
    for wrong in ("adam", object(), [hat]):
        with pytest.raises(TaskError, match="no torch.optim.Optimizer"):
            hat.begin_task(1, wrong, steps_per_epoch=5)
        with pytest.raises(TaskError, match="no torch.optim.Optimizer"):
            hat.protect(wrong)
    with pytest.raises(TaskError, match="no optimizer"):
        hat.protect(None)


def test_an_optimizer_that_lost_its_parameters_since(hat: HATModel) -> None:
    made = optimizer(hat)
    run = hat.learning(1, made, steps_per_epoch=5)
    made.param_groups[0]["params"] = made.param_groups[0]["params"][:3]
    with pytest.raises(TaskError, match="lacks parameters"):
        run.begin()


def test_the_optimizer_of_the_model_before_its_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    made = SGD(model.parameters(), lr=0.1)
    for inplace in (False, True):
        hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 3, 8, 8), verify=False, inplace=inplace)
        with pytest.raises(TaskError, match="before its conversion|lacks parameters"):
            hat.begin_task(0, made, steps_per_epoch=5)


def test_sessions_belong_to_the_model_and_not_to_what_wraps_it(hat: HATModel) -> None:
    for wrapper in (nn.Sequential(hat), torch.compile(hat)):
        with pytest.raises(TaskError, match="wraps a HAT model"):
            hatify.Learning(wrapper, 1, optimizer(hat), steps_per_epoch=5)
    with pytest.raises(TaskError, match="no HAT layers"):
        hatify.Learning(nn.Linear(2, 2), 0, schedule="constant")


def test_a_frozen_part_need_not_be_in_the_optimizer(hat: HATModel) -> None:
    hat.stem.requires_grad_(False)
    try:
        held = SGD([p for p in hat.parameters() if p.requires_grad], lr=0.1)
        hat.learning(1, held, steps_per_epoch=5)
    finally:
        hat.stem.requires_grad_(True)
    with pytest.raises(TaskError, match="lacks parameters"):
        hat.learning(1, held, steps_per_epoch=5)


def test_wrong_class_counts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    for tasks in ([2, 0], [2, -1], [], [2, "3"], 0, -1):
        with pytest.raises(HatifyError):
            hatify.convert(model, tasks, example_inputs=torch.randn(2, 3, 4), verify=False)


def test_targets_out_of_range_leave_no_session_open(hat: HATModel) -> None:
    made = SGD(hat.parameters(), lr=0.0)
    statistics = {k: v.clone() for k, v in hat.state_dict().items()}
    with pytest.raises((IndexError, RuntimeError)), hat.learning(1, made, steps_per_epoch=5):
        nn.functional.cross_entropy(hat(*inputs(NAME, 4)), torch.full((4,), 17)).backward()
    hat.load_state_dict(statistics)


def test_calls_with_a_wrong_scale(hat: HATModel) -> None:
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TaskError, match="must be positive and finite"):
            hat(*inputs(NAME, 4), task=1, mask_scale=scale)
        with pytest.raises(TaskError, match="must be positive and finite"):
            hatify.regularization(hat, 1, scale)
        with pytest.raises(TaskError, match="must be positive and finite"):
            hatify.HATPayload(torch.zeros(2, 3), task_id=1, mask_scale=scale)
    with pytest.raises(TaskError, match="needs a task"):
        hat(*inputs(NAME, 4), mask_scale=5.0)


def test_errors_say_what_to_write_instead(hat: HATModel) -> None:
    with pytest.raises(TaskError) as caught:
        hat.learning(task=0, optimizer=optimizer(hat))
    assert caught.value.fix and "len(loader)" in caught.value.fix
    other = network(NAME)
    with pytest.raises(NonFiniteError) as caught, other.learning(0, AdamW(other.parameters()), steps_per_epoch=1) as run:
        step(other, run, run.optimizers[0], tuple(x * math.nan for x in inputs(NAME, 4)))
    assert caught.value.fix and "skip" in caught.value.fix and caught.value.where
    assert loss_of(other(*inputs(NAME, 4), task=0)).isfinite()
