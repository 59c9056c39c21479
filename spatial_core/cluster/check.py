"""The cluster check: proves, step by step, that jobs will run as the settings say, before any is sent.

Each step is a finding: what was found, and what to do when it is not as it has to be. Steps that cannot be tried
because an earlier one failed are left out. The check leaves nothing behind: test jobs end or are cancelled, their
folders and files are removed.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spatial_core.cluster import facts
from spatial_core.cluster.building import Builder
from spatial_core.cluster.environment import managed, node_python, verify_python
from spatial_core.cluster.facts import Partition
from spatial_core.cluster.finding import Finding
from spatial_core.cluster.probe import Probe, make_probe
from spatial_core.cluster.probing import NO_ACCOUNTING, SHARED, Probing, written_here
from spatial_core.cluster.resources import Resources, resources_for
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.script import Submission
from spatial_core.cluster.transport import Ssh, Transport
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError, ClusterUnreachable, ConfigError

_PATIENCE_S = 20.0  # for a scheduler that does not take jobs now
_START = re.compile(r"to start at \d{4}-\d\d-\d\dT(\d\d:\d\d):\d\d .* on nodes? (\S+)")
_NETWORK = "check compute.ssh_host, compute.ssh_port and compute.ssh_jump_host; is a VPN needed?"
_NOT_THERE = 127  # exit code by which a shell says that there is no such command
_NOT_WORKING = (
    "the command is there and does not work: try it by hand there, in a shell without a terminal; the controller must "
    "answer `scontrol ping`, and SLURM_CONF must be set where SLURM's settings lie in an unusual place"
)
_PATH = "put SLURM's commands on the PATH of shells without a terminal there, such as in ~/.bashrc"
_COMMANDS = (
    ("python3", ("python3", "--version"), "python3 (3.6 or later) must be on the login node's PATH"),
    ("sbatch", ("sbatch", "--version"), _PATH),
    ("squeue", ("bash", "-c", 'squeue -h -u "$(id -un)" -o %i'), _PATH),
)


@dataclass
class ClusterCheck:
    """One check.

    Args:
        settings: a cluster profile.
        transport: the way to the cluster.
        submissions: asset -> what would be submitted for one partition key of it, for the assets made there.
        build: build a managed environment that is missing.
        wait_s: seconds that test jobs may take to start and end.
        say: told what is going on between findings.
        pause: waits; replaced in tests.
    """

    settings: Settings
    transport: Transport
    submissions: Mapping[str, Submission]
    build: bool
    wait_s: float
    say: Callable[[str], None]
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(self.transport, self.say, _PATIENCE_S, self.pause)
        self._resources = {asset: resources_for(self.settings.compute, asset) for asset in self.submissions}
        self._partitions: dict[str, Partition] = {}
        self._unfit: set[str] = set()

    def run(self) -> Iterator[Finding]:
        """Try everything; findings come as they are known.

        Raises:
            ClusterUnreachable: if the connection is lost for good on the way.
        """
        answered = True
        for finding in self._answers():
            yield finding
            answered = answered and (finding.ok or finding.step == "accounting")
        if not answered:
            return
        yield from self._names()
        yield from self._fits()
        found, python = self._environment()
        yield found
        yield from self._test_jobs(python)

    def _answers(self) -> Iterator[Finding]:
        """Login, Python, and the scheduler's commands; ends with the first that fails but accounting."""
        if isinstance(self.transport, Ssh):
            try:
                self.transport.connect()
            except ClusterError as error:
                yield Finding("login", str(error), _NETWORK if isinstance(error, ClusterUnreachable) else "")
                return
            yield Finding("login", f"{self.transport.host} over ssh, its host key is known")
        # On this host a request is answered by the interpreter of this process.
        for step, argv, remedy in _COMMANDS if isinstance(self.transport, Ssh) else _COMMANDS[1:]:
            ran = self._scheduler.run(*argv)
            if ran.code:
                yield Finding(step, ran.said, remedy if ran.code == _NOT_THERE else _NOT_WORKING)
                return
            said = ran.out.split()
            yield Finding(step, f"{len(said)} jobs of yours are queued" if step == "squeue" else " ".join(said))
        yield self._accounting()

    def _accounting(self) -> Finding:
        argv = ("sacct", "-n", "-X", "-P", "-S", "now-30days", "--format=JobID")
        try:
            rows = len(facts.ask(self._scheduler, *argv).split())
        except ClusterError as error:
            return Finding("accounting", str(error), NO_ACCOUNTING)
        if rows:
            return Finding("accounting", f"{rows} jobs of yours in the last 30 days")
        return Finding("accounting", "no job of yours in the last 30 days; a test job will show whether it keeps them")

    def _names(self) -> Iterator[Finding]:
        """Partitions, accounts and qualities of service that the settings name."""
        self._partitions = facts.partitions(self._scheduler)
        known = ", ".join(sorted(self._partitions))
        for name in self._named_partitions():
            step, partition = f"partition {name}".rstrip(), self._partitions.get(name)
            if partition is None:
                cause = "there is no such partition" if name else "the cluster has no default partition"
                yield Finding(step, cause, f"name one of {known} in compute.partition or that of an asset")
            elif not partition.up:
                yield Finding(step, "takes no jobs now", f"wait, or use another one of {known}")
            else:
                limit = "no time limit" if partition.limit_s is None else f"up to {partition.limit_s / 3600:g} h"
                yield Finding(step, f"{limit}; nodes: {facts.largest([partition])}")
        yield from self._listed("account", "format=account")
        yield from self._listed("qos", "format=name")

    def _listed(self, kind: str, column: str) -> Iterator[Finding]:
        """Whether accounting knows a name. Without limits enforced by it, sbatch takes any."""
        wanted = sorted({name for one in self._resources.values() if (name := getattr(one, kind)) is not None})
        if not wanted:
            return
        try:
            there = set(facts.ask(self._scheduler, "sacctmgr", "-n", "-P", "list", kind, column).split())
        except ClusterError as error:
            yield Finding(kind, f"sacctmgr does not say ({error}); left to sbatch")
            return
        remedy = f"name one of {', '.join(sorted(there)) or 'none'} in compute.{kind} or that of an asset"
        for name in wanted:
            known = name in there
            text = "is known to accounting" if known else f"there is no such {kind}"
            yield Finding(f"{kind} {name}", text, None if known else remedy)

    def _fits(self) -> Iterator[Finding]:
        """Whether sbatch would take each asset's job, and a node can run it."""
        for asset, submission in self.submissions.items():
            resources = self._resources[asset]
            places = [place for name in self._named_by(resources) if (place := self._partitions.get(name)) is not None]
            if places:
                yield self._fit(asset, submission, resources, places)

    def _fit(self, asset: str, submission: Submission, resources: Resources, places: list[Partition]) -> Finding:
        gpus = f"{resources.gpus} GPU" if resources.gpus else "no GPU"
        asked = (
            f"{resources.cpus} core{'s' if resources.cpus > 1 else ''}, {resources.mem}, {gpus}, {resources.time_limit}"
        )
        ran = self._scheduler.run("sbatch", "--test-only", *submission.options, text=submission.files["job.sh"])
        misfits = facts.misfits(resources, places)
        where = " or ".join(place.name for place in places)
        if not ran.code and not misfits:
            start = _START.search(ran.said)
            when = f"; would start at {start[1]} on {start[2]}" if start else ""
            return Finding(f"resources {asset}", f"{asked} fit {where}{when}")
        self._unfit.add(asset)
        said = ran.said if ran.code else ""
        if not misfits and resources.constraint is not None:
            misfits = ["constraint"]
        keys = ", ".join(f"compute.resources.{asset}.{name}" for name in misfits) or f"compute.resources.{asset}"
        limits = [place for place in places if place.limit_s is not None]
        longest = f", for at most {max(place.limit_s or 0 for place in limits) / 3600:g} h" if limits else ""
        change = "change" if misfits == ["constraint"] else "lower"
        cause = f"no job with {asked} fits {where}{f': {said}' if said else ''}"
        return Finding(
            f"resources {asset}",
            cause,
            f"{change} {keys}, or name another partition; there is {facts.largest(places)}{longest}",
        )

    def _environment(self) -> tuple[Finding, Path | None]:
        """What is known of the interpreter before a job has tried it; and the interpreter, if there is one to try."""
        try:
            environment = managed(self.settings)
            if environment is not None:
                builder = Builder(self.settings, self._scheduler, self.say, self.pause)
                if not builder.is_built(environment):
                    if not self.build:
                        again = "run again with --build; otherwise the first run builds it"
                        return Finding("environment", f"{environment.folder} is not built yet", again), None
                    builder.build(environment)
            python = node_python(self.settings)
            doubt = verify_python(self.settings, self._scheduler, python)
        except (ClusterError, ConfigError) as error:
            return Finding("environment", str(error), ""), None
        return Finding("environment", doubt or f"{python} has the code of this process"), python

    def _test_jobs(self, python: Path | None) -> Iterator[Finding]:
        folders = {"data_dir": self.settings.locations.data_dir, "jobs_dir": self.settings.jobs_dir}
        token = f".spatial-check-{uuid.uuid4().hex[:10]}"
        with ExitStack() as stack:
            try:
                stack.enter_context(written_here(folders.values(), token))
            except OSError as error:
                yield Finding("folders", f"{error.filename}: {error.strerror}, on this host", SHARED)
                return
            probes = self._probes(python, token, folders)
            probing = Probing(
                self.settings, self._scheduler, python,
                wait_s=self.wait_s, say=self.say, pause=self.pause,
            )  # fmt: skip
            yield from probing.run(probes)

    def _probes(self, python: Path | None, token: str, folders: Mapping[str, Path]) -> list[Probe]:
        probes = []
        for partition in self._named_partitions():
            if partition not in self._partitions or not self._partitions[partition].up:
                continue
            users = [asset for asset, one in self._resources.items() if partition in self._named_by(one)]
            # A job without GPU tells as much, where one of the assets needs none: then the partition takes such jobs.
            user = min(users, key=lambda asset: (asset in self._unfit, self._resources[asset].gpu_count))
            name = f"spatial-check-{uuid.uuid4().hex[:10]}"
            probes.append(
                make_probe(
                    self.settings, python, partition, self._resources[user], name=name, token=token, folders=folders
                )
            )
        return probes

    def _named_partitions(self) -> list[str]:
        """Partitions that the assets' jobs go to; the empty name stands for a default that does not exist."""
        return sorted({name for one in self._resources.values() for name in self._named_by(one)})

    def _named_by(self, resources: Resources) -> list[str]:
        if resources.partition:
            return resources.partition.split(",")
        return [next((one.name for one in self._partitions.values() if one.default), "")]
