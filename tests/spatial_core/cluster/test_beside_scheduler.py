"""The script beside the scheduler, run as it is run there, with commands that say what they are told to."""

from __future__ import annotations

import ast
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_core.cluster import beside_scheduler
from spatial_core.cluster.beside_scheduler import ACCOUNTING, ANSWER_BYTES, MESSAGE_BYTES, expand
from spatial_core.cluster.transport import ThisHost
from tests.spatial_core.cluster.conftest import FakeCommands

SCRIPT = Path(beside_scheduler.__file__)


def ask(**request: Any) -> dict[str, Any]:
    return ThisHost().ask(request)


def submit(folder: Path, **request: Any) -> dict[str, Any]:
    given = {"options": ["--mem=1G"], "files": {"job.sh": "#!/bin/sh\n", "tasks/0.json": "{}"}, "folders": ["logs"]}
    return ask(do="submit", folder=str(folder), **(given | request))


def poll(messages: Path, **tasks: int) -> dict[str, Any]:
    jobs: dict[str, Any] = {}
    for name, offset in tasks.items():
        job = name.strip("t").partition("_")[0]
        jobs.setdefault(job, {"messages": str(messages), "tasks": {}})["tasks"][name.strip("t")] = offset
    return ask(do="poll", jobs=jobs)


def row(name: str, state: str = "COMPLETED") -> str:
    return "|".join([name, state, *("x" for _ in ACCOUNTING[2:])]) + "\n"


def test_any_login_node_can_run_it() -> None:
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= sys.stdlib_module_names
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT.read_text()],
        input=b'{"do": "tail", "files": {}, "bytes": 1}', capture_output=True, check=True, cwd="/", env={"LC_ALL": "C"},
    )  # fmt: skip
    assert json.loads(done.stdout) == {"tails": {}}


def test_a_submission_is_private_and_whole_before_sbatch_runs(tmp_path: Path, commands: FakeCommands) -> None:
    folder = tmp_path / "jobs" / "spatial-x-1"
    (commands.folder / "sbatch").write_text(f"ls -R {folder} > {commands.folder}/seen\necho 123\n")
    assert submit(folder, files={"job.sh": "ä\n", "tasks/0.json": "{}"}) == {"job": "123"}
    seen = (commands.folder / "seen").read_text().split()
    assert {"job.sh", "0.json", "logs"} <= set(seen)
    assert commands.calls("sbatch") == [["--parsable", "--mem=1G", str(folder / "job.sh")]]
    assert (folder / "job.sh").read_text() == "ä\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()} == {0o700}


