"""The traps of capture and surgery: what a graph module loses, and what capture must not do to the user's model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trap_networks as traps
from networks import NETWORKS
from tasks import converted, draw_masks, fill_masks, outputs, same, small
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hatify
from hatify.errors import CallError, CaptureError, ConversionError, HatifyError
from hatify.verification import measure_drift

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """The model in the middle of a training: gradients, caches, mixed modes, a frozen parameter."""
    model.train()
    model(VECTORS).sum().backward()
    next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).eval()
    return model


def fingerprint(model: nn.Module) -> list[tuple]:
    """All there is to see of a model: attributes, identities and bits of tensors, gradients, modes, hooks."""

    def seen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (
                "tensor",
                id(value),
                value.requires_grad,
                value._version,
                id(value.grad) if value.is_leaf else None,
                value.tolist(),
            )
        if isinstance(value, nn.Module):
            return "module", id(value)
        if isinstance(value, dict):
            return "dict", [(k, seen(v)) for k, v in value.items()]
        if isinstance(value, list | tuple | set):
            return type(value).__name__, [seen(v) for v in value]
        return repr(value)

    return [(name, id(m), type(m), [(k, seen(v)) for k, v in vars(m).items()]) for name, m in model.named_modules()]


# what a graph module loses


@pytest.mark.parametrize("inplace", [False, True])
def test_keys_their_order_aliases_and_shares_are_the_originals(inplace: bool) -> None:
    model = traps.Odd()
    state, names = model.state_dict(), [n for n, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [n for n, _ in model.named_buffers()]
    values = {k: v.clone() for k, v in state.items()}
    hat = converted(model, VECTORS, inplace=inplace)
    got = hat.state_dict()
    assert [k for k in got if k in values] == list(values)
    assert all(torch.equal(got[k], v) for k, v in values.items())
    assert [n for n, _ in hat.named_parameters(remove_duplicate=False) if n in names] == names
    assert [n for n, _ in hat.named_buffers() if n in buffers] == buffers
    assert hat.alias is hat.fc1 and hat.tied.weight is hat.fc1.weight
    assert "scratch" not in got and torch.equal(hat.scratch, model.scratch)
    assert [p.data_ptr() for p in model.parameters()] != [p.data_ptr() for p in hat.parameters()]


@pytest.mark.parametrize(
    "name", ["unused_parameters", "tied_by_attribute", "layer_scale_tokens", "batchnorm_variants", "weight_norm"]
)
def test_state_dict_round_trip(name: str) -> None:
    hat, args, kwargs = small(name)
    draw_masks(hat)
    hat.finished_tasks.add(1)
    other = small(name)[0]
    assert not same(outputs(hat, args, kwargs, task=0), outputs(other, args, kwargs, task=0))
    other.load_state_dict(copy.deepcopy(hat.state_dict()), strict=True)
    for task in (None, 0, 1):
        assert same(outputs(hat, args, kwargs, task=task), outputs(other, args, kwargs, task=task))
    assert other.finished_tasks == {1}


# no trace on the user's model


def test_conversion_leaves_no_trace() -> None:
    model = trained(traps.Caching())
    before, rng, apply = fingerprint(model), torch.get_rng_state(), torch.autograd.Function.apply
    hat = hatify.convert(model, 2, example_inputs=VECTORS)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.autograd.Function.apply == apply and torch.is_grad_enabled()
    assert all(p.grad is None for p in hat.parameters())
    assert not hat.fc.weight.requires_grad


def test_the_fingerprint_sees_traces() -> None:
    """The negative control."""
    model = trained(traps.Caching())
    for change in (lambda: model.seen.append(1), lambda: model.norm(VECTORS @ torch.ones(6, 8)), model.eval, model.zero_grad):
        before = fingerprint(model)
        change()
        assert fingerprint(model) != before


def test_a_failed_capture_leaves_no_trace_either() -> None:
    class Undecided(traps.Caching):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + 1 if x.sum() > 0 else x

    model = trained(Undecided())
    before, rng, apply = fingerprint(model), torch.get_rng_state(), torch.autograd.Function.apply
    with pytest.raises(HatifyError, match="x.sum"):
        converted(model, VECTORS)
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), rng)
    assert torch.autograd.Function.apply == apply and torch.is_grad_enabled()


def test_a_hook_that_stores_on_the_model_leaves_no_trace() -> None:
    """The user's own hook runs while tracing; what it put on the model must be taken back."""
    model = traps.Named("fc")
    model.fc.register_forward_hook(lambda module, args, out: setattr(model, "feature", out))
    model(VECTORS)
    feature = model.feature
    hat = converted(model, VECTORS)
    assert model.feature is feature
    hat(VECTORS, task=0)
    assert model.feature is feature


