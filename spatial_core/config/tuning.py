"""The `tuning` section: what a study searches, how long, and where its database is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from spatial_core.config.sections import Section


class TuningSection(Section):
    """Search for the projector's hyper-parameters with Optuna."""

    study_name: str = Field(
        "projector",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="first part of the study's name; the second is a digest of its inputs and settings, so that trials "
        "that cannot be compared never share a study",
    )
    trials: PositiveInt = Field(40, description="trials of the study; raise it and tune again to add some")
    workers: PositiveInt = Field(2, le=1000, description="workers that share the study, each with one trial at a time")
    trials_per_worker: int = Field(0, ge=0, description="trials a worker runs at most, 0 = until the study has all")
    max_epochs: PositiveInt = Field(20, description="epochs of a trial")
    metric: str = Field("recall@100", description="objective: the best recall@k of any validation of the trial")
    max_queries: PositiveInt = Field(4096, description="query images of the evaluation set, the same for every trial")
    val_sample_fraction: float | None = Field(
        None, gt=0, le=1, description="search this share of val's buildings; unset = all, for fewer inflate recall"
    )
    seed: int | None = Field(None, ge=0, description="seed of the search; overrides global.seed")
    startup_trials: int = Field(10, ge=0, description="trials drawn at random before the search learns from them")
    pruner: Literal["median", "hyperband", "none"] = Field("median", description="what ends hopeless trials early")
    pruner_startup_trials: int = Field(5, ge=0, description="completed trials before the median pruner ends any")
    pruner_warmup_epochs: int = Field(3, ge=0, description="epochs that every trial gets")
    space: dict[str, tuple[bool | int | float | str, ...]] = Field(
        {},
        description="ranges in the place of the default ones, by parameter: [lowest, highest] of a number, all values "
        "of a choice, one value to fix it",
    )
    storage_url: str | None = Field(
        None, description="database of studies, without password; unset = a PostgreSQL of our own in tuning_dir"
    )
    storage_file: Path | None = Field(
        None, description="file, readable by its owner alone, that holds the database's URL with password; wins"
    )
    host: str = Field(
        "127.0.0.1",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?$",
        description="address our PostgreSQL listens on; workers on other machines need one that they can reach",
    )
    client_network: str = Field(
        "samenet",
        pattern=r"^(samenet|samehost|[0-9A-Fa-f.:]+/[0-9]{1,3})$",
        description="who may connect when host is not loopback: samenet, or a network such as 10.1.0.0/16",
    )
    heartbeat_s: PositiveInt = Field(30, description="seconds between two signs of life of a running trial")
    grace_s: PositiveInt = Field(300, description="seconds without sign of life after which a trial counts as lost")
    max_retries: int = Field(5, ge=0, description="times that a lost trial is tried again")
    database_patience_s: PositiveFloat = Field(
        900.0, description="seconds that workers wait for a database that is down"
    )

    @field_validator("storage_url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        """Settings travel to jobs and are shown; a secret must not."""
        parts = urlsplit(url or "")
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError(
                "holds a password; write the URL to a file of mode 0600 and name it in tuning.storage_file"
            )
        return url
