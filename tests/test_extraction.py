"""Extracted networks: plain modules that give what the task gave."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from extracting import extracts, finished
from networks import NETWORKS
from torch.utils.flop_counter import FlopCounterMode

import hatify
from hatify import HATModel
from hatify.calling import flatten
from hatify.errors import TaskError
from hatify.lifecycle.exactness import inexact_nodes
from hatify.lifecycle.extraction import ExtractionError
from hatify.lifecycle.picture import Picture

ROUNDING = 1e-5
"""Relative to the largest output."""
TIMM = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout"]

UNFOLDED = {"test_vit", "test_convnext", "test_mambaout", "test_byobnet"}
"""Norms over live channels; byobnet: gates whose own mask hides channels that the gate's input reads."""


def zoo(name: str, tasks: list[int] | int = 3) -> tuple[torch.nn.Module, HATModel]:
    model = timm.create_model(name)
    return model, hatify.convert(model, tasks, verify=False).eval()


def outputs(model: torch.nn.Module, inputs, **how) -> list[torch.Tensor]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    torch.manual_seed(0)
    with torch.no_grad():
        return flatten(model(*args, **how, **kwargs))[0]


def close(expected: list[torch.Tensor], got: list[torch.Tensor]) -> bool:
    assert [a.shape for a in expected] == [b.shape for b in got]
    for a, b in zip(expected, got, strict=True):
        if not torch.allclose(a, b, 0.0, ROUNDING * max(float(a.float().nan_to_num().abs().max()), 1e-3), equal_nan=True):
            return False
    return True


