"""More tasks than were planned."""

from __future__ import annotations

import copy

import pytest
import torch
from learned import answers, changed, learn, state
from networks import NETWORKS
from tasks import same
from test_forgetting import Net, network

import hatify
from hatify.errors import ConversionError, TaskError


@pytest.fixture(scope="module")
def three():
    return network(2, 2)


@pytest.fixture
def hat(three):
    return copy.deepcopy(three)


def test_old_tasks_stay_and_new_ones_start_as_at_conversion(hat):
    old, before, plain = state(hat), answers(hat, range(2)), hat(*hat.example_inputs[0]).detach()
    assert hat.add_tasks(2) == [2, 3]
    assert changed(hat, old) == {} and same(answers(hat, [1])[1], before[1])
    assert hat.config.num_tasks == hat.settings["tasks"] == hat.report.tasks == hat.settings["config"]["num_tasks"] == 4
    assert hat.report.classes == [None] * 4 and hat.settings["classes"] is None
    assert all(m.config.num_tasks == len(m.embeddings) == 4 and bool(m.embeddings[3].eq(1).all()) for m in hat.maskers.values())
    assert torch.equal(hat.norm1.tasks[3].running_mean, hat.norm1.running_mean)
    assert torch.equal(hat.indexed("shift").of(2), hat.shift) and hat.indexed("shift").of(2) is not hat.shift
    assert torch.equal(hat(*hat.example_inputs[0], task=3), plain)  # every mask is open, every copy the original's
    assert type(hat.norm1.tasks[3]) is type(hat.norm1.tasks[0]) and not hasattr(hat.norm1.tasks[3], "tasks")
    with pytest.raises(TaskError, match="no task 4"):
        hat(*hat.example_inputs[0], task=4)


def test_growing_is_converting_with_as_many():
    """Names, shapes and order of the state are those of a conversion that had planned for it."""
    torch.manual_seed(0)
    grown = hatify.convert(Net(), [4, 2], example_inputs=torch.randn(4, 3, 6, 6), verify=False)
    grown.add_tasks([3, None])
    planned = hatify.convert(Net(), [4, 2, 3, None], example_inputs=torch.randn(4, 3, 6, 6), verify=False)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (grown, planned)]
    assert shapes[0] == shapes[1] and grown.settings == planned.settings
    assert grown.report.classes == planned.report.classes == [4, 2, 3, None]


def test_a_copy_of_the_model_keeps_its_own_number(hat):
    copied = copy.deepcopy(hat)
    hat.add_tasks(1)
    assert copied.config.num_tasks == copied.report.tasks == 2 and len(copied.norm1.tasks) == 2
    assert copied.conv1.masker.config.num_tasks == 2 and copied.room.status.tasks == 2
    with pytest.raises(TaskError, match="no task 2"):
        copied(*copied.example_inputs[0], task=2)
    again = copy.deepcopy(hat)
    assert again.config.num_tasks == 3 and same(answers(again, [2])[2], answers(hat, [2])[2])


@pytest.mark.parametrize("name", ["mutating_buffer", "text_gru", "vit", "two_heads", "spectral_norm"])
def test_buffers_and_whole_layers_grow_too(name):
    if name == "vit":
        from learned import converted

        hat = converted("vit", 1)
    else:
        hat = hatify.convert(NETWORKS[name].make(), 1, example_inputs=NETWORKS[name].inputs(3), verify=False).eval()
    learn(hat, 0)
    before = answers(hat, [0])[0]
    hat.add_tasks(1)
    learn(hat, 1)
    assert same(answers(hat, [0])[0], before) and hat.finished_tasks == {0, 1}
    hatify.forget_task(hat, 1)
    assert same(answers(hat, [0])[0], before) and hat.finished_tasks == {0}


def test_saved_and_loaded(hat, tmp_path):
    hat.add_tasks([2, 3])
    learn(hat, 3)
    hatify.save(hat, tmp_path / "saved")
    loaded = hatify.load(tmp_path / "saved", factory=Net).eval()
    assert loaded.finished_tasks == {0, 1, 3} and loaded.settings == hat.settings
    found, expected = answers(loaded, range(4)), answers(hat, range(4))
    assert all(same(found[t], expected[t]) for t in range(4)) and found[3][0].shape == (4, 3)


def test_in_half_precision(hat):
    hat.to(torch.bfloat16).add_tasks([3])
    assert {p.dtype for p in hat.parameters()} == {torch.bfloat16}
    assert hat(*(a.bfloat16() for a in hat.example_inputs[0]), task=2).dtype == torch.bfloat16


# optimizers


def test_optimizers_get_groups_like_those_of_other_tasks(hat):
    masks = [e for m in hat.maskers.values() for e in m.embeddings]
    rest = [p for p in hat.parameters() if all(p is not e for e in masks)]
    groups = [{"params": rest}, {"params": masks, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    hat.add_tasks(2, optimizer=optimizer)
    held = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(optimizer.param_groups) == 4 and all(id(p) in held for p in hat.parameters())
    for task in (2, 3):
        group = held[id(hat.conv1.masker.embeddings[task])]
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
        for parameter in (hat.norm1.tasks[task].weight, hat.head.tasks[task].bias, hat.indexed("shift").of(task)):
            assert (held[id(parameter)]["lr"], held[id(parameter)]["weight_decay"]) == (0.01, 0.1)
    before = answers(hat, range(2))
    learn(hat, 3, optimizer=optimizer)  # a session refuses an optimizer that lacks something
    assert all(same(answers(hat, range(2))[t], before[t]) for t in range(2))


def test_without_being_told_a_session_refuses_the_optimizer(hat):
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    hat.add_tasks(1)
    with pytest.raises(TaskError, match="lacks parameters"):
        hat.learning(2, optimizer, schedule="constant")


def test_optimizers_with_names_and_several_of_them(hat):
    named = torch.optim.SGD([(n, p) for n, p in hat.named_parameters() if "masker" not in n], lr=0.1)
    masks = torch.optim.Adam([e for m in hat.maskers.values() for e in m.embeddings], lr=0.2)
    hat.add_tasks(1, optimizer=[named, masks])
    assert "norm1.tasks.2.weight" in named.param_groups[-1]["param_names"] and masks.param_groups[-1]["lr"] == 0.2
    hat.learning(2, [named, masks], schedule="constant")  # which refuses optimizers that lack something


# refusals


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3", [], [2, 0], [2, "a"], None])
def test_counts_that_make_no_sense(hat, wrong):
    old = state(hat)
    with pytest.raises(ConversionError, match="positive count") as caught:
        hat.add_tasks(wrong)
    assert "hat.add_tasks" in caught.value.fix and hat.config.num_tasks == 2 and old.keys() == state(hat).keys()


def test_refusals_change_nothing(hat):
    names = state(hat).keys()
    stranger = torch.optim.SGD([hat.conv1.weight], lr=0.1)
    with pytest.raises(TaskError, match="nothing that belongs to a task"):
        hat.add_tasks(1, optimizer=stranger)
    hat.begin_task(0, schedule="constant")
    with pytest.raises(TaskError, match="being learned"):
        hat.add_tasks(1)
    hat.abandon_task()
    assert state(hat).keys() == names and hat.config.num_tasks == 2 and len(stranger.param_groups) == 1
    tied = NETWORKS["tied_autoencoder"]
    whole = hatify.convert(tied.make(), 2, example_inputs=tied.inputs(2), verify=False)
    with pytest.raises(ConversionError, match="class counts"):
        whole.add_tasks([3])
    assert whole.add_tasks(1) == [2]
