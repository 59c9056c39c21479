"""What the lake holds: every artifact's name, stage, partitioning, place and upstream artifacts.

One table, so that a path follows from a name and a partition key everywhere: assets, `spatial status`, `spatial sql`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spatial_core.config.settings import ResolvedPaths, Settings
from spatial_core.jobs.registry import StageCall

TAR_KEY = re.compile(r"\d{4}")
DROP_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def _study(at: ResolvedPaths) -> Path:
    return at.tuning_dir / "study.json"


def _training(at: ResolvedPaths, _: str) -> Mapping[str, Path]:
    """Arguments of training: with the tuning study, once there is one."""
    study = {"study": _study(at)} if _study(at).is_file() else {}
    return {
        "merged_dir": at.merged_dir,
        "difficulty": at.difficulty_metadata_path,
        "output_dir": at.checkpoint_dir,
        **study,
    }


def _none(at: ResolvedPaths, key: str) -> Mapping[str, Path]:
    """Arguments of what no stage makes."""
    return {}


@dataclass(frozen=True)
class ArtifactKind:
    """One row of the catalogue.

    Args:
        name: asset name.
        stage: registered stage that makes it; empty for raw inputs.
        partition: what one artifact of the kind stands for, None when there is only one.
        upstream: names of the kinds it is made from.
        locate: (locations, partition key or "") -> path of the artifact.
        arguments: (locations, partition key or "") -> path arguments of the stage.
        on_demand: made when a person asks for it, and not missed until then.
        here: made on the machine that asks for it, wherever the settings have other stages run.
    """

    name: str
    stage: str
    partition: Literal["tar", "drop"] | None
    upstream: tuple[str, ...]
    locate: Callable[[ResolvedPaths, str], Path]
    arguments: Callable[[ResolvedPaths, str], Mapping[str, Path]] = _none
    on_demand: bool = False
    here: bool = False

    def path(self, locations: ResolvedPaths, key: str = "") -> Path:
        """Where the artifact of a partition lies."""
        return self.locate(locations, key)

    def call(self, settings: Settings, key: str = "") -> StageCall:
        """The request for the artifact of a partition."""
        arguments = {name: str(path) for name, path in self.arguments(settings.locations, key).items()}
        return StageCall(self.stage, arguments, settings)


_KINDS = (
    ArtifactKind("raw_tars", "", "tar", (), lambda at, key: at.raw_dir / f"{key}.tar"),
    ArtifactKind(
        "intermediates",
        "ingest",
        "tar",
        ("raw_tars",),
        lambda at, key: at.intermediates_dir / f"{key}.parquet",
        lambda at, key: {"tar": at.raw_dir / f"{key}.tar", "output_dir": at.intermediates_dir},
    ),
    ArtifactKind(
        "fingerprints",
        "fingerprint",
        "tar",
        ("intermediates",),
        lambda at, key: at.fingerprints_dir / f"{key}_fingerprints.parquet",
        lambda at, key: {
            "tar": at.raw_dir / f"{key}.tar",
            "intermediates": at.intermediates_dir / f"{key}.parquet",
            "output_dir": at.fingerprints_dir,
        },
    ),
    ArtifactKind(
        "backbone_embeddings",
        "embed",
        "tar",
        ("intermediates",),
        lambda at, key: at.embeddings_dir / f"{key}_embeddings.parquet",
        lambda at, key: {
            "tar": at.raw_dir / f"{key}.tar",
            "intermediates": at.intermediates_dir / f"{key}.parquet",
            "output_dir": at.embeddings_dir,
        },
    ),
    ArtifactKind(
        "merged_splits",
        "merge",
        None,
        ("backbone_embeddings",),
        lambda at, _: at.merged_dir,
        lambda at, _: {"embeddings_dir": at.embeddings_dir, "output_dir": at.merged_dir},
    ),
    ArtifactKind(
        "difficulty_metadata",
        "difficulty",
        None,
        ("fingerprints",),
        lambda at, _: at.difficulty_metadata_path,
        lambda at, _: {"fingerprints_dir": at.fingerprints_dir, "output_file": at.difficulty_metadata_path},
    ),
    ArtifactKind(
        "tuning_study",
        "tune",
        None,
        ("merged_splits", "difficulty_metadata"),
        lambda at, _: _study(at),
        lambda at, _: {
            "merged_dir": at.merged_dir,
            "difficulty": at.difficulty_metadata_path,
            "output_dir": at.tuning_dir,
        },
        on_demand=True,
    ),
    ArtifactKind(
        "projector_checkpoint",
        "train",
        None,
        ("merged_splits", "difficulty_metadata", "tuning_study"),
        lambda at, _: at.checkpoint_dir / "checkpoint_best.safetensors",
        _training,
    ),
    ArtifactKind(
        "retrieval_report",
        "evaluate",
        None,
        ("merged_splits", "projector_checkpoint"),
        lambda at, _: at.report_dir,
        lambda at, _: {
            "merged_dir": at.merged_dir,
            "checkpoint": at.checkpoint_dir / "checkpoint_best.safetensors",
            "output_dir": at.report_dir,
            "difficulty": at.difficulty_metadata_path,
            "intermediates_dir": at.intermediates_dir,
            "raw_dir": at.raw_dir,
        },
    ),
    ArtifactKind(
        "hf_model",
        "publish",
        None,
        ("projector_checkpoint", "retrieval_report"),
        lambda at, _: at.model_dir,
        lambda at, _: {
            "checkpoint": at.checkpoint_dir / "checkpoint_best.safetensors",
            "output_dir": at.model_dir,
            "report_dir": at.report_dir,
        },
    ),
    ArtifactKind("packaged_images", "", "drop", (), lambda at, key: at.drops_dir / f"{key}.parquet"),
    ArtifactKind(
        "final_embeddings",
        "embed-new",
        "drop",
        ("packaged_images", "hf_model"),
        lambda at, key: at.final_embeddings_dir / key,
        lambda at, key: {
            "input": at.drops_dir / f"{key}.parquet",
            "output_dir": at.final_embeddings_dir / key,
            "model": at.model_dir,
        },
    ),
    ArtifactKind(
        "building_embeddings",
        "pool-buildings",
        "drop",
        ("final_embeddings",),
        lambda at, key: at.building_embeddings_dir / f"{key}.parquet",
        lambda at, key: {
            "embeddings_dir": at.final_embeddings_dir / key,
            "output_file": at.building_embeddings_dir / f"{key}.parquet",
        },
    ),
    ArtifactKind(
        "cluster_usage",
        "usage",
        None,
        (),
        lambda at, _: at.cluster_usage_path,
        lambda at, _: {"usage_file": at.usage_file, "output_file": at.cluster_usage_path},
        on_demand=True,
        here=True,
    ),
)
CATALOGUE: dict[str, ArtifactKind] = {kind.name: kind for kind in _KINDS}


def raw_tar_keys(settings: Settings) -> list[str]:
    """Partition keys of the tars that lie in the raw folder, sorted."""
    return _keys(settings.locations.raw_dir, settings.process_tar.tar_name_pattern)


def drop_keys(settings: Settings) -> list[str]:
    """Partition keys of the parquet files that lie in the drops folder, sorted."""
    return _keys(settings.locations.drops_dir, settings.watch.drop_name_pattern)


def known_keys(settings: Settings, partition: str) -> list[str]:
    """Keys that lie in the watched folder, or once did: those of finished artifacts count too."""
    at = settings.locations
    if partition == "tar":
        made = {path.stem for path in at.intermediates_dir.glob("*.parquet") if TAR_KEY.fullmatch(path.stem)}
        return sorted({*raw_tar_keys(settings), *made})
    made = {path.name for path in at.final_embeddings_dir.glob("*") if path.is_dir() and DROP_KEY.fullmatch(path.name)}
    return sorted({*drop_keys(settings), *made})


def _keys(folder: Path, pattern: str) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.stem for path in folder.iterdir() if re.fullmatch(pattern, path.name) and path.is_file())