def test_a_converted_model_shares_nothing_with_the_original() -> None:
    model = traps.Odd()
    expected = model.eval()(VECTORS)
    hat = converted(model, VECTORS)
    with torch.no_grad():
        for tensor in (*hat.parameters(), *hat.buffers()):
            tensor.zero_()
    assert torch.equal(model(VECTORS), expected)


# batch size and mode are not baked in


@pytest.mark.parametrize("captured", [1, 2, 4])
def test_batch_size_is_open(captured: int) -> None:
    model = traps.BatchBaked().eval()
    hat = converted(copy.deepcopy(model), VECTORS[:captured])
    for batch in (1, 2, 3, 4, 7):
        x = torch.randn(batch, 6)
        assert torch.equal(model(x), hat(x))
        assert hat(x, task=0).shape == (batch, 3)


@pytest.mark.parametrize("converted_in", ["train", "eval"])
def test_the_mode_is_read_at_run_time(converted_in: str) -> None:
    model = traps.BatchBaked().train(converted_in == "train")
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=VECTORS, verify=False)
    assert hat.training == model.training
    for mode in (True, False, True):
        model.train(mode), hat.train(mode)
        for task in (None, 0):
            fill_masks(hat, 1.0)
            results = []
            for call in (lambda: model(VECTORS), lambda t=task: hat(VECTORS, task=t)):
                torch.manual_seed(3)
                results.append(call())
            torch.testing.assert_close(*results, rtol=0 if task is None else 1e-5, atol=0 if task is None else 1e-6)


# calls that the capture did not see


def test_another_branch_is_refused_with_its_source_line() -> None:
    hat = converted(traps.Branching(), IMAGES)
    assert hat(IMAGES[:, :, :2]).shape == (2, 3)  # another size, the same branch
    with pytest.raises(CallError) as refused:
        hat(IMAGES.transpose(2, 3))
    assert "trap_networks.py" in refused.value.where and "if x.shape[-1] > x.shape[-2]" in refused.value.where


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((), {"mask": torch.ones(8)}, "mask"),
        ((), {"scale": 2.0}, "scale"),
        ((), {"features": True}, "features"),
        ((), {"other": 1}, "other"),
        ((torch.ones(8),), {}, "mask"),
    ],
)
def test_arguments_that_were_not_captured_are_refused(args: tuple, kwargs: dict, named: str) -> None:
    hat = converted(traps.Optional(), VECTORS)
    assert torch.equal(hat(VECTORS), hat(x=VECTORS, mask=None, scale=1.0, features=False))
    with pytest.raises(CallError, match=named):
        hat(VECTORS, *args, **kwargs)


@pytest.mark.parametrize("wrong", [VECTORS[0], VECTORS.long(), torch.randn(4, 7)], ids=["rank", "type", "width"])
def test_tensors_that_do_not_fit_the_capture_are_refused(wrong: Tensor) -> None:
    with pytest.raises(CallError):
        converted(traps.Optional(), VECTORS)(wrong)


@pytest.mark.parametrize(
    ("make", "inputs", "named"),
    [
        (traps.ClipsItsWeight, VECTORS, "gain"),
        (lambda: traps.Looks(torch.nn.functional.embedding), torch.arange(6).view(2, 3), "table"),
        (lambda: traps.Looks(torch.nn.functional.embedding_bag), torch.arange(6).view(2, 3), "table"),
    ],
    ids=["clip", "embedding", "embedding bag"],
)
def test_a_forward_that_writes_into_a_parameter_is_refused(make: Any, inputs: Tensor, named: str) -> None:
    with pytest.raises(CaptureError, match=f"writes into the parameter {named}") as refused:
        converted(make(), inputs)
    assert "trap_networks.py" in refused.value.where and "TaskIndexedLayer" in refused.value.fix


