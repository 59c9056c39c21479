"""Test jobs whose nodes see what real ones rarely show on request: other files, no files, no accounting row."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster import beside_scheduler, probing
from spatial_core.cluster.finding import Finding
from spatial_core.cluster.probe import Probe, answers, make_probe
from spatial_core.cluster.probing import Probing, written_here
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.scheduler import Accounted, Look, Queued, Scheduler
from spatial_core.cluster.script import Submission
from spatial_core.config.settings import Settings, load_settings
from spatial_core.installed import installed

TOKEN = ".spatial-check-test"  # noqa: S105 - a file name
PYTHON = Path("/opt/env/bin/python")
Edit = Callable[[str], str]


@dataclass
class Cluster(Scheduler):
    """Runs each job's script as a process, after an edit that stands for what is different on the node.

    Args:
        edit: of the script.
        state: that accounting gives; None when it has no row.
        hold: reason for which jobs wait; empty, they run.
    """

    edit: Edit = lambda script: script
    state: str | None = "COMPLETED"
    hold: str = ""
    jobs: dict[str, subprocess.Popen[bytes] | None] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)

    def submit(self, submission: Submission) -> str:
        folder = Path(submission.folder)
        folder.mkdir(parents=True)
        script = folder / "job.sh"
        script.write_text(self.edit(submission.files["job.sh"]))
        job = str(len(self.jobs) + 1)
        with (folder / "probe.log").open("wb") as log:
            argv = ["env", "SLURMD_NODENAME=node7", "bash", str(script)]
            self.jobs[job] = None if self.hold else subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder)
        return job

    def look(self, tasks: Any) -> Look:
        look = Look()
        for job in tasks:
            process = self.jobs[job]
            if process is None and job not in self.cancelled:
                look.queue[job] = Queued("PENDING", self.hold, "")
            elif process is not None and process.poll() is None:
                look.queue[job] = Queued("RUNNING", "None", "node7")
            elif self.state is not None:
                look.accounts[job] = Accounted({"State": self.state, "ExitCode": "0:0"})
        return look

    def cancel(self, names: Any) -> None:
        self.cancelled += names
        for name in names:
            if (process := self.jobs[name]) is not None:
                process.terminate()


class ThisMachine:
    """A transport to this machine, in this process."""

    def ask(self, request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(beside_scheduler, request["do"])(dict(request))
        return answer


def cluster(**how: Any) -> Cluster:
    made = Cluster(**how)
    Scheduler.__init__(made, ThisMachine(), print, 1.0)
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    yield load_settings(None, [f"paths.data_dir={tmp_path / 'lake'}", "compute.profile=slurm_login"], {})
    assert list(tmp_path.rglob("*")) == [], "something was left behind"


def probe(settings: Settings) -> Probe:
    folders = {"data_dir": settings.locations.data_dir, "jobs_dir": settings.jobs_dir}
    asked = Resources(
        cpus=8, mem="64G", time_limit="24:00:00", gpus="h100:4", partition="a,b", account="me", qos="high"
    )
    return make_probe(settings, PYTHON, "b", asked, name="spatial-check-1", token=TOKEN, folders=folders)


def run(settings: Settings, how: Cluster, wait_s: float = 30.0) -> tuple[dict[str, Finding], list[str]]:
    said: list[str] = []
    one = probe(settings)
    with written_here(one.folders.values(), TOKEN):
        found = list(Probing(settings, how, PYTHON, wait_s=wait_s, say=said.append).run([one]))
    return {finding.step: finding for finding in found}, said


@pytest.fixture
def answering(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Edit]:
    """Shell lines in the place of the interpreter."""

    def edit(lines: str) -> Edit:
        file = tmp_path_factory.mktemp("interpreter") / "answer.sh"
        file.write_text(lines)
        return lambda script: script.replace(f"exec {PYTHON} -m spatial_core.installed", f"exec bash {file}")

    return edit


def test_a_test_job_asks_for_little_and_one_gpu_of_the_kind(settings: Settings) -> None:
    options = probe(settings).submission.options
    for option in ("--partition=b", "--account=me", "--qos=high", "--gres=gpu:h100:1", "--cpus-per-task=1"):
        assert option in options
    assert not any(option.startswith("--array") for option in options)


def test_what_a_node_finds_is_reported(settings: Settings, answering: Callable[[str], Edit]) -> None:
    found, said = run(settings, cluster(edit=answering(f"echo noise; echo '{installed().to_json()}'")))
    assert {step: finding.ok for step, finding in found.items()} == {
        "test job b": True, "folders b": True, "environment b": True,
    }  # fmt: skip
    assert "ran on node7" in found["test job b"].text
    assert said == ["test job b: job 1 is running"]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("exit 127", "/opt/env/bin/python could not be asked for its code (exit code 127)"),
        ("echo 'No module named spatial_core' >&2; exit 1", "has no spatial-embeddings (No module named spatial_core)"),
        ('echo \'{"version": "0.0.1", "digest": "abc"}\'', "has version 0.0.1 (abc), but this process runs"),
        ("echo hello", "did not say which code it has, but 'hello'"),
    ],
)
def test_an_interpreter_that_is_not_ours(
    settings: Settings, answering: Callable[[str], Edit], answer: str, cause: str
) -> None:
    found, _ = run(settings, cluster(edit=answering(answer)))
    assert cause in found["environment b"].text and "on node7" in found["environment b"].text
    assert found["environment b"].remedy is not None and "compute.environment_dir" in found["environment b"].remedy


def test_a_folder_that_nodes_see_and_this_host_does_not(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node writes another file than the one looked for: as when the same path is another disk."""
    monkeypatch.setattr(probing, "SEEN_S", 1.0)
    found, _ = run(settings, cluster(edit=lambda script: script.replace("$token $node", "$token elsewhere")))
    text = found["folders b"].text
    assert f"what node7 wrote to {settings.locations.data_dir} is not seen on this host after 1 s" in text
    assert "at the same path" in str(found["folders b"].remedy)


