"""The file that a cluster job is started with."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task


def task(**options: Any) -> Task:
    settings = Settings(training={"num_epochs": 3}, base_dir=Path("/lake"))  # type: ignore[arg-type]
    return Task(StageCall("embed", {"tar": "a 'b' $c.tar"}, settings), **options)


@pytest.mark.parametrize(
    "options", [{}, {"environment": {"A": "x\n$y"}, "scratch": "$SLURM_TMPDIR/spatial", "requeue": True}]
)
def test_a_task_comes_back_as_it_was_written(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job" / "tasks" / "0.json"
    task(**options).write(file)
    back = Task.read(file)
    assert back == task(**options)
    assert back.call.settings.base_dir == Path("/lake")
    assert json.loads(file.read_text())["call"]["arguments"] == {"tar": "a 'b' $c.tar"}


def test_a_task_file_is_for_its_owner_and_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "0.json"
    file.write_text("old")
    task().write(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda record: record.pop("requeue"), "'requeue' is missing"),
        (lambda record: record["call"].pop("stage"), "'stage' is missing"),
        (lambda record: record.update(environment={"A": 1}), "environment must map names to texts"),
        (lambda record: record.update(scratch=7), "scratch be a text or null"),
        (lambda record: record.update(requeue="yes"), "requeue true or false"),
        (lambda record: record.update(call=[]), "not a task"),
    ],
)
def test_what_is_not_a_task_is_refused_by_name(change: Any, cause: str, tmp_path: Path) -> None:
    record = json.loads(task().to_json())
    change(record)
    file = tmp_path / "0.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=cause) as caught:
        Task.read(file)
    assert str(file) in str(caught.value)
    file.write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="not readable"):
        Task.read(file)
