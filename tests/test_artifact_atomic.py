import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import hatify
from hatify.artifact import directory
from hatify.artifact.atomic import check_target, new_directory
from hatify.errors import ArtifactError


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 4), verify=False)


# Whole or not at all


def test_an_existing_directory_is_kept_unless_asked(small, tmp_path):
    target = tmp_path / "saved"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        hatify.save(small, target)
    assert os.listdir(target) == ["mine.txt"]
    hatify.save(small, target, overwrite=True)
    assert "mine.txt" not in os.listdir(target)
    assert os.listdir(tmp_path) == ["saved"]


def test_parents_are_made_and_a_link_is_followed(small, tmp_path):
    hatify.save(small, tmp_path / "a" / "b" / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "saved")
    hatify.save(small, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    hatify.load(tmp_path / "link")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("point", ["write_tensors", "_swap", "_exchange", "rename"])
def test_a_failure_leaves_everything_as_it_was(small, tmp_path, monkeypatch, failure, existing, point):
    target = tmp_path / "deep" / "saved"
    if existing:
        target.mkdir(parents=True)
        (target / "mine.txt").write_text("mine")

    def fail(*args, **kwargs):
        raise failure

    if point == "write_tensors":
        monkeypatch.setattr(directory, "write_tensors", fail)
    elif point == "_swap" or (point == "_exchange" and existing):
        monkeypatch.setattr(f"hatify.artifact.atomic.{point}", fail)
    else:  # the last rename of all, after the old directory has been moved away
        monkeypatch.setattr("hatify.artifact.atomic._exchange", lambda a, b: False)
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if str(a).endswith(".tmp") else rename(a, b))
    with pytest.raises(ArtifactError if isinstance(failure, OSError) else type(failure)) as caught:
        hatify.save(small, target, overwrite=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == (["deep"] if existing else [])
    if existing:
        assert os.listdir(tmp_path / "deep") == ["saved"] and os.listdir(target) == ["mine.txt"]


def test_precious_directories_are_never_replaced(tmp_path, monkeypatch):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for path in (".", "..", tmp_path / "work"):
        with pytest.raises(ArtifactError, match="is or contains"):
            check_target(path, overwrite=True)
    assert not check_target("new").exists()


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="file"):
            check_target(path, overwrite=True)


def test_a_directory_appears_with_the_usual_permissions(tmp_path):
    with new_directory(tmp_path / "new") as temporary:
        (temporary / "x").write_text("x")
        assert not (tmp_path / "new").exists()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_without_exchange_two_renames_do(small, tmp_path, monkeypatch):
    monkeypatch.setattr("hatify.artifact.atomic._exchange", lambda a, b: False)
    for _ in range(2):
        hatify.save(small, tmp_path / "saved", overwrite=True)
    assert os.listdir(tmp_path) == ["saved"]
    hatify.load(tmp_path / "saved")


def test_what_a_killed_process_left_goes_with_the_next_save_and_what_a_living_one_writes_stays(small, tmp_path):
    (tmp_path / ".saved.0123abcd.tmp").mkdir()
    (tmp_path / ".saved.0123abcd.tmp" / "half").write_text("x")
    (tmp_path / ".other.0123abcd.tmp").mkdir()
    with new_directory(tmp_path / "saved") as mine:
        hatify.save(small, tmp_path / "saved")
        assert mine.is_dir()
        mine.joinpath("x").write_text("x")
    assert sorted(os.listdir(tmp_path)) == [".other.0123abcd.tmp", "saved"]
    assert os.listdir(tmp_path / "saved") == ["x"]


def test_after_a_kill_between_two_renames_the_old_directory_comes_back(tmp_path):
    (tmp_path / ".saved.0123abcd.old").mkdir()
    (tmp_path / ".saved.0123abcd.old" / "mine.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "saved"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["saved"] and os.listdir(tmp_path / "saved") == ["mine.txt"]


SAVING = """
import sys, torch
from torch import nn
import hatify
hat = hatify.load(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    with torch.no_grad():
        hat.get_parameter("0.bias").fill_(number)
    hatify.save(hat, sys.argv[1], overwrite=True)
"""


def test_a_process_that_is_killed_leaves_the_old_directory_or_the_new_one(small, tmp_path):
    target = hatify.save(small, tmp_path / "saved")
    chance, last, killed = random.Random(0), 0.0, 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(target)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left = [name for name in os.listdir(tmp_path) if name != "saved"]
        killed += bool(left)
        bias = hatify.load(target).get_parameter("0.bias").detach()
        assert torch.equal(bias, bias[:1].expand(6)) or torch.equal(bias, small.get_parameter("0.bias"))
        last = max(last, float(bias[0]))
    assert last >= 1  # it did save
    hatify.save(small, target, overwrite=True)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_full_disk_leaves_the_old_directory(small, tmp_path, monkeypatch):
    target = hatify.save(small, tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 100

        def write(self, data):
            if self.left <= 0:
                raise OSError(28, "No space left on device")
            count = self.file.write(data[: self.left])
            self.left -= count
            return count

        def __getattr__(self, name):
            return getattr(self.file, name)

    from hatify.artifact import tensors

    original = tensors._write
    monkeypatch.setattr(tensors, "_write", lambda file, data, digest: original(Full(file), data, digest))
    with pytest.raises(ArtifactError, match="No space left"):
        hatify.save(small, target, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before and os.listdir(tmp_path) == ["saved"]
