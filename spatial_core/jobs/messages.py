"""The message file of a cluster job: what the job needs to write it, and what its lines say.

A line is one Dagster Pipes message as JSON. The job may be on another machine and may be started several times
(requeued); each attempt appends. The last report, failure or interruption is the one that counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dagster_pipes import (
    DAGSTER_PIPES_CONTEXT_ENV_VAR,
    DAGSTER_PIPES_MESSAGES_ENV_VAR,
    PipesContextData,
    encode_param,
)

from spatial_core.errors import ArtifactError

_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}


def pipes_environment(asset: str, key: str, run_id: str, job_name: str, messages: str) -> dict[str, str]:
    """Variables by which a job of one partition key finds its Pipes session.

    Args:
        asset: asset name.
        key: partition key, empty for an asset without partitions.
        run_id: Dagster run that asks.
        job_name: its Dagster job.
        messages: path of the message file, on the job's machine.
    """
    context = PipesContextData(
        asset_keys=[asset],
        code_version_by_asset_key=None,
        provenance_by_asset_key=None,
        partition_key=key or None,
        partition_key_range=None,
        partition_time_window=None,
        run_id=run_id,
        job_name=job_name,
        retry_number=0,
        extras={},
    )
    return {
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"data": context}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param({"path": messages}),
    }


@dataclass
class Said:
    """What a job has said so far.

    Args:
        report: of the stage, as JSON, once it is finished.
        failure: type and message of an expected failure.
        interrupted: what a job that was told to stop had finished by then.
        usage: what the last attempt used.
        exception: an unexpected failure, one line.
        attempts: times the job was started.
        reached: what the last attempt that was interrupted had finished.
        stalled: attempts in a row that were interrupted where the one before them was.
        closed: the last attempt has said all it had to say.
    """

    report: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    interrupted: dict[str, Any] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    exception: str | None = None
    attempts: int = 0
    reached: dict[str, Any] | None = None
    stalled: int = 0
    closed: bool = False

    def take(self, line: str) -> tuple[int, str] | None:
        """Read one line; returns level and text when it is a log line.

        Raises:
            ArtifactError: if the line is not a Pipes message.
        """
        try:
            message = json.loads(line)
            return self._take(message["method"], message["params"] or {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"not a Pipes message: {line[:200]!r} ({error})") from error

    def _take(self, method: str, params: dict[str, Any]) -> tuple[int, str] | None:
        self.closed = method == "closed"
        if method == "log":
            return _LEVELS.get(str(params["level"]).upper(), 20), str(params["message"])
        if method == "opened":
            self.attempts += 1
            self.report = self.failure = self.interrupted = self.exception = None
        elif method == "report_custom_message":
            payload: dict[str, Any] = params["payload"]
            for name in ("report", "failure", "interrupted", "usage"):
                if payload.get(name) is not None:
                    setattr(self, name, payload[name])
            if (reached := payload.get("interrupted")) is not None:
                self.stalled = self.stalled + 1 if reached == self.reached else 0
                self.reached = reached
        elif method == "closed" and (exception := params.get("exception")):
            self.exception = " ".join(str(exception["message"]).split())  # it begins with the type
        return None
