"""The product as a person meets it: the real webserver and daemon, a real browser, files dropped into folders.

With SPATIAL_SCREENSHOTS naming a folder, the pictures of the documentation are taken on the way.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright

from tests.dagster_server import ROOT, Server

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


@pytest.fixture
def server(tmp_path: Path, lake: Any) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        lake.write_small(logging={"report_port": free.getsockname()[1]})
    running = Server(tmp_path / "home", lake.config)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@contextmanager
def report_page(lake: Any) -> Iterator[None]:
    """`spatial report`, answering."""
    command = [sys.executable, "-u", "-m", "spatial_core.cli.main", "report", "--config", str(lake.config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and "shows" in running.stdout.readline()
            yield
        finally:
            running.terminate()


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

    # Its link leads to the page itself, which `make dev` shows beside Dagster.
    with report_page(lake):
        with page.expect_popup() as opened:
            page.get_by_role("link", name=f"http://127.0.0.1:{lake.settings.logging.report_port}/").first.click()
        opened.value.get_by_text("recall@1").first.wait_for()
        assert opened.value.title() == "Retrieval report"
        opened.value.close()

    # A backfill is launched from the partitions of an asset.
    runs = len(server.runs())
    page.goto(f"{server.url}/assets/fingerprints?view=partitions")
    page.get_by_text("0901", exact=True).first.wait_for()
    shoot(page, "partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("dialog").get_by_role("button", name="All", exact=True).click()
    page.get_by_role("button", name="Launch backfill").click()
    server.wait("backfill", lambda: len(server.runs()) > runs)
