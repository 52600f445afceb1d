"""The converted model as its user meets it."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS
from torch import nn

import hatify
from hatify.errors import CallError, CaptureError, ConversionError, ExampleInputsError, HatifyError, TaskError
from hatify.modules import HATLayer, TaskIndexed


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def converted(tasks=3, **options) -> hatify.HATModel:
    return hatify.convert(small(), tasks, example_inputs=torch.randn(2, 3, 8, 8), **options)


@pytest.fixture(scope="module")
def hat() -> hatify.HATModel:
    return converted()


def test_every_form_of_a_call(hat):
    x = torch.randn(4, 3, 8, 8)
    hat.eval()
    assert torch.equal(hat(x), small().eval()(x))
    assert torch.equal(hat(input=x), hat(x))
    with_task = hat(x, task=2)
    payload = hat(hatify.HATPayload(x, task_id=2))
    assert isinstance(payload, hatify.HATPayload) and payload.task_id == 2 and torch.equal(payload.data, with_task)
    soft = hat(hatify.HATPayload(x, task_id=2, mask_scale=0.5)).data
    assert torch.equal(soft, hat(x, task=2, mask_scale=0.5)) and not torch.equal(soft, with_task)
    hat.active_task = 2
    assert torch.equal(hat(x), with_task)
    hat.active_task = None


def test_a_batch_of_one_as_example_keeps_the_batch_open():
    hat = hatify.convert(small(), 2, example_inputs=torch.randn(1, 3, 8, 8))
    assert hat(torch.randn(7, 3, 12, 9), task=1).shape == (7, 5)


def test_class_counts_belong_to_tasks_and_the_original_head_stays(hat):
    counted = converted([2, None, 7])
    x = torch.randn(4, 3, 8, 8)
    assert [counted(x, task=t).shape[1] for t in range(3)] == [2, 5, 7]
    assert torch.equal(counted.eval()(x), small().eval()(x))


def test_class_counts_are_refused_where_no_head_reaches_the_output():
    network = NETWORKS["tied_autoencoder"]
    with pytest.raises(ConversionError, match="class counts"):
        hatify.convert(network.make(), [2, 3], example_inputs=network.inputs(2))


def test_shared_and_masked_heads():
    hat = converted(heads="hat")
    assert isinstance(hat.get_submodule("5"), HATLayer) and not isinstance(hat.get_submodule("5"), TaskIndexed)
    assert hat.verification.ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_give_what_the_original_gives_there(dtype):
    hat, x = converted().eval().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    assert torch.equal(hat(x), small().eval().to(dtype)(x))
    assert hat(x, task=1).dtype == dtype


def test_there_is_no_shallow_copy(hat):
    """It would be a plain graph module that protects nothing."""
    with pytest.raises(HatifyError, match="deepcopy"):
        copy.copy(hat)


def test_synchronised_norms_are_made_before(hat):
    """The order that the README asks for."""
    made = hatify.convert(nn.SyncBatchNorm.convert_sync_batchnorm(small()), 2, example_inputs=torch.randn(2, 3, 8, 8)).eval()
    assert isinstance(made[1], nn.SyncBatchNorm) and isinstance(made[1], TaskIndexed)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in made[1].tasks)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(made(x), hat.eval()(x))


def test_a_deepcopy_is_another_model(hat):
    copied = copy.deepcopy(hat)
    x = torch.randn(2, 3, 8, 8)
    before = hat.eval()(x, task=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.normal_()
        for masker in copied.maskers.values():
            masker.embeddings[0].normal_()
    assert torch.equal(hat(x, task=0), before)
    assert not torch.equal(copied.eval()(x, task=0), before)
    assert hatify.verify(copied).ok


def test_a_state_dict_brings_everything_back(hat):
    other = hatify.convert(small(1), 3, example_inputs=torch.randn(2, 3, 8, 8), verify=False).eval()
    other.load_state_dict(hat.state_dict())
    x = torch.randn(2, 3, 8, 8)
    for task in (None, 0, 2):
        assert torch.equal(other(x, task=task), hat.eval()(x, task=task))
    assert list(small().state_dict()) == [k for k in hat.state_dict() if k in small().state_dict()]


def test_a_checkpoint_of_the_original_reaches_every_copy():
    hat, new = converted().eval(), small(1).eval()
    with torch.no_grad():
        new[1].running_mean.normal_()
    hat.load_pretrained(new.state_dict())
    x = torch.randn(2, 3, 8, 8)
    for task in (None, 0, 1, 2):
        assert torch.equal(hat(x, task=task), new(x))  # all masks are ones
    with pytest.raises(ConversionError, match="no checkpoint"):
        hat.load_pretrained({"nothing": torch.zeros(1)})
    hat.finished_tasks.add(0)
    with pytest.raises(TaskError, match="finished"):
        hat.load_pretrained(new.state_dict())


def test_inplace_moves_the_weights():
    model = small()
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 3, 8, 8), inplace=True)
    assert hat.get_parameter("0.weight") is model[0].weight
    copied = converted(2)
    assert copied.get_parameter("0.weight").data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda h, x: h(x, task=3), TaskError, "0 to 2"),
        (lambda h, x: h(x, task=-1), TaskError, "0 to 2"),
        (lambda h, x: h(x, task="a"), TaskError, "0 to 2"),
        (lambda h, x: h(x, task=0, mask_scale=-1.0), TaskError, "positive"),
        (lambda h, x: h(x, mask_scale=1.0), TaskError, "needs a task"),
        (lambda h, x: h(x[0]), CallError, "dimensions"),
        (lambda h, x: h(x[:, :2]), CallError, "fixed"),
        (lambda h, x: h(x.long()), CallError, "int64"),
        (lambda h, x: h(x, other=x), CallError, "other"),
        (lambda h, x: h(), CallError, "missing"),
        (lambda h, x: h(hatify.HATPayload(x, 0), task=1), CallError, "payload"),
        (lambda h, x: setattr(h, "active_task", 9), TaskError, "0 to 2"),
    ],
)
def test_wrong_calls_say_what_is_wrong(hat, call, error, said):
    with pytest.raises(error, match=said):
        call(hat, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("tasks", [0, -1, True, 2.5, [], [2, 0], "3"])
def test_wrong_numbers_of_tasks(tasks):
    with pytest.raises(ConversionError, match="tasks must be"):
        converted(tasks)


def test_missing_example_inputs_say_the_call_to_write():
    with pytest.raises(ExampleInputsError, match=r"example_inputs=torch\.randn"):
        hatify.convert(small(), 2)


class Router(nn.Module):
    """Looks into its data to decide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.a(x)
        return self.b(x)


