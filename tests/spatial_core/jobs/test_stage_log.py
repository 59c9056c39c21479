"""Log files: lines, progress and outcome of a stage, from several processes, and a folder that cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_core.config.settings import load_settings
from spatial_core.errors import TarError
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.jobs.stage_log import logged
from spatial_core.report import Progress, Report, silent
from tests.data.make_tars import street_view, tar_bytes


def stage(failure: Exception | None = None) -> Callable[[Progress], Report]:
    def work(progress: Progress) -> Report:
        progress(1, 2, "reading")
        logging.getLogger("spatial_core.street_view").info("found something")
        if failure is not None:
            raise failure
        progress(2, 2, "reading")
        return Report("ingest", Path("out.parquet"), 3, 3, 3, seconds=1.25)

    return work


def test_what_happened_is_in_the_file(tmp_path: Path) -> None:
    told: list[tuple[int, int | None, str]] = []
    level = logging.getLogger("spatial_core").level
    for _ in range(2):
        logged(tmp_path / "logs", "ingest", stage(), lambda *step: told.append(step))
    text = (tmp_path / "logs/ingest.log").read_text()
    assert text.count("ingest: begins") == 2, "appended, never truncated"
    for line in ("reading: 1 of 2", "found something", "reading: 2 of 2", "ingest: 3 rows in 1.2 s (out.parquet)"):
        assert line in text
    assert told == [(1, 2, "reading"), (2, 2, "reading")] * 2
    assert logging.getLogger("spatial_core").level == level
    assert not [
        handler for handler in logging.getLogger("spatial_core").handlers if isinstance(handler, logging.FileHandler)
    ]


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TarError):
        logged(tmp_path, "ingest", stage(TarError("0201.tar: byte 0:\nthe file is empty")), silent)
    last = (tmp_path / "ingest.log").read_text().splitlines()[-1]
    assert last.endswith("ERROR ingest: TarError: 0201.tar: byte 0: the file is empty")


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert logged(tmp_path / "file/logs", "ingest", stage(), silent).rows == 3
    assert "global.log_dir" in caplog.text and "no log file is kept" in caplog.text


@pytest.mark.parametrize("given", [True, False])
def test_every_way_of_running_logs_where_the_settings_say(tmp_path: Path, given: bool) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[global]\nlog_dir = "logs"\n' if given else "")
    tar = tmp_path / "0101.tar"
    tar.write_bytes(tar_bytes(street_view(101, seed=1)))
    arguments = {"tar": str(tar), "output_dir": str(tmp_path / "out")}
    for _ in range(2):
        run_stage(StageCall("ingest", arguments, load_settings(config, environ={})))
    assert (tmp_path / "logs/ingest.log").is_file() == given
    if given:
        assert "was up to date" in (tmp_path / "logs/ingest.log").read_text()
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "0101.tar", "out"}
