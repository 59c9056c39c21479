"""Sends the test jobs of the cluster check, all at once, and reads off them what nodes see and can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spatial_core.cluster.ending import TERMINAL, given_up, never_starts
from spatial_core.cluster.environment import disagreement, remedy
from spatial_core.cluster.finding import Finding
from spatial_core.cluster.probe import SEEN_S, Probe, answers
from spatial_core.cluster.scheduler import Accounted, Look, Ran, Scheduler
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError

_POLL_S = 0.5
_ACCOUNTING_S = 60.0  # for the row of a job that has left the queue
_STUCK_S = 5.0  # for a reason to be looked at twice by the scheduler
_CANCEL_S = 15.0  # for cancelled jobs to end and remove what they wrote
_LOG_BYTES = 20_000
NO_ACCOUNTING = "a job has succeeded only when accounting says so: ask the administrators for it (slurmdbd)"
_STUCK = (
    "what the queue waits for will not happen by itself: change the job or ask the administrators; see `man squeue`"
)
_BUSY = "a busy cluster is no fault of the settings: give it --wait SECONDS; `man squeue` explains other reasons"
SHARED = (
    "the lake and the folder of jobs (paths.data_dir, compute.work_dir) must lie on a file system that this host, the "
    "login node and the nodes see at the same path"
)


@dataclass
class _Running:
    """A test job on its way."""

    probe: Probe
    job: str
    sent: float
    state: str = ""
    waited_s: float | None = None
    heard: dict[str, str] = field(default_factory=dict)
    heard_at: float | None = None
    seen: dict[str, float] = field(default_factory=dict)
    released: bool = False
    stuck_since: float | None = None
    left: float | None = None
    silent: str | None = None
    log: str = ""

    @property
    def node(self) -> str:
        return self.heard.get("node", "its node")

    @property
    def stuck(self) -> bool:
        """Whether it waits for what will not happen."""
        return self.stuck_since is not None and time.monotonic() - self.stuck_since > _STUCK_S

    @property
    def written(self) -> list[str]:
        """Folders that the node says it has written to."""
        return [name for name in self.probe.folders if self.heard.get(name) == "ok"]


class Probing:
    """Runs test jobs.

    Args:
        settings: where and how jobs run.
        scheduler: the cluster.
        python: interpreter that the jobs ask for its code.
        wait_s: seconds that a job may take to start and end.
        say: told how the jobs stand, when that changes.
        pause: waits; replaced in tests.
    """

    def __init__(
        self,
        settings: Settings,
        scheduler: Scheduler,
        python: Path | None,
        *,
        wait_s: float,
        say: Callable[[str], None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._python = python
        self._wait_s = wait_s
        self._say = say
        self._pause = pause

    def run(self, probes: Sequence[Probe]) -> Iterator[Finding]:
        """Send the jobs and report on each as it ends; what they leave is removed however this ends.

        Raises:
            ClusterUnreachable: if the connection is lost for good.
        """
        running: dict[str, _Running] = {}
        try:
            for probe in probes:
                try:
                    job = self._scheduler.submit(probe.submission)
                except ClusterError as error:
                    yield Finding(
                        _step("test job", probe), str(error), "see the options in: spatial slurm render ASSET"
                    )
                else:
                    running[job] = _Running(probe, job, time.monotonic())
            deadline = time.monotonic() + self._wait_s
            while running and time.monotonic() < deadline:
                self._pause(_POLL_S)
                for one, accounted in self._turn(running):
                    del running[one.job]
                    yield from self._report(one, accounted)
                for one in [one for one in running.values() if one.stuck]:
                    self._scheduler.cancel([one.job])
                    del running[one.job]
                    yield Finding(_step("test job", one.probe), f"job {one.job} is {one.state}", _STUCK)
            for one in running.values():
                late = f"job {one.job} is still {one.state or 'unknown to the queue'} after {self._wait_s:.0f} s"
                yield Finding(_step("test job", one.probe), late, _BUSY)
        finally:
            self._clean(probes, list(running))

    def _turn(self, running: dict[str, _Running]) -> list[tuple[_Running, Accounted | None]]:
        """One look at all jobs; returns those that have ended."""
        look = self._scheduler.look(dict.fromkeys(running, ("", 0)))
        logs = self._scheduler.tails({job: one.probe.log for job, one in running.items()}, _LOG_BYTES)
        ended: list[tuple[_Running, Accounted | None]] = []
        for job, one in running.items():
            one.log = logs.get(job, one.log)
            one.heard = answers(one.log)
            self._note_state(one, look)
            if "end" in one.heard and not one.released:
                self._look_here(one)
            accounted = look.accounts.get(job)
            if job in look.queue or look.queue_silent is not None:
                one.left = None
            elif accounted is not None and accounted.state in TERMINAL:
                ended.append((one, accounted))
            else:
                one.left = one.left or time.monotonic()
                one.silent = look.accounting_silent
                if one.silent or time.monotonic() - one.left > _ACCOUNTING_S:
                    ended.append((one, None))
        return ended

    def _note_state(self, one: _Running, look: Look) -> None:
        queued = look.queue.get(one.job)
        if queued is None:
            return
        stuck = never_starts(queued.state, queued.reason) or given_up(queued.state, queued.reason)
        one.stuck_since = (one.stuck_since or time.monotonic()) if stuck else None
        if queued.state != "PENDING" and one.waited_s is None:
            one.waited_s = time.monotonic() - one.sent
        reason = f" ({queued.reason})" if queued.state == "PENDING" else ""
        state = f"{queued.state.lower()}{reason}"
        if state != one.state:
            one.state = state
            self._say(f"{_step('test job', one.probe)}: job {one.job} is {state}")

    def _look_here(self, one: _Running) -> None:
        """Wait for what the node wrote to be seen on this host, then let the job end."""
        one.heard_at = one.heard_at or time.monotonic()
        since = time.monotonic() - one.heard_at
        for name in one.written:
            if name not in one.seen and _content(one.probe.node_file(name)) == f"{one.probe.token} {one.node}":
                one.seen[name] = since
        if len(one.seen) == len(one.written) or since > SEEN_S:
            self._scheduler.run("touch", f"{one.probe.submission.folder}/seen")
            one.released = True

    def _report(self, one: _Running, accounted: Accounted | None) -> Iterator[Finding]:
        yield self._ending(one, accounted)
        if "end" not in one.heard:
            return
        yield self._folders(one)
        if "scratch" in one.heard:
            yield self._scratch(one)
        if "code" in one.heard and self._python is not None:
            yield self._code(one, self._python)

    def _ending(self, one: _Running, accounted: Accounted | None) -> Finding:
        step = _step("test job", one.probe)
        if accounted is None:
            why = f"does not answer ({one.silent})" if one.silent else f"has no row of it after {_ACCOUNTING_S:.0f} s"
            return Finding(step, f"job {one.job} has left the queue, but accounting {why}", NO_ACCOUNTING)
        ending = f"job {one.job} ended {accounted.state}"
        if accounted.state != "COMPLETED":
            last = " ".join(one.log.split())[-300:] or "it printed nothing"
            how = f"{ending} with exit code {accounted.job['ExitCode']}: {last}"
            return Finding(step, how, f"look at: sacct -j {one.job} --format=ALL")
        if "end" not in one.heard:
            unseen = f"{ending}, but what it printed to {one.probe.log} is not seen on the login node"
            return Finding(step, unseen, SHARED)
        gpus = one.heard.get("gpus", "none")
        shown = "" if gpus == "none" else f" with GPU {gpus}"
        waited = "" if one.waited_s is None else f" after {one.waited_s:.0f} s in the queue"
        return Finding(step, f"job {one.job} ran on {one.node}{shown}{waited}; accounting has it")

    def _folders(self, one: _Running) -> Finding:
        step = _step("folders", one.probe)
        faults = [
            f"{path} on {one.node} {one.heard.get(name, 'was not tried')}"
            for name, path in one.probe.folders.items()
            if one.heard.get(name) != "ok"
        ]
        faults += [
            f"what {one.node} wrote to {one.probe.folders[name]} is not seen on this host after {SEEN_S:.0f} s"
            for name in one.written
            if name not in one.seen
        ]
        if faults:
            return Finding(step, "; ".join(faults), SHARED)
        names = " and ".join(str(path) for path in one.probe.folders.values())
        delay = max(one.seen.values(), default=0.0)
        return Finding(step, f"{names}: what {one.node} writes is seen on this host within {delay:.1f} s, and back")

    def _scratch(self, one: _Running) -> Finding:
        step, found = _step("scratch", one.probe), one.heard["scratch"]
        if found.startswith("ok "):
            return Finding(step, f"on {one.node}: {found.removeprefix('ok ')}")
        where = f"{self._settings.compute.scratch} on {one.node} {found}"
        return Finding(step, where, "set compute.scratch to a folder that nodes have, or leave it unset")

    def _code(self, one: _Running, python: Path) -> Finding:
        step = _step("environment", one.probe)
        code, _, said = one.heard["code"].partition(" ")
        ran = Ran(int(code), said, "")
        problem = disagreement(python, ran)
        if problem is None:
            return Finding(step, f"{python} on {one.node} has the code of this process")
        return Finding(step, f"on {one.node}: {problem}", remedy(self._settings, ran))

    def _clean(self, probes: Sequence[Probe], running: list[str]) -> None:
        """Cancel what still waits or runs, and remove folders and files, here and beside the scheduler."""
        self._scheduler.cancel(running)
        end = time.monotonic() + _CANCEL_S
        while running and self._scheduler.look(dict.fromkeys(running, ("", 0))).queue and time.monotonic() < end:
            self._pause(_POLL_S)
        files = [str(probe.node_file(name)) for probe in probes for name in probe.folders]
        for probe in probes:
            self._scheduler.remove(probe.submission.folder, str(self._settings.jobs_dir))
        if files:
            # Beside the scheduler too, where folders may be others than on this host: that is what is being found out.
            self._scheduler.run("rm", "-f", *files)
        for file in files:
            Path(file).unlink(missing_ok=True)


def _step(what: str, probe: Probe) -> str:
    return f"{what} {probe.partition}"


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@contextmanager
def written_here(folders: Iterable[Path], token: str) -> Iterator[None]:
    """Have a file `<token>-here` with the token as its content in each folder; folders are made, and removed again.

    Raises:
        OSError: if a folder cannot be made or written.
    """
    made: list[Path] = []
    files: list[Path] = []
    try:
        for folder in dict.fromkeys(folders):
            made += [place for place in [*reversed(folder.parents), folder] if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{token}-here")
            files[-1].write_text(token)
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
