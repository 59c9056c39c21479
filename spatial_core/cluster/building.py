"""Builds the managed environment of this code where it is missing.

By default on the login node: there is the network that pip needs, which nodes often lack. A request to it lasts less
than a minute, so the build is started apart and its log followed. With `compute.build_on = "node"` the same script is a
job on the default partition, for sites whose login nodes end such work.

The project's files are copied into a job folder first, so pip writes nothing into the checkout and stale build folders
there do no harm. A virtual environment holds its own path and cannot be moved, so it is made where it is to be; its
stamp, which comes last and in one step, is what makes it count. Builds of the same environment wait for each other, and
all but the first find it finished. What a killed build left has no stamp and is removed by the next.
"""

from __future__ import annotations

import shlex
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from spatial_core.cluster.environment import (
    PROJECT_FILES,
    ManagedEnvironment,
    managed,
    node_python,
    verify_python,
)
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.script import Submission
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.installed import Installed, source_files

_LIMIT_S = 3600
_POLL_S = 2.0
_SILENT_LOOKS = 5  # without a sign of a build before it counts as dead: it may just be starting
_TAIL_BYTES = 4000
_TAIL_LINES = 8
_RESOURCES = Resources(cpus=2, mem="4G", time_limit="01:00:00")


def ready_python(settings: Settings, scheduler: Scheduler, say: Callable[[str], None]) -> Path:
    """The interpreter for jobs, with the code of this process; a managed environment is built where it is missing.

    The interpreter of this process has its code, so it is not asked.

    Args:
        settings: `compute`, and the folder of jobs.
        scheduler: of the cluster.
        say: told what happens, a line at a time.

    Raises:
        ClusterError: if it cannot be built, or has other code; says what to do.
    """
    environment = managed(settings)
    if environment is not None:
        builder = Builder(settings, scheduler, say)
        if not builder.is_built(environment):
            builder.build(environment)
    python = node_python(settings)
    if environment is not None or settings.compute.python is not None:
        doubt = verify_python(settings, scheduler, python)
        if doubt is not None:
            say(doubt)
    return python


