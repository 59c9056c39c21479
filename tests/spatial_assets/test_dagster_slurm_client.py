"""One call as one job through dagster-slurm: its own parts are as we know them, its defects are closed.

The scheduler is a pocket one; the same client on a real cluster is tested in tests/slurm/test_single_jobs.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster_slurm import ComputeLauncher, SlurmPipesClient
from dagster_slurm.helpers.metrics import SlurmJobMetrics, SlurmMetric
from dagster_slurm.launchers import ExecutionPlan

from spatial_assets.compute import cluster
from spatial_assets.compute.base import Outcome, Work
from spatial_assets.compute.choose import choose_runner
from spatial_assets.compute.cluster import JOB_TAG, ClusterJobs, JobArray, SingleJob, one_or_many
from spatial_assets.compute.dagster_slurm_client import HardenedSlurmPipesClient, _JobMessages
from spatial_assets.compute.dagster_slurm_terms import overrides
from spatial_assets.compute.local import ChildProcess
from spatial_core.cluster import beside_scheduler
from spatial_core.cluster.ledger import Ledger
from spatial_core.cluster.resources import resources_for
from spatial_core.cluster.script import render
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ClusterUnreachable, ConfigError, JobFailed, TarError
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import artifact_digest
from tests.spatial_assets.pocket_scheduler import PocketScheduler

CITY = {"tars": 2, "buildings_per_tar": 3, "image_size_px": 64, "drop_images": 3, "max_views": 3}
KEYS = ("0901", "0902")

# What we call of dagster-slurm, private parts included, as it was when our use of it was tried on a real cluster.
SIGNATURES: dict[Callable[..., Any], str] = {
    SlurmPipesClient._build_sbatch_command: (
        "(self, job_name, working_dir, output_file, error_file, script_path, extra_opts=None)"
    ),
    SlurmPipesClient._store_job_tags: "(self, op_context, job_id, run_dir, asset_key)",
    SlurmPipesClient._get_asset_key_string: "(self, op_context)",
    ComputeLauncher.prepare_execution: (
        "(self, payload_path, python_executable, working_dir, pipes_context, extra_env=None, allocation_context=None, "
        "activation_script=None)"
    ),
    SlurmJobMetrics.to_metadata: "(self, slurm_metrics=None)",
}


def test_the_pinned_release_is_installed() -> None:
    assert version("dagster-slurm") == "1.22.0"


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_what_we_call_of_dagster_slurm_is_as_we_know_it(function: Callable[..., Any]) -> None:
    names = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(names)) == SIGNATURES[function]


def test_what_we_fill_of_dagster_slurm_is_as_we_know_it() -> None:
    assert list(inspect.signature(SlurmPipesClient.__init__).parameters)[:3] == ["self", "slurm_resource", "launcher"]
    assert [f.name for f in fields(ExecutionPlan)][:4] == ["kind", "payload", "environment", "resources"]
    known = {
        "job_id", "elapsed_seconds", "cpu_time_seconds", "max_rss_mb", "node_hours", "cpu_efficiency", "state",
        "exit_code", "accounting_available", "allocated_gpus", "accounting_rows",
    }  # fmt: skip
    assert known <= {f.name for f in fields(SlurmJobMetrics)}
    assert {"max_memory_mb", "cpu_efficiency_pct", "elapsed_seconds", "slurm_state"} <= {m.value for m in SlurmMetric}


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("city of tars")
    settings = Settings(demo=CITY, base_dir=folder)  # type: ignore[arg-type]
    run_stage(StageCall("demo-data", {"output_dir": str(folder)}, settings))
    return folder


@pytest.fixture
def pocket(monkeypatch: pytest.MonkeyPatch) -> Iterator[PocketScheduler]:
    scheduler = PocketScheduler()
    monkeypatch.setattr(beside_scheduler, "command", scheduler.command)
    monkeypatch.setattr(cluster, "transport_for", lambda settings: scheduler)
    yield scheduler
    scheduler.end()


def settings_in(folder: Path, **compute: Any) -> Settings:
    given = {"profile": "slurm_login", "poll_s": 0.05, "poll_max_s": 0.1, **compute}
    return Settings(compute=given, base_dir=folder)  # type: ignore[arg-type]


def ingest(city: Path, settings: Settings, key: str = KEYS[0]) -> StageCall:
    arguments = {"tar": str(city / "raw" / f"{key}.tar"), "output_dir": str(settings.base_dir / "out")}
    return StageCall("ingest", arguments, settings)


class WorkerLostError(Exception):
    """The process of a run ends at the next opportunity."""


class Ran:
    """One run of an asset that asks for some calls."""

    def __init__(self, instance: dg.DagsterInstance, calls: dict[str, StageCall]) -> None:
        self.outcomes: list[Outcome] = []
        self.error: BaseException | None = None

        @dg.asset
        def intermediates(context) -> dg.MaterializeResult:
            work = Work("intermediates", calls)
            try:
                self.outcomes += choose_runner(work).run_all(context, work)
            except (ClusterUnreachable, WorkerLostError) as error:
                self.error = error
            return dg.MaterializeResult()

        result = dg.materialize([intermediates], instance=instance)
        self.run_id = result.run_id
        events = list(instance.all_logs(result.run_id))
        self.lines = [entry.user_message for entry in events if not entry.is_dagster_event]
        self.events = " ".join(entry.dagster_event.message or "" for entry in events if entry.is_dagster_event)

    @property
    def only(self) -> Outcome:
        assert self.error is None
        (outcome,) = self.outcomes
        return outcome


@pytest.mark.parametrize("gpus", [None, "1", "2", "h100:1", "h100:4"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("limit", ["10", "00:20:00", "02:00:00", "1-12:00:00"])
def test_the_options_are_those_that_render_shows(
    gpus: str | None, nodes: int, limit: str, city: Path, tmp_path: Path
) -> None:
    """`spatial slurm render` cannot ask dagster-slurm, yet shows exactly what is submitted, script included."""
    asked = {
        "gpus": gpus, "nodes": nodes, "time_limit": limit, "mem": "24G", "partition": "a,b", "account": "geo-1",
        "qos": "long", "constraint": "gpu&nvme", "processes_per_node": 2,
        "extra": ["--exclusive=user", "--licenses=a:2"],
    }  # fmt: skip
    folder = tmp_path / "a folder with spaces"
    settings = settings_in(folder, resources={"projector_checkpoint": asked}, setup=["module load cuda"])
    resources = resources_for(settings.compute, "projector_checkpoint")
    client = HardenedSlurmPipesClient("projector_checkpoint", settings)
    call = StageCall("train", {}, settings)
    names = {"name": "spatial-x-1", "python": Path("/opt/a b/python"), "run_id": "r"}
    shown = render("projector_checkpoint", {"": call}, resources, settings, **names)
    sent = client._submission("projector_checkpoint", {"": call}, resources, settings, **names)
    assert sorted(sent.options) == sorted(shown.options)
    assert sent.options[-2:] == shown.options[-2:] == ("--exclusive=user", "--licenses=a:2"), (
        "the user has the last word"
    )
    assert (sent.folder, sent.files, sent.keys) == (shown.folder, shown.files, shown.keys)
    stronger = resources.with_more_memory(2)
    again = client._submission("projector_checkpoint", {"": call}, stronger, settings, **names)
    assert "--mem=49152M" in again.options


def test_memory_is_kept_with_gpus(tmp_path: Path) -> None:
    """dagster-slurm's own defaults drop it; when that changes, naming it every time can go."""
    settings = settings_in(tmp_path, resources={"projector_checkpoint": {"gpus": "1", "mem": "24G"}})
    client = HardenedSlurmPipesClient("projector_checkpoint", settings)
    places = ("name", "/work", "out", "err", "job.sh")
    assert "--mem" not in SlurmPipesClient._build_sbatch_command(client, *places)
    asked = overrides(resources_for(settings.compute, "projector_checkpoint"), settings.compute)
    assert "--mem=24G" in client._build_sbatch_command(*places, asked)


