"""One settings tree from TOML, environment and overrides.

Precedence, later wins: defaults, the TOML file, environment variables `SPATIAL_<SECTION>__<KEY>` (for example
`SPATIAL_TRAINING__NUM_EPOCHS=5`), overrides `section.key=value`. A key that does not exist is refused, with the nearest
one that does.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spatial_core.config import sections as s
from spatial_core.config.compute import ComputeSection, ResourcesSection
from spatial_core.config.earlier import share_batch_size
from spatial_core.config.sources import Given
from spatial_core.config.tuning import TuningSection
from spatial_core.errors import ConfigError
from spatial_core.storage.digests import digest_json

CONFIG_VARIABLE = "SPATIAL_CONFIG"
_HEAD_KEYS = frozenset(s.TrainingModelSection.model_fields)
# What changes where or how fast a result is computed, or how it is watched, is not part of its identity.
_NOT_IDENTITY = frozenset({"paths", "infrastructure", "logging", "compute", "watch"})
_NOT_IDENTITY_KEYS = {
    "global": {"log_dir"},
    "tuning": {
        "workers",
        "trials_per_worker",
        "storage_url",
        "storage_file",
        "host",
        "client_network",
        "heartbeat_s",
        "grace_s",
        "max_retries",
        "database_patience_s",
    },
}
_PASSWORD = re.compile(r"(://[^/\s:@'\"]*:)[^\s'\"]*@|(password=)[^&\s'\"]*")
_LAKE = {
    "raw_dir": "raw",
    "intermediates_dir": "intermediates",
    "fingerprints_dir": "fingerprints",
    "embeddings_dir": "embeddings",
    "merged_dir": "merged",
    "difficulty_metadata_path": "difficulty/difficulty_metadata.parquet",
    "checkpoint_dir": "checkpoints",
    "tuning_dir": "tuning",
    "report_dir": "report",
    "model_dir": "model",
    "drops_dir": "drops",
    "final_embeddings_dir": "final_embeddings",
    "building_embeddings_dir": "building_embeddings",
    "cluster_usage_path": "usage/cluster_usage.parquet",
}


class ResolvedPaths(BaseModel):
    """Every location as an absolute path."""

    model_config = ConfigDict(frozen=True)

    data_dir: Path
    log_dir: Path | None
    raw_dir: Path
    intermediates_dir: Path
    fingerprints_dir: Path
    embeddings_dir: Path
    merged_dir: Path
    difficulty_metadata_path: Path
    checkpoint_dir: Path
    tuning_dir: Path
    report_dir: Path
    model_dir: Path
    drops_dir: Path
    final_embeddings_dir: Path
    building_embeddings_dir: Path
    cluster_usage_path: Path
    jobs_dir: Path

    @property
    def usage_file(self) -> Path:
        """One line for each end of a cluster job: what it used."""
        return self.jobs_dir / "usage.jsonl"


class Settings(BaseModel):
    """The whole tree. `Settings()` holds the defaults; `load_settings` reads files and environment."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    global_: s.GlobalSection = Field(default_factory=s.GlobalSection, alias="global")
    paths: s.PathsSection = Field(default_factory=s.PathsSection)
    process_tar: s.ProcessTarSection = Field(default_factory=s.ProcessTarSection)
    fingerprints: s.FingerprintsSection = Field(default_factory=s.FingerprintsSection)
    embedding_model: s.EmbeddingModelSection = Field(default_factory=s.EmbeddingModelSection)
    training_model: s.TrainingModelSection = Field(default_factory=s.TrainingModelSection)
    training: s.TrainingSection = Field(default_factory=s.TrainingSection)
    tuning: TuningSection = Field(default_factory=TuningSection)
    data: s.DataSection = Field(default_factory=s.DataSection)
    infrastructure: s.InfrastructureSection = Field(default_factory=s.InfrastructureSection)
    evaluation: s.EvaluationSection = Field(default_factory=s.EvaluationSection)
    publishing: s.PublishingSection = Field(default_factory=s.PublishingSection)
    inference: s.InferenceSection = Field(default_factory=s.InferenceSection)
    logging: s.LoggingSection = Field(default_factory=s.LoggingSection)
    compute: ComputeSection = Field(default_factory=ComputeSection)
    watch: s.WatchSection = Field(default_factory=s.WatchSection)
    demo: s.DemoSection = Field(default_factory=s.DemoSection)
    base_dir: Path = Field(default_factory=Path.cwd, exclude=True, description="what relative paths are relative to")
    moved: tuple[str, ...] = Field((), exclude=True, description="keys that stood in another section, one line each")

    @model_validator(mode="after")
    def _no_password_for_jobs(self) -> Self:
        """Settings travel to jobs and are shown; a secret must not."""
        if self.compute.profile != "local" and urlsplit(self.logging.mlflow_tracking_uri or "").password is not None:
            raise ValueError(
                "logging.mlflow_tracking_uri holds a password, which would be sent to the cluster with every job; "
                "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes, in setup"
            )
        return self

    @property
    def seed(self) -> int:
        """Seed of every stage but training, which may have its own."""
        return self.global_.seed

    @property
    def locations(self) -> ResolvedPaths:
        """All paths, absolute, unset ones derived from `paths.data_dir`."""
        data_dir = self.absolute(self.paths.data_dir)
        resolved = {
            name: self.absolute(given) if (given := getattr(self.paths, name)) is not None else data_dir / default
            for name, default in _LAKE.items()
        }
        log_dir = None if self.global_.log_dir is None else self.absolute(self.global_.log_dir)
        named = self.compute.work_dir
        jobs_dir = data_dir / "jobs" if named is None else self.absolute(named)
        return ResolvedPaths(data_dir=data_dir, log_dir=log_dir, jobs_dir=jobs_dir, **resolved)

    @property
    def jobs_dir(self) -> Path:
        """Folder of cluster jobs, the same path here and on the nodes."""
        return self.locations.jobs_dir

    @property
    def head(self) -> s.TrainingModelSection:
        """The projection head: [training_model]; head keys set in [training] win, as in the earlier pipeline."""
        given = {name: getattr(self.training, name) for name in _HEAD_KEYS & self.training.model_fields_set}
        return self.training_model.model_copy(update=given)

    @property
    def digest(self) -> str:
        """SHA-256 of every setting that can change a result; recorded in every artifact."""
        tree = self.model_dump(mode="json", by_alias=True)
        for section, keys in _NOT_IDENTITY_KEYS.items():
            tree[section] = {name: value for name, value in tree[section].items() if name not in keys}
        return digest_json({name: value for name, value in tree.items() if name not in _NOT_IDENTITY})

    def pick(self, *dotted: str) -> dict[str, Any]:
        """The named settings (`section.key`, or `section` for all of it) as JSON: a stage's share of the tree.

        What another setting stands in for has the value that counts: the head's keys, and the seeds of training and
        tuning.
        """
        tree = self.model_dump(mode="json", by_alias=True)
        tree["training_model"] = self.head.model_dump(mode="json")
        for section in ("training", "tuning"):
            if tree[section]["seed"] is None:
                tree[section]["seed"] = self.seed
        picked: dict[str, Any] = {}
        for name in dotted:
            section, _, key = name.partition(".")
            picked[name] = tree[section][key] if key else tree[section]
        return picked

    def share_digest(self, *dotted: str) -> str:
        """SHA-256 of the named settings, as `pick` takes them, without those that change no result."""
        picked = self.pick(*dotted)
        for section in picked.keys() & _NOT_IDENTITY_KEYS.keys():
            picked[section] = {k: v for k, v in picked[section].items() if k not in _NOT_IDENTITY_KEYS[section]}
        return digest_json(picked)

    def replaced(self, values: Mapping[str, Any]) -> Settings:
        """The tree with other values, by dotted name; checked as those of a file are.

        A head setting replaces what [training] says of it too.

        Raises:
            ConfigError: naming the setting that does not exist, or does not accept its value.
        """
        tree = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for name, value in values.items():
            section, _, key = name.partition(".")
            tree.setdefault(section, {})[key] = value
            if section == "training_model":
                tree.get("training", {}).pop(key, None)
        try:
            return Settings(**tree, base_dir=self.base_dir)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from error

    def notices(self) -> list[str]:
        """Keys of the earlier pipeline that are mapped to something else or have no effect here."""
        return [*self.moved, *self._unused()]

    def _unused(self) -> list[str]:
        given = self.logging.model_fields_set
        texts = {
            "wandb_enabled": "logging.wandb_enabled switches MLflow tracking here",
            "wandb_project": "logging.wandb_project names the MLflow experiment here",
            "wandb_run_name": "logging.wandb_run_name names the MLflow run here",
            "wandb_mode": "logging.wandb_mode is not used: MLflow writes to its tracking URI",
        }
        notes = [text for key, text in texts.items() if key in given]
        reasons = {
            "tar_file": "tars are found in paths.raw_dir or named on the command line",
            "log_file": "each stage has its own file in global.log_dir",
            "temp_dir": "tars are never extracted",
        }
        notes += [
            f"paths.{key} is not used: {reason}"
            for key, reason in reasons.items()
            if getattr(self.paths, key) is not None
        ]
        merged_dir = self.locations.merged_dir
        for split in ("train", "val"):
            path = getattr(self.paths, f"{split}_parquet_path")
            if path is not None and self.absolute(path) != merged_dir / f"{split}.parquet":
                notes.append(f"paths.{split}_parquet_path is not used: splits are read from {merged_dir}")
        return notes

    def to_json(self) -> str:
        """The tree as JSON for another process; `from_json` restores it with the same base folder."""
        tree = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        record = {"base_dir": str(self.base_dir), "moved": list(self.moved), "tree": tree}
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of `to_json`."""
        record = json.loads(text)
        return cls(**record["tree"], base_dir=Path(record["base_dir"]), moved=tuple(record["moved"]))

    def absolute(self, path: Path) -> Path:
        """A path of the settings file: relative ones are relative to its folder."""
        path = path.expanduser()
        return path if path.is_absolute() else (self.base_dir / path).resolve()


def load_settings(
    path: Path | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read settings.

    Args:
        path: a TOML file; None means the one named by SPATIAL_CONFIG, else `config.toml` in the working folder if there
            is one, else defaults.
        overrides: `section.key=value` texts; the value is read as TOML, or as plain text when it is not TOML.
        environ: environment; default `os.environ`.

    Raises:
        ConfigError: one line naming the file, key and cause.
    """
    environ = os.environ if environ is None else environ
    path = settings_file(path, environ)
    given = Given(
        "settings" if path is None else str(path), {name: m.model_fields for name, m in section_models().items()}
    )
    base_dir = Path.cwd()
    if path is not None:
        given.add_file(path)
        base_dir = path.resolve().parent
    given.add_environment(environ)
    for override in overrides:
        given.add_override(override)
    share_batch_size(given.tree)
    for name in {"base_dir", "moved"} & given.tree.keys():
        raise ConfigError(f"{given.file}: unknown section {name}; sections are {', '.join(section_models())}")
    try:
        return Settings(**given.tree, base_dir=base_dir, moved=tuple(given.notes))
    except ValidationError as error:
        origin, elsewhere = given.origin_of({tuple(map(str, fault["loc"][:2])) for fault in error.errors()})
        hint = f" (given as {elsewhere})" if elsewhere else ""
        raise ConfigError(f"{origin}: {_explain(error)}{hint}") from error


