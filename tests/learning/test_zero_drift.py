"""Finished tasks give the same to the last bit, whatever is trained after them; every scenario moves them without the guard."""

from __future__ import annotations

import pytest
from training import ARCHITECTURES, OPTIMIZERS, SMALLEST, defenceless, equal, learn, network, outputs

PROTECTED = pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])


@PROTECTED
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, optimizer: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    three_tasks(name, optimizer, protected, monkeypatch)


@PROTECTED
@pytest.mark.parametrize("clear", [True, False], ids=["grad None", "grad zero"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SMALLEST)
def test_optimizers(name: str, optimizer: str, clear: bool, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    three_tasks(name, optimizer, protected, monkeypatch, clear=clear)


def three_tasks(name: str, optimizer: str, protected: bool, monkeypatch: pytest.MonkeyPatch, **how: bool) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat = network(name)
    carried = OPTIMIZERS[optimizer](list(hat.parameters()))
    learn(hat, name, 0, carried, **how)
    before = outputs(hat, name, 0)
    learn(hat, name, 1, carried, **how)
    second = outputs(hat, name, 1)
    assert equal(outputs(hat, name, 0), before) == protected
    learn(hat, name, 2, carried, **how)
    assert equal(outputs(hat, name, 0), before) == protected
    assert equal(outputs(hat, name, 1), second) == protected
    assert not equal(outputs(hat, name, 2), outputs(hat, name, 1)), "the probe tells tasks apart"