class Counter(nn.Module):
    """Loops as often as its data says."""

    def forward(self, x):
        for _ in range(int(x.abs().sum().item()) % 3):
            x = x + 1
        return x


def routed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Router(), nn.ReLU(), Counter(), nn.Linear(4, 2))


def test_control_flow_on_data_names_the_line_and_the_ways_out():
    with pytest.raises(CaptureError) as caught:
        hatify.convert(routed(), 2, example_inputs=torch.randn(2, 4))
    assert "if x.sum() > 0:" in str(caught.value) and "register" in str(caught.value)


def test_check_lists_every_problem_and_changes_nothing():
    model = routed()
    before = copy.deepcopy(model.state_dict())
    problems = hatify.check(model, example_inputs=torch.randn(2, 4))
    places = " ".join(p.where for p in problems if p.severity == "error")
    assert "1, " in places and "3, " in places, "both modules that look into their data"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())
    assert [p for p in hatify.check(small(), example_inputs=torch.randn(2, 3, 8, 8)) if p.severity == "error"] == []


def test_a_registered_layer_is_kept_whole():
    class WholeRouter(Router):
        pass

    hatify.register(WholeRouter, hatify.TaskIndexedLayer("looks into its data"))
    model = nn.Sequential(nn.Linear(4, 4), WholeRouter(), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 4))
    assert hat.verification.ok
    row = next(r for r in hat.report.layers if r["path"] == "1")
    assert row["rung"] == "task-indexed" and row["reason"] == "looks into its data"


def test_a_described_layer_gets_masks():
    class Scaled(nn.Linear):
        def forward(self, x):
            weight = self.weight / self.weight.norm(dim=1, keepdim=True)
            return nn.functional.linear(x, weight, self.bias)

    @hatify.register(Scaled)
    def describe(layer):
        return hatify.Weighted(row_locked=True)

    hat = hatify.convert(
        nn.Sequential(Scaled(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2)), 2, example_inputs=torch.randn(2, 4)
    )
    assert hat.verification.ok and hat.report.rungs["row-locked"]["parameters"] == 8 * 4 + 8


def test_registering_nonsense_is_refused():
    with pytest.raises(HatifyError, match="only module classes"):
        hatify.register(3)


def test_converting_twice_is_refused(hat):
    with pytest.raises(ConversionError, match="already"):
        hatify.convert(hat, 2)


def test_verification_leaves_no_trace(hat):
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in hat.modules()]
    assert hatify.verify(hat).ok
    assert all(torch.equal(v, before[k]) for k, v in hat.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in hat.modules()]
    assert all(p.grad is None for p in hat.parameters())


def test_the_code_reads_like_the_original():
    hat = hatify.convert(NETWORKS["unet"].make(), 2, example_inputs=NETWORKS["unet"].inputs(2), verify=False)
    assert "getattr" not in hat.code and "torch.ops" not in hat.code and "= None;" not in hat.code
    assert hat.code.count("self.hat.masks.") == hat.report.mask_nodes


class FunctionalNorm(nn.Module):
    """Running statistics written by F.batch_norm, which its schema does not say."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x):
        x = nn.functional.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
        return self.head(x.relu().mean((2, 3)))


def test_running_statistics_by_function_belong_to_their_task():
    x = torch.randn(4, 3, 8, 8)
    hat = hatify.convert(FunctionalNorm(), 2, example_inputs=x).eval()
    first, second = hat(x, task=0), hat(x, task=1)
    hat.train()(2 * x, task=1)
    hat.eval()
    assert torch.equal(hat(x, task=0), first)
    assert not torch.equal(hat(x, task=1), second), "the task that ran did not learn its statistics"


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward here")


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(NoBackward.apply(torch.tanh(self.fc(x))))


def test_an_original_whose_backward_fails_is_compared_without_it(monkeypatch):
    hat = hatify.convert(OwnFunction(), 2, example_inputs=torch.randn(3, 6))
    proof = hat.verification
    assert proof.ok and proof.parity == proof.parity_train == 0.0 and proof.gradients is None
    assert any("the original's own backward fails (RuntimeError: no backward here)" in note for note in proof.notes)
    run = hat.run
    hat.run = lambda tensors, task: (run(tensors, task)[0] * 1.5,)  # the negative control: outputs are still compared
    assert hatify.verify(hat).parity_train > 0


def test_a_backward_that_only_the_converted_model_fails_at_is_no_parity():
    hat = hatify.convert(small(), 2, example_inputs=torch.randn(2, 3, 8, 8), verify=False)
    run = hat.run
    hat.run = lambda tensors, task: (NoBackward.apply(run(tensors, task)[0]) / 2,)
    report = hatify.verify(hat)
    assert report.parity_train == 0.0 and report.gradients == float("inf") and not report.ok
