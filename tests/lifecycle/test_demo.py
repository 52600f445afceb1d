"""The demo, with fewer tasks and epochs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from test_cli import refused, run

import hatify.demo
from hatify.errors import HatifyError
from hatify.lifecycle import forgetting


@pytest.fixture
def short(monkeypatch):
    exact = hatify.demo.demonstrate
    monkeypatch.setattr(hatify.demo, "TASKS", 3)
    monkeypatch.setattr(hatify.demo, "demonstrate", lambda seed, tell: exact(seed, tell, epochs=1))


def test_nothing_is_forgotten_and_then_one_task_is(short):
    shown = json.loads(run("demo", "--json").stdout)
    rows = [row["accuracies"] for row in shown["rows"]]
    assert shown["learned_equal"] and shown["forgotten_equal"] and shown["forgetting"] == 0.0
    assert [sum(a is not None for a in row) for row in rows] == [1, 2, 3, 3]
    assert all(rows[3][task] == rows[2][task] == rows[task][task] for task in range(1, 3))
    assert all(0 < row["used"] <= 100 for row in shown["rows"]) and shown["freed"]["copies"] > 0


def test_it_learns_on_one_thread_and_puts_the_number_back(monkeypatch):
    monkeypatch.setattr(hatify.demo, "TASKS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = {}
        hatify.demo.demonstrate(tell=lambda step, share: seen.setdefault(step, torch.get_num_threads()), epochs=1)
        assert seen["learn task 0"] == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_change_of_another_task_is_an_error(short, monkeypatch):
    """The control: a lock that is left out when task 0 is forgotten."""
    exact = forgetting.shared_weights
    monkeypatch.setattr(forgetting, "shared_weights", lambda network, tasks, kept: exact(network, tasks, []))
    stdout = run("demo", code=1).stdout
    assert "CHANGED" in stdout and "after forgetting task 0" in stdout


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(HatifyError, match="scikit-learn"):
        hatify.demo.demonstrate()
    assert "hatify[demo]" in refused("demo")
