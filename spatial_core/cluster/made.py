"""What jobs have made already: a request that was answered is not sent to a queue again to find that out.

One small file an artifact, `made/ASSET/KEY.json` in the folder of jobs, holds the identity of the last request that
ended well, its report and the artifact's digest. It counts only while the artifact still has that digest.
"""

from __future__ import annotations

import json
from pathlib import Path

from spatial_core.errors import ArtifactError
from spatial_core.report import Report
from spatial_core.storage.atomic import write_json
from spatial_core.storage.provenance import artifact_digest, read_manifest


class MadeBefore:
    """The records in a folder of jobs, for one asset."""

    def __init__(self, jobs_dir: Path, asset: str) -> None:
        self._folder = jobs_dir / "made" / asset

    def find(self, key: str, identity: str) -> Report | None:
        """The report of an artifact that a job made for the very same request and that lies there unchanged."""
        try:
            record = json.loads(self._file(key).read_text())
            report = Report.from_json(record["report"])
            known = record["identity"] == identity and record["sha256"] == _digest(report.artifact)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, ArtifactError):  # damaged: a job finds out what is there
            return None
        return report.unchanged() if known else None

    def note(self, key: str, identity: str, report: Report) -> None:
        """Keep the outcome of a request that ended well."""
        record = {"identity": identity, "sha256": _digest(report.artifact), "report": report.to_json()}
        write_json(self._file(key), record)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key or 'whole'}.json"


def _digest(artifact: Path) -> str | None:
    """Digest of an artifact that has a manifest and agrees with it.

    Raises:
        DigestMismatch: if it does not agree.
    """
    if read_manifest(artifact) is None or not artifact.exists():
        return None
    return artifact_digest(artifact)
