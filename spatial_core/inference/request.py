"""What a data set of vectors belongs to, and what happens when a run asks for something else.

The answer is written in `state.json`, and results are never mixed:

* A run with another input file, another model, another `filter_valid` or `precision` is refused: choose another folder
  or delete this one.
* The same input path with new bytes, or the same model name with new weights, is new data. What a killed run had done
  of the old is dropped. A finished data set stays until its successor, built hidden beside it, takes its place.
* `read_batch_size` decides which rows a part holds, so the first run's is kept for as long as the data set lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.inference.dataset import discard, file_names, read_state
from spatial_core.inference.drop import Drop, open_drop
from spatial_core.publishing.loading import model_digest
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.provenance import stage_key
from spatial_core.storage.replaceable import require_replaceable

STAGE = "embed-new"
CODE_VERSION = "1"
_IDENTITY_KEYS = ("input_path", "input_sha256", "model_id", "model_sha256", "filter_valid", "precision")


@dataclass(frozen=True)
class Request:
    """What a run is asked for: the identity of its data set, and how far to go.

    Args:
        drop: the input.
        input_bytes: its size.
        input_mtime_ns: when it was last written, nanoseconds.
        input_sha256: digest of its bytes.
        model: folder or hub id as given, a folder as an absolute path.
        model_sha256: digest that identifies its files.
        filter_valid: leave out rows whose `is_valid` is not true.
        precision: arithmetic of the forward pass.
        rows: rows of the drop to account for, from its start.
    """

    drop: Drop
    input_bytes: int
    input_mtime_ns: int
    input_sha256: str
    model: str
    model_sha256: str
    filter_valid: bool
    precision: str
    rows: int

    @property
    def input_path(self) -> str:
        return str(self.drop.path.resolve())

    @property
    def key(self) -> str:
        """Identity of the data set; the limit is not part of it, a longer run goes on with a shorter one's parts."""
        config = {"filter_valid": self.filter_valid, "precision": self.precision}
        return stage_key(STAGE, CODE_VERSION, config, {"input": self.input_sha256, "model": self.model_sha256})

    def drop_record(self) -> dict[str, Any]:
        """How the input is told apart from a replacement without reading it, for reports."""
        return {
            "path": self.input_path,
            "bytes": self.input_bytes,
            "mtime_ns": self.input_mtime_ns,
            "sha256": self.input_sha256,
        }

    def state(self) -> dict[str, Any]:
        """The request as `state.json` records it."""
        return {
            "input_path": self.input_path,
            "input_sha256": self.input_sha256,
            "model_id": self.model,
            "model_sha256": self.model_sha256,
            "filter_valid": self.filter_valid,
            "precision": self.precision,
            "total_rows_in_input": self.drop.rows,
            "num_row_groups": len(self.drop.row_groups),
        }


def refuse_foreign(place: Path, state: Mapping[str, Any] | None) -> None:
    """Leave folders alone that this stage did not make.

    Raises:
        ConfigError: if `place` has files but no state of ours.
    """
    if state is not None:
        missing = [key for key in _IDENTITY_KEYS if key not in state]
        if missing:
            raise ConfigError(
                f"{place}: its state.json does not say {', '.join(missing)}, so another program made it and whether "
                "its parts fit is unknown; choose another folder"
            )
    elif place.is_dir() and any(not path.name.startswith(".") for path in place.iterdir()):
        raise ConfigError(
            f"{place}: has files but no state.json, so it is no data set of vectors; choose another folder"
        )


def read_request(path: Path, settings: Settings, model: str, known: Mapping[str, Any] | None) -> Request:
    """Settings and files -> request.

    Args:
        path: the input.
        settings: [inference] matters here.
        model: folder or hub id.
        known: `drop_record` of the last finished run; an input of the same path, size and mtime is not hashed again.

    Raises:
        InputError: if the input is not a readable drop.
    """
    drop = open_drop(path)
    stat = path.stat()
    record = {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    unchanged = known is not None and all(known[name] == value for name, value in record.items())
    limit = settings.inference.limit
    return Request(
        drop=drop,
        input_bytes=stat.st_size,
        input_mtime_ns=stat.st_mtime_ns,
        input_sha256=str(known["sha256"]) if known is not None and unchanged else sha256_file(path),
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        model_sha256=model_digest(model),
        filter_valid=settings.inference.filter_valid,
        precision=settings.inference.precision,
        rows=drop.rows if limit is None else min(limit, drop.rows),
    )


def choose_root(
    place: Path, successor: Path, state: dict[str, Any] | None, request: Request
) -> tuple[Path, dict[str, Any] | None, str | None]:
    """(folder to work in, state found there, what becomes of earlier results).

    Raises:
        ConfigError: if the data set belongs to something else.
        InputError: if it would make way for a new one, and files of others with it.
    """
    if state is None:
        return place, None, None
    renewed = _renewed(place, state, request)
    if not renewed:
        return place, state, None
    require_replaceable(place, STAGE, file_names(place))
    if not state.get("finished"):
        discard(place)
        return place, None, f"{renewed} changed: what was done of the old is dropped"
    waiting = read_state(successor) if successor.is_dir() else None
    if waiting is None or any(waiting[key] != value for key, value in request.state().items() if key in _IDENTITY_KEYS):
        if successor.exists():
            discard(successor)
        waiting = None
    return successor, waiting, f"{renewed} changed: the results of the old are replaced"


def _renewed(place: Path, state: Mapping[str, Any], request: Request) -> str:
    """Which of input and model has new content under its old name; empty when neither.

    Raises:
        ConfigError: if the data set was made from another input or model, or with other options.
    """
    asked = request.state()
    renewed = []
    refused = []
    for name, name_key, digest_key in (("input", "input_path", "input_sha256"), ("model", "model_id", "model_sha256")):
        if state[digest_key] == asked[digest_key]:
            continue
        if state[name_key] == asked[name_key]:
            renewed.append(name)
        else:
            refused.append(f"{name} {state[name_key]} (asked for: {asked[name_key]})")
    refused += [
        f"{option} {state[option]} (asked for: {asked[option]})"
        for option in ("filter_valid", "precision")
        if state[option] != asked[option]
    ]
    if refused:
        raise ConfigError(
            f"{place}: made with {'; '.join(refused)}; results are not mixed: choose another folder or delete this one"
        )
    return " and ".join(renewed)
