"""MANIFEST.json: the SHA-256 of every file in a model folder, so that damage is noticed wherever the folder travels."""

from __future__ import annotations

import json
from pathlib import Path

from spatial_core.errors import ArtifactError, DigestMismatch, InputError
from spatial_core.storage.digests import digest_json, sha256_file

MANIFEST = "MANIFEST.json"
FORMAT = "spatial-model-folder/1"


def write_file_digests(folder: Path) -> None:
    """Hash every file of a finished folder into its manifest."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": files}, indent=2, sort_keys=True) + "\n")


def read_file_digests(folder: Path) -> dict[str, str]:
    """File name relative to `folder` -> hex SHA-256.

    Raises:
        InputError: if the folder has no manifest, so it is not a model published by this project.
        ArtifactError: if the manifest cannot be read, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no {MANIFEST}, so not a model folder written by `spatial publish`") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); publish the model again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a manifest of format {FORMAT}; publish the model again")
    files = {str(name): str(digest) for name, digest in record["sha256"].items()}
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ArtifactError(f"{path}: names files outside the folder ({outside[0]!r})")
    return files


def folder_digest(folder: Path) -> str:
    """Digest that identifies the model, without reading its weights: `content_digest` of the folder as published.

    Raises:
        InputError, ArtifactError: as `read_file_digests`.
    """
    files = {**read_file_digests(folder), MANIFEST: sha256_file(folder / MANIFEST)}
    # In the order of paths, in which a folder is listed, not of their text.
    return digest_json([[name, files[name]] for name in sorted(files, key=Path)])


def verify_files(folder: Path) -> str:
    """Hash every listed file again; returns `folder_digest`.

    Raises:
        DigestMismatch: naming the first file that is missing or changed.
        InputError, ArtifactError: as `read_file_digests`.
    """
    for name, expected in read_file_digests(folder).items():
        path = folder / name
        if not path.is_file():
            raise DigestMismatch(f"{path}: missing, though {MANIFEST} lists it; publish or download the model again")
        found = sha256_file(path)
        if found != expected:
            raise DigestMismatch(
                f"{path}: its bytes changed since it was published (recorded sha256 {expected[:12]}, "
                f"found {found[:12]}); publish or download the model again"
            )
    return folder_digest(folder)
