"""dagster-slurm's Pipes client, hardened: how a single call of an asset becomes a job."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dagster as dg
from dagster_slurm import SlurmPipesClient

from spatial_assets.compute.accounting import job_metadata
from spatial_assets.compute.base import one_line
from spatial_assets.compute.cluster import Follower, ending_together, engine_for
from spatial_assets.compute.dagster_slurm_terms import StageLauncher, overrides, slurm_resource, spelled_out
from spatial_core.cluster.following import Done
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.resources import Resources, resources_for
from spatial_core.cluster.script import Submission, log_file, render
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, SpatialError
from spatial_core.jobs.messages import Said
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report


class JobFailure(dg.Failure):
    """A job that did not succeed, as the failure event of its run.

    Args:
        error: the typed cause, whose message ends with the last lines of the job's log.
        metadata: what accounting says of the job.
    """

    def __init__(self, error: SpatialError, metadata: Mapping[str, Any]) -> None:
        super().__init__(one_line(error), metadata=metadata, allow_retries=False)
        self.error = error


class StageInvocation(dg.PipesClientCompletedInvocation):
    """A job that succeeded: its artifact lies in place with the digest of its manifest.

    Args:
        session: that it reported in.
        report: of the stage.
        metadata: what accounting says of the job.
    """

    def __init__(self, session: dg.PipesSession, report: Report, metadata: Mapping[str, Any]) -> None:
        super().__init__(session, metadata)
        self.report = report


class HardenedSlurmPipesClient(SlurmPipesClient):
    """Runs one stage call as one job, and returns when its artifact is in place.

    Of dagster-slurm (1.22.0) it uses, by calling them: the resource models, the launcher's contract, the sbatch command
    for the resources a job asks for, the run tags with job id and folder, the names of its metadata, and the Pipes
    session with which every client of Dagster works. So a run looks like any run of dagster-slurm.

    Its `run` cannot be reused in any part and is replaced: it opens its own ssh connection pool and log readers by name
    and leaves no place to put others. What is submitted, followed, cancelled and judged goes through the engine that
    runs job arrays (`spatial_core.cluster.engine`), with the same ledger. That closes these defects, each of which was
    reproduced on a real cluster:

    * success without an accounting row, or while the job is still completing, also after a crash or out of memory: the
      engine wants accounting, report and artifact;
    * a run attaching to the job of another partition, because jobs are found by asset and run tags alone: the ledger
      knows a request by asset, partition and the state of its inputs;
    * `tail` sessions that end in `sleep infinity` on the login node, and a command over ssh for every question: one
      request a look, over one shared connection, and nothing stays behind;
    * ssh even where sbatch works on this host: the transport follows `compute.profile`;
    * seconds of idle allocation for stdio capture: the job's only output is its log;
    * a time-out that counts the time in the queue: there is none, the job's own limit ends it;
    * failures without stderr, log folder or accounting figures: `JobFailure` has them;
    * workers deaf to SIGTERM and to termination, because `run` puts in its own signal handlers: Dagster's stay, a
      terminated run cancels its job, any other end leaves the job to be found again;
    * memory dropped when there are GPUs: it is named for every attempt;
    * environments packed by pixi: the job uses the interpreter that the settings name.

    Args:
        asset: asset name.
        settings: of its calls.

    Raises:
        ConfigError: if dagster-slurm's models refuse the settings.
    """

    def __init__(self, asset: str, settings: Settings) -> None:
        resources = resources_for(settings.compute, asset)
        try:
            slurm = slurm_resource(settings, resources)
        except ValueError as error:
            raise ConfigError(f"compute: refused by dagster-slurm: {' '.join(str(error).split())}") from error
        super().__init__(slurm, StageLauncher.of(settings.compute, resources))
        self._asset = asset
        self._settings = settings

    def run(  # type: ignore[override]  # each Pipes client has its own arguments
        self, *, context: dg.AssetExecutionContext, call: StageCall, key: str = ""
    ) -> StageInvocation:
        """Run a call to its end, or follow it if it is on its way already.

        Args:
            context: of the asset.
            call: the stage call.
            key: its partition key, empty for an asset without partitions.

        Raises:
            JobFailure: if the stage or its job failed.
            ClusterError: if the cluster refuses the job or cannot be reached.
        """
        messages = _JobMessages()
        with dg.open_pipes_session(context, dg.PipesEnvContextInjector(), messages) as session:
            done = self._follow(context, call, key, messages)
        metadata = job_metadata(self._asset, done, self._settings.compute)
        if done.report is None:
            assert done.error is not None  # noqa: S101 - one of the two is always there
            raise JobFailure(done.error, metadata) from done.error
        return StageInvocation(session, done.report, metadata)

    def _follow(self, context: dg.AssetExecutionContext, call: StageCall, key: str, messages: _JobMessages) -> Done:
        follower = _Tagging(context, self)
        engine = engine_for(
            context, self._asset, self._settings, follower,
            rendered=self._submission, heard=lambda: _Heard(messages.take),
        )  # fmt: skip
        with ending_together(context, engine):
            (done,) = engine.run({key: call})
        return done

    def _submission(
        self, asset: str, calls: Mapping[str, StageCall], resources: Resources, settings: Settings, **names: Any
    ) -> Submission:
        """What `script.render` gives, with script and resources as dagster-slurm puts them."""
        rendered = render(asset, calls, resources, settings, **names)
        ((_, call),) = calls.items()
        plan = self.launcher.prepare_execution(call.stage, str(names["python"]), rendered.folder, {})
        log = shlex.quote(log_file(rendered.folder, 0))
        command = self._build_sbatch_command(
            job_name=rendered.name,
            working_dir=shlex.quote(rendered.folder),
            output_file=log,
            error_file=log,
            script_path="job.sh",
            extra_opts=overrides(resources, settings.compute),
        )
        options = spelled_out(command)
        known = {option.partition("=")[0] for option in options}
        # The user's own options stay, and stay last: for sbatch the last word counts.
        options += [
            option for option in rendered.options if option.partition("=")[0] not in known or option in resources.extra
        ]
        files = {**rendered.files, "job.sh": "\n".join(plan.payload) + "\n"}
        return replace(rendered, options=tuple(options), files=files)


class _Tagging(Follower):
    """Also tags the run as dagster-slurm does; which job is followed is decided by the ledger, not by tags."""

    def __init__(self, context: dg.AssetExecutionContext, client: HardenedSlurmPipesClient) -> None:
        super().__init__(context)
        self._op_context = context.op_execution_context
        self._client = client

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        super().submitted(submission, attached=attached)
        asset = self._client._get_asset_key_string(self._op_context)
        self._client._store_job_tags(self._op_context, int(str(submission.job)), submission.folder, asset)


class _JobMessages(dg.PipesMessageReader):
    """Hands the messages of a job, which the engine reads beside the scheduler, to a Pipes session."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._opened = False
        self._closed: dict[str, Any] | None = None

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[dict[str, Any]]:
        """Where the job writes stands in its task file, so the session has nothing to tell it."""
        self._handler = handler
        try:
            yield {}
        except BaseException:
            # The run ends before its job and says so itself: Dagster need not wonder why the session stays open.
            if self._opened:
                handler.handle_message({"method": "closed", "params": {}})
            raise
        # A job that is queued again opens and closes its session once for each attempt; for Dagster it is one.
        if self._closed is not None:
            handler.handle_message(self._closed)

    def take(self, message: dict[str, Any]) -> None:
        """Pass one message on."""
        if message["method"] == "closed":
            self._closed = message
        elif message["method"] in ("opened", "log", "report_custom_message"):
            self._opened = self._opened or message["method"] == "opened"
            self._handler.handle_message(message)

    @property
    def expected_writer_count(self) -> int:
        """One job; the base class says the same with a warning."""
        return 1

    def no_messages_debug_text(self) -> str:
        return "The job writes them to a file in its job folder, beside its log; one that never started has none."


class _Heard(Said):
    """Also tells the Pipes session, which shows the log lines."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def take(self, line: str) -> tuple[int, str] | None:
        """Read one line; there is nothing left to show."""
        super().take(line)
        self._tell(json.loads(line))
        return None
