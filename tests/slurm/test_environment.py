"""Managed environments on a real cluster: built once, whoever asks and wherever, used by jobs, refused when different.

They are real virtual environments made by a real pip; only the dependencies come from the environment of the tests, by
a line of `compute.setup`, because installing torch would take minutes.
"""

from __future__ import annotations

import shutil
import site
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_core.cluster.building import Builder, ready_python
from spatial_core.cluster.environment import ManagedEnvironment, managed, verify_python
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import transport_for
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ClusterError
from spatial_core.installed import Installed, installed
from tests.slurm.client import Slurm
from tests.slurm.lakes import ClusterLake
from tests.slurm.test_check import findings, over_ssh, settings_of

pytestmark = [pytest.mark.isolated, pytest.mark.slow]

BASE = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(autouse=True)
def commands_work_here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))


def with_environment(lake: Path, folder: Path, *overrides: str) -> Settings:
    """Settings of a cluster on this host with managed environments in a folder."""
    return load_settings(
        None,
        [
            f"paths.data_dir={lake}", "compute.profile=slurm_login", f"compute.environment_dir={folder}",
            f"compute.base_python={BASE}", "compute.pip_options=['--no-deps']",
            f"compute.setup=['export PYTHONPATH={site.getsitepackages()[0]}']", *overrides,
        ],
        {},
    )  # fmt: skip


def scheduler(settings: Settings) -> Scheduler:
    return Scheduler(transport_for(settings), print, 30.0)


def builder(settings: Settings) -> Builder:
    return Builder(settings, scheduler(settings), print)


