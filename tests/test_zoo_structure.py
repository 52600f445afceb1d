"""Work that is shared between names: models without weights, and digests that are equal only where the graph is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import zoo_networks
from torch import nn

import hatify
from hatify.snapshot import snapshot
from hatify.zoo import records
from hatify.zoo.entry import Entry
from hatify.zoo.from_timm import build
from hatify.zoo.hollow import build_hollow
from hatify.zoo.proving import prove
from hatify.zoo.structure import structure_of

X = torch.zeros(2, 3, 8, 8)


def _digest(model: nn.Module, inputs: torch.Tensor = X) -> str | None:
    return structure_of(model, (inputs,))


def test_a_hollow_model_is_the_model_without_its_weights() -> None:
    make = partial(timm.create_model, "swin_tiny_patch4_window7_224")
    hollow, model = build_hollow(make), make()
    assert {k: v.shape for k, v in hollow.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(hollow.buffers(), model.buffers()))
    assert type(hollow.head.fc.weight) is nn.Parameter and hollow.head.fc.weight.requires_grad
    # no initialisation: two of them differ from each other only by what memory held
    assert not torch.equal(model.layers[3].blocks[0].mlp.fc1.weight, hollow.layers[3].blocks[0].mlp.fc1.weight)
    assert nn.Linear(512, 512).weight.std() > 0, "afterwards layers are initialised as ever"
    tied = nn.Linear(512, 512)
    assert build_hollow(lambda: nn.ModuleList([tied, tied]))[0] is tied


def test_nothing_is_written_into_the_weights_of_a_hollow_model() -> None:
    def make() -> nn.Module:
        layer = nn.Linear(512, 512)  # torch.nn.init hands its tensor on by name
        layer.more = nn.Parameter(torch.empty(512, 512))
        nn.init.trunc_normal_(layer.more, std=0.02)
        layer.more.data.div_(2.0)
        layer.more.data[:, 0].zero_()
        return layer

    assert [p._version for p in build_hollow(make).parameters() if p.dim() == 2] == [0, 0]
    assert all(p._version > 0 for p in make().parameters()), "torch counts what is written"


def test_a_hollow_conversion_says_the_same() -> None:
    entry = zoo_networks.entry("Good")
    full = hatify.convert(entry.make(), 3, example_inputs=X, verify=False)
    hollow = hatify.convert(build_hollow(entry.build).train(), 3, example_inputs=X, verify=False, inplace=True)
    assert snapshot(hollow) == snapshot(full)


def test_what_decides_the_graph_is_in_the_digest() -> None:
    base = _digest(zoo_networks.Good())
    assert base is not None and base == _digest(zoo_networks.Good())
    wide = zoo_networks.Good()
    wide.head = nn.Linear(8, 5)
    eps = zoo_networks.Good()
    eps.norm.eps = 1e-3
    flagged = zoo_networks.Good()
    flagged.flag = True
    tabled = zoo_networks.Good()
    tabled.register_buffer("table", torch.tensor([0, 1]))
    other_table = zoo_networks.Good()
    other_table.register_buffer("table", torch.tensor([1, 0]))
    tied = zoo_networks.Good()
    tied.extra = tied.conv
    frozen = zoo_networks.Good().requires_grad_(False)
    other_class = zoo_networks.Undecided()
    functions = []
    for function in (torch.relu, nn.functional.gelu, partial(nn.functional.gelu, approximate="tanh"), lambda x: x, lambda x: x + 1):
        functions.append(zoo_networks.Good())
        functions[-1].act = function
    models = [wide, eps, flagged, tabled, other_table, tied, frozen, other_class, *functions]
    digests = [_digest(model) for model in models]
    assert None not in digests
    assert len({base, *digests}) == len(models) + 1, "each of these may be another graph"
    assert _digest(zoo_networks.Good(), torch.zeros(2, 3, 9, 9)) != base


def test_a_closure_is_what_it_closes_over() -> None:
    def scaled(by: float) -> nn.Module:
        model = zoo_networks.Good()
        model.act = lambda x: x * by
        return model

    assert _digest(scaled(2.0)) == _digest(scaled(2.0)) != _digest(scaled(3.0))


def test_what_cannot_be_compared_is_not_shared() -> None:
    model = zoo_networks.Good()
    model.thing = object()
    assert _digest(model) is None
    hidden = zoo_networks.Good()
    hidden.list = [nn.Linear(2, 2)]  # weights that no path names
    assert _digest(hidden) is None


def test_weights_do_not_decide_and_names_of_weights_neither() -> None:
    a, b = build("test_resnet"), build("test_resnet")
    b.pretrained_cfg = {**b.pretrained_cfg, "tag": "other"}
    x = torch.zeros(2, 3, 160, 160)
    assert _digest(a, x) == _digest(b, x) is not None


def test_one_conversion_answers_for_all_of_its_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = zoo_networks.entry("Good")
    record = prove(first, "conversion", known=tmp_path)
    assert record.verdict == "converted" and record.structure and record.shares is None and record.proof is None
    records.write(tmp_path, record, records.structure_key(record.structure))
    twin = Entry("timm", "twin", "invented", zoo_networks.Good, size=zoo_networks.SIZE)
    calls = []
    convert = hatify.conversion.convert
    monkeypatch.setattr(hatify, "convert", lambda *args, **options: calls.append(args) or convert(*args, **options))
    shared = prove(twin, "conversion", known=tmp_path)
    assert not calls and shared.shares == "timm/Good" and shared.key == "timm/twin"
    assert shared.snapshot == record.snapshot and shared.verdict == "converted"
    other = Entry("timm", "other", "invented", zoo_networks.Forgetful, size=zoo_networks.SIZE)
    assert prove(other, "conversion", known=tmp_path).shares is None and len(calls) == 1
