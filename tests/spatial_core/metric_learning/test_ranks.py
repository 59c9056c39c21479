"""Training by several processes: real ones, started by torchrun on the loopback, two of them on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dagster_pipes import encode_param

from spatial_core.errors import ArtifactBusy, Interrupted, RankLost
from spatial_core.jobs.pipes import failure_from
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task
from spatial_core.metric_learning.checkpoint import BEST, FINAL, load_checkpoint
from spatial_core.metric_learning.ranks import Ranks
from spatial_core.metric_learning.training import train_projector
from spatial_core.metric_learning.training_state import STATE, load_state
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from tests.data.make_training_lake import Lake, train_settings

ROOT = Path(__file__).parents[3]
CONTEXT = {"asset_keys": None, "partition_key": None, "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}

# The job itself, one process of which gets a signal in the middle of an epoch.
DRIVER = """
import os, signal, sys
from spatial_core.jobs.__main__ import main
from spatial_core.metric_learning.mining import TripletSampler

rank, epoch, number = (int(text) for text in sys.argv[1].split(","))
draw = TripletSampler.epoch
def epoch_of(self, batch_size):
    global epoch
    if batch_size < 1000:  # validation draws all of its triplets at once
        epoch -= 1
    for place, batch in enumerate(draw(self, batch_size)):
        if epoch == 0 and place == 1 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        yield batch
