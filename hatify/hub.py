"""The Hub: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a HAT model, through huggingface_hub's own mixin."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelHubMixin

if TYPE_CHECKING:
    from hatify.model import HATModel

__all__ = ["HubMethods"]

PUSHING = ("commit_message", "private", "token", "branch", "create_pr", "allow_patterns", "ignore_patterns", "delete_patterns")
"""Options of huggingface_hub's ``push_to_hub`` that are taken."""


class HubMethods(ModelHubMixin, library_name="hatify", tags=["continual-learning", "hard-attention-to-the-task"]):
    """What a HAT model has of the Hub. ``from_pretrained`` takes a directory or a name on the Hub, and what :func:`hatify.load` takes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> HubMethods:
        return object.__new__(cls)  # the mixin would take the constructor's arguments for a configuration

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **options: Any) -> str | None:
        """Writes the directory that :func:`hatify.save` writes; an existing one is replaced if it holds such a model and nothing else.

        Args:
            save_directory: where to.
            push_to_hub: upload it too; ``repo_id`` and further ``options`` are those of ``push_to_hub``.
            options: ``dtype`` and ``max_shard_size`` are those of :func:`hatify.save`.

        Raises:
            ArtifactError: as :func:`hatify.save`, or the directory holds other files.
            TypeError: an option that is none of these.
        """
        from hatify.artifact.directory import check_only_ours, save

        target = Path(save_directory)
        own = {key: options.pop(key) for key in ("dtype", "max_shard_size") if key in options}
        options.pop("config", None), options.pop("model_card_kwargs", None)
        unknown = next((name for name in options if name not in ("repo_id", *PUSHING)), None)
        if unknown is not None:
            raise TypeError(f"save_pretrained() has no option {unknown!r}")
        check_only_ours(target, "give another directory, or move these files away")
        save(self, target, overwrite=target.is_dir(), **own)
        if push_to_hub:
            return self.push_to_hub(options.pop("repo_id", target.name), **options)
        return None

    def push_to_hub(self, repo_id: str, *, dtype: Any = None, max_shard_size: int | str = "5GB", **options: Any) -> str:
        """Uploads the directory that :func:`hatify.save` writes.

        Args:
            repo_id: ``user/name``.
            dtype, max_shard_size: those of :func:`hatify.save`.
            options: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr``, ``allow_patterns``, ``ignore_patterns``,
                ``delete_patterns`` of huggingface_hub.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        from hatify.artifact.directory import save

        api = HfApi(token=options.pop("token", None))
        repo_id = api.create_repo(repo_id=repo_id, private=options.pop("private", None), exist_ok=True).repo_id
        message = options.pop("commit_message", "Upload with hatify")
        with tempfile.TemporaryDirectory() as directory:
            path = save(self, Path(directory, "model"), dtype=dtype, max_shard_size=max_shard_size)
            branch = options.pop("branch", None)
            return api.upload_folder(
                repo_id=repo_id, repo_type="model", folder_path=path, commit_message=message, revision=branch, **options
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> HATModel:
        """A model from a directory, or from the Hub.

        Not by the mixin's own way, which reads ``config.json`` before anything was checked, and takes arguments from it.

        Args:
            pretrained_model_name_or_path: a directory, or ``user/name``.
            revision, cache_dir, force_download, local_files_only, token: those of huggingface_hub's ``snapshot_download``.
            options: those of :func:`hatify.load`.

        Raises:
            ArtifactError: as :func:`hatify.load`.
        """
        from huggingface_hub import snapshot_download

        from hatify.artifact.directory import load

        if os.path.isdir(pretrained_model_name_or_path):
            return load(pretrained_model_name_or_path, **options)
        snapshot = snapshot_download(
            str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        beside = Path(snapshot).parent
        with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as plain:
            _without_links(Path(snapshot), Path(plain))
            return load(plain, **options)


def _without_links(snapshot: Path, target: Path) -> None:
    """The cache of the Hub keeps links in its snapshots, which a directory of a stranger may not have: here are the files themselves."""
    for file in snapshot.iterdir():
        if file.is_file():
            try:
                os.link(os.path.realpath(file), target / file.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, target / file.name)
