"""One worker of the soak: asks the cluster for some partitions until it has them, in a process that may be killed.

    python -m tests.slurm.soak_worker CONFIG RUN_ID LOG KEY...

LOG gets one JSON line for each submission and each outcome it was told of.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from spatial_core.cluster.engine import Engine
from spatial_core.cluster.environment import node_python
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import transport_for
from spatial_core.config.settings import load_settings
from spatial_core.errors import ClusterError
from spatial_core.lake.catalogue import CATALOGUE

ASSET = "intermediates"


class Journal:
    """Follows the work and writes down what it hears; a line is written in one piece."""

    def __init__(self, path: Path, run_id: str) -> None:
        self._path = path
        self._run_id = run_id

    def note(self, **record: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"at": time.time(), "run": self._run_id, **record}) + "\n")

    def log(self, level: int, text: str) -> None:
        if level >= 30:
            self.note(warning=text)

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        self.note(submission=submission.name, job=submission.job, keys=submission.keys, attached=attached)

    def in_progress(self, run_id: str) -> bool:
        """Runs are named after the process that is one."""
        return Path(f"/proc/{run_id.rpartition('-')[2]}").exists()

    def has_ended(self, run_id: str) -> bool:
        return not self.in_progress(run_id)


def main(config: str, run: str, log: str, keys: list[str]) -> int:
    """Ask until every key has an artifact."""
    settings = load_settings(Path(config), environ={})
    run_id = f"{run}-{os.getpid()}"
    journal = Journal(Path(log), run_id)
    missing = list(keys)
    while missing:
        scheduler = Scheduler(transport_for(settings), lambda text: journal.note(warning=text), 600)
        engine = Engine(settings, ASSET, scheduler, journal, python=node_python(settings), run_id=run_id)
        try:
            for done in engine.run({key: CATALOGUE[ASSET].call(settings, key) for key in missing}):
                sha = None if done.report is None else str(done.report.artifact)
                journal.note(key=done.key, made=sha, error=done.error and str(done.error))
                if done.report is not None:
                    missing.remove(done.key)
        except ClusterError as error:
            journal.note(warning=str(error))
            time.sleep(2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
