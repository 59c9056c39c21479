"""A job that asks SLURM to be queued again; `squeue` and `scontrol` are programs that record how they were called."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.jobs.requeue import own_job, requeue


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that comes first; nothing else is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def program(folder: Path, name: str, output: str, code: int = 0) -> None:
    file = folder / name
    file.write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/calls\nprintf "%s" "{output}"\nexit {code}\n')
    file.chmod(0o755)


def test_a_job_knows_its_name() -> None:
    assert own_job({}) is None
    assert own_job({"SLURM_JOB_ID": "31"}) == "31"
    assert own_job({"SLURM_JOB_ID": "33", "SLURM_ARRAY_JOB_ID": "31", "SLURM_ARRAY_TASK_ID": "0"}) == "31_0"


def test_a_running_job_is_queued_again(commands: Path) -> None:
    program(commands, "squeue", "RUNNING")
    program(commands, "scontrol", "")
    assert requeue("31_4") is None
    assert (commands / "calls").read_text().splitlines() == [
        "squeue --noheader --jobs 31_4 --format %T",
        "scontrol requeue 31_4",
    ]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_is_being_ended_does_not_come_back(state: str, commands: Path) -> None:
    program(commands, "squeue", state)
    program(commands, "scontrol", "")
    assert requeue("31") == f"squeue says: {state or 'no such job'}"
    assert "scontrol" not in (commands / "calls").read_text()


def test_refusals_say_why(commands: Path) -> None:
    assert "squeue" in (requeue("31") or "")
    program(commands, "squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    assert "Unable to contact" in (requeue("31") or "")
    program(commands, "squeue", "RUNNING")
    program(commands, "scontrol", "Job has no requeue option", 1)
    assert requeue("31") == "scontrol says: Job has no requeue option"
    program(commands, "scontrol", "", 3)
    assert requeue("31") == "scontrol says: scontrol: exit code 3"
