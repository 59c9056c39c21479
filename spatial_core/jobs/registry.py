"""Every stage by name: one table that the command line, Dagster, a subprocess and a cluster job all call through.

A stage is a function `stage(**paths, settings=Settings, progress=Progress) -> Report`. It is named here as
`module:function` and imported only when it runs, so that listing stages costs no torch.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.jobs.stage_log import logged
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.hardware import share_cores, usable_cores


@dataclass(frozen=True)
class Stage:
    """Where a stage lives and what it takes.

    Args:
        target: `module:function`.
        code_version: the algorithm's version, shown by Dagster; equals the module's CODE_VERSION.
        required: names of path arguments that must be given.
        settings: sections, or single settings, that can change what it makes.
        optional: names of path arguments that may be given.
        shared: several processes started by `torchrun` do it together.
    """

    target: str
    code_version: str
    required: tuple[str, ...]
    settings: tuple[str, ...]
    optional: tuple[str, ...] = ()
    shared: bool = False


_NO_PATHS = {"model", "worker"}
_TRAINING = ("training", "training_model", "data.min_negative_distance_m", "global.seed")
_TUNING = (*_TRAINING, "tuning")
STAGES: dict[str, Stage] = {
    "ingest": Stage("spatial_core.street_view.ingest:ingest_tar", "2", ("tar", "output_dir"), ("process_tar",)),
    "fingerprint": Stage(
        "spatial_core.street_view.fingerprints:fingerprint_tar",
        "1",
        ("tar", "intermediates", "output_dir"),
        ("fingerprints",),
    ),
    "embed": Stage(
        "spatial_core.street_view.embeddings:embed_tar",
        "1",
        ("tar", "intermediates", "output_dir"),
        ("embedding_model",),
    ),
    "merge": Stage(
        "spatial_core.street_view.splits:merge_splits", "1", ("embeddings_dir", "output_dir"), ("data", "global.seed")
    ),
    "difficulty": Stage(
        "spatial_core.street_view.difficulty:compute_difficulty",
        "2",
        ("fingerprints_dir", "output_file"),
        ("data", "global.seed", "infrastructure.distance_dtype", "infrastructure.row_group_size"),
    ),
    "train": Stage(
        "spatial_core.metric_learning.training:train_projector",
        "1",
        ("merged_dir", "difficulty", "output_dir"),
        _TRAINING,
        ("study",),
        shared=True,
    ),
    "tune": Stage(
        "spatial_core.tuning.orchestrate:tune",
        "1",
        ("merged_dir", "difficulty", "output_dir"),
        _TUNING,
        ("storage_file",),
    ),
    "tune-worker": Stage(
        "spatial_core.tuning.worker:tune_worker",
        "1",
        ("merged_dir", "difficulty", "output_dir", "storage_file", "worker"),
        _TUNING,
    ),
    "tune-collect": Stage(
        "spatial_core.tuning.collect:collect_study",
        "1",
        ("merged_dir", "difficulty", "output_dir", "storage_file"),
        _TUNING,
    ),
    "evaluate": Stage(
        "spatial_core.evaluation.report:evaluate_projector",
        "1",
        ("merged_dir", "checkpoint", "output_dir"),
        ("evaluation", "training_model", "global.seed"),
        ("difficulty", "intermediates_dir", "raw_dir"),
    ),
    "publish": Stage(
        "spatial_core.publishing.model_folder:publish_model",
        "1",
        ("checkpoint", "output_dir"),
        ("publishing", "embedding_model", "training_model", "inference", "global.seed"),
        ("report_dir",),
    ),
    "embed-new": Stage(
        "spatial_core.inference.embed_new:embed_parquet", "1", ("input", "output_dir"), ("inference",), ("model",)
    ),
    "pool-buildings": Stage(
        "spatial_core.inference.pooling:pool_buildings", "1", ("embeddings_dir", "output_file"), ()
    ),
    "usage": Stage("spatial_core.cluster.usage:collect_usage", "1", ("usage_file", "output_file"), ()),
    "demo-data": Stage("spatial_core.demo.city:write_city", "1", ("output_dir",), ("demo", "global.seed")),
}


@dataclass(frozen=True)
class StageCall:
    """A request for one stage: its name, its arguments as text, and the settings. Serialisable."""

    stage: str
    arguments: Mapping[str, str]
    settings: Settings

    def to_json(self) -> str:
        record = {"stage": self.stage, "arguments": dict(self.arguments), "settings": self.settings.to_json()}
        return json.dumps(record, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StageCall:
        record = json.loads(text)
        return cls(record["stage"], record["arguments"], Settings.from_json(record["settings"]))


def sharing_cores(call: StageCall, calls: int) -> StageCall:
    """The same call with its share of this machine's cores, for calls that run at the same time on it.

    Processes that each take all cores wait for one another and are slower than one after another.
    """
    if calls < 2 or call.settings.infrastructure.threads:
        return call
    threads = max(1, usable_cores() // calls)
    return replace(call, settings=call.settings.replaced({"infrastructure.threads": threads}))


def run_stage(call: StageCall, progress: Progress = silent) -> Report:
    """Run a stage in this process.

    Raises:
        ConfigError: if the stage does not exist or its arguments do not fit.
        SpatialError: whatever the stage raises on purpose.
    """
    stage = STAGES.get(call.stage)
    if stage is None:
        raise ConfigError(f"no stage named {call.stage!r}; there are {', '.join(STAGES)}")
    missing = [name for name in stage.required if name not in call.arguments]
    unknown = [name for name in call.arguments if name not in {*stage.required, *stage.optional}]
    if missing or unknown:
        raise ConfigError(f"stage {call.stage}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    if not stage.shared and "LOCAL_RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(f"stage {call.stage} is done by one process, but torchrun started {os.environ['WORLD_SIZE']}")
    module_name, _, function_name = stage.target.partition(":")
    share_cores()  # before the stage's module imports torch
    module = importlib.import_module(module_name)
    function: Any = getattr(module, function_name)
    # A model may be a hub id, which as a Path would still be the same text on POSIX.
    arguments: dict[str, Any] = {
        name: value if name in _NO_PATHS else Path(value) for name, value in call.arguments.items()
    }

    def work(told: Progress) -> Report:
        report: Report = function(**arguments, settings=call.settings, progress=told)
        return report

    return logged(call.settings.locations.log_dir, call.stage, work, progress)
