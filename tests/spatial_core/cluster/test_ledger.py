"""The record of what was sent, used by several real processes at a time, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from spatial_core.cluster.ledger import KEPT_S, Ledger, SubmissionRecord, TaskRecord, now
from spatial_core.errors import ArtifactError

START = """
import os, sys, time
from pathlib import Path
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, now
folder = Path(sys.argv[1])
ledger = Ledger(folder)
def record(name, *identities):
    keys = tuple("k" + identity for identity in identities)
    return SubmissionRecord(name, "intermediates", str(folder / name), "run", keys, identities, now())
"""


def record(name: str, *identities: str, at: float = 0.0, run_id: str = "run") -> SubmissionRecord:
    keys = tuple(f"k{identity}" for identity in identities)
    return SubmissionRecord(name, "intermediates", f"/jobs/{name}", run_id, keys, identities, at or now())


def process(folder: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", START + code, str(folder)], text=True, stdout=subprocess.PIPE)


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    outs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outs


def test_an_intent_survives_the_death_of_who_had_it(tmp_path: Path) -> None:
    dying = process(tmp_path, "ledger.intend(record('a', 'i', 'j')); os.kill(os.getpid(), 9)")
    dying.communicate(timeout=60)
    assert dying.returncode == -signal.SIGKILL
    found = Ledger(tmp_path).find({"key": "j", "other": "x"})
    assert list(found) == ["key"]
    assert (found["key"].submission.name, found["key"].index, found["key"].submission.job) == ("a", 1, None)


def test_the_job_id_makes_task_ids(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    array, single = record("a", "i", "j"), record("b", "k")
    for submission in (array, single):
        ledger.intend(submission)
        ledger.submitted(submission, "12")
    found = ledger.find({"i": "i", "j": "j", "k": "k"})
    assert {key: task.task_id for key, task in found.items()} == {"i": "12_0", "j": "12_1", "k": "12"}
    assert {key: task.key for key, task in found.items()} == {"i": "ki", "j": "kj", "k": "kk"}


def test_a_submission_is_forgotten_when_all_its_tasks_are_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    submission = record("a", "i", "j", "k")
    ledger.intend(submission)
    ledger.settle([TaskRecord(submission, 1)])
    assert [task.index for left in ledger.submissions() for task in left.open_tasks] == [0, 2]
    assert ledger.find({"j": "j"}) == {}
    ledger.settle([TaskRecord(submission, 0), TaskRecord(submission, 2)])
    assert ledger.submissions() == []
    ledger.settle([TaskRecord(submission, 0)])
    assert ledger.submissions() == []


def test_settling_the_earlier_leaves_the_later_of_the_same_request(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    earlier, later = record("a", "i", at=now() - 9), record("b", "h", "i")
    ledger.intend(earlier)
    ledger.intend(later)
    assert ledger.find({"i": "i"})["i"].submission.name == "b"
    ledger.settle([TaskRecord(earlier, 0)])
    assert ledger.find({"i": "i"})["i"].submission.name == "b"
    ledger.withdraw(later)
    assert ledger.submissions() == []


def test_changes_are_made_to_what_is_recorded_not_to_what_was_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    read_before = record("a", "i", "j")
    ledger.intend(read_before)
    ledger.submitted(read_before, "12")
    ledger.settle([TaskRecord(read_before, 0)])
    adopted = ledger.adopt(read_before, "another")
    assert (adopted.job, adopted.run_id, adopted.settled) == ("12", "another", (0,))
    assert ledger.submission("a") == adopted


def test_a_job_that_exists_is_recorded_even_if_its_request_was_given_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    submission = record("a", "i")
    ledger.intend(submission)
    ledger.withdraw(submission)
    ledger.submitted(submission, "12")
    assert [found.job for found in ledger.submissions()] == ["12"]


def test_of_many_processes_one_submits(tmp_path: Path) -> None:
    code = """
while not (folder / "go").exists():
    time.sleep(0.001)
with ledger.sending():
    if not ledger.find({"k": "i"}):
        time.sleep(0.05)
        ledger.intend(record(f"by-{os.getpid()}", "i"))
        print("submitted")
"""
    rivals = [process(tmp_path, code) for _ in range(6)]
    (tmp_path / "go").touch()
    assert sorted(ended(rivals)) == [""] * 5 + ["submitted\n"]
    assert len(Ledger(tmp_path).submissions()) == 1


def test_tasks_settled_by_several_processes_at_once_are_all_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.intend(record("a", *map(str, range(40))))
    code = """
from spatial_core.cluster.ledger import TaskRecord
submission = ledger.submission("a")
while not (folder / "go").exists():
    time.sleep(0.001)
for index in range({first}, 39, 3):
    ledger.settle([TaskRecord(submission, index)])
"""
    settling = [process(tmp_path, code.replace("{first}", str(first))) for first in range(3)]
    (tmp_path / "go").touch()
    ended(settling)
    assert [task.index for left in ledger.submissions() for task in left.open_tasks] == [39]


def test_who_only_takes_note_does_not_wait_for_who_is_sending(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    submission = record("a", "i")
    ledger.intend(submission)
    with ledger.sending():
        ended([process(tmp_path, "ledger.settle(ledger.submission('a').open_tasks)")])
    assert ledger.submissions() == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    holder = process(tmp_path, "with ledger.sending():\n    print('held', flush=True)\n    time.sleep(60)")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiting = process(tmp_path, "with ledger.sending():\n    print('mine')")
    time.sleep(0.3)
    assert waiting.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    assert ended([waiting]) == ["mine\n"]
    holder.communicate(timeout=60)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"name": "a"})])
def test_a_damaged_record_is_never_passed_over(text: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.intend(record("a", "i"))
    (file,) = (tmp_path / "ledger").glob("*.json")
    file.write_text(text)
    with pytest.raises(ArtifactError, match="squeue --me --name a"):
        ledger.find({"k": "i"})


def test_a_job_folder_goes_some_time_after_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    submission = record("a", "i")
    ledger.retire(submission)
    assert ledger.submissions() == []
    assert ledger.retired() == []
    later = now() + KEPT_S + 1
    monkeypatch.setattr("spatial_core.cluster.ledger.now", lambda: later)
    (found,) = ledger.retired()
    assert (found.name, found.folder) == ("a", "/jobs/a")
    ledger.forget(found)
    ledger.forget(found)
    assert ledger.retired() == []
