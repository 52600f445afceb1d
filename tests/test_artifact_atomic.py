import contextlib
import copy
import os
import random
import signal
import time
import traceback
import warnings

import pytest
import torch
from torch import nn

import hatify
from hatify.artifact import atomic, directory
from hatify.artifact.atomic import check_target, new_directory
from hatify.errors import ArtifactError, ArtifactWarning


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


def _last(a, b):
    return str(a).endswith(".tmp") and not os.path.exists(b)


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
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if _last(a, b) else rename(a, b))
    with pytest.raises(ArtifactError if isinstance(failure, OSError) else type(failure)) as caught:
        hatify.save(small, target, overwrite=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
        assert ("what was there is as it was" if existing else "nothing was left there") in caught.value.why
    assert os.listdir(tmp_path) == (["deep"] if existing else [])
    if existing:
        assert os.listdir(tmp_path / "deep") == ["saved"] and os.listdir(target) == ["mine.txt"]


def test_an_error_after_the_last_rename_says_that_the_new_one_is_there(small, tmp_path, monkeypatch):
    target, flush = hatify.save(small, tmp_path / "saved"), atomic._flush
    first = (target / "config.json").stat().st_ino

    def fail(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(atomic, "_flush", fail)
    with pytest.raises(ArtifactError, match="it is there, but"):
        hatify.save(small, target, overwrite=True)
    assert (target / "config.json").stat().st_ino != first and os.listdir(tmp_path) == ["saved"]
    hatify.load(target)


@pytest.mark.parametrize("forgotten", [False, True])
def test_every_file_is_on_disk_before_the_directory_has_its_name(small, tmp_path, monkeypatch, forgotten):
    flushed, renamed = set(), []
    fsync, swap = os.fsync, atomic._swap

    def seen(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def look(temporary, target, overwrite):
        renamed.append({p.name for p in (temporary, *temporary.iterdir()) if p.stat().st_ino not in flushed})
        swap(temporary, target, overwrite)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(atomic, "_swap", look)
    if forgotten:  # the look itself
        flush = atomic._flush
        monkeypatch.setattr(atomic, "_flush", lambda path: None if path.name == "gates.safetensors" else flush(path))
    hatify.save(small, tmp_path / "saved")
    assert renamed == [{"gates.safetensors"} if forgotten else set()]
    assert tmp_path.stat().st_ino in flushed


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
    with new_directory(tmp_path / "saved", overwrite=True) as mine:
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


def test_what_appears_meanwhile_is_not_replaced_unless_asked(small, tmp_path):
    for overwrite in (False, True):
        target = tmp_path / f"saved{overwrite}"
        caught = contextlib.nullcontext() if overwrite else pytest.raises(ArtifactError, match="exists")
        with caught, new_directory(target, overwrite) as temporary:
            (temporary / "mine.txt").write_text("mine")
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")
        assert os.listdir(target) == (["mine.txt"] if overwrite else ["theirs.txt"])
    assert sorted(os.listdir(tmp_path)) == ["savedFalse", "savedTrue"]


def test_a_file_system_without_locks_and_a_directory_that_somebody_holds(small, tmp_path, monkeypatch):
    import fcntl

    (tmp_path / ".saved.0123abcd.tmp").mkdir()
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as ``flock . command`` would
        hatify.save(small, tmp_path / "saved")
    finally:
        os.close(handle)

    def none(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("hatify.artifact.atomic.fcntl.flock", none)
    hatify.save(small, tmp_path / "saved", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".saved.0123abcd.tmp", "saved"]  # whose it is, nobody can say
    hatify.load(tmp_path / "saved")


def saving(target, who=0, exchange=True):
    """A process that saves again and again, numbers that end in ``who``; forked, since importing takes longer than a hundred saves."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if not exchange:
            atomic._exchange = lambda a, b: False
        hat, number = hatify.load(target), who
        while True:
            number += 10
            with torch.no_grad():
                hat.get_parameter("0.bias").fill_(number)
            hatify.save(hat, target, overwrite=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def killed(pid):
    """Kills a process that must be alive."""
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def bias_of(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)  # of a model card that another process is about to replace
        bias = hatify.load(target).get_parameter("0.bias").detach()
    assert torch.equal(bias, bias[:1].expand(6))
    return int(bias[0])


@pytest.fixture
def marked(small, tmp_path):
    hat = copy.deepcopy(small)
    with torch.no_grad():
        hat.get_parameter("0.bias").fill_(0)
    return hatify.save(hat, tmp_path / "saved")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@forks
def test_a_process_that_is_killed_leaves_the_old_directory_or_the_new_one(small, tmp_path, marked):
    chance, last, halves = random.Random(0), 0, 0
    for _ in range(12):
        pid = saving(marked)
        time.sleep(chance.uniform(0.1, 0.6))
        killed(pid)
        halves += len(os.listdir(tmp_path)) > 1
        last = max(last, bias_of(marked))
    assert last > 0 and halves > 0  # it did save, and was killed while it did
    hatify.save(small, marked, overwrite=True)
    assert os.listdir(tmp_path) == ["saved"]


@forks
@pytest.mark.parametrize("exchange", [True, False])
def test_two_that_save_and_are_killed_leave_one_whole_directory_and_loads_find_one(small, tmp_path, marked, exchange):
    chance, seen, processes = random.Random(exchange), set(), {}
    try:
        for _ in range(8):
            for who in {1, 2} - processes.keys():
                processes[who] = saving(marked, who, exchange)
            end = time.monotonic() + chance.uniform(0.2, 1.0)
            while time.monotonic() < end:
                try:
                    seen.add(bias_of(marked) % 10)
                except ArtifactError as error:  # between two renames nothing is there: such a system has no better
                    assert not exchange and "no saved model there" in str(error)
            killed(processes.pop(chance.choice([1, 2])))
    finally:
        for pid in processes.values():
            killed(pid)
    hatify.save(small, marked, overwrite=True)
    assert {1, 2} <= seen and os.listdir(tmp_path) == ["saved"]
    hatify.load(marked)


@forks
def test_a_directory_that_comes_and_goes_is_never_taken_for_a_file(tmp_path):
    """Another process may move it away between two questions to the system."""
    there, away = tmp_path / "saved", tmp_path / "away"
    there.mkdir()
    pid = os.fork()
    if not pid:
        while True:
            there.rename(away)
            away.rename(there)
    try:
        seen = set()
        for _ in range(20_000):
            assert check_target(there, overwrite=True) == there
            seen.add(there.exists())
    finally:
        killed(pid)
    assert seen == {True, False}


def test_a_full_disk_leaves_the_old_directory(small, tmp_path, monkeypatch):
    target = hatify.save(small, tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    left, writev = [100], os.writev

    def until_full(handle, parts):
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        count = writev(handle, [parts[0][: left[0]]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "writev", until_full)
    with pytest.raises(ArtifactError, match="No space left"):
        hatify.save(small, target, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before and os.listdir(tmp_path) == ["saved"]
