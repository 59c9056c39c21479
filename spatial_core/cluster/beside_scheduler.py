"""What runs on the machine that has the scheduler's commands: one request in, one answer out, both JSON.

Sent as text to whatever Python 3 is there (so: standard library only, Python 3.6 syntax, no import of this project), on
this host or over ssh. A request costs one process and one round trip however many jobs and files it is about.

Requests, by `do`:

* `submit`: make the private folder, write the files, run sbatch -> `{"job": "123"}`.
* `poll`: queue rows and, for the tasks no longer queued, accounting rows, and what is new in message files.
* `find`: job ids of a job name, from queue and accounting.
* `cancel`: scancel; `tail`: last bytes of files; `remove`: delete a job folder; `run`: one command of the check.

A scheduler that does not answer is reported as such (`queue_error`, `accounting_error`), never guessed about.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, List, Optional, Tuple

Json = Dict[str, Any]

# A job sees of the submitter's environment what finds programs, and nothing else: tokens and passwords stay here.
PASSED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "SLURM_CONF", "LD_LIBRARY_PATH", "BASH_ENV", "TZ")
PASSED_PREFIXES = ("LC_", "MODULE", "LMOD", "BASH_FUNC_", "__LMOD", "XDG_RUNTIME")
ACCOUNTING = (
    "JobID", "State", "ExitCode", "ElapsedRaw", "TotalCPU", "CPUTimeRAW", "MaxRSS", "NodeList", "AllocTRES", "ReqMem",
    "Submit", "Start", "End", "Partition", "JobName",
)  # fmt: skip
TIMEOUT_S = 50
MESSAGE_BYTES = 1 << 16  # of one task and poll; the rest comes with the next poll
ANSWER_BYTES = 1 << 20
# After these words of sbatch the controller may have taken the job all the same.
UNCLEAR = re.compile("timed out|(receive|send|shutdown) failure|Zero Bytes were transmitted", re.IGNORECASE)
RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def environment() -> "Dict[str, str]":
    """The part of this process's environment that scheduler commands, and so jobs, may see."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED or any(name.startswith(prefix) for prefix in PASSED_PREFIXES)
    }
    kept["SLURM_BITSTR_LEN"] = "0"  # task lists of arrays in full
    return kept