def test_sbatch_and_so_the_job_sees_no_secret(
    tmp_path: Path, commands: FakeCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_4f1c", "AWS_SECRET_ACCESS_KEY": "aws-9d27", "SBATCH_EXPORT": "ALL", "PGPASSWORD": "pw-7"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    commands.say("sbatch", "123\n")
    submit(tmp_path / "jobs" / "x")
    seen = commands.environment("sbatch")
    assert "SLURM_CONF=/etc/slurm/slurm.conf" in seen
    assert "PATH=" in seen
    assert not [name for name, value in secrets.items() if name in seen or value in seen]


@pytest.mark.parametrize("out", ["123\n", "123;cluster\n", "Welcome to the cluster!\n123\n"])
def test_the_job_id_is_found_in_what_sbatch_says(out: str, tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("sbatch", out)
    assert submit(tmp_path / "jobs" / "x") == {"job": "123"}


def test_a_refused_submission_leaves_nothing(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("sbatch", err="sbatch: error: invalid partition specified: nine", code=1)
    answer = submit(tmp_path / "jobs" / "x")
    assert answer == {"error": "sbatch: error: invalid partition specified: nine", "unclear": False}
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "unclear"),
    [
        ("Batch job submission failed: Socket timed out on send/recv operation", True),
        ("Batch job submission failed: Unable to contact slurm controller (receive failure)", True),
        ("Batch job submission failed: Zero Bytes were transmitted or received", True),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("Batch job submission failed: Slurm backup controller in standby mode", False),
        ("Batch job submission failed: Invalid account or account/partition combination specified", False),
    ],
)
def test_a_job_that_may_have_been_taken_keeps_its_folder(
    error: str, unclear: bool, tmp_path: Path, commands: FakeCommands
) -> None:
    commands.say("sbatch", err=f"sbatch: error: {error}", code=1)
    answer = submit(tmp_path / "jobs" / "x")
    assert answer["unclear"] is unclear
    assert (tmp_path / "jobs" / "x").exists() is unclear


@pytest.mark.parametrize("out", ["", "Usage: sbatch [OPTIONS]\n", "12a\n"])
def test_an_answer_without_a_job_id_is_unclear(out: str, tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("sbatch", out)
    answer = submit(tmp_path / "jobs" / "x")
    assert answer["unclear"] is True
    assert "sbatch ended with exit code 0" in answer["error"]


def test_sbatch_that_hangs_is_unclear(tmp_path: Path, commands: FakeCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.hang("sbatch")
    monkeypatch.setattr(beside_scheduler, "TIMEOUT_S", 0.2)
    folder = tmp_path / "jobs" / "x"
    answer = beside_scheduler.submit({"folder": str(folder), "files": {"job.sh": ""}, "folders": [], "options": []})
    assert answer == {"error": "sbatch did not answer in 0.2 s", "unclear": True}
    assert folder.exists()


def test_sbatch_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(tmp_path / "jobs" / "x") == {"error": "sbatch: No such file or directory", "unclear": False}


def test_files_that_cannot_be_written_are_an_answer(tmp_path: Path, commands: FakeCommands) -> None:
    answer = submit(tmp_path / "jobs" / "x", files={"a": "", "a/b": ""})
    assert "Not a directory" in answer["error"] or "File exists" in answer["error"]
    assert answer["unclear"] is False
    assert list((tmp_path / "jobs").iterdir()) == []
    assert commands.calls("sbatch") == []


def test_a_folder_is_never_used_twice(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("sbatch", "123\n")
    submit(tmp_path / "jobs" / "x")
    with pytest.raises(Exception, match="File exists"):
        submit(tmp_path / "jobs" / "x")
    assert len(commands.calls("sbatch")) == 1


def test_a_look_asks_for_all_jobs_once(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", "12_[1-2%5]|PENDING|Priority|\n12_0|RUNNING|None|node1\n13|PENDING|Resources|\n")
    answer = poll(tmp_path, t12_0=0, t12_1=0, t12_2=0, t13=0)
    assert answer["queue"][1] == ["12_0", "RUNNING", "None", "node1"]
    assert [call[call.index("-j") + 1] for call in commands.calls("squeue")] == ["12,13"]
    assert commands.calls("sacct") == [], "accounting is not asked while the queue knows everything"
    assert "SLURM_BITSTR_LEN=0" in commands.environment("squeue")


def test_accounting_is_asked_for_jobs_that_left_the_queue(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", "12_1|COMPLETING|None|node1\n13_0|RUNNING|None|node1\n")
    commands.say("sacct", row("12_0") + row("12_0.batch") + "torn|row\n" + row("12_1", "RUNNING"))
    answer = poll(tmp_path, t12_0=0, t12_1=0, t13_0=0)
    assert [call[call.index("-j") + 1] for call in commands.calls("sacct")] == ["12"]
    assert [found["JobID"] for found in answer["accounting"]] == ["12_0", "12_0.batch", "12_1"]
    assert answer["accounting"][0]["State"] == "COMPLETED"


def test_jobs_the_queue_has_forgotten_are_no_error(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    commands.say("sacct", row("12"))
    answer = poll(tmp_path, t12=0)
    assert "queue_error" not in answer
    assert [found["JobID"] for found in answer["accounting"]] == ["12"]


def test_a_silent_queue_is_reported_and_nothing_else_is_asked(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    commands.say("sacct", row("12", "FAILED"))
    answer = poll(tmp_path, t12=0)
    assert answer["queue_error"] == "slurm_load_jobs error: Unable to contact slurm controller"
    assert answer["accounting"] == []
    assert commands.calls("sacct") == []


def test_silent_accounting_is_reported(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("sacct", err="sacct: error: Problem talking to the database: Connection refused", code=1)
    answer = poll(tmp_path, t12=0)
    assert answer["accounting"] == []
    assert "Connection refused" in answer["accounting_error"]


def test_a_message_in_another_alphabet_stops_nothing(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", err="nicht verf\u00fcgbar", code=1)
    assert poll(tmp_path, t12=0)["queue_error"] == "nicht verf\u00fcgbar"


def running(commands: FakeCommands, *names: str) -> None:
    commands.say("squeue", "".join(f"{name}|RUNNING|None|node1\n" for name in names))


def test_only_new_whole_lines_travel(tmp_path: Path, commands: FakeCommands) -> None:
    running(commands, "12_3")
    file = tmp_path / "3.jsonl"
    assert poll(tmp_path, t12_3=0)["messages"] == {}, "no file yet"
    file.write_text("one\ntw")
    assert poll(tmp_path, t12_3=0)["messages"] == {"12_3": [4, "one\n"]}
    assert poll(tmp_path, t12_3=4)["messages"] == {}
    with file.open("a") as handle:
        handle.write("o\nthree\n")
    answer = poll(tmp_path, t12_3=4)
    assert (answer["messages"], answer["more"]) == ({"12_3": [14, "two\nthree\n"]}, [])


def test_a_file_that_shrank_is_read_from_its_beginning(tmp_path: Path, commands: FakeCommands) -> None:
    running(commands, "12")
    (tmp_path / "0.jsonl").write_text("new\n")
    assert poll(tmp_path, t12=1000)["messages"] == {"12": [4, "new\n"]}


def test_a_line_longer_than_what_is_read_at_a_time_arrives_whole(tmp_path: Path, commands: FakeCommands) -> None:
    running(commands, "12_0")
    line = "x" * (3 * MESSAGE_BYTES + 7) + "\n"
    (tmp_path / "0.jsonl").write_text(line)
    assert poll(tmp_path, t12_0=0)["messages"] == {"12_0": [len(line), line]}


def test_a_flood_arrives_in_parts_and_it_is_said_that_there_is_more(tmp_path: Path, commands: FakeCommands) -> None:
    running(commands, "12_0")
    lines = "".join(f"{number:09}\n" for number in range(3 * MESSAGE_BYTES // 10))
    (tmp_path / "0.jsonl").write_text(lines)
    got, offset, looks = "", 0, 0
    while True:
        answer = poll(tmp_path, t12_0=offset)
        offset, text = answer["messages"]["12_0"]
        got, looks = got + text, looks + 1
        if not answer["more"]:
            break
        assert answer["more"] == ["12_0"]
    assert (got, looks) == (lines, 4)


def test_many_floods_share_one_answer(tmp_path: Path, commands: FakeCommands) -> None:
    many = 2 * ANSWER_BYTES // MESSAGE_BYTES
    running(commands, *(f"12_{index}" for index in range(many)))
    for index in range(many):
        (tmp_path / f"{index}.jsonl").write_text("y" * (MESSAGE_BYTES - 1) + "\n")
    answer = poll(tmp_path, **{f"t12_{index}": 0 for index in range(many)})
    assert len(answer["messages"]) == many // 2
    assert len(answer["more"]) == many - many // 2
    assert not set(answer["more"]) & set(answer["messages"])


def test_files_of_tasks_that_wait_are_not_opened(tmp_path: Path, commands: FakeCommands) -> None:
    commands.say("squeue", "12_[0-1]|PENDING|Priority|\n")
    for index in range(2):
        (tmp_path / f"{index}.jsonl").write_text("said\n")
    answer = poll(tmp_path, t12_0=0, t12_1=5)
    assert answer["messages"] == {}, "one has not begun, of the other (requeued) everything is known"


def test_a_job_is_found_by_its_name_in_queue_or_accounting(commands: FakeCommands) -> None:
    commands.say("squeue", "14|12\n15|12\n")
    commands.say("sacct", "12_0\n12_[1-5]\n9\n")
    assert ask(do="find", name="spatial-x-1") == {"jobs": ["12", "9"]}
    assert "spatial-x-1" in commands.calls("squeue")[0]
    assert "spatial-x-1" in commands.calls("sacct")[0]


@pytest.mark.parametrize("silent", ["squeue", "sacct"])
def test_not_found_is_only_said_when_both_answered(silent: str, commands: FakeCommands) -> None:
    commands.say(silent, err="no answer", code=1)
    assert ask(do="find", name="spatial-x-1") == {"error": "no answer"}


def test_cancelling_what_has_ended_is_no_error(commands: FakeCommands) -> None:
    commands.say("scancel", err="scancel: error: Kill job error on job id 12: Invalid job id specified", code=1)
    assert ask(do="cancel", jobs=["12_0", "13"]) == {}
    assert commands.calls("scancel") == [["12_0", "13"]]
    commands.say("scancel", err="scancel: error: Unable to contact slurm controller", code=1)
    assert ask(do="cancel", jobs=["12"]) == {"error": "scancel: error: Unable to contact slurm controller"}


def test_the_end_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff" + b"x" * 100 + b"end")
    answer = ask(do="tail", files={"here": str(tmp_path / "log"), "not": str(tmp_path / "none")}, bytes=5)
    assert answer == {"tails": {"here": "xxend"}}


def test_only_job_folders_are_removed(tmp_path: Path) -> None:
    jobs, other = tmp_path / "jobs", tmp_path / "other"
    for folder in (jobs / "x" / "tasks", jobs / "y", other):
        folder.mkdir(parents=True)
    (jobs / "link").symlink_to(other)
    assert ask(do="remove", folder=str(jobs / "x"), inside=str(jobs)) == {}
    for folder in (other, jobs, jobs / ".." / "other", jobs / "link", jobs / "y" / ".."):
        assert "is not a job folder" in ask(do="remove", folder=str(folder), inside=str(jobs))["error"]
    assert sorted(path.name for path in jobs.iterdir()) == ["link", "y"]
    assert other.exists()


def indices(spans: list[tuple[int, int, int]]) -> tuple[str, set[int]]:
    texts, members = [], set()
    for first, length, step in spans:
        last = first + length * step
        texts.append(str(first) if not length else f"{first}-{last}" + (f":{step}" if step > 1 else ""))
        members |= set(range(first, last + 1, step)) if length else {first}
    return ",".join(texts), members


SPANS = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=8)


@given(st.integers(1, 10**7), SPANS, st.none() | st.integers(1, 99))
def test_a_row_stands_for_the_tasks_in_its_list(job: int, spans: list[tuple[int, int, int]], limit: int | None) -> None:
    text, members = indices(spans)
    name = f"{job}_[{text}{f'%{limit}' if limit else ''}]"
    assert set(expand(name)) == {f"{job}_{index}" for index in members}


def test_a_row_of_one_task_or_a_plain_job_stands_for_itself() -> None:
    assert expand("12_7") == ["12_7"]
    assert expand("12") == ["12"]
