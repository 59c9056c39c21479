"""How an artifact came to be, and whether it still stands.

Two records accompany every artifact:

* `Provenance`, inside it (parquet footer, safetensors metadata, model folder): producing stage and code version,
  settings digest, input digests, model and preprocessing. It depends on content only, never on clocks or paths, so
  the same inputs give the same bytes wherever they are computed.
* a manifest, beside it in `_manifests/<name>.json`: SHA-256, size, the key it was requested under, and the stage's
  report. The manifest is written last; an artifact without a matching one counts as unfinished and is redone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spatial_core.errors import ArtifactError, DigestMismatch, InputError
from spatial_core.report import Report
from spatial_core.storage.atomic import write_json
from spatial_core.storage.digests import digest_json, sha256_file

SCHEMA_VERSION = "1"
FOOTER_KEY = b"spatial.provenance"


@dataclass(frozen=True)
class Provenance:
    """Content-only origin of an artifact.

    Args:
        stage: registered stage name.
        code_version: version of the stage's algorithm; raised when the same inputs would give other numbers.
        config_digest: `Settings.digest` of the whole tree.
        config: the settings the stage actually used, by dotted name.
        inputs: logical input name -> SHA-256.
        model: id and revision of a model the values come from, if any.
        preprocessing: id of the pixel preprocessing, if any.
    """

    stage: str
    code_version: str
    config_digest: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    preprocessing: str = ""
    schema_version: str = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Provenance:
        return cls(**json.loads(text))


def stage_key(stage: str, code_version: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Identity of a request: a finished artifact with an equal key need not be made again.

    `inputs` holds whatever identifies each input cheaply: the SHA-256 of an artifact, or size and mtime of a raw tar
    whose digest is only known after it has been read.
    """
    return digest_json([SCHEMA_VERSION, stage, code_version, dict(config), dict(inputs)])


def manifest_path(artifact: Path) -> Path:
    """`dir/name` -> `dir/_manifests/name.json`; the underscore keeps dataset readers out."""
    return artifact.parent / "_manifests" / f"{artifact.name}.json"


def read_manifest(artifact: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None when it has none.

    Raises:
        ArtifactError: if the manifest itself is not readable JSON.
    """
    path = manifest_path(artifact)
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); delete it and rebuild {artifact.name}") from error
    return record


def _files(artifact: Path) -> dict[str, Path]:
    if artifact.is_file():
        return {"": artifact}
    return {
        file.relative_to(artifact).as_posix(): file
        for file in sorted(artifact.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(artifact).parts)
    }


def content_digest(artifact: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a file, or of the sorted (name, SHA-256) list of a folder; `known` are digests of files in it."""
    files = _files(artifact)
    if artifact.is_file():
        return sha256_file(artifact)
    known = known or {}
    return digest_json([[name, known.get(name) or sha256_file(file)] for name, file in files.items()])


def _stat(artifact: Path) -> list[list[Any]]:
    return [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in _files(artifact).items()]


def record_artifact(
    artifact: Path, key: str, provenance: Provenance, report: Report, digests: Mapping[str, str] | None = None
) -> None:
    """Write the manifest that declares `artifact` finished; `digests` are of those of its files hashed when written."""
    stat = _stat(artifact)
    write_json(
        manifest_path(artifact),
        {
            "artifact": artifact.name,
            "sha256": content_digest(artifact, digests),
            "bytes": sum(size for _, size, _ in stat),
            "stat": stat,
            "key": key,
            "provenance": json.loads(provenance.to_json()),
            "report": report.to_json(),
        },
    )


def renew_manifest(artifact: Path, key: str, details: Mapping[str, Any]) -> Report:
    """Let a finished artifact answer another key too: its inputs were written again and hold what they held before.

    Args:
        artifact: finished and intact.
        key: of the request as it would be made now.
        details: what the report's details say of the inputs now.

    Returns:
        The recorded report with those details, marked `up_to_date`.

    Raises:
        InputError: if there is no manifest to renew.
    """
    record = read_manifest(artifact)
    if record is None:
        raise InputError(f"{artifact}: no manifest at {manifest_path(artifact)}; nothing to renew")
    report = {**record["report"], "details": {**record["report"]["details"], **details}}
    write_json(manifest_path(artifact), {**record, "key": key, "report": report, "stat": _stat(artifact)})
    return Report.from_json({**report, "artifact": str(artifact)}).unchanged()


def finished(artifact: Path, key: str) -> Report | None:
    """The report of a finished, intact artifact made under `key`, marked `up_to_date`; None when it must be made."""
    record = read_manifest(artifact)
    if record is None or record["key"] != key or not artifact.exists():
        return None
    stat = _stat(artifact)
    if stat != record["stat"] and content_digest(artifact) != record["sha256"]:
        return None
    return Report.from_json({**record["report"], "artifact": str(artifact)}).unchanged()


def artifact_digest(artifact: Path) -> str:
    """SHA-256 that identifies an input artifact: from its manifest when that still describes the file, else computed.

    Raises:
        InputError: if the artifact does not exist.
        DigestMismatch: if it has a manifest and its bytes no longer match.
    """
    if not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    record = read_manifest(artifact)
    if record is None:
        return content_digest(artifact)
    if _stat(artifact) == record["stat"]:
        return str(record["sha256"])
    actual = content_digest(artifact)
    if actual != record["sha256"]:
        raise DigestMismatch(
            f"{artifact}: its bytes changed after stage '{record['provenance']['stage']}' recorded them "
            f"(expected sha256 {record['sha256'][:12]}, found {actual[:12]}); rebuild it with that stage"
        )
    return actual


def verify_artifact(artifact: Path) -> None:
    """Reread every byte and compare with the manifest.

    Raises:
        InputError: if there is no manifest to compare with.
        DigestMismatch: if a byte changed.
    """
    record = read_manifest(artifact)
    if record is None:
        raise InputError(f"{artifact}: no manifest at {manifest_path(artifact)}; nothing to verify against")
    actual = content_digest(artifact)
    if actual != record["sha256"]:
        raise DigestMismatch(
            f"{artifact}: damaged (recorded sha256 {record['sha256'][:12]}, found {actual[:12]}); "
            f"rebuild it with stage '{record['provenance']['stage']}'"
        )
