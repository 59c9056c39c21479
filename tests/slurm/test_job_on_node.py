"""A job told to stop by a real SLURM: queued again from within, not when cancelled, and as several processes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dagster_pipes import encode_param

from spatial_core.cluster.resources import Resources
from spatial_core.cluster.script import log_file, render
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task
from spatial_core.metric_learning.training_state import STATE, load_state
from spatial_core.street_view.embeddings import embed_tar
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_model import make_backbone, model_settings
from tests.data.make_tars import street_view, tar_bytes
from tests.data.make_training_lake import Lake, build_lake, train_settings
from tests.slurm.client import Slurm
from tests.slurm.conftest import REPOSITORY

CONTEXT = {"asset_keys": None, "partition_key": None, "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}
ROOMY = ("--cpus-per-task=1", "--mem=3G", "--requeue", "--open-mode=append", f"--export=ALL,PYTHONPATH={REPOSITORY}")

# After every piece there is time to be told.
DRIVER = """
import pathlib, sys, time
from spatial_core.jobs.__main__ import main
rename = pathlib.Path.replace
def replace(self, target):
    result = rename(self, target)
    if ".pieces-" in str(target):
        time.sleep(2)
    return result
pathlib.Path.replace = replace
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Place:
    """A folder that the nodes share, with what jobs need in it, and the message file in it."""

    root: Path
    file: str = "messages"

    def task(self, call: StageCall, **options: Any) -> list[str]:
        """Write the task of a job that reports to the message file; the command line after the interpreter."""
        pipes = {
            "DAGSTER_PIPES_CONTEXT": encode_param({"data": CONTEXT}),
            "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(self.root / self.file)}),
        }
        Task(call, pipes, requeue=True, **options).write(self.root / "task.json")
        (self.root / "driver.py").write_text(DRIVER)
        return [str(self.root / "driver.py"), call.stage, "--task", str(self.root / "task.json")]

    def messages(self) -> list[dict[str, Any]]:
        file = self.root / self.file
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def outcomes(self) -> list[dict[str, Any]]:
        """What the attempts said in the end, in order, their usage left out."""
        sent = [message["params"]["payload"] for message in self.messages() if message["method"].endswith("message")]
        return [payload for payload in sent if "usage" not in payload]

    def usages(self) -> list[dict[str, Any]]:
        sent = [message["params"]["payload"] for message in self.messages() if message["method"].endswith("message")]
        return [payload["usage"] for payload in sent if "usage" in payload]


@pytest.fixture
def place(slurm: Slurm) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=slurm.work, ignore_cleanup_errors=True) as folder:
        yield Place(Path(folder))


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Settings]:
    """A tar, its intermediates, and settings under which its features are several pieces."""
    root = tmp_path_factory.mktemp("lake")
    tar = root / "0101.tar"
    tar.write_bytes(tar_bytes(street_view(101, seed=3, targets=12, side_px=72)))
    ingest_tar(tar, root / "intermediates", Settings())
    settings = model_settings(
        root, make_backbone(root / "tiny"), "embedding_model.batch_size=4", "embedding_model.piece_rows=12"
    )
    return tar, root / "intermediates" / "0101.parquet", settings


def embed_call(place: Place, tar: tuple[Path, Path, Settings]) -> StageCall:
    arguments = {"tar": tar[0], "intermediates": tar[1], "output_dir": place.root / "out"}
    return StageCall("embed", {name: str(path) for name, path in arguments.items()}, tar[2])


def pieces(place: Place) -> list[Path]:
    return list((place.root / "out").glob(".*pieces-*/*.parquet"))


def test_a_task_of_an_array_saves_its_piece_is_queued_again_and_finishes(
    slurm: Slurm, place: Place, tar: tuple[Path, Path, Settings]
) -> None:
    command = place.task(embed_call(place, tar), scratch="$SLURM_TMPDIR")
    task = f"{slurm.sbatch(*ROOMY, '--array=3', run=[sys.executable, *command])}_3"
    slurm.wait_for(lambda: pieces(place), timeout_s=120, what="the first piece")
    slurm.run("scancel", "--signal=TERM", "--batch", task)  # as --signal=B:TERM@… does before the limit
    slurm.wait_for(place.outcomes, what="the first attempt's last words")
    (interrupted,) = place.outcomes()
    assert "of 0101.tar are finished; run again" in interrupted["interrupted"]["message"]
    done = len(pieces(place))
    assert slurm.ended(task, timeout_s=180).state == "COMPLETED"
    report = place.outcomes()[-1]["report"]
    assert report["details"]["pieces_resumed"] == done
    first, second = place.usages()
    assert (first["slurm"]["array_task_id"], first["slurm"]["restart_count"]) == ("3", None)
    assert second["slurm"]["restart_count"] == "1"
    assert second["slurm"]["node"] in {"node1", "node2"}
    whole = embed_tar(*tar[:2], place.root / "whole", tar[2])
    assert Path(report["artifact"]).read_bytes() == whole.artifact.read_bytes()


def test_a_cancelled_job_saves_its_piece_and_stays_cancelled(
    slurm: Slurm, place: Place, tar: tuple[Path, Path, Settings]
) -> None:
    job = slurm.sbatch(*ROOMY, run=[sys.executable, *place.task(embed_call(place, tar))])
    slurm.wait_for(lambda: pieces(place), timeout_s=120, what="the first piece")
    slurm.cancel(job)
    assert slurm.ended(job).state == "CANCELLED"
    slurm.wait_for(lambda: "is not queued again" in slurm.log(job), what="what the job says")
    assert "interrupted" in place.outcomes()[-1]
    assert slurm.queued(job) in ([], ["CANCELLED"])
    assert [message["method"] for message in place.messages()].count("opened") == 1


def test_processes_on_two_nodes_stop_together_and_go_on(slurm: Slurm, place: Place) -> None:
    """By the very script and options that are handed to sbatch for training on two nodes."""
    lake: Lake = build_lake(place.root)
    arguments = {"merged_dir": lake.merged, "difficulty": lake.difficulty, "output_dir": lake.output}
    settings = train_settings("training.num_epochs=150", f"compute.work_dir={place.root}")
    submission = render(
        "projector_checkpoint",
        {"": StageCall("train", {name: str(path) for name, path in arguments.items()}, settings)},
        Resources(cpus=1, mem="3G", time_limit="01:00:00", partition="urgent", nodes=2),
        settings,
        name="two-nodes",
        python=Path(sys.executable),
        run_id="r",
    )
    assert "--signal=B:TERM@120" in submission.options
    for name, text in submission.files.items():
        file = Path(submission.folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("logs", "messages"):
        (Path(submission.folder) / name).mkdir(exist_ok=True)
    job = slurm.run("sbatch", "--parsable", *submission.options, f"{submission.folder}/job.sh")
    log, said = Path(log_file(submission.folder, 0)), Place(Path(submission.folder), "messages/0.jsonl")
    slurm.wait_for((lake.output / STATE).exists, timeout_s=120, what="the first epoch")
    slurm.run("scancel", "--signal=TERM", "--batch", job)  # the batch shell, as that option does
    slurm.wait_for(said.outcomes, what="the first attempt's last words")
    assert "of 150 epochs are finished" in said.outcomes()[0]["interrupted"]["message"], log.read_text()
    epochs = load_state(lake.output / STATE)[1]["run"]["epoch"]
    assert 0 < epochs < 150
    assert slurm.ended(job, timeout_s=180).state == "COMPLETED", log.read_text()
    report = said.outcomes()[-1]["report"]
    assert report["details"]["resumed_from_epoch"] == epochs
    assert report["details"]["processes"] == 2