# types, devices, copies

TYPED = ["grouped_query_attention", "coord_conv", "hand_written_rmsnorm", "cumsum_tokens", "transformer_encoder_norm_first",
         "relative_position_bias", "mutating_buffer", "weight_norm"]  # fmt: skip
DTYPES = [("typed constants", t) for t in (torch.float16, torch.bfloat16)] + [
    (n, torch.float64) for n in ("typed constants", *TYPED)
]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_another_dtype_is_that_of_the_original(name: str, dtype: torch.dtype) -> None:
    model, inputs = (traps.Typed(), VECTORS) if name == "typed constants" else (NETWORKS[name].make(), NETWORKS[name].inputs(3))
    hat = converted(copy.deepcopy(model), inputs)
    args, kwargs = cast(hat.example_inputs, dtype)
    model, hat = model.to(dtype).eval(), hat.to(dtype)
    assert same(outputs(model, args, kwargs), outputs(hat, args, kwargs))
    draw_masks(hat)
    for scale in (None, 20.0):
        assert all(t.isfinite().all() for t in outputs(hat, args, kwargs, task=0, mask_scale=scale) if t.is_floating_point())
    assert all(not t.is_floating_point() or t.dtype == dtype for t in outputs(hat, args, kwargs, task=0))


@pytest.mark.parametrize("name", ["layer_scale_tokens", "batchnorm_variants", "tied_by_attribute", "mutating_buffer"])
def test_a_deep_copy_is_independent(name: str) -> None:
    hat, args, kwargs = small(name)
    draw_masks(hat)
    hat.finished_tasks.add(1)
    copied = copy.deepcopy(hat)
    before = outputs(hat, args, kwargs, task=0)
    assert same(before, outputs(copied, args, kwargs, task=0)) and copied.finished_tasks == {1}
    held = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (hat, copied)]
    assert not held[0] & held[1]
    copied.finished_tasks.clear()
    with torch.no_grad():
        for tensor in copied.parameters():
            tensor.zero_()
    assert same(before, outputs(hat, args, kwargs, task=0)) and hat.finished_tasks == {1}
    assert list(copied.state_dict()) == list(hat.state_dict())


# constants of the two modes


