"""One training run from its beginning, or from where it was interrupted, to its last checkpoint.

After every epoch the whole state of the run is written, so that a killed run goes on from its latest epoch and ends
with the weights an undisturbed run would have had. A state is only continued by a run of the same key: the same
settings, inputs and checkpoint to start from. More epochs or another saving interval leave the key as it is, so a
finished run can be prolonged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, Interrupted, ModelError
from spatial_core.interruption import stop_here, stop_requested
from spatial_core.metric_learning.checkpoint import (
    BEST,
    FINAL,
    Checkpoint,
    load_checkpoint,
    read_pickle,
    record_path,
    save_checkpoint,
)
from spatial_core.metric_learning.following import Order
from spatial_core.metric_learning.projector import ProjectorConfig, build_projector
from spatial_core.metric_learning.ranks import Ranks
from spatial_core.metric_learning.tracking import Tracker, tracking_of
from spatial_core.metric_learning.trainer import EpochStats, Trainer
from spatial_core.metric_learning.training_data import TrainingData
from spatial_core.metric_learning.training_state import STATE, load_state, save_state
from spatial_core.metric_learning.validation import Selection
from spatial_core.report import Progress
from spatial_core.storage.provenance import Provenance, manifest_path, stage_key

# They choose how long to train and what to keep, but not what an epoch computes.
_EXTENT = {"training.num_epochs", "training.save_every_n_epochs"}


class Observer(Protocol):
    """Told of every validation of a run; of those before an interruption too, when the run goes on."""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Whether training goes on; False ends it here, with the best and the final checkpoint in their places."""
        ...


@dataclass
class Run:
    """What a run has reached; everything but `best_weights` is JSON.

    Args:
        epoch: epochs completed.
        history: one record an epoch.
        best_epoch: epoch of the best validation.
        best_metrics: its metrics.
        best_weights: its weights, on the CPU.
        validations_without_gain: since then.
        tracking_run: MLflow run.
    """

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    validations_without_gain: int = 0
    tracking_run: str | None = None


