"""How every end of a SLURM job is brought about for real.

Two kinds. *Programs* are argv lists for a job to run. *Blows* befall a job that somebody else submitted, whatever it
runs, so that they serve for plain sbatch as well as for jobs our own code submits:

    job = slurm.sbatch(*ROOMY, run=sleeps(300))
    recipes.reach_time_limit(slurm, job)
    assert slurm.ended(job).state == "TIMEOUT"

What was tried on Slurm 22.05 is said at each recipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from tests.slurm.client import Slurm
from tests.slurm.cluster.configuration import CLUSTER

SMALL = ("--cpus-per-task=1", "--mem=64M")
WHOLE_NODE = ("--exclusive", "--mem=1G")
"""Options: nothing else fits beside such a job, so that it preempts, or is preempted by, the next one."""


def sleeps(seconds: float) -> list[str]:
    """Ends with 0 after a while."""
    return ["sleep", str(seconds)]


def exits(code: int) -> list[str]:
    """FAILED with `code`:0."""
    return ["sh", "-c", f"echo about to exit with {code}; exit {code}"]


def dies_of(signal_name: str) -> list[str]:
    """FAILED with 0:SIGNAL, such as SEGV, as when a library crashes."""
    return ["sh", "-c", f"kill -{signal_name} $$"]


def eats(mebibytes: int) -> list[str]:
    """OUT_OF_MEMORY once it holds more than its --mem, when the cluster `kills_for_memory`."""
    hold = f"import time; held = bytearray(b'x') * ({mebibytes} << 20); print(len(held), flush=True); time.sleep(60)"
    return [sys.executable, "-c", hold]


def notes_term(seconds: float) -> list[str]:
    """On SIGTERM prints "asked to end", takes half a second to finish and exits with 0; otherwise sleeps."""
    body = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    print('asked to end', flush=True); time.sleep(0.5); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"print('ready', flush=True); time.sleep({seconds})\n"
    )
    return [sys.executable, "-c", body]


def cancel(slurm: Slurm, job: str) -> None:
    """CANCELLED, pending or running; a running job gets SIGTERM and after KillWait SIGKILL."""
    slurm.cancel(job)


def reach_time_limit(slurm: Slurm, job: str) -> None:
    """TIMEOUT within about half a minute: the running job's end is moved to now.

    A limit cannot be shorter than a minute, and the controller looks at limits every 30 s, so that waiting for the
    shortest limit takes 60 to 90 s; moving the end leaves the 30 s.
    """
    slurm.wait_state(job, "RUNNING")
    slurm.run("scontrol", "update", f"JobId={job}", f"EndTime={_in(2)}")


def warn_of_time_limit(slurm: Slurm, job: str, ahead_s: int) -> None:
    """The signal of --signal=B:TERM@AHEAD reaches the running job within half a minute, AHEAD seconds before its end.

    A job that exits with 0 then is COMPLETED, however little it had done.
    """
    slurm.wait_state(job, "RUNNING")
    slurm.run("scontrol", "update", f"JobId={job}", f"EndTime={_in(ahead_s)}")


def occupy(slurm: Slurm, node: str) -> str:
    """A job that has the whole node until it is cancelled, so that the next one waits for resources."""
    partition = {"node1": "cpu", "node2": "gpu"}[node]
    job = slurm.sbatch(f"--partition={partition}", *WHOLE_NODE, run=sleeps(600))
    slurm.wait_state(job, "RUNNING")
    return job


def miss_deadline(slurm: Slurm, job: str) -> None:
    """DEADLINE: a job that waits for resources (see `occupy`) is given a deadline it cannot meet any more.

    Jobs that are held, wait for a dependency or for --begin are not looked at until they could start.
    """
    slurm.wait_state(job, "PENDING")
    slurm.run("scontrol", "update", f"JobId={job}", f"Deadline={_in(2)}")


def preempt(slurm: Slurm, job: str, *, for_s: float = 2) -> str:
    """PREEMPTED (partition scavenge) or requeued (scavenge_requeue), by an urgent job that needs the whole node.

    Returns the urgent job, which ends after `for_s` seconds and lets a requeued one go on.
    """
    slurm.wait_state(job, "RUNNING")
    node = slurm.run("squeue", "-h", "-j", job, "-o", "%N")
    return slurm.sbatch("--partition=urgent", f"--nodelist={node}", *WHOLE_NODE, run=sleeps(for_s))


def requeue(slurm: Slurm, job: str) -> None:
    """A running job goes back to the queue and starts again after cred_expire (10 s in this cluster)."""
    slurm.wait_state(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)


@contextmanager
def power_cut(slurm: Slurm, node: str) -> Iterator[None]:
    """The node's daemon and all its processes die at once; afterwards it comes back.

    Its jobs end as NODE_FAIL, or are requeued unless --no-requeue, when the controller has not heard of it for
    SlurmdTimeout (20 s), or when it registers again without them, whichever comes first.
    """
    slurm.cluster.power_off(node)
    try:
        yield
    finally:
        slurm.start(node)


def _in(seconds: float) -> str:
    """A time from now, as scontrol reads it."""
    return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def forget(slurm: Slurm, job: str) -> None:
    """Leave no trace of a job that has ended: the controller forgets it by itself, accounting is made to."""
    slurm.ended(job)
    slurm.wait_for(lambda: not slurm.queued(job), what="the controller to forget the job")
    layout = slurm.cluster.layout
    statement = f"delete from {CLUSTER}_job_table where id_job = {int(job)}"  # noqa: S608 - a number
    address = ("--protocol=tcp", "--host=127.0.0.1", f"--port={layout.port('mariadbd')}", "--user=slurm")
    subprocess.run(
        ["mariadb", "--no-defaults", *address, "slurm_acct_db", f"--execute={statement}"],
        env={**os.environ, "MYSQL_PWD": layout.facts.database_password},
        check=True,
    )
    assert slurm.accounted(job) == []
