"""Submitting to and looking at a scheduler that answers as it is told, and sometimes not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from spatial_core.cluster.scheduler import Scheduler, UnclearSubmission
from spatial_core.cluster.script import Submission
from spatial_core.cluster.transport import NotConnected
from spatial_core.errors import ClusterError, ClusterUnreachable

SUBMISSION = Submission("spatial-x-1", "/jobs/spatial-x-1", ("--mem=1G",), {"job.sh": ""}, ("0201",))
PATIENCE_S = 600.0
Answer = dict[str, Any] | Exception


class Script:
    """A transport with prepared answers, and a clock that only `pause` moves."""

    def __init__(self, *answers: Answer | Callable[[], Answer], last: Answer | None = None) -> None:
        self.answers = list(answers)
        self.last = last
        self.asked: list[Mapping[str, Any]] = []
        self.now = 0.0
        self.warnings: list[str] = []
        self.scheduler = Scheduler(self, self.warnings.append, PATIENCE_S, pause=self.pause, clock=lambda: self.now)

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        answer = self.answers.pop(0) if self.answers else self.last
        assert answer is not None, f"nobody prepared an answer to {request}"
        answer = answer() if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def did(self) -> list[str]:
        return [request["do"] for request in self.asked]


AWAY = {
    "error": "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "unclear": False,
}


def test_a_submission_is_one_request() -> None:
    script = Script({"job": "12"})
    assert script.scheduler.submit(SUBMISSION) == "12"
    assert script.asked == [SUBMISSION.request()]


def test_a_refusal_is_sbatchs_own_words() -> None:
    script = Script({"error": "sbatch: error: invalid partition specified: nine", "unclear": False})
    with pytest.raises(ClusterError, match=r"^the job was refused: invalid partition specified: nine$"):
        script.scheduler.submit(SUBMISSION)
    assert script.did == ["submit"]


@pytest.mark.parametrize("away", [AWAY, NotConnected("login: no ssh connection")])
def test_a_cluster_that_is_away_is_waited_for(away: Answer) -> None:
    script = Script(*[away] * 12, {"job": "12"})
    assert script.scheduler.submit(SUBMISSION) == "12"
    assert script.now == 60
    assert len(script.warnings) == 1
    assert "does not take jobs now" in script.warnings[0]


@pytest.mark.parametrize("away", [AWAY, NotConnected("login: no ssh connection")])
def test_but_not_for_ever(away: Answer) -> None:
    script = Script(last=away)
    with pytest.raises(ClusterError, match=r"connect"):
        script.scheduler.submit(SUBMISSION)
    assert PATIENCE_S < script.now < PATIENCE_S + 10
    assert set(script.did) == {"submit"}


UNCLEAR = {"error": "sbatch: error: Socket timed out on send/recv operation", "unclear": True}
LOST = ClusterUnreachable("ssh connection lost during 'submit'")


@pytest.mark.parametrize("lost", [UNCLEAR, LOST])
def test_after_an_unclear_answer_the_job_is_looked_for_never_sent_again(lost: Answer) -> None:
    script = Script(lost, {"jobs": []}, {"error": "sacct: no"}, LOST, {"jobs": ["12"]})
    assert script.scheduler.submit(SUBMISSION) == "12"
    assert script.did == ["submit", "find", "find", "find", "find"]
    assert {request["name"] for request in script.asked[1:]} == {"spatial-x-1"}


@pytest.mark.parametrize("lost", [UNCLEAR, LOST])
def test_a_job_that_cannot_be_found_stays_unclear(lost: Answer) -> None:
    script = Script(lost, last={"jobs": []})
    with pytest.raises(UnclearSubmission, match="not known whether job spatial-x-1 was taken"):
        script.scheduler.submit(SUBMISSION)
    assert script.did.count("submit") == 1
    assert 20 < script.now < 30


def test_only_a_scheduler_that_answers_has_not_found_it() -> None:
    script = Script(UNCLEAR, *[{"error": "squeue: Unable to contact slurm controller"}] * 60, {"jobs": ["12"]})
    assert script.scheduler.submit(SUBMISSION) == "12"
    assert script.now == 120


def test_an_unclear_submission_is_not_looked_for_for_ever() -> None:
    script = Script(UNCLEAR, last=LOST)
    with pytest.raises(UnclearSubmission):
        script.scheduler.submit(SUBMISSION)
    assert PATIENCE_S < script.now < PATIENCE_S + 10


def answer(**given: Any) -> dict[str, Any]:
    return {"queue": [], "accounting": [], "messages": {}, "more": []} | given


def test_a_look_is_one_small_request() -> None:
    script = Script(answer())
    script.scheduler.look({"12_0": ("/a/messages", 7), "13": ("/b/messages", 0), "12_5": ("/a/messages", 0)})
    assert script.asked == [
        {
            "do": "poll",
            "jobs": {
                "12": {"messages": "/a/messages", "tasks": {"12_0": 7, "12_5": 0}},
                "13": {"messages": "/b/messages", "tasks": {"13": 0}},
            },
        }
    ]


def test_a_look_tells_tasks_apart() -> None:
    rows = [
        ["12_[1,3-4%2]", "PENDING", "Priority", ""],
        ["12_0", "RUNNING", "None", "node1"],
        ["14", "RUNNING", "", ""],
    ]
    accounting = [
        {"JobID": "12_2", "State": "CANCELLED by 0", "Submit": "s"},
        {"JobID": "12_2.batch", "State": "CANCELLED"},
        {"JobID": "12_2.0", "State": "CANCELLED"},
        {"JobID": "15_[0-1]", "State": "PENDING", "Submit": "s"},
    ]
    said = answer(queue=rows, accounting=accounting, messages={"12_0": [5, "one\n"]}, more=["12_0"])
    tasks: dict[str, tuple[str | None, int]] = {f"12_{index}": ("/a/messages", 0) for index in range(4)}
    look = Script(said).scheduler.look(tasks)
    assert {name: row.state for name, row in look.queue.items()} == {
        "12_0": "RUNNING",
        "12_1": "PENDING",
        "12_3": "PENDING",
    }
    assert look.queue["12_1"].reason == "Priority"
    assert look.accounts["12_2"].state == "CANCELLED"
    assert [step["JobID"] for step in look.accounts["12_2"].steps] == ["12_2.batch", "12_2.0"]
    assert look.accounts["15_1"].state == "PENDING"
    assert look.lines == {"12_0": (5, "one\n")}
    assert look.more == {"12_0"}
    assert look.silent is None


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)], ids=["oldest first", "newest first"])
def test_attempts_before_a_requeue_are_told_from_the_last(order: tuple[int, ...]) -> None:
    attempts = [
        ("2025-12-31T09:00:00", "FAILED", "somebody else's job of that number"),
        ("2026-01-01T09:00:00", "REQUEUED", "ours"),
        ("2026-01-01T10:00:00", "PREEMPTED", "ours"),
        ("2026-01-01T11:00:00", "COMPLETED", "ours"),
    ]
    accounting = []
    for submitted, state, name in (attempts[place] for place in order):
        accounting.append({"JobID": "12", "State": state, "Submit": submitted, "JobName": name})
        accounting.append({"JobID": "12.batch", "State": state, "Submit": submitted, "JobName": "batch"})
    last = Script(answer(queue=[], accounting=accounting)).scheduler.look({"12": (None, 0)}).accounts["12"]
    assert (last.state, [attempt.state for attempt in last.earlier]) == ("COMPLETED", ["REQUEUED", "PREEMPTED"])
    for attempt in (last, *last.earlier):
        assert [step["State"] for step in attempt.steps] == [attempt.state]


@pytest.mark.parametrize("which", ["queue", "accounting"])
def test_silence_is_handed_on(which: str) -> None:
    look = Script(answer(**{f"{which}_error": "no answer"})).scheduler.look({"12": ("/a", 0)})
    assert getattr(look, f"{which}_silent") == look.silent == "no answer"


def test_nothing_is_cancelled_without_asking_for_it() -> None:
    script = Script({}, {"error": "scancel: no"})
    script.scheduler.cancel([])
    assert script.asked == []
    script.scheduler.cancel(["12_1", "12_0", "12_1"])
    assert script.asked == [{"do": "cancel", "jobs": ["12_0", "12_1"]}]
    with pytest.raises(ClusterError, match="scancel 13: scancel: no"):
        script.scheduler.cancel(["13"])


def test_a_folder_that_is_not_removed_is_told() -> None:
    with pytest.raises(ClusterError, match="not a job folder"):
        Script({"error": "/etc is not a job folder"}).scheduler.remove("/etc", "/jobs")


def test_logs_that_exist() -> None:
    script = Script({"tails": {"0201": "end"}})
    assert script.scheduler.tails({"0201": "/a", "0202": "/b"}) == {"0201": "end"}
