"""What the lines of a cluster job's message file say, written as a job writes them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from dagster_pipes import DagsterPipesError, PipesContext, PipesMappingParamsLoader, open_dagster_pipes

from spatial_core.errors import ArtifactError
from spatial_core.jobs.messages import Said, pipes_environment


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one Pipes session; a test may have several."""
    monkeypatch.setattr(PipesContext, "_instance", None)


def attempt(file: Path, *payloads: dict[str, Any], error: Exception | None = None, key: str = "0201") -> PipesContext:
    """Write what one start of a job says."""
    environment = pipes_environment("intermediates", key, "run", "__ASSET_JOB", str(file))
    PipesContext._instance = None  # type: ignore[misc]
    with (
        nullcontext() if error is None else pytest.raises(type(error)),
        open_dagster_pipes(params_loader=PipesMappingParamsLoader(environment)) as pipes,
    ):
        pipes.log.warning("a line\nof two")
        for payload in payloads:
            pipes.report_custom_message(payload)
        if error is not None:
            raise error
    return pipes


def read(file: Path, said: Said | None = None) -> tuple[Said, list[tuple[int, str] | None]]:
    said = said or Said()
    return said, [said.take(line) for line in file.read_text().splitlines()]


def test_the_environment_of_a_task_opens_its_session(tmp_path: Path) -> None:
    pipes = attempt(tmp_path / "0.jsonl", {"report": {"rows": 3}})
    assert (pipes.asset_key, pipes.partition_key, pipes.run_id) == ("intermediates", "0201", "run")
    with pytest.raises(DagsterPipesError, match="partition"):
        _ = attempt(tmp_path / "1.jsonl", key="").partition_key
    said, shown = read(tmp_path / "0.jsonl")
    assert (said.report, said.attempts, said.closed) == ({"rows": 3}, 1, True)
    assert [line for line in shown if line] == [(30, "a line\nof two")]


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    attempt(file, {"usage": {"gpu_utilisation": 0.5}}, {"interrupted": {"message": "3 of 9"}})
    said, _ = read(file)
    assert said.interrupted == {"message": "3 of 9"}
    attempt(file, {"report": {"rows": 9}})
    said, _ = read(file)
    assert (said.report, said.interrupted, said.attempts) == ({"rows": 9}, None, 2)
    assert said.usage == {"gpu_utilisation": 0.5}


def test_it_is_counted_how_often_a_job_got_no_further(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    stalled = []
    for reached in ("3 of 9", "3 of 9", "3 of 9", "5 of 9", "5 of 9"):
        attempt(file, {"interrupted": {"message": reached}})
        stalled.append(read(file)[0].stalled)
    assert stalled == [0, 1, 2, 0, 1]


def test_an_attempt_that_has_begun_says_nothing_yet(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    attempt(file, {"report": {"rows": 3}})
    opened = file.read_text().splitlines()[0]
    said, _ = read(file)
    said.take(opened)
    assert (said.report, said.closed, said.attempts) == (None, False, 2)


def test_an_unexpected_error_is_one_line(tmp_path: Path) -> None:
    attempt(tmp_path / "0.jsonl", error=ValueError("not\nfound"))
    said, _ = read(tmp_path / "0.jsonl")
    assert said.exception == "ValueError: not found"
    assert said.closed


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not json",
        "3",
        "[]",
        '{"method": "log"}',
        '{"method": "log", "params": {}}',
        '{"method": "log", "params": ["x"]}',
        '{"method": "report_custom_message", "params": {}}',
        '{"method": "report_custom_message", "params": {"payload": 3}}',
        '{"method": "closed", "params": {"exception": "oh"}}',
    ],
)
def test_what_is_not_a_message_is_refused_and_changes_nothing_said(line: str, tmp_path: Path) -> None:
    attempt(tmp_path / "0.jsonl", {"report": {"rows": 3}})
    said, _ = read(tmp_path / "0.jsonl")
    with pytest.raises(ArtifactError, match="not a Pipes message"):
        said.take(line)
    assert said.report == {"rows": 3}


def test_levels_are_those_of_logging() -> None:
    said = Said()
    names = ("debug", "INFO", "WARNING", "error", "CRITICAL", "chatty")
    lines = [json.dumps({"method": "log", "params": {"level": name, "message": name}}) for name in names]
    assert [said.take(line) for line in lines] == list(zip((10, 20, 30, 40, 50, 20), names, strict=True))
