"""The Hub's methods, offline: local directories, and a Hub that is a directory."""

import os
import shutil

import huggingface_hub
import pytest
import torch
from torch import nn

import hatify
from hatify.errors import ArtifactError


@pytest.fixture(scope="module")
def hat():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 4), verify=False).eval()


def same(hat, other):
    mine, theirs = hat.state_dict(), other.state_dict()
    x = torch.randn(5, 4)
    assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert isinstance(other, hatify.HATModel) and torch.equal(hat(x, task=1), other(x, task=1))


def test_a_directory_is_written_replaced_and_read(hat, tmp_path):
    for _ in range(2):
        hat.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    same(hat, hatify.HATModel.from_pretrained(tmp_path / "saved"))
    half = hatify.HATModel.from_pretrained(str(tmp_path / "saved"), dtype=torch.float16, device="cpu")
    assert half.get_parameter("0.weight").dtype == torch.float16
    (tmp_path / "saved" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not the model's") as caught:
        hat.save_pretrained(tmp_path / "saved")
    assert caught.value.where == "mine.txt"
    assert (tmp_path / "saved" / "mine.txt").read_text() == "mine"


def test_an_option_that_nobody_knows_is_refused(hat, tmp_path):
    with pytest.raises(TypeError, match="'dtpye'"):
        hat.save_pretrained(tmp_path / "saved", dtpye=torch.float16)
    assert not (tmp_path / "saved").exists()
    hat.save_pretrained(tmp_path / "saved", commit_message="unused")


def test_what_is_pushed_can_be_pulled_through_the_links_of_the_cache(hat, tmp_path, monkeypatch):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["created"] = repo_id, options
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, folder_path, repo_id, **options):
        calls["uploaded"] = repo_id, options["commit_message"]
        shutil.copytree(folder_path, blobs)
        snapshot.mkdir(parents=True)
        for name in os.listdir(blobs):
            (snapshot / name).symlink_to(blobs / name)
        return "commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(snapshot))
    assert hat.push_to_hub("me/model", commit_message="first") == "commit"
    assert calls["created"][0] == calls["uploaded"][0] == "me/model" and calls["uploaded"][1] == "first"
    assert huggingface_hub.ModelCard.load(blobs / "README.md").data.library_name == "hatify"
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda *args, **options: str(snapshot / "config.json"))
    same(hat, hatify.HATModel.from_pretrained("me/model"))
    assert os.listdir(snapshot.parent) == ["main"]


@pytest.mark.parametrize("writable", [True, False])
def test_the_cache_of_the_hub_is_read_offline(hat, tmp_path, monkeypatch, writable):
    """As huggingface_hub lays it out and finds it again, with relative links; a shared one may be read-only."""
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--me--model"
    saved, snapshot = hat.save_pretrained(tmp_path / "saved"), repository / "snapshots" / revision
    assert saved is None
    shutil.copytree(tmp_path / "saved", repository / "blobs")
    snapshot.mkdir(parents=True)
    for name in os.listdir(repository / "blobs"):
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", name))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)

    made, original = [], os.link
    monkeypatch.setattr(os, "access", lambda path, mode, **options: writable)  # root may write anywhere
    monkeypatch.setattr(os, "link", lambda source, target: (made.append(target), original(source, target)))
    same(hat, hatify.HATModel.from_pretrained("me/model", cache_dir=tmp_path / "cache", local_files_only=True))
    assert made and all((repository in target.parents) == writable for target in made)
    assert os.listdir(repository / "snapshots") == [revision]