@pytest.mark.parametrize("name", NETWORKS)
def test_baked_network_equals_the_task(name: str) -> None:
    network = NETWORKS[name]
    hat = hatify.convert(network.make(), 3, example_inputs=network.inputs(2), verify=False).eval()
    finished(hat, 1)
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    plain = hatify.extract(hat, 1)
    assert not plain.training and not any("hatify" in type(m).__module__ for m in plain.modules())
    assert all(torch.equal(v, before[k]) for k, v in hat.state_dict().items()), "the model was changed"
    assert plain.extraction["task"] == 1 and not plain.extraction["slim"]
    for batch in (2, 5):
        inputs = network.inputs(batch)
        assert close(outputs(hat, inputs, task=1), outputs(plain, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_slim_network_equals_the_task(name: str) -> None:
    network = NETWORKS[name]
    hat = hatify.convert(network.make(), 3, example_inputs=network.inputs(2), verify=False).eval()
    finished(hat, 1, live=0.5)
    plain = hatify.extract(hat, 1, slim=True)
    told = plain.extraction
    assert told["parameters"]["after"] <= told["parameters"]["before"]
    assert all(layer["live"] <= layer["kept"] <= layer["of"] or layer["kept"] == 1 for layer in told["slimmed"])
    assert all(entry["why"] for entry in told["whole"])
    for batch in (2, 5):
        inputs = network.inputs(batch)
        assert close(outputs(hat, inputs, task=1), outputs(plain, inputs))


@pytest.mark.parametrize("name", TIMM)
def test_slim_is_smaller(name: str) -> None:
    """Parameters and operations of a task that uses half of every layer, against the task's own whole network."""
    _, hat = zoo(name)
    finished(hat, 0, live=0.5)
    baked, plain = hatify.extract(hat, 0), hatify.extract(hat, 0, slim=True)
    x = torch.randn(2, *hat.example_inputs[0][0].shape[1:])
    assert close(outputs(hat, x, task=0), outputs(plain, x))
    assert count(plain) < 0.75 * count(baked)
    assert flops(plain, x) < 0.65 * flops(baked, x)
    if name == "test_resnet":
        assert not plain.extraction["whole"] and flops(plain, x) < 0.45 * flops(baked, x)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def test_norms_over_live_channels_become_ordinary_ones() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32),
        torch.nn.LayerNorm(32),
        torch.nn.GELU(),
        torch.nn.Linear(32, 24),
        torch.nn.RMSNorm(24),
        torch.nn.Linear(24, 5),
    )
    hat = hatify.convert(model, 1, example_inputs=torch.randn(4, 6), verify=False).eval()
    finished(hat, 0, live=0.25)
    plain = hatify.extract(hat, 0, slim=True)
    kinds = {name: (type(plain.get_submodule(name)), plain.get_submodule(name).normalized_shape) for name in ("1", "4")}
    assert kinds == {"1": (torch.nn.LayerNorm, (8,)), "4": (torch.nn.RMSNorm, (6,))}
    assert [n.target for n in plain.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3", "4", "5"]
    assert not plain.extraction["whole"] and not any("live" in key for key in plain.state_dict())


def test_heads_are_padded_to_the_widest() -> None:
    """Attention heads keep equal widths, as wide as the widest; scores are scaled as before."""
    network = NETWORKS["multihead_attention"]
    hat = hatify.convert(network.make(), 1, example_inputs=network.inputs(2), verify=False).eval()
    finished(hat, 0, live=0.5, seed=3)
    plain = hatify.extract(hat, 0, slim=True)
    assert any(0 < s["live"] < s["kept"] < s["of"] for s in plain.extraction["slimmed"])
    inputs = network.inputs(4)
    assert close(outputs(hat, inputs, task=0), outputs(plain, inputs))


class DynamicConvolution(torch.nn.Module):
    """Weights mixed for every sample; the samples' channels side by side, a group of the convolution for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Linear(4, 3)
        self.kernels, self.head = torch.nn.Parameter(torch.randn(3, 8, 4, 3, 3) * 0.2), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        kernels = torch.mm(self.route(x.mean((2, 3))).softmax(1), self.kernels.view(3, -1)).view(-1, c, 3, 3)
        y = F.conv2d(x.reshape(1, -1, h, w), kernels, padding=1, groups=b)
        return self.head(F.relu(y.view(b, 8, h, w)).mean((2, 3)))


def _dynamic() -> HATModel:
    torch.manual_seed(0)
    hat = hatify.convert(DynamicConvolution(), 2, example_inputs=torch.randn(2, 2, 6, 6), verify=False).eval()
    return finished(hat, 0)


def test_channels_beside_those_of_other_samples_are_kept() -> None:
    """How many there are depends on the batch, so that none can be taken by its number."""
    calls = [((torch.randn(shape),), {}) for shape in ((5, 2, 6, 6), (1, 2, 6, 6), (3, 2, 10, 7))]
    found = extracts(_dynamic(), 0, *calls)[True].extraction
    assert "how many channels there are depends on the sizes of the inputs" in {entry["why"] for entry in found["whole"]}
    assert any(layer["kept"] < layer["of"] for layer in found["slimmed"])


def test_a_smaller_network_that_cannot_be_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: channels are taken by the numbers of the example's batch."""
    monkeypatch.setattr(Picture, "compare", lambda *args: None)
    hat = _dynamic()
    with pytest.raises(ExtractionError, match="cannot be run") as refused:
        hatify.extract(hat, 0, slim=True)
    assert "slim=False" in refused.value.fix
    assert hatify.extract(hat, 0).extraction["difference"] < ROUNDING


class CalledTwice(torch.nn.Module):
    """One layer on channels, and where what is cut lies along another of its dimensions."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.conv, self.layer, self.head = torch.nn.Conv2d(3, 6, 3, padding=1), layer, torch.nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        straight, crossed = self.layer(x), self.layer(x.transpose(1, 3)).transpose(1, 3)
        return self.head(torch.cat([straight.mean((2, 3)), crossed.mean((2, 3))], 1))


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Conv2d(6, 6, 1), torch.nn.BatchNorm2d(6), torch.nn.PReLU(6), torch.nn.Linear(6, 6)],
    ids=lambda m: m._get_name(),
)
def test_calls_of_one_layer_are_cut_alike(layer: torch.nn.Module) -> None:
    """What one call needs whole is whole in the other."""
    hat = hatify.convert(CalledTwice(layer), 1, example_inputs=torch.randn(2, 3, 6, 6), verify=False).eval()
    finished(hat, 0, live=0.5)
    extracts(hat, 0)


class Chosen(torch.nn.Module):
    """Values chosen by a condition of inputs or of values, the others a number."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3), how

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        if self.how == "of rows":
            h = torch.where(mask[:, None], h, 0.0)
        elif self.how == "of values":
            h = torch.where(h > 0.1, h, 0.0)
        else:
            h = torch.where(mask, h @ h.t(), -1e9).softmax(-1) @ h
        return self.last(h)


@pytest.mark.parametrize("how", ["of rows", "of values", "of pairs"])
def test_conditions_of_the_models_own_are_no_masks(how: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 5), torch.tensor([True, False, True, True])
    hat = hatify.convert(Chosen(how), 1, example_inputs=inputs, verify=False).eval()
    finished(hat, 0, live=0.5)
    extracts(hat, 0, ((inputs[0], ~inputs[1]), {}))


class Detached(torch.nn.Module):
    """Two branches, one of which no gradient passes, as a teacher's; a hidden layer stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.teacher = torch.nn.Linear(5, 8), torch.nn.Linear(8, 6)
        self.student, self.last = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taught = torch.relu(self.teacher(torch.relu(self.hidden(x))))
        return self.last(torch.relu(self.student(x)) + taught.detach())


class SummedOut(torch.nn.Module):
    """An einsum with a letter that one operand alone has, and that is summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = torch.nn.Linear(5, 8), torch.nn.Linear(6, 3)
        self.w = torch.nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h(torch.relu(torch.einsum("xij,bi->bj", self.w, self.a(x))))


def test_letters_that_are_summed_out_of_one_operand() -> None:
    x = torch.randn(2, 5)
    hat = hatify.convert(SummedOut(), 2, example_inputs=x, verify=False).eval()
    extracts(finished(hat, 0), 0)


def test_what_gradients_do_not_pass_is_needed() -> None:
    torch.manual_seed(0)
    hat = hatify.convert(Detached(), 1, example_inputs=torch.randn(4, 5), verify=False).eval()
    finished(hat, 0, live=0.5)
    found = extracts(hat, 0)
    baked, slim = (sum(p.numel() for p in plain.parameters()) for plain in (found[False], found[True]))
    assert slim < baked


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_exports(name: str, slim: bool, tmp_path) -> None:
    import onnxruntime

    _, hat = zoo(name)
    finished(hat, 0, live=0.5)
    plain = hatify.extract(hat, 0, slim=slim)
    x = torch.randn(3, *hat.example_inputs[0][0].shape[1:])
    expected = outputs(hat, x, task=0)[0]
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(plain, (x,), dynamic_shapes=(batch,))
    assert close([expected], outputs(exported.module(), x))
    path = tmp_path / "task.onnx"
    torch.onnx.export(plain, (x,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for given in (x, torch.randn(5, *x.shape[1:])):
        got = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        wanted = outputs(hat, given, task=0)[0]
        # another library's kernels: their own rounding
        assert torch.allclose(wanted, torch.from_numpy(got), 1e-3, 1e-4 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", TIMM)
def test_state_dict_is_the_architectures_own(name: str) -> None:
    _, hat = zoo(name, [7, 5])
    finished(hat, 1)
    plain = hatify.extract(hat, 1)
    x = torch.randn(3, *hat.example_inputs[0][0].shape[1:])
    expected = outputs(hat, x, task=1)
    assert expected[0].shape == (3, 5) and close(expected, outputs(plain, x))
    fresh = timm.create_model(name, num_classes=5).eval()
    if name in UNFOLDED:
        assert set(plain.state_dict()) > set(fresh.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):  # the weights alone would not be this network
            fresh.load_state_dict(plain.state_dict(), strict=True)
        return
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert close(expected, outputs(fresh, x))
    assert not plain.extraction["stayed"]


def test_everything_folds_in_convolutional_networks() -> None:
    for name in ("test_resnet", "test_efficientnet"):
        _, hat = zoo(name)
        finished(hat, 0)
        plain = hatify.extract(hat, 0)
        assert not plain.extraction["stayed"] and plain.extraction["folded"]
        assert list(plain.state_dict()) == list(timm.create_model(name).state_dict())


def test_a_mask_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the zeros in the weights, taking the masks out gives other outputs."""
    from hatify.lifecycle import folding

    _, hat = zoo("test_resnet")
    finished(hat, 0)
    monkeypatch.setattr(folding, "zero_dead", lambda plain: None)
    with pytest.raises(hatify.HatifyError, match="does not give what task 0 gives"):
        hatify.extract(hat, 0)


def test_a_live_channel_that_is_removed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one live channel of a hidden layer too few. Dead rectifiers may hide one, not all."""
    from hatify.lifecycle.labels import Labels

    network = NETWORKS["conv1d"]
    hat = hatify.convert(network.make(), 1, example_inputs=network.inputs(2), verify=False).eval()
    finished(hat, 0)
    solved = Labels.__init__
    caught = []
    for number in range(4):

        def one_less(self, *arguments, number: int = number) -> None:
            solved(self, *arguments)
            hidden = next(own for node, own in self.own.items() if node.name == "conv1")
            kept = self.classes.kept
            kept[[label for label in hidden.tolist() if kept[label]][number]] = False

        monkeypatch.setattr(Labels, "__init__", one_less)
        try:
            hatify.extract(hat, 0, slim=True)
        except hatify.HatifyError as error:
            caught.append("does not give what task 0 gives" in str(error))
    assert caught == [True] * 4


@pytest.mark.parametrize("slim", [False, True])
def test_works_without_hatify(slim: bool, tmp_path) -> None:
    _, hat = zoo("test_vit")
    finished(hat, 2)
    plain = hatify.extract(hat, 2, slim)
    x = torch.randn(2, 3, 160, 160)
    torch.save({"x": x, "y": outputs(plain, x)[0], "model": plain}, tmp_path / "plain.pt")
    code = (
        "import sys; sys.modules['hatify'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        f"held = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False)\n"
        "assert torch.equal(held['model'](held['x']), held['y'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_modes_and_a_step_of_training() -> None:
    _, hat = zoo("test_resnet")
    finished(hat, 0)
    hat.train()
    plain = hatify.extract(hat, 0)
    assert hat.training and not plain.training
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    x, y = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(p.grad is not None for p in plain.parameters()) and all(p.grad is None for p in hat.parameters())


def test_refusals_carry_the_fix() -> None:
    _, hat = zoo("test_resnet")
    with pytest.raises(TaskError, match="no task is finished"):
        hatify.extract(hat, 0)
    finished(hat, 1)
    with pytest.raises(TaskError, match="no task 7"):
        hatify.extract(hat, 7)
    with pytest.raises(TaskError, match=r"task 0 is not finished(.|\n)*hatify.extract\(hat, 1\)"):
        hatify.extract(hat, 0)
    with pytest.raises(hatify.HatifyError, match="a converted model, not Linear"):
        hatify.extract(torch.nn.Linear(2, 2), 0)


def test_the_node_where_a_difference_begins_is_named() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3), torch.nn.ReLU()
    )
    x = torch.randn(4, 3, 8, 8)
    hat = finished(hatify.convert(net, 2, example_inputs=x, verify=False, heads="hat").eval(), 1)
    plain = hatify.extract(hat, 1)
    assert plain.extraction["inexact"] == inexact_nodes(hat, 1, plain, [x], [x]) == []
    with torch.no_grad():
        plain.get_submodule("3").weight.mul_(1.001)
    assert inexact_nodes(hat, 1, plain, [x], [x]) == ["_3"], "what follows from it is not named again"
