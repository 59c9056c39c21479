"""The cluster does what the tests built on it rely on: every end of a job, for real, with plain sbatch.

How each end comes about is said in `tests.slurm.recipes`. What takes long is started once (`started`) and goes on while
other tests run: the time limit is looked at every 30 s, a requeued job waits 10 s, a lost node is noticed after 20 s.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import pytest

from tests.slurm import recipes
from tests.slurm.client import CommandFailed, Slurm


@dataclass(frozen=True)
class Started:
    """Jobs on node1 that take their time to end."""

    completed: str
    over_time: str
    warned: str
    requeued: str


@pytest.fixture(scope="module", autouse=True)
def started(slurm: Slurm) -> Started:
    """Send the slow ones on their way."""
    completed = slurm.sbatch(*recipes.SMALL, run=["sh", "-c", 'echo "on $SLURMD_NODENAME in $SLURM_TMPDIR"'])
    over_time = slurm.sbatch(*recipes.SMALL, "--time=5", run=recipes.sleeps(300))
    warned = slurm.sbatch(*recipes.SMALL, "--time=5", "--signal=B:TERM@60", run=recipes.notes_term(300))
    requeued = slurm.sbatch(*recipes.SMALL, "--requeue", "--open-mode=append", run=["sh", "-c", "date +%s; sleep 3"])
    recipes.reach_time_limit(slurm, over_time)
    slurm.wait_for(lambda: "ready" in slurm.log(warned), what="the job's first words")
    recipes.warn_of_time_limit(slurm, warned, 60)
    recipes.requeue(slurm, requeued)
    return Started(completed, over_time, warned, requeued)


def test_completed_with_a_row_a_log_and_node_local_scratch(slurm: Slurm, started: Started) -> None:
    row = slurm.ended(started.completed)
    assert (row.state, row.exit_code, row.nodes) == ("COMPLETED", "0:0", "node1")
    scratch = slurm.cluster.layout.scratch / "node1" / started.completed
    assert slurm.log(started.completed) == f"on node1 in {scratch}\n"
    slurm.wait_for(lambda: not scratch.exists(), what="the epilog")
    slurm.wait_for(lambda: slurm.ended(started.completed).requested_memory == "64M", what="the rest of the row")


def test_failed_with_its_exit_code_or_signal(slurm: Slurm) -> None:
    code = slurm.sbatch(*recipes.SMALL, run=recipes.exits(3))
    crash = slurm.sbatch(*recipes.SMALL, run=recipes.dies_of("SEGV"))
    assert (slurm.ended(code).state, slurm.ended(code).exit_code) == ("FAILED", "3:0")
    assert (slurm.ended(crash).state, slurm.ended(crash).exit_code) == ("FAILED", "0:11")
    assert slurm.log(code) == "about to exit with 3\n"


def test_cancelled_while_pending_and_while_running(slurm: Slurm) -> None:
    pending = slurm.sbatch(*recipes.SMALL, "--hold", run=recipes.sleeps(300))
    running = slurm.sbatch(*recipes.SMALL, run=recipes.notes_term(300))
    slurm.wait_for(lambda: "ready" in slurm.log(running), what="the job's first words")
    recipes.cancel(slurm, pending)
    recipes.cancel(slurm, running)
    assert slurm.ended(pending).state == "CANCELLED"
    assert slurm.ended(running).state == "CANCELLED"
    assert "asked to end" in slurm.log(running)


def test_deadline(slurm: Slurm) -> None:
    occupied = recipes.occupy(slurm, "node2")
    job = slurm.sbatch("--partition=gpu", *recipes.SMALL, "--time=1", run=recipes.sleeps(1))
    recipes.miss_deadline(slurm, job)
    assert slurm.ended(job).state == "DEADLINE"
    slurm.cancel(occupied)


def test_out_of_memory(slurm: Slurm) -> None:
    job = slurm.sbatch(*recipes.SMALL, run=recipes.eats(400))
    fits = slurm.sbatch("--mem=600M", run=["timeout", "2", *recipes.eats(400)])
    expected = ("OUT_OF_MEMORY", "0:125") if slurm.cluster.kills_for_memory else ("FAILED", "0:9")
    row = slurm.ended(job)
    assert (row.state, row.exit_code) == expected
    assert slurm.ended(fits).exit_code == "124:0", "with enough memory the same program lives until its timeout"


def test_an_array_keeps_to_its_limit(slurm: Slurm) -> None:
    marks = slurm.work / "marks"
    marks.mkdir(exist_ok=True)
    body = f"touch {marks}/$SLURM_ARRAY_TASK_ID; ls {marks} | wc -l; sleep 2; rm {marks}/$SLURM_ARRAY_TASK_ID; "
    body += "exit $(( SLURM_ARRAY_TASK_ID == 3 ))"
    job = slurm.sbatch(*recipes.SMALL, "--array=0-5%2", f"--output={slurm.work}/logs/%A_%a.out", run=["sh", "-c", body])
    ends = {task: slurm.ended(f"{job}_{task}").state for task in range(6)}
    assert ends == {task: "FAILED" if task == 3 else "COMPLETED" for task in range(6)}
    at_once = [int((slurm.work / "logs" / f"{job}_{task}.out").read_text()) for task in range(6)]
    assert max(at_once) == 2


def test_gpus_are_given_out(slurm: Slurm) -> None:
    body = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    one = slurm.sbatch("--partition=gpu", "--gpus=1", run=body)
    both = slurm.sbatch("--partition=gpu", "--gpus=h100:2", run=body)
    assert "gres/gpu=1" in slurm.ended(one).tres
    assert "gres/gpu=2" in slurm.ended(both).tres
    assert slurm.log(both) == "0,1\n"


def test_one_job_over_both_nodes(slurm: Slurm) -> None:
    job = slurm.sbatch(
        "--partition=both", "--nodes=2", "--ntasks=2", "--mem=64M", run=["srun", "sh", "-c", "echo $SLURMD_NODENAME"]
    )
    assert slurm.ended(job).state == "COMPLETED"
    assert sorted(slurm.log(job).split()) == ["node1", "node2"]


def test_urgent_preempts_by_cancelling_and_by_requeueing(slurm: Slurm) -> None:
    on_node2 = ("--nodelist=node2", *recipes.SMALL)
    cancelled = slurm.sbatch("--partition=scavenge", *on_node2, run=recipes.sleeps(300))
    requeued = slurm.sbatch(
        "--partition=scavenge_requeue", "--requeue", *on_node2, run=["sh", "-c", "sleep $((SLURM_RESTART_COUNT?1:300))"]
    )
    slurm.wait_state(requeued, "RUNNING")
    urgent = recipes.preempt(slurm, cancelled)
    assert slurm.ended(urgent).state == "COMPLETED"
    assert slurm.ended(cancelled).state == "PREEMPTED"
    assert slurm.ended(requeued).state == "COMPLETED"
    assert [row.state for row in slurm.accounted(requeued, every_run=True) if row.id == requeued] == [
        "PREEMPTED",
        "COMPLETED",
    ]


def test_a_lost_node(slurm: Slurm) -> None:
    lost = slurm.sbatch("--partition=gpu", "--no-requeue", *recipes.SMALL, run=recipes.sleeps(300))
    again = slurm.sbatch(
        "--partition=gpu", "--requeue", *recipes.SMALL, run=["sh", "-c", "sleep $((SLURM_RESTART_COUNT?1:300))"]
    )
    slurm.wait_state(lost, "RUNNING")
    slurm.wait_state(again, "RUNNING")
    with recipes.power_cut(slurm, "node2"):
        assert slurm.ended(lost).state == "NODE_FAIL"
    assert slurm.ended(again).state == "COMPLETED"
    assert [row.state for row in slurm.accounted(again, every_run=True) if row.id == again] == [
        "NODE_FAIL",
        "COMPLETED",
    ]


def test_over_its_time_limit(slurm: Slurm, started: Started) -> None:
    row = slurm.ended(started.over_time)
    assert (row.state, row.exit_code) == ("TIMEOUT", "0:0")


def test_warned_before_its_time_limit(slurm: Slurm, started: Started) -> None:
    row = slurm.ended(started.warned)
    assert (row.state, row.exit_code) == ("COMPLETED", "0:0")
    assert "asked to end" in slurm.log(started.warned)


def test_requeued_and_run_again(slurm: Slurm, started: Started) -> None:
    assert slurm.ended(started.requeued).state == "COMPLETED"
    log = slurm.log(started.requeued)
    assert "DUE TO JOB REQUEUE" in log
    first, second = (int(line) for line in log.splitlines() if line.isdigit())
    assert second > first


def test_jobs_go_on_while_the_controller_is_down(slurm: Slurm) -> None:
    job = slurm.sbatch(*recipes.SMALL, run=["sh", "-c", "sleep 2; echo done"])
    slurm.wait_state(job, "RUNNING")
    slurm.stop("slurmctld")
    with pytest.raises(CommandFailed, match="Unable to contact slurm controller"):
        slurm.jobs()
    slurm.wait_for(lambda: slurm.log(job) == "done\n", what="the job's last words")
    slurm.start("slurmctld")
    assert slurm.ended(job).state == "COMPLETED"


def test_accounting_catches_up_after_slurmdbd_was_down(slurm: Slurm) -> None:
    slurm.stop("slurmdbd")
    job = slurm.sbatch(*recipes.SMALL)
    slurm.wait_state(job, "COMPLETED")
    with pytest.raises(CommandFailed, match="Problem talking to the database"):
        slurm.accounted(job)
    slurm.start("slurmdbd")
    assert slurm.ended(job).state == "COMPLETED"


def test_the_login_node_by_ssh(slurm: Slurm) -> None:
    assert slurm.run(*slurm.ssh.argv("sinfo", "--version")).startswith("slurm")
    assert "node1" in slurm.run(*slurm.ssh.argv("sinfo", "-h", "-N", "-o", "%N"))
    slurm.ssh.known_hosts.rename(slurm.ssh.known_hosts.with_suffix(".away"))
    try:
        with pytest.raises(CommandFailed, match="Host key verification failed"):
            slurm.run(*slurm.ssh.argv("true"))
    finally:
        slurm.ssh.known_hosts.with_suffix(".away").rename(slurm.ssh.known_hosts)


def test_connections_end_with_sshd_but_not_what_runs_there(slurm: Slurm) -> None:
    mark = slurm.work / "session"
    command = slurm.ssh.argv("sh", "-c", f"'touch {mark}; sleep 300'")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as session:
        slurm.wait_for(mark.exists, what="the session's mark")
        slurm.stop("sshd", hard=True)
        assert session.wait(timeout=20) == 255
    left = slurm.cluster.login_processes()
    assert "sleep" in {process.name() for process in left}
    slurm.start("sshd")
    assert slurm.run(*slurm.ssh.argv("echo", "back")) == "back"
    for process in left:
        process.kill()
    slurm.wait_for(lambda: not slurm.cluster.login_processes(), what="an empty login node")


def test_a_frozen_controller_answers_when_thawed(slurm: Slurm) -> None:
    slurm.cluster.freeze("slurmctld")
    with pytest.raises(subprocess.TimeoutExpired):
        slurm.run("squeue", timeout_s=2)
    slurm.cluster.thaw("slurmctld")
    assert slurm.run("scontrol", "ping").endswith("is UP")


def test_what_a_test_breaks_is_healed(slurm: Slurm) -> None:
    slurm.run("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=broken by a test")
    slurm.stop("node2", "sshd")
    slurm.cluster.freeze("slurmdbd")
    assert slurm.cluster.node_troubles("node1")
    assert slurm.cluster.node_troubles("node2")
    slurm.heal()
    assert slurm.ended(slurm.sbatch("--partition=both", "--nodes=2", *recipes.SMALL)).state == "COMPLETED"
    assert slurm.run(*slurm.ssh.argv("echo", "back")) == "back"


def test_a_finished_job_is_forgotten_by_the_queue_but_not_by_accounting(slurm: Slurm, started: Started) -> None:
    slurm.wait_for(lambda: not slurm.queued(started.completed), 90, what="the controller to forget the job")
    assert slurm.ended(started.completed).state == "COMPLETED"
    assert slurm.state(started.completed) == "COMPLETED"
