"""What the jobs of each asset ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_core.cluster.resources import DEFAULTS, Resources, limit_seconds, megabytes, resources_for
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ConfigError
from spatial_core.lake.catalogue import CATALOGUE


def compute(**given: Any) -> Any:
    return Settings(compute=given).compute  # type: ignore[arg-type]


# Of the earlier pipeline's submit scripts: cores, GiB of a whole job, hours, GPUs.
EARLIER = {
    "intermediates": (1, 32, 2, 0),
    "fingerprints": (1, 8, 2, 0),
    "backbone_embeddings": (6, 6 * 21, 24, 1),
    "merged_splits": (8, 100, 12, 0),
    "difficulty_metadata": (16, 124, 1, 0),
    "tuning_study": (8, 64, 24, 1),
    "projector_checkpoint": (8, 256, 48, 1),
    "final_embeddings": (6, 6 * 21, 24, 1),
}


@pytest.mark.parametrize("asset", EARLIER)
def test_defaults_are_those_of_the_earlier_jobs(asset: str) -> None:
    cores, memory_gib, hours, gpus = EARLIER[asset]
    found = resources_for(compute(), asset)
    assert found.cpus == cores
    assert megabytes(found.mem) == memory_gib * 1024
    assert limit_seconds(found.time_limit) == hours * 3600
    assert found.gpu_count == gpus


def test_every_asset_that_a_stage_makes_has_resources() -> None:
    assert {kind.name for kind in CATALOGUE.values() if kind.stage and not kind.here} <= set(DEFAULTS)


def test_the_cluster_profile_spells_out_the_defaults() -> None:
    """What is written there to be changed is what counts when it is left out."""
    settings = load_settings(Path(__file__).parents[3] / "config.cluster.toml", environ={})
    assert settings.compute.profile == "slurm_login"
    for asset in settings.compute.resources:
        found, default = resources_for(settings.compute, asset), resources_for(compute(max_parallel=50), asset)
        assert limit_seconds(found.time_limit) == limit_seconds(default.time_limit)
        assert replace(found, time_limit="1") == replace(default, time_limit="1"), asset
    assert set(settings.compute.resources) == set(DEFAULTS)


def test_settings_are_laid_over_the_defaults() -> None:
    given = compute(
        partition="cpu",
        account="def-prof",
        max_parallel=7,
        resources={
            "backbone_embeddings": {"partition": "gpu", "gpus": "h100:2", "mem": "48G", "extra": ["--exclusive"]},
            "final_embeddings": {"gpus": "0"},
        },
    )
    found = resources_for(given, "backbone_embeddings")
    assert (found.partition, found.account, found.mem, found.cpus) == ("gpu", "def-prof", "48G", 6)
    assert (found.gpu_count, found.processes, found.max_parallel) == (2, 2, 7)
    assert found.options() == [
        "--partition=gpu",
        "--account=def-prof",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--mem=48G",
        "--gres=gpu:h100:2",
        "--time=24:00:00",
        "--exclusive",
    ]
    without = resources_for(given, "final_embeddings")
    assert (without.gpus, without.gpu_count, without.processes) == (None, 0, 1)
    assert not [option for option in without.options() if "gres" in option or "qos" in option]


def test_a_resource_for_no_asset_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"compute\.resources\.merged_split: no such asset; there are .*merged_splits"
    ):
        resources_for(compute(resources={"merged_split": {"cpus": 2}}), "merged_splits")


@pytest.mark.parametrize("key", ["nodes", "processes_per_node"])
def test_only_training_is_spread(key: str) -> None:
    given = compute(resources={"merged_splits": {key: 2}, "projector_checkpoint": {key: 2}})
    with pytest.raises(ConfigError, match="nodes and processes_per_node are for projector_checkpoint"):
        resources_for(given, "merged_splits")
    assert getattr(resources_for(given, "projector_checkpoint"), key) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("48:00:00", 172_800),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:15", 131_415),
        ("0", 0),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize(("text", "mib"), [("512", 512), ("2048K", 2), ("512M", 512), ("2G", 2048), ("1T", 1 << 20)])
def test_memory(text: str, mib: int) -> None:
    assert megabytes(text) == mib


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.floats(1.01, 8))
def test_more_memory_is_more_and_is_still_memory(amount: int, unit: str, factor: float) -> None:
    before = Resources(1, f"{amount}{unit}", "01:00:00")
    after = before.with_more_memory(factor)
    assert megabytes(after.mem) == pytest.approx(megabytes(before.mem) * factor, abs=1)
    assert megabytes(after.mem) >= 1
    Settings(compute={"resources": {"merged_splits": {"mem": after.mem}}})  # type: ignore[arg-type]


@given(st.integers(1, 10**6), st.floats(1.01, 8))
def test_more_time_is_more_and_is_still_a_time(minutes: int, factor: float) -> None:
    before = Resources(1, "1G", str(minutes))
    after = before.with_more_time(factor)
    assert limit_seconds(after.time_limit) == round(minutes * 60 * factor)
    Settings(compute={"resources": {"merged_splits": {"time_limit": after.time_limit}}})  # type: ignore[arg-type]
