"""A cluster job that is told to stop: what it says, what it leaves, whether SLURM is asked, and how it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dagster_pipes import encode_param

from spatial_core.config.settings import Settings
from spatial_core.errors import Interrupted
from spatial_core.jobs.pipes import EXIT_INTERRUPTED, failure_from
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task
from spatial_core.report import Report
from spatial_core.street_view.embeddings import embed_tar
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_model import make_backbone, model_settings
from tests.data.make_tars import street_view, tar_bytes

ROOT = Path(__file__).parents[3]
CONTEXT = {"asset_keys": None, "partition_key": None, "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}

# The job, which gets a SIGTERM just after its n-th piece has its name.
DRIVER = """
import os, pathlib, signal, sys
from spatial_core.jobs.__main__ import main
rename, left = pathlib.Path.replace, int(sys.argv[1])
def replace(self, target):
    global left
    result = rename(self, target)
    if ".pieces-" in str(target):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
    return result
pathlib.Path.replace = replace
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Settings]:
    """A tar, its intermediates, and settings under which its features are 5 pieces or more."""
    root = tmp_path_factory.mktemp("lake")
    tar = root / "0101.tar"
    tar.write_bytes(tar_bytes(street_view(101, seed=3, targets=12, side_px=72)))
    ingest_tar(tar, root / "intermediates", Settings())
    backbone = make_backbone(root / "tiny")
    settings = model_settings(root, backbone, "embedding_model.batch_size=4", "embedding_model.piece_rows=8")
    return tar, root / "intermediates" / "0101.parquet", settings


@pytest.fixture
def job(lake: tuple[Path, Path, Settings], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the job as SLURM would, with programs that stand for SLURM's; told to stop after `stop_after` pieces."""
    tar, intermediates, settings = lake
    arguments = {"tar": str(tar), "intermediates": str(intermediates), "output_dir": str(tmp_path / "out")}
    pipes = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"data": CONTEXT}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(tmp_path / "messages")}),
    }
    commands = tmp_path / "bin"
    commands.mkdir()

    def run(
        *, stop_after: int, slurm: bool = True, refusal: str = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        for name, output in (("squeue", "RUNNING"), ("scontrol", refusal)):
            program = commands / name
            program.write_text(f"#!/bin/sh\necho {name} $@ >>{commands}/calls\necho {output}\n")
            program.chmod(0o755)
        task = Task(StageCall("embed", arguments, settings), **{"environment": pipes, **options})
        task.write(tmp_path / "0.json")
        identity = {"SLURM_JOB_ID": "33", "SLURM_ARRAY_JOB_ID": "31", "SLURM_ARRAY_TASK_ID": "2"} if slurm else {}
        return subprocess.run(
            [sys.executable, "-c", DRIVER, str(stop_after), "embed", "--task", str(tmp_path / "0.json")],
            cwd=ROOT,
            env={**os.environ, **identity, "PATH": f"{commands}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def payloads(folder: Path) -> list[dict[str, Any]]:
    sent = [json.loads(line) for line in (folder / "messages").read_text().splitlines()]
    return [message["params"]["payload"] for message in sent if message["method"] == "report_custom_message"]


def test_a_job_stops_after_its_piece_is_queued_again_and_goes_on(
    lake: tuple[Path, Path, Settings], job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    rows = pq.read_metadata(lake[1]).num_rows
    pieces = -(-rows // 8)
    assert pieces >= 4
    stopped = job(stop_after=2, requeue=True)
    assert stopped.returncode == EXIT_INTERRUPTED == 75, stopped.stderr
    assert (tmp_path / "bin" / "calls").read_text().splitlines()[-1] == "scontrol requeue 31_2"
    assert "job 31_2 will be queued again" in stopped.stderr
    usage, outcome = payloads(tmp_path)
    error = failure_from(outcome["interrupted"])
    assert isinstance(error, Interrupted)
    assert f"2 of {pieces} pieces of 0101.tar are finished; run again to go on from there" in str(error)
    assert usage["usage"]["slurm"]["array_task_id"] == "2"
    assert usage["usage"]["cpu_s"] > 0
    assert not list((tmp_path / "out").glob("*.parquet"))

    done = job(stop_after=-1, requeue=True)
    assert done.returncode == 0, done.stderr
    *before, usage, outcome = payloads(tmp_path)
    assert len(before) == 2, "the second attempt goes on in the same file"
    report = Report.from_json(outcome["report"])
    assert report.details["pieces_resumed"] == 2
    whole = embed_tar(lake[0], lake[1], tmp_path / "whole", lake[2])
    assert report.artifact.read_bytes() == whole.artifact.read_bytes()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("case", ["not wanted", "not in SLURM", "refused"])
def test_a_job_that_is_not_queued_again_says_by_its_exit_code_that_it_should_be(
    case: str, job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    stopped = job(
        stop_after=1,
        slurm=case != "not in SLURM",
        requeue=case != "not wanted",
        refusal="Requested operation is presently disabled",
        environment={},
    )
    assert stopped.returncode == EXIT_INTERRUPTED
    assert "Interrupted: stopped when asked to, 1 of " in stopped.stderr
    assert ("31_2 is not queued again" in stopped.stderr) == (case == "refused")
    assert ("presently disabled" in stopped.stderr) == (case == "refused")
    calls = tmp_path / "bin" / "calls"
    assert calls.exists() == (case == "refused")
    assert stopped.stdout == ""


def test_scratch_gives_the_same_bytes_and_pieces_lie_where_another_node_finds_them(
    lake: tuple[Path, Path, Settings], job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "local").mkdir()
    stopped = job(stop_after=2, scratch=str(tmp_path / "local"))
    assert stopped.returncode == EXIT_INTERRUPTED
    assert len(list((tmp_path / "out").glob(".*pieces-*/*.parquet"))) == 2
    assert list((tmp_path / "local").iterdir()) == []
    assert job(stop_after=-1, scratch=str(tmp_path / "local")).returncode == 0
    whole = embed_tar(lake[0], lake[1], tmp_path / "whole", lake[2])
    assert (tmp_path / "out" / whole.artifact.name).read_bytes() == whole.artifact.read_bytes()
    assert list((tmp_path / "local").iterdir()) == []


def test_scratch_that_is_not_there_is_an_expected_failure(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert job(stop_after=-1, scratch="$SLURM_TMPDIR_OF_NO_NODE").returncode == 1
    usage, outcome = payloads(tmp_path)
    assert outcome["failure"]["type"] == "ConfigError"
    assert "SLURM_TMPDIR_OF_NO_NODE" in outcome["failure"]["message"]
    assert "usage" in usage
