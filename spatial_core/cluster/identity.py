"""Which requests are the same: asset, partition, the settings its stage reads, and the state of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spatial_core.jobs.registry import STAGES, StageCall
from spatial_core.storage.digests import digest_json
from spatial_core.storage.provenance import read_manifest

_OUTPUTS = {"output_dir", "output_file"}


def identity(asset: str, key: str, call: StageCall) -> str:
    """SHA-256 of a request. Cheap: inputs are told apart by their recorded digests, raw files by size and time."""
    inputs = {
        name: _state(Path(value)) if name not in _OUTPUTS else value for name, value in sorted(call.arguments.items())
    }
    stage = STAGES[call.stage]
    share = call.settings.share_digest(*stage.settings)
    return digest_json([asset, key, call.stage, stage.code_version, share, inputs])


def destination(call: StageCall) -> str:
    """Where a request is to leave what it makes; requests with different ones do not get in each other's way."""
    return " ".join(value for name, value in sorted(call.arguments.items()) if name in _OUTPUTS)


def _state(path: Path) -> Any:
    manifest = read_manifest(path)
    if manifest is not None:
        return [str(path), manifest["sha256"]]
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        return [str(path), [[entry.name, *_stat(entry)] for entry in entries]]
    return [str(path), *_stat(path)]


def _stat(path: Path) -> list[int]:
    """Size and time; nothing for what is not there (or is a hub id rather than a path)."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
