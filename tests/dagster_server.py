"""A real `dagster dev` of this checkout, driven as its UI drives it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
# The machine of a test run may be busy; a step that really hangs fails all the same.
PATIENCE_S = 600
STATUSES = """
query {
  assetNodes {
    assetKey { path }
    assetMaterializations(limit: 50) { partition runId }
  }
  runsOrError { ... on Runs { results { runId status tags { key value } } } }
}
"""
LAUNCH = """
mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""
TERMINATE = """
mutation($run: String!) { terminateRun(runId: $run) { __typename ... on TerminateRunFailure { message } } }
"""


class Server:
    """`dagster dev` on an instance and a lake of its own.

    Args:
        home: DAGSTER_HOME; gets the project's dagster.yaml when it has none.
        config: settings file.
        environment: further variables.
    """

    def __init__(self, home: Path, config: Path, environment: Mapping[str, str] | None = None) -> None:
        home.mkdir(exist_ok=True)
        if not (home / "dagster.yaml").exists():
            shutil.copy(ROOT / "dagster_home" / "dagster.yaml", home)
        self.home = home
        self.log = home / "dev.log"
        self._environment = {
            **os.environ, "DAGSTER_HOME": str(home), "SPATIAL_CONFIG": str(config), **(environment or {})
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it; `wait_ready` waits until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until it answers."""
        self.wait("server", lambda: bool(self.ask("query { version }")))

    def stop(self) -> None:
        """End the server, its daemon, its code server and its runs. In the background it does not heed SIGINT."""
        self.kill()

    def kill(self) -> None:
        """End it and everything it started at once, as when the host goes down."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one, ended since it was listed
                child.kill()
        self.process.wait()
        psutil.wait_procs(children, timeout=30)

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Answer to a GraphQL query."""
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
            record = json.load(answer)
        assert "errors" not in record, record["errors"]
        data: dict[str, Any] = record["data"]
        return data

    def runs(self) -> list[dict[str, Any]]:
        """Id, status and tags of every run, newest first."""
        found = self.ask(STATUSES)["runsOrError"]["results"]
        return [{**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found]

    def made(self, *, failures: bool = False) -> dict[str, set[str]]:
        """Asset -> partitions materialized so far ("" for single assets); fails on a failed run unless told not to."""
        data = self.ask(STATUSES)
        failed = [run for run in data["runsOrError"]["results"] if run["status"] == "FAILURE"]
        assert failures or not failed, f"{failed}\n{self.log.read_text()[-3000:]}"
        return {
            node["assetKey"]["path"][-1]: {event["partition"] or "" for event in node["assetMaterializations"]}
            for node in data["assetNodes"]
        }

    def backfill(self, asset: str, keys: list[str]) -> None:
        """Launch a backfill of some partitions of an asset."""
        params = {"assetSelection": [{"path": [asset]}], "partitionNames": keys}
        answer = self.ask(LAUNCH, params=params)["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer

    def terminate(self, run_id: str) -> None:
        """Press Terminate."""
        answer = self.ask(TERMINATE, run=run_id)["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def worker(self, run_id: str) -> psutil.Process:
        """The process that executes a run, as it named itself in the log."""
        pids = re.findall(rf"{run_id} - .*Executing steps in process \(pid: (\d+)\)", self.log.read_text())
        assert pids, f"no process executes run {run_id}"
        return psutil.Process(int(pids[-1]))

    def wait(self, what: str, ready: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """The first true value, polling.

        Raises:
            AssertionError: with the end of the server's log, when it does not come to be.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if value := ready():
                    return value
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if what != "server":
                    raise
            time.sleep(1)
        raise AssertionError(f"{what} did not happen within {patience_s:g} s; {self.log.read_text()[-3000:]}")