class _Build(Protocol):
    """A build that was started."""

    def alive(self) -> bool:
        """Whether it still waits or runs."""
        ...

    def end(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class Builder:
    """Builds environments for one cluster.

    Args:
        settings: `compute`, and the folder of jobs.
        scheduler: takes builds that are jobs; others run beside it.
        say: told what happens, a line at a time.
        pause: waits; replaced in tests.
    """

    settings: Settings
    scheduler: Scheduler
    say: Callable[[str], None]
    pause: Callable[[float], None] = time.sleep

    def is_built(self, environment: ManagedEnvironment) -> bool:
        """Whether the environment is finished; its stamp names the code.

        Raises:
            ClusterUnreachable: if the cluster could not be asked.
        """
        text = self._read(environment.stamp)
        try:
            return text is not None and Installed.from_json(text) == environment.code
        except ValueError:
            return False

    def build(self, environment: ManagedEnvironment) -> None:
        """Build it, or wait for who is building it. Interrupted, the build ends too.

        Raises:
            ClusterError: if it cannot be built; the message holds pip's last lines and names the log.
        """
        folder = self.settings.jobs_dir / f"environment-{uuid.uuid4().hex[:10]}"
        on_node = self.settings.compute.build_on == "node"
        where = "in a job" if on_node else "beside the scheduler"
        self.say(f"building environment {environment.folder} {where}, which can take minutes")
        outcome = "unfinished"
        try:
            self._copy_project(environment, folder)
            (folder / "build.sh").write_text(build_script(self.settings, environment, folder))
            build = self._as_job(folder) if on_node else self._beside(folder)
            outcome = self._follow(build, folder)
        finally:
            shutil.rmtree(folder / "source" if outcome != "0" else folder, ignore_errors=True)
        if outcome != "0":
            raise ClusterError(
                f"{environment.folder} was not built: {self._last_lines(folder)}; the whole log is {folder}/build.log"
            )
        if not self.is_built(environment):
            raise ClusterError(f"{environment.folder} was built, but the login node does not see {environment.stamp}")
        self.say(f"environment {environment.folder} is ready")

    def _copy_project(self, environment: ManagedEnvironment, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True)  # pip's options may name an index with a password
        project = environment.project
        for path in [*(project / name for name in PROJECT_FILES), project / "README.md", *source_files(project)]:
            copy = folder / "source" / path.relative_to(project)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

    def _beside(self, folder: Path) -> _Build:
        # A session of its own, so that the request ends at once and the build can be ended as a whole.
        apart = f"echo $$ >pid; exec timeout {_LIMIT_S} bash build.sh"
        start = f"cd {shlex.quote(str(folder))}; setsid --fork bash -c {shlex.quote(apart)} >build.log 2>&1 </dev/null"
        ran = self.scheduler.run("bash", "-c", start)
        if ran.code:
            raise ClusterError(f"the build could not be started beside the scheduler: {ran.said}")
        return _BesideScheduler(self.scheduler, folder)

    def _as_job(self, folder: Path) -> _Build:
        compute = self.settings.compute
        resources = replace(_RESOURCES, partition=compute.partition, account=compute.account, qos=compute.qos)
        name = f"spatial-{folder.name}"
        options = (f"--job-name={name}", f"--output={folder}/build.log", "--export=ALL", *resources.options())
        script = f"#!/bin/bash\nexec bash {shlex.quote(str(folder / 'build.sh'))}\n"
        job = self.scheduler.submit(Submission(name, f"{folder}/job", options, {"job.sh": script}, ("",)))
        self.say(f"job {job} builds it")
        return _Job(self.scheduler, job, self.say)

    def _follow(self, build: _Build, folder: Path) -> str:
        """The build's exit code as text."""
        silent, shown = 0, ""
        try:
            while (outcome := self._read(folder / "outcome")) is None:
                self.pause(_POLL_S)
                silent = 0 if build.alive() else silent + 1
                if silent > _SILENT_LOOKS:
                    return "killed"
                last = (self._read(folder / "build.log") or "").rstrip().rpartition("\n")[2]
                if last != shown:
                    self.say(last)
                    shown = last
        except BaseException:
            build.end()
            raise
        return outcome.strip()

    def _last_lines(self, folder: Path) -> str:
        lines = (self._read(folder / "build.log") or "").splitlines()
        return " | ".join(line.strip() for line in lines[-_TAIL_LINES:] if line.strip()) or "it said nothing"

    def _read(self, path: Path) -> str | None:
        return self.scheduler.tails({"file": str(path)}, _TAIL_BYTES).get("file")


@dataclass(frozen=True)
class _BesideScheduler:
    scheduler: Scheduler
    folder: Path

    def alive(self) -> bool:
        return self.scheduler.run("bash", "-c", f"kill -0 {self._process}").code == 0

    def end(self) -> None:
        # `timeout` leads the session and passes the signal on to all of it.
        self.scheduler.run("bash", "-c", f"kill {self._process}")

    @property
    def _process(self) -> str:
        return f"$(cat {shlex.quote(str(self.folder / 'pid'))})"


@dataclass
class _Job:
    scheduler: Scheduler
    job: str
    say: Callable[[str], None]
    shown: str = ""

    def alive(self) -> bool:
        look = self.scheduler.look({self.job: ("", 0)})
        queued = look.queue.get(self.job)
        state = "" if queued is None else f"job {self.job}: {queued.state.lower()} ({queued.reason})"
        if queued is not None and queued.state == "PENDING" and state != self.shown:
            self.say(state)
        self.shown = state
        return look.queue_silent is not None or queued is not None

    def end(self) -> None:
        self.scheduler.cancel([self.job])


def build_script(settings: Settings, environment: ManagedEnvironment, folder: Path) -> str:
    """The script that builds an environment from the copy of the project in a folder.

    Args:
        settings: `compute` says with which interpreter, prefix and pip options.
        environment: what is built.
        folder: where `source` lies, and where the exit code is left as `outcome`.
    """
    compute = settings.compute
    prefix = [*compute.container]
    place, stamp = environment.folder, str(environment.stamp)
    lock = place.with_name(f".{place.name}.lock")
    make = [*prefix, str(compute.base_python), "-m", "venv", str(place)]
    pip = [*prefix, str(environment.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    pip += ["-c", "source/constraints.txt", *compute.pip_options, "./source"]
    ask = shlex.join([*prefix, str(environment.python), "-m", "spatial_core.installed"])
    q = shlex.quote
    lines = [
        "#!/bin/bash",
        "set -eo pipefail",
        f"cd {q(str(folder))}",
        "trap 'echo $? >outcome.partial; mv outcome.partial outcome' EXIT",
        *compute.setup,
        f"mkdir -p {q(str(place.parent))}",
        f"exec 9>{q(str(lock))}",
        "flock 9",
        f"if [ -f {q(stamp)} ]; then echo 'somebody else has built it'; exit 0; fi",
        f"rm -rf {q(str(place))}",
        shlex.join(make),
        shlex.join(pip),
        f"found=$(cd / && {ask})",
        f'if [ "$found" != {q(environment.code.to_json())} ]; then',
        '  echo "what was installed is not what was copied: $found"; exit 1',
        "fi",
        f'echo "$found" >{q(stamp + ".partial")}',
        f"mv {q(stamp + '.partial')} {q(stamp)}",
    ]
    return "\n".join(lines) + "\n"