def test_a_folder_that_is_not_there_or_not_writable_on_nodes(settings: Settings) -> None:
    lake = str(settings.locations.data_dir)
    missing = cluster(edit=lambda script: script.replace(f"folder data_dir {lake}", f"folder data_dir {lake}/none"))
    read_only = cluster(edit=lambda script: script.replace('>"$2/$mine"', '>"/proc/version"'))
    for how, cause in ((missing, "is not there"), (read_only, "cannot be written")):
        found, _ = run(settings, how, wait_s=120.0)  # the node itself waits 20 s for a folder to be there
        assert f"{lake} on node7 {cause}" in found["folders b"].text


def test_a_job_that_fails_shows_its_last_words(settings: Settings) -> None:
    found, _ = run(settings, cluster(edit=lambda script: "echo no such device; exit 1", state="FAILED"))
    assert list(found) == ["test job b"]
    assert "ended FAILED with exit code 0:0: no such device" in found["test job b"].text


def test_a_job_whose_output_is_not_seen(settings: Settings) -> None:
    found, _ = run(settings, cluster(edit=lambda script: "true"))
    assert list(found) == ["test job b"]
    assert "is not seen on the login node" in found["test job b"].text


def test_a_job_without_an_accounting_row(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_ACCOUNTING_S", 1.0)
    found, _ = run(settings, cluster(edit=lambda script: "true", state=None))
    assert "accounting has no row of it after 1 s" in found["test job b"].text


def test_a_job_that_does_not_start_is_cancelled(settings: Settings) -> None:
    how = cluster(hold="Priority")
    found, said = run(settings, how, wait_s=1.0)
    assert "job 1 is still pending (Priority) after 1 s" in found["test job b"].text
    assert "--wait SECONDS" in str(found["test job b"].remedy)
    assert said == ["test job b: job 1 is pending (Priority)"]
    assert how.cancelled == ["1"]


@pytest.mark.parametrize("reason", ["PartitionTimeLimit", "launch failed requeued held"])
def test_a_job_that_never_will_start_is_not_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(probing, "_STUCK_S", 0.2)
    how = cluster(hold=reason)
    found, _ = run(settings, how, wait_s=600.0)
    assert found["test job b"].text == f"job 1 is pending ({reason})"
    assert "will not happen by itself" in str(found["test job b"].remedy)
    assert how.cancelled == ["1"]


def test_an_interrupted_check_cleans_up(settings: Settings) -> None:
    how = cluster(edit=lambda script: script.replace("say end ok", "sleep 60"))
    one = probe(settings)
    looks = 0

    def interrupt(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt

    probes = Probing(settings, how, PYTHON, wait_s=30.0, say=print, pause=interrupt)
    with pytest.raises(KeyboardInterrupt), written_here(one.folders.values(), TOKEN):
        list(probes.run([one]))
    assert how.cancelled == ["1"]


def test_answers_are_the_marked_lines_of_a_log() -> None:
    assert answers("module loaded\n@node\tn1\n@code\t0 {\"a\": 1}\n@broken\n") == {
        "node": "n1", "code": '0 {"a": 1}', "broken": "",
    }  # fmt: skip