TripletSampler.epoch = epoch_of
sys.exit(main(sys.argv[2:]))
"""


@dataclass
class Ran:
    """How a run over several processes ended."""

    code: int
    log: str
    seconds: float
    outcome: dict[str, Any]

    @property
    def report(self) -> Report:
        return Report.from_json(self.outcome["report"])


def torchrun(lake: Lake, output: Path, *overrides: str, signal_to: str = "-1,0,0", stage: str = "train") -> Ran:
    """Two processes. `signal_to`: rank, epoch and number of the signal it gets."""
    messages = output.parent / f"{output.name}.messages"
    messages.unlink(missing_ok=True)
    arguments = {"merged_dir": str(lake.merged), "difficulty": str(lake.difficulty), "output_dir": str(output)}
    pipes = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"data": CONTEXT}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(messages)}),
    }
    task = output.parent / f"{output.name}.task.json"
    if stage != "train":
        arguments = {"output_dir": str(output)}
    Task(StageCall(stage, arguments, train_settings(*overrides)), pipes).write(task)
    driver = output.parent / "driver.py"
    driver.write_text(DRIVER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *launcher, str(driver), signal_to, stage, "--task", str(task)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            log, _ = process.communicate(timeout=300)
        except BaseException:
            process.terminate()  # torchrun then ends its processes, which are in sessions of their own
            process.communicate(timeout=60)
            raise
    lines = messages.read_text().splitlines() if messages.exists() else []
    sent = [json.loads(line) for line in lines]
    payloads = [message["params"]["payload"] for message in sent if message["method"] == "report_custom_message"]
    outcome = payloads[-1] if payloads else {}
    return Ran(process.returncode, log, time.monotonic() - began, outcome)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def weights(output: Path, name: str = FINAL) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in load_checkpoint(output / name).projector.state_dict().values()])


def train(lake: Lake, output: Path, *overrides: str) -> Report:
    return train_projector(lake.merged, lake.difficulty, output, train_settings(*overrides))


def test_two_processes_give_what_one_gives(lake: Lake, tmp_path: Path) -> None:
    """Without dropout, which is drawn by each process for itself; with a last batch of one triplet, so that one of the
    two has nothing to do."""
    anchors = train(lake, tmp_path / "probe", "training.num_epochs=1").rows
    size = next(size for size in range(11, anchors) if anchors % size == 1)
    options = ("training_model.dropout=0", f"training.batch_size={size}")
    one = train(lake, tmp_path / "one", *options)
    ran = torchrun(lake, tmp_path / "two", *options)
    assert ran.code == 0, ran.log
    assert (ran.report.details["processes"], one.details["processes"]) == (2, 1)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=2e-4, atol=2e-5)
    for ours, theirs in zip(
        load_checkpoint(tmp_path / "two").history, load_checkpoint(tmp_path / "one").history, strict=True
    ):
        assert ours["band_shares"] == theirs["band_shares"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["active_fraction"] == pytest.approx(theirs["active_fraction"], abs=0.02)
    assert ran.report.rows == one.rows
    assert ran.report.artifact == tmp_path / "two" / BEST

    known = torchrun(lake, tmp_path / "one", *options)
    assert known.report.up_to_date, "how many processes there are is no part of what identifies a checkpoint"


@pytest.mark.slow
def test_a_run_is_stopped_resumed_and_repeated_to_identical_files(lake: Lake, tmp_path: Path) -> None:
    """With dropout, whose masks differ between processes but not between runs. One process alone gets the SIGTERM."""
    whole = torchrun(lake, tmp_path / "whole")
    assert whole.code == 0, whole.log
    stopped = torchrun(lake, tmp_path / "stopped", signal_to="1,2,15")
    error = failure_from(stopped.outcome["interrupted"])
    assert isinstance(error, Interrupted)
    assert "2 of 3 epochs are finished; run again" in str(error)
    assert "process 1 spatial_core.jobs: Interrupted" in stopped.log
    assert load_state(tmp_path / "stopped" / STATE)[1]["run"]["epoch"] == 2
    resumed = torchrun(lake, tmp_path / "stopped")
    assert resumed.report.details["resumed_from_epoch"] == 2
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_dies_the_others_end_and_another_number_of_them_goes_on(
    rank: int, lake: Lake, tmp_path: Path
) -> None:
    ran = torchrun(lake, tmp_path / "out", "training_model.dropout=0", signal_to=f"{rank},2,9")
    assert ran.code != 0
    assert ran.seconds < 120
    if rank == 0:
        assert "report" not in ran.outcome
        assert "process 1 spatial_core.jobs: RankLost" in ran.log
    else:
        error = failure_from(ran.outcome["failure"])
        assert isinstance(error, RankLost)
        assert "process 0 of 2: lost another process of the run" in str(error)
    report = train(lake, tmp_path / "out", "training_model.dropout=0")
    assert report.details["resumed_from_epoch"] == 1
    straight = train(lake, tmp_path / "straight", "training_model.dropout=0")
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "straight"), rtol=2e-4, atol=2e-5)
    assert report.details["epochs"] == straight.details["epochs"]


def test_what_fails_on_one_process_fails_on_all(lake: Lake, tmp_path: Path) -> None:
    with exclusive(tmp_path / "busy" / BEST):
        ran = torchrun(lake, tmp_path / "busy")
    assert isinstance(failure_from(ran.outcome["failure"]), ArtifactBusy)
    assert "process 1 spatial_core.jobs: ArtifactBusy" in ran.log
    options = ("training.learning_rate=1e30", "training_model.use_layer_norm=false")
    ran = torchrun(lake, tmp_path / "diverged", *options)
    assert "training diverged" in ran.outcome["failure"]["message"]
    assert "process 1 spatial_core.jobs: ModelError: training diverged" in ran.log


def test_a_stage_for_one_process_refuses_several(lake: Lake, tmp_path: Path) -> None:
    ran = torchrun(lake, tmp_path / "out", stage="demo-data")
    assert ran.code != 0
    assert "stage demo-data is done by one process, but torchrun started 2" in ran.outcome["failure"]["message"]
    assert not (tmp_path / "out").exists()


def test_every_process_draws_dropout_masks_of_its_own_and_the_first_goes_on_with_its_stream() -> None:
    def drawn(rank: int, epoch: int, seed: int = 42) -> tuple[float, ...]:
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 3
        torch.manual_seed(9)  # what every process has after it took over the state of the first
        ranks.seed_dropout(seed, epoch)
        return tuple(torch.rand(4).tolist())

    with torch.random.fork_rng():
        assert drawn(0, 1) == drawn(0, 2)
        cases = [(rank, epoch, seed) for rank in (0, 1, 2) for epoch in (1, 2) for seed in (42, 43)]
        assert len({drawn(*case) for case in cases if case[0]}) == 8
        assert drawn(1, 1) == drawn(1, 1) != drawn(0, 1)


@pytest.mark.parametrize(("total", "size"), [(16, 2), (17, 4), (3, 4), (1, 2), (0, 3)])
def test_shares_divide_a_batch(total: int, size: int) -> None:
    taken: list[int] = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        share = list(range(total))[ranks.share(total)]
        assert abs(len(share) - total / size) < 1
        taken += share
    assert taken == list(range(total))