class Session:
    """Runs epochs, validates, keeps state and checkpoints.

    Args:
        output_dir: folder of checkpoints and state.
        settings: the whole tree.
        trainer: a head that was just initialised.
        data: what it is trained and validated on.
        provenance: of the checkpoints.
        start: checkpoint to start from, if one was named.
        observer: told of every validation, and may end the run.
        ranks: the processes that train together, of which this is the first; the others `follow`.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: Settings,
        trainer: Trainer,
        data: TrainingData,
        provenance: Provenance,
        *,
        start: Path | None,
        observer: Observer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._settings = settings
        self._selection = Selection(settings.training.selection_metric)
        self._trainer = trainer
        self._data = data
        self._provenance = provenance
        self._start = start
        self._observer = observer
        self._ended = False
        self._ranks = ranks or Ranks()
        self._run = Run()
        identity = {name: value for name, value in provenance.config.items() if name not in _EXTENT}
        self._key = stage_key(provenance.stage, provenance.code_version, identity, provenance.inputs)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Train; returns the report's details.

        Raises:
            Interrupted: if a rank was asked to stop; the run goes on from its last finished epoch.
        """
        training = self._settings.training
        self._sweep()
        resumed = self._continue_own()
        if not resumed and self._start is not None:
            self._start_from(self._start)
        resumed_from = self._run.epoch if resumed or self._start is not None else None
        tracker = Tracker(tracking_of(self._settings))
        tracker.start(self._params(), self._run.tracking_run, self._run.history)
        triplets, seconds = 0, 0.0
        try:
            for entry in self._run.history:
                self._show(entry)
            while self._run.epoch < training.num_epochs and not self._out_of_patience() and not self._ended:
                self._ranks.tell(self._order)
                self._stop_if_asked()
                begun = time.perf_counter()
                stats = self._epoch(progress)
                if not resumed and not triplets:
                    self._remove_earlier_run()
                triplets += stats.triplets
                seconds += time.perf_counter() - begun
                self._after_epoch(stats, tracker)
            self._finish()
        except BaseException as error:
            interrupted = isinstance(error, Interrupted) or not isinstance(error, Exception)
            tracker.finish(status="KILLED" if interrupted else "FAILED")
            raise
        tracker.finish([record_path(self._output_dir / BEST)])
        return self._details(tracker, resumed_from, triplets / seconds if seconds else None)

    def _epoch(self, progress: Progress) -> EpochStats:
        training = self._settings.training
        anchors = len(self._trainer.sampler.anchors)
        before, total = self._run.epoch * anchors, training.num_epochs * anchors
        every = self._settings.logging.log_every_n_batches * training.batch_size
        label = f"epoch {self._run.epoch + 1}/{training.num_epochs}"

        def after_batch(seen: int, loss: Tensor) -> None:
            if seen % every == 0 or seen == anchors:
                progress(before + seen, total, f"{label}, loss {float(loss) / seen:.4f}")

        stats = self._trainer.epoch(after_batch)
        if stats.diverged:
            raise ModelError(
                f"training diverged: the mean loss of an epoch is {stats.loss}; lower training.learning_rate "
                f"({training.learning_rate}) or use training.precision=fp32"
            )
        return stats

    def _order(self) -> Order:
        state = self._trainer.state()
        return Order(self._run.epoch + 1, {name: value.detach().cpu() for name, value in state.items()})

    def _stop_if_asked(self) -> None:
        """All ranks stop before the same epoch, whichever of them was asked."""
        asked = self._ranks.any(stop_requested())
        stop_here(f"{self._run.epoch} of {self._settings.training.num_epochs} epochs are finished", asked=asked)

    def _after_epoch(self, stats: EpochStats, tracker: Tracker) -> None:
        run, training = self._run, self._settings.training
        run.epoch += 1
        entry: dict[str, Any] = {
            "epoch": run.epoch,
            "train_loss": stats.loss,
            "active_fraction": stats.active_fraction,
            "band_shares": dict(stats.band_shares),
            "band_rewards": dict(stats.band_rewards),
        }
        improved = False
        if run.epoch % training.validate_every_n_epochs == 0 or run.epoch == training.num_epochs:
            metrics = self._data.validator.measure(self._trainer.projector)
            entry["validation"] = metrics
            improved = self._consider(metrics)
        run.history.append(entry)
        run.tracking_run = tracker.run_id
        self._save_state()
        if improved:
            self._publish_best()
        if run.epoch % training.save_every_n_epochs == 0:
            self._publish_epoch()
        tracker.log(entry)
        self._show(entry)

    def _show(self, entry: Mapping[str, Any]) -> None:
        if self._observer is not None and "validation" in entry and not self._ended:
            self._ended = not self._observer(entry["epoch"], entry["validation"])

    def _consider(self, metrics: dict[str, float]) -> bool:
        """Take the current weights as the best if they are."""
        run = self._run
        if run.best_metrics and self._selection.key(metrics) <= self._selection.key(run.best_metrics):
            run.validations_without_gain += 1
            return False
        run.best_epoch, run.best_metrics, run.validations_without_gain = run.epoch, metrics, 0
        weights = self._trainer.projector.state_dict()
        run.best_weights = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        return True

    def _out_of_patience(self) -> bool:
        patience = self._settings.training.early_stopping_patience
        return 0 < patience <= self._run.validations_without_gain

    # Files

    def _save_state(self) -> None:
        run = {name: value for name, value in vars(self._run).items() if name != "best_weights"}
        record = {"key": self._key, "projector": self._trainer.projector.config.to_json(), "run": run}
        best = {f"best.{name}": weight for name, weight in self._run.best_weights.items()}
        frame = self._data.frame
        apart = {"frame.mean": frame.mean, "frame.scale": torch.tensor(frame.scale, dtype=torch.float64)}
        save_state(self._output_dir / STATE, {**self._trainer.state(), **best, **apart}, record)

    def _checkpoint(self, weights: Mapping[str, Tensor], epoch: int, metrics: Mapping[str, float]) -> Checkpoint:
        return Checkpoint(
            projector=build_projector(self._trainer.projector.config, self._data.frame.absorb(weights)),
            epoch=epoch,
            metrics=metrics,
            history=tuple(self._run.history),
            backbone=self._data.backbone,
            provenance=self._provenance,
        )

    def _publish_best(self) -> None:
        run = self._run
        save_checkpoint(self._output_dir / BEST, self._checkpoint(run.best_weights, run.best_epoch, run.best_metrics))

    def _publish_epoch(self, name: str | None = None) -> None:
        run = self._run
        path = self._output_dir / (name or f"checkpoint_epoch_{run.epoch}.safetensors")
        metrics = run.history[-1].get("validation", {}) if run.history else {}
        save_checkpoint(path, self._checkpoint(self._weights(), run.epoch, metrics))

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.cpu() for name, weight in self._trainer.projector.state_dict().items()}

    def _finish(self) -> None:
        """Final checkpoint, and the best one again, now with the whole history."""
        if not self._run.best_metrics:  # continued from a state that was never validated, with no epoch left to train
            self._consider(self._data.validator.measure(self._trainer.projector))
        self._publish_epoch(FINAL)
        self._publish_best()

    def _sweep(self) -> None:
        """Remove what a killed run was just writing; the caller holds the folder's lock."""
        for name in ("checkpoint_*", "training_state"):
            for path in self._output_dir.glob(f".{name}.*.partial"):
                path.unlink()

    def _remove_earlier_run(self) -> None:
        """Checkpoints of a run with other settings or inputs would be mixed up with those of this one."""
        keep = set() if self._start is None else {self._start.resolve(), record_path(self._start).resolve()}
        manifests = manifest_path(self._output_dir / BEST).parent.glob("checkpoint_*.json")
        stale = [path for name in ("*.safetensors", "*.json") for path in self._output_dir.glob(f"checkpoint_{name}")]
        for path in [*manifests, *stale, self._output_dir / STATE]:
            if path.resolve() not in keep:
                path.unlink(missing_ok=True)

    # Beginnings

    def _continue_own(self) -> bool:
        path = self._output_dir / STATE
        if not path.is_file():
            return False
        tensors, record = load_state(path)
        if record["key"] != self._key or record["run"]["epoch"] > self._settings.training.num_epochs:
            return False
        self._restore(tensors, record)
        # The best checkpoint is about to be replaced, so what was recorded of it no longer holds.
        manifest_path(self._output_dir / BEST).unlink(missing_ok=True)
        # The process may have been killed between writing the state and publishing what it implies.
        if self._run.best_metrics:
            self._publish_best()
        if self._run.epoch % self._settings.training.save_every_n_epochs == 0:
            self._publish_epoch()
        return True

    def _restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        self._trainer.load_state({name: value for name, value in tensors.items() if not name.startswith("best.")})
        self._run = Run(**record["run"], best_weights=best)

    def _start_from(self, path: Path) -> None:
        """Go on from a checkpoint that was named: a training state, a checkpoint of ours, or an old pickle."""
        if path.name == STATE:
            tensors, record = load_state(path)
            self._require_same_head(path, ProjectorConfig.from_json(record["projector"]))
            frame = self._data.frame
            if not torch.equal(tensors["frame.mean"], frame.mean) or float(tensors["frame.scale"]) != frame.scale:
                raise ConfigError(
                    f"{path}: belongs to other training images or another training.standardize_features; start from a "
                    f"checkpoint_epoch_N beside it instead"
                )
            self._restore(tensors, record)
            self._run.tracking_run = None
        else:
            checkpoint = load_checkpoint(path, self._settings.head)
            self._require_same_head(path, checkpoint.config)
            self._trainer.projector.load_state_dict(self._data.frame.release(checkpoint.projector.state_dict()))
            self._run = Run(checkpoint.epoch, [dict(entry) for entry in checkpoint.history[: checkpoint.epoch]])
            # Moments of gradients in one frame say nothing about those in another.
            if path.suffix != ".safetensors" and self._data.frame.is_raw:
                self._load_legacy_moments(path)
            self._consider(self._data.validator.measure(self._trainer.projector))
        if self._run.epoch >= self._settings.training.num_epochs:
            raise ConfigError(
                f"{path}: has {self._run.epoch} epochs already; raise training.num_epochs "
                f"(now {self._settings.training.num_epochs}) to train on"
            )

    def _require_same_head(self, path: Path, found: ProjectorConfig) -> None:
        wanted = self._trainer.projector.config
        if found != wanted:
            raise ConfigError(f"{path}: holds {found}, but the settings ask for {wanted}")

    def _load_legacy_moments(self, path: Path) -> None:
        state = read_pickle(path).get("optimizer_state_dict", {}).get("state")
        if not state:
            return
        try:
            self._trainer.load_moments([state[index] for index in sorted(state)])
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: optimizer_state_dict is not that of Adam ({error})") from error

    # Accounts

    def _params(self) -> dict[str, Any]:
        return {
            **self._provenance.config,
            "config_digest": self._provenance.config_digest,
            "parameters": self._trainer.projector.parameter_count,
            "input_dim": self._data.train.dim,
            "train_images": len(self._data.train.label),
            "train_buildings": len(self._data.train.building_ids),
            "backbone": self._data.backbone.model.get("id", ""),
        }

    def _details(self, tracker: Tracker, resumed_from: int | None, speed: float | None) -> dict[str, Any]:
        run, data = self._run, self._data
        last = run.history[-1] if run.history else {}
        return {
            "epochs": run.epoch,
            "best_epoch": run.best_epoch,
            "selection_metric": self._selection.metric,
            "best_metric": run.best_metrics[self._selection.metric],
            "metrics": run.best_metrics,
            "validated_on": data.validated_on,
            "validation_images": data.validator.images,
            "validation_queries": len(data.validator.queries),
            "stopped_early": run.epoch < self._settings.training.num_epochs,
            "ended_by_observer": self._ended,
            "resumed_from_epoch": resumed_from,
            "train_loss": last.get("train_loss"),
            "active_fraction": last.get("active_fraction"),
            "band_shares": last.get("band_shares", {}),
            "triplets_per_s": None if speed is None else round(speed, 1),
            "parameters": self._trainer.projector.parameter_count,
            "projector": self._trainer.projector.config.to_json(),
            "buildings": len(data.train.building_ids),
            "buildings_in_file": data.train.buildings_in_file,
            "features_on": data.train.placed,
            "device": str(data.train.device),
            "precision": self._settings.training.precision,
            "standardized": not data.frame.is_raw,
            "difficulty": asdict(data.table),
            "random_negatives_too_near": int(data.sampler.near_random),
            "processes": self._ranks.size,
            "tracking": tracker.describe(),
        }