def test_settings_that_its_models_refuse_are_named(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, resources={"intermediates": {"time_limit": "1-99:00:00"}})
    with pytest.raises(ConfigError, match="time_limit"):
        HardenedSlurmPipesClient("intermediates", settings)


def test_one_call_is_one_job_and_several_are_an_array(city: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, local_assets=("hf_model",))
    call = ingest(city, settings)
    assert isinstance(choose_runner(Work("intermediates", {"0901": call})), ClusterJobs)
    assert isinstance(one_or_many({"": call}), SingleJob)
    assert isinstance(one_or_many({"0901": call, "0902": call}), JobArray)
    assert isinstance(choose_runner(Work("hf_model", {"": call})), ChildProcess)


def test_the_artifact_is_the_local_one_and_the_run_shows_the_job(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    here = ingest(city, Settings(base_dir=tmp_path / "here"))
    local = run_stage(here)
    settings = settings_in(tmp_path / "there", cost_per_gpu_hour=3.6)
    ran = Ran(instance, {"0901": ingest(city, settings)})
    report = ran.only.result()
    assert artifact_digest(report.artifact) == artifact_digest(local.artifact)
    assert (report.rows, report.kept, report.rejected) == (local.rows, local.kept, local.rejected)
    figures = {name: value.value for name, value in ran.only.metadata.items()}
    assert figures["slurm_job_id"] == "701"
    assert (figures["slurm_state"], figures["slurm_exit_code"]) == ("COMPLETED", 0)
    assert (figures["elapsed_seconds"], figures["max_memory_mb"], figures["cpu_efficiency_pct"]) == (20, 512, 25)
    assert (figures["slurm_allocated_gpus"], figures["job_gpu_s"], figures["job_core_s"]) == (1, 20, 40)
    assert figures["job_cost"] == pytest.approx(0.02)
    assert figures["slurm_tres_accounting"][0]["AllocTRES"] == "billing=2,cpu=2,gres/gpu=1,mem=4G,node=1"
    tags = instance.get_run_by_id(ran.run_id).tags
    assert tags[JOB_TAG.format(asset="intermediates")] == tags["dagster_slurm/job_id"] == "701"
    assert tags["dagster_slurm/run_dir"].startswith(str(settings.jobs_dir))
    assert any("0901.tar" in line for line in ran.lines), "the stage's progress is in the event log"
    assert not any("[pipes] unexpected" in line or "did not receive" in line for line in ran.lines)


def test_what_a_job_made_before_is_found_without_another(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path)
    first = Ran(instance, {key: ingest(city, settings, key) for key in KEYS})
    again = Ran(instance, {key: ingest(city, settings, key) for key in KEYS})
    assert len(pocket.submissions) == 1
    assert {o.key: o.result() for o in again.outcomes} == {o.key: o.result().unchanged() for o in first.outcomes}
    first.outcomes[0].result().artifact.unlink()
    third = Ran(instance, {key: ingest(city, settings, key) for key in KEYS})
    assert len(pocket.submissions) == 2, "only what is missing is sent"
    assert sum(outcome.result().up_to_date for outcome in third.outcomes) == 1


def test_what_somebody_else_is_writing_is_waited_for_without_a_job(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, work_dir=tmp_path / "jobs")
    artifact = settings.locations.intermediates_dir / "0901.parquet"
    arguments = {"tar": str(city / "raw" / "0901.tar"), "output_dir": str(artifact.parent)}
    calls = {"0901": StageCall("ingest", arguments, settings)}
    with exclusive(artifact):
        assert isinstance(Ran(instance, calls).only.error, ArtifactBusy)
    assert pocket.submissions == []
    assert Ran(instance, calls).only.result().artifact == artifact


def test_a_job_that_nobody_followed_to_its_end_is_taken_note_of(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its artifact is known already: or the ledger would hold it for ever."""
    settings = settings_in(tmp_path)
    calls = {key: ingest(city, settings, key) for key in KEYS}
    with monkeypatch.context() as lost:
        lost.setattr(Ledger, "settle", lambda ledger, tasks: None)
        Ran(instance, calls)
    ledger = Ledger(settings.jobs_dir)
    assert len(ledger.submissions()) == 1
    assert len(Ran(instance, calls).outcomes) == len(KEYS)
    assert ledger.submissions() == []
    assert len(pocket.submissions) == 1


def test_both_ways_name_their_metadata_alike(city: Path, pocket: PocketScheduler, instance, tmp_path: Path) -> None:
    one = settings_in(tmp_path / "one")
    two = settings_in(tmp_path / "two")
    single = Ran(instance, {"0901": ingest(city, one)})
    several = Ran(instance, {key: ingest(city, two, key) for key in KEYS})
    tasks = {outcome.key: outcome for outcome in several.outcomes}
    assert [set(tasks[key].metadata) for key in KEYS] == [set(single.only.metadata)] * 2
    assert [tasks[key].metadata["slurm_job_id"] for key in KEYS] == ["702_0", "702_1"]
    both = (single.only, tasks["0901"])
    assert len({artifact_digest(outcome.result().artifact) for outcome in both}) == 1


def test_a_requeued_job_is_one_session(city: Path, pocket: PocketScheduler, instance, tmp_path: Path) -> None:
    pocket.restarts = 1
    ran = Ran(instance, {"0901": ingest(city, settings_in(tmp_path))})
    assert isinstance(ran.only.result(), Report)
    assert len(pocket.submissions) == 1
    assert not any("[pipes] unexpected" in line for line in ran.lines)


def test_an_expected_failure_keeps_its_type_and_says_where_it_ran(
    pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0901.tar").write_bytes(b"\x01" * 2048)
    ran = Ran(instance, {"0901": ingest(tmp_path, settings)})
    assert isinstance(ran.only.error, TarError)
    assert "0901.tar" in str(ran.only.error)
    assert ran.only.metadata["slurm_state"].value == "FAILED"
    assert Path(ran.only.metadata["job_log"].value).is_file()


def test_a_crash_is_a_failure_with_the_last_words_and_the_accounting(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, setup=("echo last words >&2", "kill -SEGV $$"))
    ran = Ran(instance, {"0901": ingest(city, settings)})
    assert type(ran.only.error) is JobFailed
    assert "job 701 ended FAILED (signal 11, after 20 s, peak memory 512 MiB of 4096, on node1)" in str(ran.only.error)
    assert "last words" in str(ran.only.error)
    assert ran.only.metadata["max_memory_mb"].value == 512
    assert Path(ran.only.metadata["job_log"].value).read_text() == "last words\n"


def test_the_failure_event_has_message_and_figures(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    """As a Pipes client of its own, in an asset that knows nothing of outcomes."""
    settings = settings_in(tmp_path, setup=("exit 3",))

    @dg.asset
    def intermediates(context) -> dg.MaterializeResult:
        client = HardenedSlurmPipesClient("intermediates", settings)
        return client.run(context=context, call=ingest(city, settings)).get_materialize_result()

    result = dg.materialize([intermediates], instance=instance, raise_on_error=False)
    (event,) = [event for event in result.all_events if event.is_step_failure]
    shown = event.step_failure_data.user_failure_data
    assert shown.description.startswith("JobFailed: job 701 ended FAILED (exit code 3, ")
    assert shown.metadata["slurm_exit_code"].value == 3


def test_as_a_pipes_client_it_hands_back_an_invocation(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path)

    @dg.asset
    def intermediates(context) -> dg.MaterializeResult:
        client = HardenedSlurmPipesClient("intermediates", settings)
        invocation = client.run(context=context, call=ingest(city, settings))
        assert {"report": invocation.report.to_json()} in invocation.get_custom_messages()
        return invocation.get_materialize_result()

    result = dg.materialize([intermediates], instance=instance)
    (made,) = result.asset_materializations_for_node("intermediates")
    assert made.metadata["slurm_job_id"].value == "701"


def test_no_success_without_an_accounting_row(city: Path, pocket: PocketScheduler, instance, tmp_path: Path) -> None:
    pocket.accounting = False
    ran = Ran(instance, {"0901": ingest(city, settings_in(tmp_path, accounting_patience_s=1))})
    assert isinstance(ran.error, ClusterUnreachable)
    assert ran.outcomes == []
    assert (tmp_path / "out" / "0901.parquet").exists(), "the job itself had ended well"
    pocket.accounting = True
    again = Ran(instance, {"0901": ingest(city, settings_in(tmp_path))})
    assert again.only.result().rows
    assert len(pocket.submissions) == 1, "what was sent is found again, not sent twice"


def test_a_lost_run_leaves_its_job_to_the_next_run_of_the_same_partition_alone(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    pocket.held = True

    def lost(seconds: float) -> None:
        raise WorkerLostError

    with monkeypatch.context() as patched:
        engine_for = cluster.engine_for
        patched.setattr(
            "spatial_assets.compute.dagster_slurm_client.engine_for",
            lambda *given, **how: engine_for(*given, pause=lost, **how),
        )
        first = Ran(instance, {"0901": ingest(city, settings)})
    assert isinstance(first.error, WorkerLostError)
    assert any("they go on and the next run" in line for line in first.lines)
    pocket.release()
    other = Ran(instance, {"0902": ingest(city, settings, "0902")})
    assert other.only.result().artifact.name == "0902.parquet"
    assert other.only.metadata["slurm_job_id"].value == "702", "not the job of the other partition"
    same = Ran(instance, {"0901": ingest(city, settings)})
    assert same.only.result().artifact.name == "0901.parquet"
    assert same.only.metadata["slurm_job_id"].value == "701"
    assert len(pocket.submissions) == 2
    assert any("follows job 701" in line for line in same.lines)


def test_a_task_of_an_array_is_followed_as_well(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path, accounting_patience_s=1)
    pocket.accounting = False
    assert isinstance(Ran(instance, {key: ingest(city, settings, key) for key in KEYS}).error, ClusterUnreachable)
    pocket.accounting = True
    single = Ran(instance, {"0902": ingest(city, settings, "0902")})
    assert single.only.metadata["slurm_job_id"].value == "701_1"
    assert len(pocket.submissions) == 1


def test_termination_cancels_the_job(
    city: Path, pocket: PocketScheduler, instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    pocket.held = True
    engine_for = cluster.engine_for
    seen: dict[str, str] = {}

    def engine(context: Any, *given: Any, **how: Any) -> Any:
        def terminated(seconds: float) -> None:
            seen["run"] = context.run.run_id
            instance.report_run_canceling(instance.get_run_by_id(context.run.run_id))
            raise dg.DagsterExecutionInterruptedError

        return engine_for(context, *given, pause=terminated, **how)

    monkeypatch.setattr("spatial_assets.compute.dagster_slurm_client.engine_for", engine)

    @dg.asset
    def intermediates(context) -> dg.MaterializeResult:
        list(SingleJob().run_all(context, Work("intermediates", {"0901": ingest(city, settings)})))
        return dg.MaterializeResult()

    with pytest.raises(dg.DagsterExecutionInterruptedError):
        dg.materialize([intermediates], instance=instance)
    assert pocket.tasks["701"].state == "CANCELLED"
    assert Ledger(settings.jobs_dir).submissions() == []
    said = [entry.user_message for entry in instance.all_logs(seen["run"]) if not entry.is_dagster_event]
    assert any("cancelled 1 tasks of intermediates" in line for line in said)
    (noise,) = [line for line in said if "[pipes]" in line]
    assert "one that never started has none" in noise


@pytest.mark.parametrize(("said", "told"), [([], []), (["opened"], ["opened", "closed"])])
def test_a_session_that_a_job_opened_is_closed_with_the_run(said: list[str], told: list[str]) -> None:
    messages = _JobMessages()
    handled: list[str] = []
    handler = SimpleNamespace(handle_message=lambda message: handled.append(message["method"]))
    with pytest.raises(KeyboardInterrupt), messages.read_messages(handler):
        for method in said:
            messages.take({"method": method, "params": {}})
        raise KeyboardInterrupt
    assert handled == told
