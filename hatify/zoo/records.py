"""What became of one model of the zoo, on disk: one JSON file per model, which says itself whether it is still current."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PROVED, CONVERTED, REFUSED, FAILED = "proved", "converted", "refused", "failed"
VERDICTS = (PROVED, CONVERTED, REFUSED, FAILED)
_LIBRARIES = ("torch", "timm", "torchvision", "transformers")
_ROOT = Path(__file__).parents[1]
_APART = ("cli", "zoo")  # how the sweep is run; what it runs on is in _WITHIN
_WITHIN = ("zoo/entry.py", "zoo/weights.py", "zoo/proving.py", "zoo/hollow.py", "zoo/structure.py")


@dataclass
class Record:
    """The result of one model.

    Attributes:
        key, family: as in the catalogue.
        verdict: ``proved`` (every promise held), ``converted`` (not asked to prove), ``refused`` (with hatify's own error) or
            ``failed`` (a promise did not hold, a crash, no time or no memory left).
        reason: of a refusal or a failure: ``what``, ``where``, ``why``, ``fix``.
        proof: the verification report.
        snapshot: what it converts to.
        parameters: of the original.
        seconds: per step.
        memory: the most that the process held, in bytes.
        asked: what was asked to be proved.
        structure: a digest of all that decides the graph, where only a conversion was asked for; see ``structure.py``.
        shares: the key of the model of the same structure whose conversion this is.
        libraries, files: what the result depends on: versions, and a digest of each of hatify's files that the run imported.
    """

    key: str
    family: str
    verdict: str
    asked: str = "proof"
    reason: dict[str, str] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    snapshot: dict[str, Any] | None = None
    parameters: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    structure: str | None = None
    shares: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        return self.key.partition("/")[2]

    def current(self, asked: str) -> bool:
        """Whether running it again would ask the same question of the same code.

        A proof answers for a conversion too. What ended because of time or memory is not a result of the code: it is run again.
        """
        if self.verdict == FAILED and not self.files:
            return False
        enough = self.asked == asked or (asked == "conversion" and self.asked.startswith("proof"))
        return enough and self.libraries == versions() and all(digest_of(name) == value for name, value in self.files.items())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_directory() -> Path:
    """Where records are kept from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hatify" / "zoo"


def path_of(directory: Path, key: str) -> Path:
    return directory / f"{key}.json"


def structure_key(structure: str) -> str:
    """Where the record of the first model of a structure is found by that."""
    return f"structures/{structure}"


def read(directory: Path, key: str) -> Record | None:
    """The record of a model; None where there is none, or none that this version can read."""
    try:
        return Record(**json.loads(path_of(directory, key).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write(directory: Path, record: Record, key: str | None = None) -> None:
    """Replaces the record of the model (or of another key) as a whole: an interrupted run leaves none half-written."""
    path = path_of(directory, key or record.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def imported_files() -> dict[str, str]:
    """A digest of each of hatify's files that this process has imported, but for those that only run the sweep."""
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if getattr(module, "__name__", "").partition(".")[0] != "hatify" or not file or not Path(file).is_relative_to(_ROOT):
            continue
        name = Path(file).relative_to(_ROOT).as_posix()
        if name.partition("/")[0] not in _APART or name in _WITHIN:
            found[name] = digest_of(name)
    return dict(sorted(found.items()))


@cache
def digest_of(name: str) -> str | None:
    """Of a file of hatify; None where it is gone."""
    try:
        return hashlib.sha256((_ROOT / name).read_bytes()).hexdigest()[:12]
    except FileNotFoundError:
        return None
