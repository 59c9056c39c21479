"""Which code this is: the version of the project and a digest of its source files, alike in a checkout and installed.

`python -m spatial_core.installed` prints both as one line of JSON. A cluster's interpreter is asked this before jobs
are sent to it, so nothing but the standard library is imported: it answers at once, whatever else is missing there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECT = "spatial-embeddings"
PACKAGES = ("spatial_assets", "spatial_core")
# What an installation contains too: the package data of pyproject.toml.
_SUFFIXES = {".py", ".html", ".md", ".txt", ".typed"}


@dataclass(frozen=True)
class Installed:
    """The project as some interpreter finds it.

    Args:
        version: of the project.
        digest: SHA-256 of its source files and their names.
    """

    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.version} ({self.digest[:12]})"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Installed:
        """Inverse of `to_json`.

        Raises:
            ValueError: if it is not that.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or set(record) != {"version", "digest"}:
            raise ValueError(f"not a version and a digest: {text[:100]!r}")
        return cls(record["version"], record["digest"])


def root_folder() -> Path:
    """The folder that holds the packages this process runs: the checkout, or site-packages."""
    return Path(__file__).resolve().parents[1]


def source_files(root: Path) -> Iterator[Path]:
    """The project's source files below a folder, in an order that depends on their names alone."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                yield path


def installed(root: Path | None = None) -> Installed:
    """Version and digest of the code below a folder; by default the code of this process."""
    root = root or root_folder()
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return Installed(_version(root), digest.hexdigest())


def _version(root: Path) -> str:
    """As the checkout says, or as pip recorded."""
    project = root / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return importlib.metadata.version(PROJECT)


if __name__ == "__main__":
    sys.stdout.write(installed().to_json() + "\n")
