"""What a tuning study found, as training takes it over: the best trial's hyper-parameters in the place of settings.

A study names hyper-parameters by the settings they stand for. Only those listed here are taken over, so that a study
from elsewhere cannot change where training reads, writes or starts; their values are checked as a settings file's are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, ConfigError, InputError
from spatial_core.storage.provenance import artifact_digest

FORMAT = "spatial-study/1"
# Hyper-parameter -> the setting it stands for.
TUNABLE = {
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "margin": "training.margin",
    "loss_distance": "training.loss_distance",
    "batch_size": "training.batch_size",
    "ucb_exploration_constant": "training.ucb_exploration_constant",
    "ucb_warmup_samples": "training.ucb_warmup_samples",
    "dropout": "training_model.dropout",
    "use_residual": "training_model.use_residual",
    "use_layer_norm": "training_model.use_layer_norm",
    "hidden_dim": "training_model.hidden_dim",
    "num_hidden_layers": "training_model.num_hidden_layers",
    "hidden_dim_multiplier": "training_model.hidden_dim_multiplier",
    "activation": "training_model.activation",
}


@dataclass(frozen=True)
class Advice:
    """What a study says to a training run.

    Args:
        study: name of the study.
        trial: number of its best trial; None when no trial was completed.
        metric: what was maximised.
        value: what the best trial reached.
        parameters: its hyper-parameters.
        sha256: digest of the study file.
        inputs: digests of what its trials were trained and validated on.
    """

    study: str
    trial: int | None
    metric: str
    value: float | None
    parameters: Mapping[str, Any]
    sha256: str
    inputs: Mapping[str, str]

    def apply(self, settings: Settings) -> Settings:
        """The settings with the best trial's hyper-parameters.

        Raises:
            ConfigError: naming the hyper-parameter that is unknown, or whose value is not acceptable.
        """
        unknown = sorted(set(self.parameters) - set(TUNABLE))
        if unknown:
            raise ConfigError(f"study {self.study}: {', '.join(unknown)} cannot be taken over from a study")
        try:
            return settings.replaced({TUNABLE[name]: value for name, value in self.parameters.items()})
        except ConfigError as error:
            raise ConfigError(f"study {self.study}, trial {self.trial}: {error}") from error

    def describe(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        """For the report of a run that was trained on `inputs`."""
        described: dict[str, Any] = {
            "study": self.study,
            "trial": self.trial,
            "metric": self.metric,
            "value": self.value,
            "settings": {TUNABLE[name]: value for name, value in self.parameters.items()},
            "same_inputs": all(inputs.get(name) == digest for name, digest in self.inputs.items()),
        }
        if self.trial is None:
            described["note"] = "no trial was completed; hyper-parameters are those of the settings"
        return described


def read_advice(path: Path) -> Advice:
    """Read `study.json`.

    Raises:
        InputError: if there is no such file.
        DigestMismatch: if it changed after it was written.
        ArtifactError: if it is not a study.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such study; `spatial tune` makes one")
    digest = artifact_digest(path)
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise ArtifactError(f"{path}: is a study of format {record['format']!r}, expected {FORMAT}; tune again")
        best = record["best"] or {"number": None, "value": None, "parameters": {}}
        return Advice(
            study=str(record["study"]),
            trial=best["number"],
            metric=str(record["metric"]),
            value=best["value"],
            parameters=dict(best["parameters"]),
            sha256=digest,
            inputs=dict(record["provenance"]["inputs"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a tuning study ({type(error).__name__}: {error}); tune again") from error
