"""What is handed to sbatch, read the way a shell and sbatch would read it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dagster_pipes import PipesMappingParamsLoader

from spatial_core.cluster.resources import Resources, resources_for
from spatial_core.cluster.script import Submission, render
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task

NASTY = "a $(touch PWNED) `touch PWNED` 'q' \"d\" ; touch PWNED"
HOSTILE_KEYS = (".", "..", "a/b", "x" * 300, "$(x)", "a\nb", "a\n", "-a", "a b", "a.b", "ä", "%a", "../0201")


def rendered(
    folder: Path, keys: tuple[str, ...] = ("0201",), stage: str = "ingest", asset: str = "intermediates", **compute: Any
) -> Submission:
    settings = Settings(compute=compute, base_dir=folder)  # type: ignore[arg-type]
    calls = {key: StageCall(stage, {"tar": f"{key}.tar", "output_dir": NASTY}, settings) for key in keys}
    resources = resources_for(settings.compute, asset)
    return render(asset, calls, resources, settings, name="spatial-x-1", python=folder / "py", run_id="run-1")


def run_script(submission: Submission, folder: Path, **environment: str) -> list[str]:
    """Run the script with a Python that prints its arguments; returns them."""
    python = folder / "py"
    python.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    script = folder / "job.sh"
    script.write_text(submission.files["job.sh"])
    done = subprocess.run(
        ["bash", str(script)],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_one_task_of_an_array_runs_its_own_file(tmp_path: Path) -> None:
    submission = rendered(tmp_path, ("0201", "0202", "0203"), max_parallel=2)
    assert "--array=0-2%2" in submission.options
    words = run_script(submission, tmp_path, SLURM_ARRAY_TASK_ID="2")
    assert words == ["-m", "spatial_core.jobs", "ingest", "--task", f"{submission.folder}/tasks/2.json"]
    tasks = [Task.from_json(submission.files[f"tasks/{index}.json"]) for index in range(3)]
    assert [task.call.arguments["tar"] for task in tasks] == ["0201.tar", "0202.tar", "0203.tar"]
    assert tasks[0].call.arguments["output_dir"] == NASTY
    keys = [
        PipesMappingParamsLoader(dict(task.environment)).load_context_params()["data"]["partition_key"]
        for task in tasks
    ]
    assert keys == ["0201", "0202", "0203"]


def test_each_task_has_a_message_file_of_its_own_that_is_there_from_the_start(tmp_path: Path) -> None:
    submission = rendered(tmp_path, ("0201", "0202"))
    request = submission.request()
    for index in range(2):
        task = Task.from_json(submission.files[f"tasks/{index}.json"])
        params = PipesMappingParamsLoader(dict(task.environment)).load_messages_params()
        assert params["path"] == f"{submission.folder}/messages/{index}.jsonl"
        assert request["files"][f"messages/{index}.jsonl"] == ""


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_hostile_partition_keys_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"partition key .* of intermediates is refused"):
        rendered(tmp_path, ("0201", key))


@pytest.mark.parametrize("asset", ["", "a b", "../x", "$(x)", "a\n", "A", "-x"])
def test_hostile_asset_names_are_refused(asset: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="asset name"):
        rendered(tmp_path, asset=asset)


@pytest.mark.parametrize("nasty", [NASTY, "new\nline", "100%", "back\\slash"])
def test_paths_reach_their_programs_whole(nasty: str, tmp_path: Path) -> None:
    folder = tmp_path / nasty.replace("/", "_")
    folder.mkdir()
    submission = rendered(folder, work_dir=folder / "jobs", container=("env", f"X={nasty}"))
    words = "\n".join(run_script(submission, folder))
    assert words.endswith(f"{folder}/jobs/spatial-x-1/tasks/0.json")
    assert not list(tmp_path.rglob("PWNED"))
    assert f"--chdir={folder}/jobs/spatial-x-1" in submission.options


def test_a_percent_sign_in_a_folder_is_no_pattern_of_slurm(tmp_path: Path) -> None:
    options = rendered(tmp_path, ("0201", "0202"), work_dir=Path("/lake/100%a/jobs")).options
    assert "--output=/lake/100%%a/jobs/spatial-x-1/logs/%a.log" in options


def test_a_single_call_is_a_plain_job(tmp_path: Path) -> None:
    submission = rendered(tmp_path)
    assert not [option for option in submission.options if "array" in option]
    assert f"--output={submission.folder}/logs/0.log" in submission.options
    assert run_script(submission, tmp_path)[-1] == f"{submission.folder}/tasks/0.json"


def test_setup_lines_run_first_and_a_failing_one_ends_the_job(tmp_path: Path) -> None:
    submission = rendered(tmp_path, setup=("export ANSWER=42", "echo set up $ANSWER"))
    assert run_script(submission, tmp_path)[0] == "set up 42"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_script(rendered(tmp_path, setup=("module_that_is_not_there load cuda",)), tmp_path)
    assert failed.value.returncode == 127
    assert "spatial_core.jobs" not in failed.value.stdout


def test_the_stage_takes_the_place_of_the_shell(tmp_path: Path) -> None:
    """So that a signal to the batch shell is one to the stage."""
    lines = rendered(tmp_path, container=("apptainer", "exec", "--nv", "/a b.sif")).files["job.sh"].splitlines()
    words = shlex.split(lines[-1])
    assert words[:5] == ["exec", "apptainer", "exec", "--nv", "/a b.sif"]
    assert words[5:8] == [str(tmp_path / "py"), "-m", "spatial_core.jobs"]


@pytest.mark.parametrize("distributed", [False, True])
def test_bash_finds_no_fault(distributed: bool, tmp_path: Path) -> None:
    resources = {"projector_checkpoint": {"nodes": 2, "processes_per_node": 2}} if distributed else {}
    submission = rendered(
        tmp_path, ("",), "train", "projector_checkpoint",
        resources=resources, setup=("module load cuda",), work_dir=Path(f"/w/{NASTY}"), container=("c", NASTY),
    )  # fmt: skip
    script = submission.files["job.sh"]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert ("torch.distributed.run --nnodes=2 --nproc-per-node=2" in script) is distributed
    assert ("\nsrun --kill-on-bad-exit=1 " in script) is distributed


@pytest.mark.parametrize(("limit", "told"), [("02:00:00", True), ("00:05:00", False), ("9", True)])
def test_a_job_long_enough_is_told_before_its_end(limit: str, told: bool, tmp_path: Path) -> None:
    submission = rendered(tmp_path, resources={"intermediates": {"time_limit": limit}})
    assert ("--signal=B:TERM@120" in submission.options) is told


def test_options_are_an_argument_list_with_the_resources_in_it(tmp_path: Path) -> None:
    submission = rendered(tmp_path, partition="cpu", account="def-x")
    expected = Resources(cpus=1, mem="32G", time_limit="02:00:00", partition="cpu", account="def-x").options()
    assert set(expected) <= set(submission.options)
    assert "--requeue" in submission.options
    assert all(option.startswith("--") for option in submission.options)


def test_nothing_of_the_submitters_environment_is_in_a_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_4f1c", "AWS_SECRET_ACCESS_KEY": "aws-9d27", "MLFLOW_TRACKING_PASSWORD": "pw-77a0"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(rendered(tmp_path).request())
    assert not [value for value in secrets.values() if value in text]
