"""Commands on saved models: verify, usage, forget, prune, extract."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from learned import answers, changed, learned, state
from tasks import same
from test_cli import refused, run, work  # noqa: F401 (a fixture)

import hatify

FACTORY = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
    def forward(self, x):
        return self.head(torch.relu(self.conv2(torch.relu(self.norm1(self.conv1(x))))).mean((2, 3)))
def make():
    torch.manual_seed(0)
    return Net()
"""
OWN = ["--factory", "cli_net:make"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of three finished tasks, and what it answers."""
    room = tmp_path_factory.mktemp("saved")
    (room / "cli_net.py").write_text(FACTORY)
    sys.path.insert(0, str(room))
    try:
        from cli_net import make

        torch.manual_seed(0)
        hat = learned(hatify.convert(make(), 3, example_inputs=torch.randn(4, 3, 8, 8), verify=False).eval())
    finally:
        sys.path.remove(str(room))
    hatify.save(hat, room / "model")
    torch.save(make().state_dict(), room / "original.pt")
    return room, hat, answers(hat, range(3))


@pytest.fixture
def saved(model, work):  # noqa: F811
    import shutil

    room, _, _ = model
    for name in ("model", "cli_net.py", "original.pt"):
        (shutil.copytree if (room / name).is_dir() else shutil.copy)(room / name, work / name)
    return work / "model"


def loaded(path):
    from cli_net import make

    return hatify.load(path, factory=make).eval()


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_forget_changes_one_task_and_says_what(model, saved):
    _, hat, before = model
    stdout = run("forget", saved, "--task", 1, *OWN).stdout
    assert "conv2.weight" in stdout and "tasks forgotten: 1 (kept: 0, 2)" in stdout and str(saved) in stdout.replace("\n", "")
    after = loaded(saved)
    assert after.finished_tasks == {0, 2} and all(same(answers(after, [t])[t], before[t]) for t in (0, 2))
    assert not same(answers(after, [1])[1], before[1])
    assert {n for n in changed(after, state(hat)) if n.startswith("norm1")} <= {f"norm1.tasks.1.{n}" for n in dir(after.norm1)}


def test_a_dry_run_writes_nothing(saved):
    old = files(saved)
    report = json.loads(run("forget", saved, "--task", 1, "--dry-run", "--json", *OWN).stdout)
    assert report["dry_run"] and report["path"] is None and report["parameters"]["conv2.weight"]["count"] > 0
    assert "nothing was written" in run("prune", saved, "--keep", "0", "--dry-run", *OWN).stdout
    assert files(saved) == old


def test_prune_keeps_what_is_named(model, saved, work):  # noqa: F811
    _, _, before = model
    old = files(saved)
    report = json.loads(run("prune", saved, "--keep", "2", "--out", "small", "--json", *OWN).stdout)
    assert report["tasks"] == [0, 1] and report["path"] == str(work / "small") and files(saved) == old
    after = loaded(work / "small")
    assert after.finished_tasks == {2} and same(answers(after, [2])[2], before[2])


def test_reset_to_a_checkpoint(model, saved):
    _, hat, _ = model
    run("prune", saved, "--keep", "0", "--pretrained", "original.pt", *OWN)
    from cli_net import make

    free = (hat.locks([1])["conv2.weight"] | hat.locks([2])["conv2.weight"]) & ~hat.locks([0])["conv2.weight"]
    assert torch.equal(loaded(saved).conv2.weight[free], make().conv2.weight[free])


def test_extract_writes_nothing_among_the_models_own_files(saved, work, monkeypatch):  # noqa: F811
    old = files(saved)
    for option in ("--out", "--onnx"):
        stderr = refused("extract", saved, "--task", 1, option, saved / "inside.pt2", *OWN)
        assert "holds its own files and no others" in stderr and str(work / "inside.pt2") in stderr
    monkeypatch.chdir(saved)
    run("extract", ".", "--task", 1, *OWN)
    assert files(saved) == old and (work / f"{saved.name}-task1.pt2").is_file()
    run("forget", ".", "--task", 1, "--out", "../other", *OWN)
    refused("extract", ".", "--task", 1, "--out", ".", code=2)


@pytest.mark.parametrize("args", [["forget", "--task", "1"], ["prune", "--keep", "0"]])
def test_an_interrupted_run_leaves_the_old_directory_whole(saved, work, monkeypatch, args):  # noqa: F811
    old, listing = files(saved), sorted(os.listdir(work))
    from hatify.artifact import directory

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "write_tensors", interrupt)
    assert "interrupted" in refused(args[0], saved, *args[1:], *OWN, code=130)
    assert files(saved) == old and sorted(set(os.listdir(work)) - {"__pycache__"}) == listing


def test_refusals_write_nothing(saved):
    old = files(saved)
    assert "no task 7" in refused("forget", saved, "--task", 7, *OWN)
    assert "no task 5" in refused("prune", saved, "--keep", "0,5", *OWN)
    assert "no saved model" in refused("forget", "nowhere", "--task", 1)
    refused("prune", saved, "--keep", "none", *OWN, code=2)
    refused("forget", saved, code=2)
    (saved / "notes.txt").write_text("mine")
    stderr = refused("forget", saved, "--task", 1, *OWN)
    assert "notes.txt" in stderr and "--out" in stderr
    assert files(saved) == {**old, "notes.txt": b"mine"}


def test_usage_as_table_json_and_picture(saved, work):  # noqa: F811
    stdout = run("usage", saved, *OWN).stdout
    assert "conv2" in stdout and "task 2" in stdout and "free" in stdout
    data = json.loads(run("usage", saved, "--json", "--plot", "fill.png", *OWN).stdout)
    assert data["tasks"] == [0, 1, 2] and data["plot"] == "fill.png" and (work / "fill.png").stat().st_size > 1000


def test_verify_says_whether_the_promises_hold(saved, monkeypatch):
    old = files(saved)
    proof = json.loads(run("verify", saved, "--json", *OWN).stdout)
    assert proof["ok"] and proof["parity"] == 0 and proof["drift"] == 0 and proof["control"] > 0
    assert "equal to the bit" in run("verify", saved, *OWN).stdout and files(saved) == old
    exact = hatify.HATModel.locks
    monkeypatch.setattr(
        hatify.HATModel, "locks", lambda self, tasks, **how: exact(self, tasks, **{**how, "without": ("conv2.weight",)})
    )
    each = hatify.HATModel.each_lock
    monkeypatch.setattr(
        hatify.HATModel, "each_lock", lambda self, tasks, **how: each(self, tasks, **{**how, "without": ("conv2.weight",)})
    )
    assert not json.loads(run("verify", saved, "--json", *OWN, code=1).stdout)["ok"]


def test_extract_writes_programs_and_weights(model, saved, work):  # noqa: F811
    _, hat, _ = model
    x = torch.randn(5, 3, 8, 8)
    expected = hat(x, task=1).detach()
    report = json.loads(run("extract", saved, "--task", 1, "--json", *OWN).stdout)
    assert report["written"] == ["model-task1.pt2"] and report["task"] == 1
    torch.testing.assert_close(torch.export.load(work / "model-task1.pt2").module()(x), expected)
    assert "model-task1.pt2 exists" in refused("extract", saved, "--task", 1, *OWN)
    run("extract", saved, "--task", 1, "--force", "--out", "weights.safetensors", *OWN)
    from safetensors.torch import load_file

    assert load_file(work / "weights.safetensors")["conv2.weight"].shape == (8, 8, 3, 3)
    refused("extract", saved, "--task", 1, "--out", "x.bin", code=2)
    assert "no such directory" in refused("extract", saved, "--task", 1, "--out", "none/x.pt2", *OWN)
    assert not any(name.startswith(".") for name in os.listdir(work))


def test_extract_writes_onnx(model, saved, work):  # noqa: F811
    import onnxruntime

    _, hat, _ = model
    stdout = run("extract", saved, "--task", 2, "--onnx", "task.onnx", *OWN).stdout
    assert "task.onnx" in stdout and not (work / "model-task2.pt2").exists()
    session = onnxruntime.InferenceSession(work / "task.onnx")
    for size in (2, 5):
        x = torch.randn(size, 3, 8, 8)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), hat(x, task=2).detach())


@pytest.mark.parametrize(
    "args",
    [
        ["extract", "--task", 1],
        ["extract", "--task", 1, "--slim", "--onnx", "task.onnx"],
        ["extract", "--task", 1, "--out", "task.safetensors"],
        ["forget", "--task", 1],
        ["prune", "--keep", "0", "--out", "other"],
    ],
    ids=lambda args: " ".join(map(str, args)),
)
def test_no_room_on_the_disk(saved, work, monkeypatch, args):  # noqa: F811
    import resource

    old, listing = files(saved), sorted(os.listdir(work))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses to write more into any file
    try:
        stderr = refused(args[0], saved, *args[1:], *OWN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in stderr and "free some space" in stderr
    assert files(saved) == old and sorted(set(os.listdir(work)) - {"__pycache__"}) == listing


def test_tasks_that_are_not_finished_are_refused_with_a_command(saved, work):  # noqa: F811
    run("forget", saved, "--task", 1, "--out", "two", *OWN)
    for args in (["extract", "two", "--task", 1], ["forget", "two", "--task", 1], ["prune", "two", "--keep", "1"]):
        stderr = refused(*args, *OWN)
        assert "hatify usage two" in stderr and "hatify.load('two')" in stderr
    hatify.save(hatify.convert(torch.nn.Linear(2, 2), 2, example_inputs=torch.randn(2, 2), verify=False), work / "fresh")
    assert "no task is finished yet" in refused("extract", "fresh", "--task", 0)


def test_extraction_says_what_was_kept_and_where_it_differs(saved, capsys):
    from hatify.cli.render import print_extraction

    stdout = run("extract", saved, "--task", 1, "--slim", *OWN).stdout
    assert "kept, in 3 layers" in stdout
    report = {"task": 0, "slim": True, "parameters": {"before": 9, "after": 5}, "slimmed": [], "folded": [], "bit_equal": False}
    whole = [{"node": f"node{n}", "where": "", "why": "channels are drawn"} for n in range(8)]
    told = {"stayed": [], "whole": whole, "difference": 1e-7, "inexact": ["fc"], "renamed": {"code": "code_"}, "notes": []}
    print_extraction({**report, **told}, [])
    shown = capsys.readouterr().out
    assert "code is code_" in shown
    assert "node0, node1, node2, node3, node4, node5 and 2 more: channels are drawn" in shown and "begins at         fc" in shown