def command(argv: "List[str]", text: "Optional[str]" = None) -> "Tuple[int, str, str]":
    """Run a command; returns exit code, stdout and stderr. One that is missing or hangs is an exit code too."""
    try:
        done = subprocess.run(
            argv,
            input=(text or "").encode("utf-8"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            env=environment(),
            check=False,
        )
    except OSError as error:
        return 127, "", f"{argv[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, "", f"{argv[0]} did not answer in {TIMEOUT_S} s"
    # Whatever the locale says: the default of an ASCII locale would stop at the first accent in a message.
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip()


def submit(request: Json) -> Json:
    """Write a job folder that did not exist before and hand it to sbatch."""
    folder = request["folder"]
    os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
    os.mkdir(folder, 0o700)
    try:
        for name, text in request["files"].items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
                handle.write(text)
        for name in request["folders"]:
            os.makedirs(os.path.join(folder, name), mode=0o700, exist_ok=True)
    except OSError as fault:
        shutil.rmtree(folder, ignore_errors=True)
        return {"error": str(fault), "unclear": False}
    code, out, error = command(["sbatch", "--parsable"] + request["options"] + [os.path.join(folder, "job.sh")])
    job = out.strip().rpartition("\n")[2].partition(";")[0]
    if not code and job.isdigit():
        return {"job": job}
    # A job that was taken although the answer did not arrive needs its folder.
    unclear = code in (0, 124) or UNCLEAR.search(error) is not None
    if not unclear:
        shutil.rmtree(folder, ignore_errors=True)
    return {"error": error or f"sbatch ended with exit code {code} and said {out[:200]!r}", "unclear": unclear}


def poll(request: Json) -> Json:
    """The state of jobs, and new messages of their tasks.

    `jobs` maps a job id to its folder of message files (null if they are of no interest) and to its tasks, each with
    the bytes of its messages that are known.
    """
    answer: Json = {"queue": [], "accounting": [], "messages": {}, "more": []}
    jobs = request["jobs"]
    code, out, error = command(["squeue", "-h", "-j", ",".join(jobs), "-o", "%i|%T|%r|%N"])
    if code and "Invalid job id" not in error:
        answer["queue_error"] = error or f"squeue ended with exit code {code}"
        return answer
    answer["queue"] = [line.split("|") for line in out.splitlines() if line.count("|") >= 3]
    queued = {name: row[1] for row in answer["queue"] for name in expand(row[0])}
    ended = sorted(job for job, watched in jobs.items() if any(name not in queued for name in watched["tasks"]))
    if ended:
        answer["accounting"], problem = accounting(ended)
        if problem:
            answer["accounting_error"] = problem
    # Messages last: those of a task that accounting has the end of are then complete.
    size = 0
    for watched in jobs.values():
        for name, offset in watched["tasks"].items() if watched["messages"] else ():
            if queued.get(name) == "PENDING" and not offset:
                continue
            path = os.path.join(watched["messages"], (name.partition("_")[2] or "0") + ".jsonl")
            if size >= ANSWER_BYTES:
                answer["more"].append(name)
                continue
            found, more = new_lines(path, offset)
            if found:
                answer["messages"][name] = found
                size += len(found[1])
            if more:
                answer["more"].append(name)
    return answer


def expand(name: str) -> "List[str]":
    """Tasks of a row: `12_[3-5,9%2]` stands for 12_3, 12_4, 12_5 and 12_9."""
    job, bracket, rest = name.partition("_[")
    if not bracket:
        return [name]
    names = []
    for first, last, step in RANGE.findall(rest.partition("%")[0]):
        names += [f"{job}_{index}" for index in range(int(first), int(last or first) + 1, int(step or 1))]
    return names


def accounting(jobs: "List[str]") -> "Tuple[List[Json], Optional[str]]":
    """Accounting rows of jobs, a dict each, those of attempts before a requeue too; and what went wrong, or None."""
    code, out, error = command(["sacct", "-n", "-P", "-D", "-j", ",".join(jobs), "--format=" + ",".join(ACCOUNTING)])
    if code:
        return [], error or f"sacct ended with exit code {code}"
    rows = [line.split("|") for line in out.splitlines()]
    return [dict(zip(ACCOUNTING, row)) for row in rows if len(row) == len(ACCOUNTING)], None


def new_lines(path: str, offset: int) -> "Tuple[Optional[List[Any]], bool]":
    """[new offset, text] of whole lines behind an offset, None when there are none; and whether there are more."""
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < offset:
                offset = 0
            handle.seek(offset)
            data = handle.read(MESSAGE_BYTES)
            while data and b"\n" not in data:
                further = handle.read(MESSAGE_BYTES)
                if not further:
                    return None, False
                data += further
    except FileNotFoundError:
        return None, False
    whole = data.rfind(b"\n") + 1
    text = data[:whole].decode("utf-8", "replace")
    return ([offset + whole, text] if whole else None), offset + len(data) < size


def find(request: Json) -> Json:
    """Job ids of a job name: a submission whose answer was lost is found by the name it was given."""
    code, out, error = command(["squeue", "-h", "-n", request["name"], "-o", "%A|%F"])
    if code:
        return {"error": error}
    jobs = {line.split("|")[1] for line in out.splitlines()}
    code, out, error = command(
        ["sacct", "-n", "-P", "-X", "--name", request["name"], "-S", "now-30days", "--format=JobID"]
    )
    if code:
        return {"error": error}
    jobs.update(line.split("_")[0].split(".")[0] for line in out.splitlines() if line)
    return {"jobs": sorted(jobs)}


def cancel(request: Json) -> Json:
    """Cancel jobs or single tasks; one that has ended already is no error."""
    code, _, error = command(["scancel"] + request["jobs"])
    return {"error": error} if code and "Invalid job id" not in error else {}


def tail(request: Json) -> Json:
    """The last bytes of files that exist."""
    found = {}
    for name, path in request["files"].items():
        try:
            with open(path, "rb") as handle:
                handle.seek(max(0, os.fstat(handle.fileno()).st_size - request["bytes"]))
                found[name] = handle.read().decode("utf-8", "replace")
        except FileNotFoundError:
            continue
    return {"tails": found}


def remove(request: Json) -> Json:
    """Delete a job folder: only one that lies directly in the folder of jobs."""
    folder = os.path.realpath(request["folder"])
    if os.path.dirname(folder) != os.path.realpath(request["inside"]):
        return {"error": f"{folder} is not a job folder"}
    shutil.rmtree(folder, ignore_errors=True)
    return {}


def run(request: Json) -> Json:
    """One command, for the cluster check."""
    code, out, error = command(request["argv"], request.get("text"))
    return {"code": code, "out": out, "err": error}


def main() -> None:
    """Answer the request on standard input."""
    actions = {f.__name__: f for f in (submit, poll, find, cancel, tail, remove, run)}
    request = json.load(sys.stdin)
    sys.stdout.write(json.dumps(actions[request["do"]](request)))


if __name__ == "__main__":
    main()
