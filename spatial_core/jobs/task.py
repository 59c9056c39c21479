"""A stage call as a cluster job carries it: one JSON file a job, or a task of a job array, on the shared file system.

The submitting side writes it; `python -m spatial_core.jobs STAGE --task FILE` reads it on the node. What varies between
the tasks of an array lies in their files alone, so that the script is the same for all of them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spatial_core.errors import ConfigError
from spatial_core.jobs.registry import StageCall


@dataclass(frozen=True)
class Task:
    """What one job is to do, and how.

    Args:
        call: the stage, its arguments and settings.
        environment: variables set before anything else happens: those of a Dagster Pipes session, if there is one.
        scratch: node-local folder to write artifacts in before they are published; `$NAME` stands for a variable of the
            job's own environment (`$SLURM_TMPDIR`). None: they are written beside their destination.
        requeue: when the job is told to stop and has saved its finished pieces, ask SLURM to queue it again.
    """

    call: StageCall
    environment: Mapping[str, str] = field(default_factory=dict)
    scratch: str | None = None
    requeue: bool = False

    def to_json(self) -> str:
        """The content of a task file."""
        record = {
            "call": json.loads(self.call.to_json()),
            "environment": dict(self.environment),
            "scratch": self.scratch,
            "requeue": self.requeue,
        }
        return json.dumps(record, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Inverse of `to_json`.

        Raises:
            ConfigError: if it is not a task; says what is wrong with it.
        """
        try:
            record = json.loads(text)
            call = StageCall.from_json(json.dumps(record["call"]))
            environment, scratch, requeue = record["environment"], record["scratch"], record["requeue"]
        except KeyError as error:
            raise ConfigError(f"not a task: {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"not a task: {' '.join(str(error).split())}") from error
        texts = isinstance(environment, dict) and all(isinstance(value, str) for value in environment.values())
        if not (texts and isinstance(scratch, str | None) and isinstance(requeue, bool)):
            raise ConfigError(
                "not a task: environment must map names to texts, scratch be a text or null, requeue true or false"
            )
        return cls(call, environment, scratch, requeue)

    def write(self, path: Path) -> None:
        """Write the task file, readable by its owner alone and whole at any time; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self.to_json())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read a task file.

        Raises:
            ConfigError: if it cannot be read or is not a task; names the file.
        """
        try:
            return cls.from_json(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not readable ({error})") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
