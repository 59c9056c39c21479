"""Checkpoints: round trip, damage, atomicity, and the earlier pipeline's pickles, friendly and hostile."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from spatial_core.config.sections import TrainingModelSection
from spatial_core.errors import ArtifactError, DigestMismatch, InputError, ModelError, StorageFull
from spatial_core.metric_learning.checkpoint import (
    BEST,
    Backbone,
    Checkpoint,
    load_checkpoint,
    record_path,
    save_checkpoint,
)
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.provenance import Provenance

CONFIG = ProjectorConfig(8, (6, 5), 3, "relu", 0.2)


def example() -> Checkpoint:
    torch.manual_seed(5)
    return Checkpoint(
        projector=Projector(CONFIG).eval(),
        epoch=4,
        metrics={"recall@1": 0.5, "loss": 0.25},
        history=({"epoch": 1, "train_loss": 0.4}, {"epoch": 2, "train_loss": 0.3}),
        backbone=Backbone({"id": "some/model", "revision": "abc", "pooling": "cls_token"}, "dinov2-224"),
        provenance=Provenance("train", "1", "digest", {"training.margin": 0.5}, {"train": "aa"}),
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / BEST
    made = example()
    digest = save_checkpoint(path, made)
    read = load_checkpoint(tmp_path)
    assert digest == read.weights_sha256 == sha256_file(path)
    assert (read.epoch, read.metrics, read.history, read.backbone, read.provenance, read.config) == (
        made.epoch,
        made.metrics,
        made.history,
        made.backbone,
        made.provenance,
        made.config,
    )
    assert read.config_digest == "digest"
    assert not read.projector.training
    features = torch.randn(5, 8)
    assert torch.equal(read.projector(features), made.projector(features))


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.safetensors", example())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / BEST
    save_checkpoint(path, example())
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"checkpoint_best\.safetensors: damaged"):
        load_checkpoint(path)


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / BEST
    save_checkpoint(path, example())
    record = json.loads(record_path(path).read_text())
    record["metrics"]["recall@1"] = 0.99
    record_path(path).write_text(json.dumps(record))
    with pytest.raises(DigestMismatch, match="changed after it was written"):
        load_checkpoint(path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / BEST
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, example())
    record_path(path).write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_checkpoint(path)
    record_path(path).write_text("[]")
    with pytest.raises(ArtifactError, match="not a checkpoint record"):
        load_checkpoint(path)
    record_path(path).unlink()
    with pytest.raises(InputError, match=r"checkpoint_best\.json: missing"):
        load_checkpoint(path)
    other = tmp_path / "weights.npy"
    other.touch()
    with pytest.raises(InputError, match=r"a checkpoint is a \.safetensors file"):
        load_checkpoint(other)


def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / BEST
    save_checkpoint(path, example())
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="no space left for checkpoint_best"):
        save_checkpoint(path, Checkpoint(Projector(CONFIG), epoch=9))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert load_checkpoint(path).epoch == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint_best.json", BEST]


def legacy(path: Path, **changes: object) -> Projector:
    """A file as the earlier pipeline's torch.save wrote it, optimizer included."""
    torch.manual_seed(6)
    projector = Projector(CONFIG)
    optimizer = torch.optim.Adam(projector.parameters())
    projector(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 11,
        "model_state_dict": projector.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "metrics": {
            "val_loss": 0.2,
            "best_val_epoch": None,
            "early_stopped": False,
            "best_val_loss": float("inf"),
            "val_metrics": {"val_loss": 0.2, "retrieval_recall@1": 0.7},
        },
    }
    torch.save({**content, **changes}, path)
    return projector.eval()


def test_a_legacy_pickle_loads(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best.pt"
    projector = legacy(path)
    read = load_checkpoint(path, TrainingModelSection(activation="relu", dropout=0.2))
    assert read.config == CONFIG
    assert read.epoch == 12
    assert read.metrics == {"val_loss": 0.2, "recall@1": 0.7}
    assert read.backbone == Backbone()
    assert read.config_digest == ""
    features = torch.randn(5, 8)
    assert torch.equal(read.projector(features), projector(features))


class Payload:
    """Runs a command when unpickled by a reader that trusts its file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    inside = tmp_path / "checkpoint_inside.pt"
    legacy(inside, metrics={"note": Payload(marker)})
    bare = tmp_path / "checkpoint_bare.pt"
    bare.write_bytes(pickle.dumps(Payload(marker)))
    for path in (inside, bare):
        with pytest.raises(ModelError, match=rf"{path.name}: refused"):
            load_checkpoint(path)
    assert not marker.exists()


def test_broken_legacy_files_are_typed_errors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    legacy(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a torch checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="not a torch checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="holds list"):
        load_checkpoint(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(ModelError, match="no model_state_dict"):
        load_checkpoint(path)
    torch.save({"model_state_dict": OrderedDict(other=torch.zeros(2))}, path)
    with pytest.raises(ModelError, match="not the weights of a projection head"):
        load_checkpoint(path)