def settings_file(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The file that `load_settings` reads with these arguments; None where there is none and defaults hold."""
    if path is not None:
        return path
    if named := (os.environ if environ is None else environ).get(CONFIG_VARIABLE):
        return Path(named)
    return Path("config.toml") if Path("config.toml").is_file() else None


def section_models() -> dict[str, type[s.Section]]:
    """Section name as written in TOML -> its model, in order."""
    names: dict[str, type[s.Section]] = {}
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, s.Section):
            names[info.alias or name] = info.annotation
    return names


def _explain(error: ValidationError) -> str:
    known = section_models()
    causes = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            inside = len(fault["loc"]) > 1
            candidates = _names_at(known, fault["loc"])
            wrong = str(fault["loc"][-1])
            elsewhere = [f"{name}.{wrong}" for name, model in known.items() if wrong in model.model_fields]
            near = difflib.get_close_matches(wrong, candidates, n=1, cutoff=0.0)
            hint = elsewhere[0] if elsewhere else ".".join([*map(str, fault["loc"][:-1]), near[0]])
            causes.append(f"unknown {'key' if inside else 'section'} {where}; did you mean {hint}?")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            causes.append(f"{where}: {message} (got {fault['input']!r})" if where else message)
    return _PASSWORD.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", "; ".join(causes))


def _names_at(known: Mapping[str, type[s.Section]], place: tuple[int | str, ...]) -> list[str]:
    """Names that would be right where an unknown one was found."""
    if len(place) == 1:
        return list(known)
    if place[:2] == ("compute", "resources"):
        return list(ResourcesSection.model_fields)
    return list(known[str(place[0])].model_fields)
