"""The product as a person meets it: the real webserver and daemon, a real browser, files dropped into folders.

With SPATIAL_SCREENSHOTS naming a folder, the pictures of the documentation are taken on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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


class Server:
    """`dagster dev` of this checkout on an instance and a lake of its own."""

    def __init__(self, home: Path, config: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "dev.log"
        environment = {**os.environ, "DAGSTER_HOME": str(home), "SPATIAL_CONFIG": str(config)}
        command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """End the server, its daemon and its code server."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def ask(self, query: str) -> dict[str, Any]:
        """Answer to a GraphQL query."""
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{self.url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
            data: dict[str, Any] = json.load(answer)["data"]
        return data

    def made(self) -> dict[str, set[str]]:
        """Asset -> partitions materialized so far ("" for single assets); fails on a failed run."""
        data = self.ask(STATUSES)
        failed = [run for run in data["runsOrError"]["results"] if run["status"] == "FAILURE"]
        assert not failed, f"{failed}\n{self.log.read_text()[-3000:]}"
        return {
            node["assetKey"]["path"][-1]: {event["partition"] or "" for event in node["assetMaterializations"]}
            for node in data["assetNodes"]
        }

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Poll until something is so.

        Raises:
            AssertionError: with the end of the server's log, when it does not come to be.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if ready():
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if what != "server":
                    raise
            time.sleep(2)
        raise AssertionError(f"{what} did not happen within {PATIENCE_S} s; {self.log.read_text()[-3000:]}")


@pytest.fixture
def server(tmp_path: Path, lake: Any) -> Iterator[Server]:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", home)
    lake.write_small()
    running = Server(home, lake.config)
    try:
        running.wait("server", lambda: bool(running.ask("query { version }")))
        yield running
    finally:
        running.stop()


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def shoot(page: Page, name: str) -> None:
    """A picture for the documentation, where one is wanted."""
    folder = os.environ.get("SPATIAL_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(3000)
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.browser
@pytest.mark.slow
def test_a_person_drops_files_and_gets_vectors(server: Server, page: Page, lake: Any, city: Path) -> None:
    at = lake.settings.locations
    page.goto(f"{server.url}/asset-groups")
    for group in ("street_view", "projector", "publishing"):
        page.get_by_text(group, exact=True).first.wait_for()

    # A tar and a parquet are copied into the watched folders; nobody clicks anything.
    at.raw_dir.mkdir(parents=True, exist_ok=True)
    at.drops_dir.mkdir(parents=True, exist_ok=True)
    for name in ("0901.tar", "0902.tar"):
        shutil.copy(city / "raw" / name, at.raw_dir)
    shutil.copy(city / "drops" / "new_images.parquet", at.drops_dir / "march.parquet")
    server.wait("tars", lambda: server.made()["backbone_embeddings"] == {"0901", "0902"})
    server.wait("vectors", lambda: server.made()["building_embeddings"] == {"march"})

    vectors = ds.dataset(at.final_embeddings_dir / "march" / "parts", format="parquet").to_table()
    rejects = pq.read_table(at.final_embeddings_dir / "march" / "rejects.parquet")
    assert vectors.num_rows + rejects.num_rows == pq.read_metadata(at.drops_dir / "march.parquet").num_rows
    assert vectors.num_rows

    # The graph shows every asset of the chain.
    page.goto(f"{server.url}/asset-groups")
    page.get_by_text("street_view", exact=True).first.wait_for()
    page.mouse.click(800, 200, button="right")
    page.get_by_role("menuitem", name="Expand all groups").click()
    page.wait_for_timeout(3000)
    # Loaded anew, the expanded graph is shown whole; long names are cut in the middle there.
    page.goto(f"{server.url}/asset-groups")
    for asset in ("raw_tars", "intermediates", "merged_splits", "retrieval_report", "hf_model", "final_embeddings"):
        page.get_by_text(asset, exact=True).first.wait_for()
    shoot(page, "asset_graph")

    # The report shows its table and its picture in the asset's page.
    page.goto(f"{server.url}/assets/retrieval_report")
    page.get_by_text("recall@1").first.wait_for()
    shoot(page, "retrieval_report")

    # A backfill is launched from the partitions of an asset.
    runs = len(server.ask(STATUSES)["runsOrError"]["results"])
    page.goto(f"{server.url}/assets/fingerprints?view=partitions")
    page.get_by_text("0901", exact=True).first.wait_for()
    shoot(page, "partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("dialog").get_by_role("button", name="All", exact=True).click()
    page.get_by_role("button", name="Launch backfill").click()
    server.wait("backfill", lambda: len(server.ask(STATUSES)["runsOrError"]["results"]) > runs)
