"""The message file: whole lines, whoever was killed while writing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from dagster_pipes import (
    PipesContext,
    PipesMappingParamsLoader,
    encode_param,
    open_dagster_pipes,
)

from spatial_core.jobs.message_file import LineFile, LineFileWriter

CONTEXT = {"asset_keys": None, "partition_key": None, "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}


def message(text: str) -> Any:
    return {"__dagster_pipes_version": "0.1", "method": "log", "params": {"message": text, "level": "INFO"}}


def test_many_threads_and_long_messages_make_whole_lines(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "messages")
    texts = [[f"{writer}-{number}-{'x' * 100_000}" for number in range(20)] for writer in range(4)]

    def write(own: list[str]) -> None:
        for text in own:
            file.write_message(message(text))

    writers = [threading.Thread(target=write, args=(own,)) for own in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / "messages").read_text().splitlines()
    assert sorted(json.loads(line)["params"]["message"] for line in lines) == sorted(
        text for own in texts for text in own
    )


@pytest.mark.parametrize(("left", "kept"), [(b'{"method": "lo', 1), (b'{"method": 1}\n', 1), (b"", 0)])
def test_a_second_attempt_goes_on_after_whatever_the_first_left(left: bytes, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "messages"
    path.write_bytes(left)
    LineFile(path).write_message(message("again"))
    lines = path.read_bytes().splitlines()
    assert lines[:kept] == left.splitlines()
    assert [json.loads(line)["params"]["message"] for line in lines[kept:]] == ["again"]
    assert path.read_bytes().endswith(b"\n")


def test_pipes_write_their_messages_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipesContext, "_instance", None)
    path = tmp_path / "messages"
    path.write_bytes(b'{"cut')
    environment = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"data": CONTEXT}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(path)}),
    }
    with open_dagster_pipes(
        message_writer=LineFileWriter(), params_loader=PipesMappingParamsLoader(environment)
    ) as pipes:
        pipes.log.info("hello")
        pipes.report_custom_message({"report": {}})
    first, *lines = path.read_text().splitlines()
    assert first == '{"cut'
    assert [json.loads(line)["method"] for line in lines] == ["opened", "log", "report_custom_message", "closed"]