class ConstantsOfModes(nn.Module):
    """Each mode makes other constants, in another order; some are alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 4), nn.Linear(4, 3)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = (
                x * torch.tensor([1.0, 2.0, 3.0, 4.0])[: self.width].mean()
                + torch.tensor([float("nan"), 1.0]).nan_to_num(2.0).sum()
            )
        return self.h(x + torch.tensor([9.0, 8.0, 7.0, 6.0]))


@pytest.mark.parametrize("width", [2, 4])
def test_each_mode_reads_its_own_constants(width: int, tmp_path: Path) -> None:
    model = ConstantsOfModes(width)
    hat = hatify.convert(model, 2, example_inputs=VECTORS)
    assert hat.verification.ok and hat.train_graph is not None
    hatify.save(hat, tmp_path / "saved")
    loaded = hatify.load(tmp_path / "saved")
    for mode in (False, True):
        wanted = model.train(mode)(VECTORS)
        assert torch.equal(wanted, hat.train(mode)(VECTORS)) and torch.equal(wanted, loaded.train(mode)(VECTORS))


# copies per task


@pytest.mark.parametrize("name", ["layer_scale_tokens", "batchnorm_variants", "spectral_norm", "functional_weights", "prelu"])
def test_load_pretrained_reaches_every_copy(name: str) -> None:
    hat, args, kwargs = small(name)
    with torch.no_grad():
        for parameter in hat.parameters():
            parameter.mul_(0.0)
    fresh = NETWORKS[name].make().eval()
    hat.load_pretrained(fresh.state_dict())
    fill_masks(hat, 1.0, task=0), fill_masks(hat, 1.0, task=1)
    assert same(outputs(fresh, args, kwargs), outputs(hat, args, kwargs))
    for task in (0, 1):
        for wanted, got in zip(outputs(fresh, args, kwargs), outputs(hat, args, kwargs, task=task)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="checkpoint"):
        hat.load_pretrained({**fresh.state_dict(), "another": torch.zeros(1)})


@pytest.mark.parametrize("name", ["layer_scale_tokens", "batchnorm_variants", "spectral_norm", "text_gru", "unused_parameters"])
def test_task_copies_own_their_memory(name: str) -> None:
    hat, *_ = small(name, tasks=3)
    seen: dict[int, str] = {}
    for key, tensor in [*hat.named_parameters(), *hat.named_buffers()]:
        if tensor.numel():
            assert tensor.untyped_storage().data_ptr() not in seen, f"{key} and {seen[tensor.untyped_storage().data_ptr()]}"
            seen[tensor.untyped_storage().data_ptr()] = key


def test_an_expanded_parameter_gets_memory_per_task() -> None:
    model = nn.Sequential(nn.Linear(6, 8), traps.Scale(1.0), nn.Linear(8, 3))
    model[1].scale = nn.Parameter(torch.ones(1).expand(8))
    hat = converted(model, VECTORS)
    copies = [hat.indexed("1.scale").of(t) for t in (0, 1)]
    with torch.no_grad():
        copies[0][0] = 7.0
    assert copies[1].tolist() == [1.0] * 8 and copies[0].tolist() == [7.0] + [1.0] * 7


def test_a_table_that_is_a_layers_weight_too() -> None:
    tokens = torch.arange(10).view(2, 5) % 5
    hat = converted(traps.LookupAndLinear(), tokens)
    fill_masks(hat, 1.0)
    torch.testing.assert_close(hat(tokens, task=0), hat(tokens))
    assert [measure_drift(hat, seed=s)[0] for s in range(3)] == [0.0] * 3


class WritesOut(nn.Module):
    """An operator that writes its result over a buffer, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            with torch.no_grad():
                torch.div(x.sum(0), x.shape[0], out=self.mean)
        return self.head(torch.relu(x - self.mean.clone()))


def test_out_is_a_write_and_stays_outside_of_the_gradients() -> None:
    hat = hatify.convert(WritesOut().train(), 2, example_inputs=torch.randn(3, 4))
    assert hat.verification.parity_train == 0.0 and hat.verification.gradients == 0.0 and hat.verification.ok


EVERYWHERE: list[nn.Module] = []


class Leaky(nn.Module):
    """A neuron with a state, reset through a list of all neurons, as spiking networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3, 8), persistent=False)
        EVERYWHERE.append(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = 0.9 * self.state + x
        return torch.sigmoid(self.state)


class Spiking(nn.Module):
    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.layers, self.everywhere = nn.Sequential(nn.Linear(5, 8), Leaky(), nn.Linear(8, 2)), everywhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in EVERYWHERE if self.everywhere else self.modules():
            if isinstance(module, Leaky):
                module.state = torch.zeros_like(module.state)
        self.layers(x)
        return self.layers(x)


def test_what_is_reached_past_the_model_is_put_back_and_refused() -> None:
    EVERYWHERE.clear()
    model, x = Spiking(everywhere=True), torch.randn(3, 5)
    before, state = model(x), model.layers[1].state
    with pytest.raises(CaptureError, match="writes to its modules past its own tree") as error:
        hatify.convert(model, tasks=2, example_inputs=x)
    assert error.value.where == "layers.1.state"
    assert model.layers[1].state is state and torch.equal(model(x), before)
    EVERYWHERE.clear()
    hatify.convert(Spiking(everywhere=False), tasks=2, example_inputs=x)


class Expanded(nn.Module):
    """A buffer whose rows are one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.rand(8).expand(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) * self.scale)


def test_a_buffer_that_is_an_expanded_view(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    hat = hatify.convert(Expanded(), tasks=2, example_inputs=x)
    draw_masks(hat)
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    before = hat(x, task=0)
    assert hatify.verify(hat).ok and same(hat(x, task=0), before)
    for slim in (False, True):
        assert torch.allclose(hatify.extract(hat, 0, slim=slim)(x), before, atol=1e-6)
    hatify.save(hat, tmp_path / "hat")
    assert same(hatify.load(tmp_path / "hat").eval()(x, task=0), before)
    hatify.forget_task(hat, 0)
