"""Runs that are killed, prolonged, changed, or started from a checkpoint of somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_core import interruption
from spatial_core.errors import ArtifactError, ConfigError, DigestMismatch, InputError, Interrupted, ModelError
from spatial_core.metric_learning.checkpoint import BEST, FINAL, load_checkpoint
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.metric_learning.training import train_projector
from spatial_core.metric_learning.training_state import STATE, load_state, save_state
from spatial_core.report import Report
from tests.data.make_training_lake import Lake, train_settings

ROOT = Path(__file__).parents[3]
HEAD = ProjectorConfig(16, (24,), 8)

# Trains in forked children, each killed at another moment: just after its n-th rename, or after its n-th batch.
KILLER = """
import os, pathlib, signal, sys
import torch
from tests.data.make_training_lake import Lake, train_settings
from spatial_core.metric_learning.training import train_projector

# What the first optimizer step imports is imported once here instead of in every child.
weight = torch.nn.Parameter(torch.zeros(1))
weight.sum().backward()
torch.optim.Adam([weight], fused=True).step()
root = pathlib.Path(sys.argv[1])
lake = Lake(root / "merged", root / "difficulty.parquet", root)
moments = [(kind, n) for kind, ns in (("rename", range(1, 14)), ("batch", (1, 9, 14))) for n in ns]
for kind, n in moments:
    child = os.fork()
    if child == 0:
        left = n
        def die():
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        rename = pathlib.Path.replace
        def replace(self, target):
            result = rename(self, target)
            if kind == "rename":
                die()
            return result
        pathlib.Path.replace = replace
        def progress(done, total, message):
            if kind == "batch":
                die()
        settings = train_settings("training.save_every_n_epochs=2", "logging.log_every_n_batches=1")
        train_projector(lake.merged, lake.difficulty, root / f"{kind}{n}", settings, progress)
        os._exit(3)
    status = os.waitpid(child, 0)[1]
    print(kind, n, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
"""


def train(lake: Lake, *overrides: str, output: Path | None = None) -> Report:
    settings = train_settings("training.save_every_n_epochs=2", "logging.log_every_n_batches=1", *overrides)
    return train_projector(lake.merged, lake.difficulty, output or lake.output, settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def test_a_killed_run_goes_on_and_ends_with_identical_files(lake: Lake, tmp_path: Path) -> None:
    train(lake)
    expected = contents(lake.output)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    outcomes = [line.split() for line in killer.stdout.splitlines()]
    assert len(outcomes) == 16
    resumed = set()
    for kind, number, code in outcomes:
        assert int(code) == signal.SIGKILL, f"{kind} {number} was not reached"
        folder = tmp_path / f"{kind}{number}"
        for path in folder.glob("checkpoint_epoch_*.safetensors"):
            load_checkpoint(path)
        report = train(lake, output=folder)
        assert not report.up_to_date
        assert contents(folder) == expected
        assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
        resumed.add(report.details["resumed_from_epoch"])
    assert {None, 1, 2, 3} <= resumed


def test_a_run_that_is_told_to_stop_does_so_after_its_epoch_and_goes_on_to_identical_files(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(lake)
    monkeypatch.setattr(interruption, "_stop", interruption._Stop())

    def stop(done: int, total: int | None, message: str) -> None:
        if message.startswith("epoch 2"):
            interruption.request_stop()

    settings = train_settings("training.save_every_n_epochs=2", "logging.log_every_n_batches=1")
    with pytest.raises(Interrupted, match="2 of 3 epochs are finished; run again"):
        train_projector(lake.merged, lake.difficulty, tmp_path / "stopped", settings, stop)
    with pytest.raises(Interrupted, match="2 of 3 epochs"):
        train(lake, output=tmp_path / "stopped")
    monkeypatch.setattr(interruption, "_stop", interruption._Stop())
    report = train(lake, output=tmp_path / "stopped")
    assert report.details["resumed_from_epoch"] == 2
    assert contents(tmp_path / "stopped") == contents(lake.output)


def test_a_finished_run_is_prolonged_as_if_it_had_been_longer(lake: Lake, tmp_path: Path) -> None:
    train(lake, "training.num_epochs=2")
    prolonged = train(lake, "training.num_epochs=4")
    assert prolonged.details["resumed_from_epoch"] == 2
    straight = train(lake, "training.num_epochs=4", output=tmp_path / "straight")
    assert straight.details["resumed_from_epoch"] is None
    assert contents(lake.output) == contents(tmp_path / "straight")
    shorter = train(lake, "training.num_epochs=2")
    assert shorter.details["epochs"] == 2
    assert not (lake.output / "checkpoint_epoch_4.safetensors").exists()


def test_a_state_that_was_never_validated_is_continued_and_finished(lake: Lake, tmp_path: Path) -> None:
    def interrupted(output: Path) -> None:
        def stop(done: int, total: int | None, message: str) -> None:
            if message.startswith("epoch 2"):
                raise KeyboardInterrupt

        settings = train_settings("training.validate_every_n_epochs=3", "logging.log_every_n_batches=1")
        with pytest.raises(KeyboardInterrupt):
            train_projector(lake.merged, lake.difficulty, output, settings, stop)
        assert sorted(contents(output)) == [STATE]

    seldom = "training.validate_every_n_epochs=3"
    interrupted(lake.output)
    report = train(lake, seldom)
    assert (report.details["resumed_from_epoch"], report.details["best_epoch"]) == (1, 3)
    interrupted(tmp_path / "short")
    report = train(lake, seldom, "training.num_epochs=1", output=tmp_path / "short")
    assert (report.details["resumed_from_epoch"], report.details["best_epoch"], report.details["epochs"]) == (1, 1, 1)
    assert load_checkpoint(report.artifact).metrics == report.details["metrics"]


def test_a_run_that_is_being_prolonged_does_not_count_as_finished(lake: Lake) -> None:
    manifest = lake.output / "_manifests" / f"{BEST}.json"
    train(lake, "training.num_epochs=2")
    assert manifest.exists()

    def look(done: int, total: int | None, message: str) -> None:
        assert not manifest.exists()

    settings = train_settings("training.save_every_n_epochs=2", "training.num_epochs=3")
    train_projector(lake.merged, lake.difficulty, lake.output, settings, look)
    assert manifest.exists()


def test_other_settings_start_over_and_leave_nothing_of_the_earlier_run(lake: Lake, tmp_path: Path) -> None:
    train(lake, "training.num_epochs=4")
    changed = train(lake, "training.margin=0.3", "training.num_epochs=3")
    assert changed.details["resumed_from_epoch"] is None
    clean = train(lake, "training.margin=0.3", "training.num_epochs=3", output=tmp_path / "clean")
    assert clean.details["metrics"] == changed.details["metrics"]
    assert contents(lake.output) == contents(tmp_path / "clean")
    assert sorted(path.name for path in (lake.output / "_manifests").iterdir()) == [f"{BEST}.json"]


def test_a_run_that_fails_before_its_first_epoch_leaves_the_earlier_one(lake: Lake) -> None:
    train(lake)
    before = contents(lake.output)
    with pytest.raises(ConfigError):
        train(lake, "training_model.input_dim=99")
    assert contents(lake.output) == before


def test_a_damaged_state_is_refused(lake: Lake) -> None:
    train(lake)
    state = lake.output / STATE
    data = bytearray(state.read_bytes())
    data[-3] ^= 1
    state.write_bytes(data)
    with pytest.raises(DigestMismatch, match="delete it to train from the start"):
        train(lake, "training.num_epochs=4")
    state.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="not a training state"):
        train(lake, "training.num_epochs=4")


def test_state_round_trip(tmp_path: Path) -> None:
    weights = torch.randn(3, 4)
    tensors = {"a": weights, "b": weights, "c": torch.arange(5, dtype=torch.uint8), "d": torch.tensor(2.5)}
    save_state(tmp_path / STATE, tensors, {"epoch": 3})
    read, record = load_state(tmp_path / STATE)
    assert record == {"epoch": 3}
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


# A named checkpoint


def test_starting_from_our_checkpoint_keeps_its_epoch_history_and_score(lake: Lake, tmp_path: Path) -> None:
    first = train(lake)
    report = train(
        lake,
        f"training.resume_from_checkpoint={lake.output / FINAL}",
        "training.num_epochs=4",
        "training.learning_rate=1e-9",
        output=tmp_path / "on",
    )
    assert report.details["resumed_from_epoch"] == 3
    assert report.details["epochs"] == 4
    checkpoint = load_checkpoint(tmp_path / "on" / FINAL)
    final = load_checkpoint(lake.output / FINAL)
    assert list(checkpoint.history[:3]) == list(final.history)
    # Such small steps change nothing that can be seen, so the weights it started from remain the best or are equalled.
    assert report.details["metrics"]["recall@1"] == pytest.approx(final.metrics["recall@1"], abs=0.02)
    again = train(
        lake,
        f"training.resume_from_checkpoint={lake.output / FINAL}",
        "training.num_epochs=4",
        "training.learning_rate=1e-9",
        output=tmp_path / "on",
    )
    assert again.up_to_date
    assert not first.up_to_date


def test_starting_from_a_training_state_is_going_on_in_another_folder(lake: Lake, tmp_path: Path) -> None:
    train(lake, "training.num_epochs=2")
    other = train(
        lake,
        f"training.resume_from_checkpoint={lake.output / STATE}",
        "training.num_epochs=4",
        output=tmp_path / "elsewhere",
    )
    straight = train(lake, "training.num_epochs=4", output=tmp_path / "straight")
    assert other.details["metrics"] == straight.details["metrics"]
    ours, theirs = (load_checkpoint(tmp_path / name / FINAL).projector for name in ("elsewhere", "straight"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_training_state_of_other_features_is_refused(lake: Lake, tmp_path: Path) -> None:
    train(lake, "training.num_epochs=2")
    with pytest.raises(ConfigError, match=r"other training images or another training\.standardize_features"):
        train(
            lake,
            f"training.resume_from_checkpoint={lake.output / STATE}",
            "training.standardize_features=false",
            output=tmp_path / "elsewhere",
        )


def legacy(path: Path, config: ProjectorConfig = HEAD, epoch: int = 1) -> Projector:
    torch.manual_seed(8)
    projector = Projector(config)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        projector(torch.randn(9, config.input_dim)).sum().backward()
        optimizer.step()
    content = {"epoch": epoch, "model_state_dict": projector.state_dict(), "metrics": {"val_loss": 0.3}}
    torch.save({**content, "optimizer_state_dict": optimizer.state_dict()}, path)
    return projector


def test_starting_from_an_old_pickle_takes_weights_and_moments(lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best.pt"
    projector = legacy(path)
    report = train(
        lake,
        f"training.resume_from_checkpoint={path}",
        "training.num_epochs=3",
        "training.learning_rate=1e-12",
        "training.weight_decay=0",
        "training.standardize_features=false",
    )
    assert report.details["resumed_from_epoch"] == 2
    trained = load_checkpoint(lake.output / FINAL).projector
    for ours, theirs in zip(trained.parameters(), projector.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)
    tensors, _ = load_state(lake.output / STATE)
    batches = -(-report.rows // 16)
    assert float(tensors["adam.step.input_layer.weight"]) == 3 + batches


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_with_code_or_of_another_head_are_refused(lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"epoch": 0, "model_state_dict": Projector(HEAD).state_dict(), "x": Payload(tmp_path / "ran")}, path)
    with pytest.raises(ModelError, match=r"evil\.pt: refused"):
        train(lake, f"training.resume_from_checkpoint={path}")
    assert not (tmp_path / "ran").exists()
    legacy(path, ProjectorConfig(16, (20,), 8))
    with pytest.raises(ConfigError, match=r"evil\.pt: holds .*\(20,\).*settings ask for .*\(24,\)"):
        train(lake, f"training.resume_from_checkpoint={path}")
    legacy(path, epoch=5)
    with pytest.raises(ConfigError, match=r"has 6 epochs already; raise training\.num_epochs"):
        train(lake, f"training.resume_from_checkpoint={path}")


def test_a_checkpoint_of_the_same_folder_is_kept_or_refused(lake: Lake) -> None:
    train(lake, "training.num_epochs=2")
    with pytest.raises(ConfigError, match="would overwrite the checkpoint it starts from"):
        train(lake, f"training.resume_from_checkpoint={lake.output / BEST}")
    start = lake.output / "checkpoint_epoch_2.safetensors"
    before = start.read_bytes()
    report = train(lake, f"training.resume_from_checkpoint={start}", "training.margin=0.3", "training.num_epochs=3")
    assert report.details["resumed_from_epoch"] == 2
    assert start.read_bytes() == before
    with pytest.raises(InputError, match="no such checkpoint"):
        train(lake, "training.resume_from_checkpoint=missing.safetensors")