def environment(settings: Settings) -> ManagedEnvironment:
    found = managed(settings)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def built(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings whose environment was built beside the scheduler, by two who asked at the same time."""
    place = tmp_path_factory.mktemp("built")
    settings = with_environment(place / "lake", place / "environments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm.conf))
        errors: list[Exception] = []

        def build() -> None:
            try:
                builder(settings).build(environment(settings))
            except ClusterError as error:
                errors.append(error)

        both = [threading.Thread(target=build) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
    assert errors == []
    yield settings


def test_an_environment_is_built_once_and_has_the_code_of_this_process(built: Settings) -> None:
    made = environment(built)
    code = installed()
    assert made.folder.name.startswith(f"{code.version}-") and len(made.folder.name.rpartition("-")[2]) == 12
    assert Installed.from_json(made.stamp.read_text()) == code
    assert sorted(path.name for path in made.folder.parent.iterdir()) == [f".{made.folder.name}.lock", made.folder.name]
    assert list(built.jobs_dir.iterdir()) == [], "the copies of the project are removed"
    assert verify_python(built, scheduler(built), made.python) is None
    before = made.stamp.stat().st_mtime_ns
    said: list[str] = []
    assert ready_python(built, scheduler(built), said.append) == made.python
    assert said == [] and made.stamp.stat().st_mtime_ns == before, "a finished environment is used as it is"


def test_runs_use_it_and_are_refused_when_it_has_other_code(built: Settings, slurm: Slurm, tmp_path: Path) -> None:
    """Through Dagster: a good tar becomes the artifact of a local run, and nothing is submitted to other code."""
    lake = ClusterLake(tmp_path / "config.toml", slurm)
    lake.write("local")
    lake.draw_city()
    local = materialize(lake, "0901")
    assert local.success
    expected = lake.digests()
    shutil.rmtree(lake.settings.locations.intermediates_dir)
    compute = built.compute
    lake.write(
        environment_dir=str(compute.environment_dir),
        base_python=str(compute.base_python),
        pip_options=list(compute.pip_options),
        setup=list(compute.setup),
    )
    python = environment(lake.settings).python
    assert python == environment(built).python
    assert materialize(lake, "0901").success
    assert lake.digests() == expected
    (lake.settings.locations.raw_dir / "0902.tar").write_bytes(b"no tar")
    assert not materialize(lake, "0902").success
    sent = sorted(lake.settings.jobs_dir.glob("spatial-intermediates-*"))
    assert len(sent) == 2
    for folder in sent:
        assert f"{python} -m spatial_core.jobs ingest" in (folder / "job.sh").read_text()

    module = next((python.parents[1] / "lib").glob("python*/site-packages/spatial_core")) / "report.py"
    original = module.read_bytes()
    module.write_bytes(original + b"# edited\n")
    try:
        refused = materialize(lake, "0903")
    finally:
        module.write_bytes(original)
    assert not refused.success
    failure = refused.failure_data_for_node("intermediates")
    assert failure is not None and "but this process runs" in str(failure.error)
    assert sorted(lake.settings.jobs_dir.glob("spatial-intermediates-*")) == sent


def materialize(lake: ClusterLake, key: str) -> dg.ExecuteInProcessResult:
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("tar", ["0901", "0902", "0903"])
        return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("intermediates")], partition_key=key, raise_on_error=False
        )


def test_the_check_finds_it_on_the_nodes(built: Settings, slurm: Slurm) -> None:
    compute = built.compute
    overrides = [
        f"compute.environment_dir={compute.environment_dir}", f"compute.base_python={compute.base_python}",
        "compute.pip_options=['--no-deps']", f"compute.setup=['{compute.setup[0]}']", "compute.profile=slurm_login",
    ]  # fmt: skip
    settings = settings_of(built.locations.data_dir, *overrides)
    found = findings(settings)
    assert [step for step, finding in found.items() if not finding.ok] == []
    python = environment(settings).python
    assert f"{python} has the code of this process" in found["environment"].text
    assert f"{python} on node2 has the code of this process" in found["environment gpu"].text


def test_other_code_under_the_same_name_is_refused_everywhere(built: Settings, tmp_path: Path) -> None:
    """Somebody edits the installed package: neither a run nor the check takes it for what it is named."""
    made = environment(built)
    package = next((made.folder / "lib").glob("python*/site-packages/spatial_core"))
    module = package / "report.py"
    original = module.read_bytes()
    module.write_bytes(original + b"# edited\n")
    try:
        with pytest.raises(
            ClusterError, match=r"has version 0.* but this process runs 0.*spatial cluster check --build"
        ):
            ready_python(built, scheduler(built), print)
        overrides = [f"compute.python={made.python}", f"compute.setup=['{built.compute.setup[0]}']"]
        found = findings(settings_of(tmp_path / "lake", "compute.profile=slurm_login", *overrides))
        wrong = [step for step, finding in found.items() if not finding.ok]
        assert wrong == ["environment"]
        assert "but this process runs" in found["environment"].text
        assert "install this checkout there" in found["environment"].text
    finally:
        module.write_bytes(original)
    assert ready_python(built, scheduler(built), print) == made.python


def test_an_interpreter_without_the_project_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    settings = load_settings(
        None, [f"paths.data_dir={tmp_path}", "compute.profile=slurm_login", f"compute.python={BASE}"], {}
    )
    with pytest.raises(ClusterError, match=r"has no spatial-embeddings .*No module named"):
        verify_python(settings, scheduler(settings), BASE)
    missing = tmp_path / "none" / "python"
    with pytest.raises(ClusterError, match="No such file or directory"):
        verify_python(settings, scheduler(settings), missing)


def test_a_missing_environment_is_named_by_the_check_and_built_on_request(slurm: Slurm, tmp_path: Path) -> None:
    """Over ssh, in a job: nothing of the build runs on this host or the login node."""
    folder = tmp_path / "environments"
    overrides = [
        *over_ssh(slurm), f"compute.environment_dir={folder}", f"compute.base_python={BASE}",
        "compute.pip_options=['--no-deps']", f"compute.setup=['export PYTHONPATH={site.getsitepackages()[0]}']",
        "compute.build_on=node",
    ]  # fmt: skip
    settings = settings_of(tmp_path / "lake", *overrides)
    found = findings(settings)
    assert [step for step, finding in found.items() if not finding.ok] == ["environment"]
    assert "is not built yet" in found["environment"].text and "--build" in str(found["environment"].remedy)
    assert "environment gpu" not in found
    found = findings(settings, build=True)
    assert [step for step, finding in found.items() if not finding.ok] == []
    assert environment(settings).stamp.is_file()
    assert sorted((tmp_path / "lake").rglob("*")) == [settings.jobs_dir], "no job folder, no copy of the project"
    names = slurm.run("sacct", "-n", "-X", "-P", "-S", "now-1hour", "--format=JobName,State").splitlines()
    assert any(name.startswith("spatial-environment-") and name.endswith("COMPLETED") for name in names)


def test_a_build_that_fails_says_why_and_leaves_nothing_that_counts(slurm: Slurm, tmp_path: Path) -> None:
    settings = with_environment(
        tmp_path / "lake", tmp_path / "environments", "compute.pip_options=['--no-such-option']"
    )
    with pytest.raises(ClusterError, match=r"was not built: .*no such option: --no-such-option.*build\.log"):
        builder(settings).build(environment(settings))
    assert not environment(settings).stamp.exists()
    (left,) = settings.jobs_dir.iterdir()
    assert not (left / "source").exists()
    assert "no such option" in (left / "build.log").read_text()


class Broken(Exception):
    """Stands for a person's Ctrl-C, or a run that is terminated."""


def test_an_interrupted_build_ends_and_the_next_starts_afresh(slurm: Slurm, tmp_path: Path) -> None:
    settings = with_environment(tmp_path / "lake", tmp_path / "environments")
    place = environment(settings)

    def interrupt_when_it_works(seconds: float) -> None:
        time.sleep(0.2)
        if (place.folder / "bin" / "python").exists():
            raise Broken

    with pytest.raises(Broken):
        replace(builder(settings), pause=interrupt_when_it_works).build(place)
    slurm.wait_for(lambda: not processes_of(settings.jobs_dir), what="the build's processes to be gone")
    assert place.folder.exists() and not builder(settings).is_built(place)
    (place.folder / "left-behind").write_text("")
    builder(settings).build(place)
    assert builder(settings).is_built(place) and not (place.folder / "left-behind").exists()


def test_a_build_killed_from_outside_is_noticed(slurm: Slurm, tmp_path: Path) -> None:
    settings = with_environment(tmp_path / "lake", tmp_path / "environments")
    place = environment(settings)

    def kill_when_it_works(seconds: float) -> None:
        time.sleep(0.2)
        if (place.folder / "bin" / "python").exists():
            for process in processes_of(settings.jobs_dir):
                slurm.run("kill", "-9", str(process))

    with pytest.raises(ClusterError, match="was not built"):
        replace(builder(settings), pause=kill_when_it_works).build(place)
    assert not builder(settings).is_built(place)


def processes_of(folder: Path) -> list[int]:
    """Processes that work in a job folder: the build, and pip's own children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = Path((process / "cwd").readlink()).is_relative_to(folder)
        except OSError:
            continue  # has ended meanwhile
        if inside:
            found.append(int(process.name))
    return found
