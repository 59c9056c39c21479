"""`spatial slurm render`: what would be submitted is shown to the letter, and nothing is."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_core.cluster.resources import resources_for
from spatial_core.cluster.script import render
from spatial_core.config.settings import load_settings
from spatial_core.jobs.task import Task
from spatial_core.lake.catalogue import CATALOGUE

CONFIG = """
[compute]
profile = "slurm_login"
account = "def-prof"
python = "/shared/env/bin/python"
setup = ["module load cuda"]
[compute.resources.backbone_embeddings]
partition = "gpu"
gpus = "h100:1"
time_limit = 04:00:00
"""
KEYS = ("0201", "0202")


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    for key in KEYS:
        (raw / f"{key}.tar").touch()
    return tmp_path


def render_cli(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spatial_core.cli.main", "slurm", "render", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=variables)


def test_what_is_shown_is_what_the_library_submits(lake: Path) -> None:
    shown = render_cli("backbone_embeddings", "-p", "0201", "-p", "0202", "--json", cwd=lake)
    assert shown.returncode == 0, shown.stderr
    settings = load_settings(lake / "config.toml", environ={})
    kind = CATALOGUE["backbone_embeddings"]
    expected = render(
        "backbone_embeddings",
        {key: kind.call(settings, key) for key in KEYS},
        resources_for(settings.compute, "backbone_embeddings"),
        settings,
        name="spatial-backbone-embeddings-RENDERED",
        python=Path("/shared/env/bin/python"),
        run_id="RUN",
    )
    assert json.loads(shown.stdout) == {**expected.request(), "name": expected.name}
    assert not (lake / "data" / "jobs").exists()


def test_a_person_can_copy_the_command(lake: Path) -> None:
    shown = render_cli("backbone_embeddings", cwd=lake)
    assert shown.returncode == 0, shown.stderr
    command, *_ = [line for line in shown.stdout.splitlines() if line.startswith("sbatch ")]
    words = shlex.split(command)
    assert "--array=0-1%50" in words, "all known tars when none is named"
    assert {"--gres=gpu:h100:1", "--time=04:00:00", "--account=def-prof", "--partition=gpu"} <= set(words)
    assert words[-1].endswith("/job.sh")
    script = shown.stdout.partition("#!/bin/bash")[2].partition("tasks/0.json")[0]
    assert "module load cuda\nexec /shared/env/bin/python -m spatial_core.jobs embed --task" in script
    tasks = re.findall(r"^tasks/\d+\.json ─+\n(\{.*?^\})$", shown.stdout, re.MULTILINE | re.DOTALL)
    assert [Path(Task.from_json(text).call.arguments["tar"]).stem for text in tasks] == list(KEYS)


def test_no_secret_of_the_shell_is_shown(lake: Path) -> None:
    secrets = {"HF_TOKEN": "hf_4f1c", "AWS_SECRET_ACCESS_KEY": "aws-9d27"}
    shown = render_cli("intermediates", cwd=lake, **secrets)
    assert shown.returncode == 0, shown.stderr
    assert not [value for value in secrets.values() if value in shown.stdout]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("raw_tars",), "no stage makes 'raw_tars'"),
        (("nonsense",), "no stage makes 'nonsense'"),
        (("merged_splits", "-p", "0201"), "has no partitions"),
        (("final_embeddings",), "no drop is known yet"),
        (("intermediates", "-p", ""), "must not be empty"),
        (("intermediates", "-p", "../x"), "'../x' of intermediates is refused"),
        (("intermediates", "-p", "$(x)"), "refused"),
        (("intermediates", "--set", "compute.resources.intermediat.cpus=1"), "no such asset"),
        (("intermediates", "--set", "compute.partition=a b"), "compute.partition"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_one_line(arguments: tuple[str, ...], cause: str, lake: Path) -> None:
    refused = render_cli(*arguments, cwd=lake)
    assert refused.returncode in {1, 2}
    assert cause in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
