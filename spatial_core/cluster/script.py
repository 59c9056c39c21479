"""What is handed to sbatch: one script, its options and the files of its tasks. Rendering submits nothing.

Several calls become the tasks of a job array, a single one a plain job. The script is the same for all tasks; what
differs lies in the task files. Options are an argument list that no shell reads, and every text that the script
contains is quoted, has a pattern in the settings, or is one of the user's own `setup` lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.cluster.resources import Resources, limit_seconds
from spatial_core.config.compute import ComputeSection
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.jobs.messages import pipes_environment
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task

# Keys are file names of the watched folders, which the sensors admit by a narrower pattern still.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_ASSET = re.compile(r"[a-z][a-z0-9_]{0,99}")
_PORTS = (20000, 20000)  # first, and how many: one for each job id


@dataclass(frozen=True)
class Submission:
    """What one sbatch call is given.

    Args:
        name: job name, unique: a submission whose answer was lost is found by it.
        folder: job folder, which must not exist yet.
        options: of sbatch.
        files: relative path -> text, written for the owner's eyes alone.
        keys: partition keys in the order of the tasks.
    """

    name: str
    folder: str
    options: tuple[str, ...]
    files: Mapping[str, str]
    keys: tuple[str, ...]

    def request(self) -> dict[str, Any]:
        """For `beside_scheduler`.

        Message files are made beforehand: a network file system may go on denying for a while a file that was looked
        for before it existed.
        """
        messages = {f"messages/{index}.jsonl": "" for index in range(len(self.keys))}
        return {
            "do": "submit",
            "folder": self.folder,
            "options": list(self.options),
            "files": {**self.files, **messages},
            "folders": ["logs"],
        }


def message_folder(folder: str) -> str:
    """Where the tasks of a job say how they fare, each in a file of its own."""
    return f"{folder}/messages"


def message_file(folder: str, index: int) -> str:
    """Where a task says how it fares."""
    return f"{message_folder(folder)}/{index}.jsonl"


def log_file(folder: str, index: int | str) -> str:
    """Output of a task; `%a` stands for each task of an array."""
    return f"{folder}/logs/{index}.log"


def render(
    asset: str,
    calls: Mapping[str, StageCall],
    resources: Resources,
    settings: Settings,
    *,
    name: str,
    python: Path,
    run_id: str,
    job_name: str = "__ASSET_JOB",
) -> Submission:
    """Render the job array for some partition keys of an asset, or the plain job for a single one.

    Args:
        asset: its name.
        calls: partition key (empty for an asset without partitions) -> stage call; all of one stage.
        resources: what each task may use.
        settings: where and how jobs run.
        name: unique job name.
        python: interpreter on the nodes.
        run_id: Dagster run that asks.
        job_name: its Dagster job.

    Raises:
        ClusterError: if the asset or a key has characters that no key has.
    """
    keys = tuple(calls)
    if not _ASSET.fullmatch(asset):
        raise ClusterError(f"asset name {asset!r} is not one")
    for key in keys:
        if key and not _KEY.fullmatch(key):
            raise ClusterError(f"partition key {key!r} of {asset} is refused: letters, digits, - and _ only")
    compute = settings.compute
    folder = f"{settings.jobs_dir}/{name}"
    (stage,) = {call.stage for call in calls.values()}
    files = {"job.sh": job_script(stage, resources, compute, folder, python)}
    for index, key in enumerate(keys):
        environment = pipes_environment(asset, key, run_id, job_name, message_file(folder, index))
        files[f"tasks/{index}.json"] = Task(calls[key], environment, compute.scratch, requeue=True).to_json()
    # B: to the batch shell, which is the stage's own process. Without it only job steps are told, and there are none.
    signal = end_signal(compute.end_signal_s, resources)
    options = (
        f"--job-name={name}",
        f"--comment=spatial {asset} {run_id}",
        f"--chdir={folder}",
        f"--output={log_file(folder.replace('%', '%%'), '%a' if len(keys) > 1 else 0)}",
        "--open-mode=append",
        "--export=ALL",  # of an environment that `beside_scheduler` has cleared of everything else
        "--requeue",
        *([f"--signal=B:{signal}"] if signal else []),
        *([f"--array=0-{len(keys) - 1}%{resources.max_parallel}"] if len(keys) > 1 else []),
        *resources.options(),
    )
    return Submission(name, folder, options, files, keys)


def end_signal(seconds: int, resources: Resources) -> str | None:
    """The signal that tells a job some time before its limit. It may come a minute early, so short jobs get none."""
    return f"TERM@{seconds}" if limit_seconds(resources.time_limit) >= 3 * (seconds + 60) else None


def job_script(stage: str, resources: Resources, compute: ComputeSection, folder: str, python: Path) -> str:
    """The script of a job folder: `setup`, then the stage in place of the shell."""
    task = f'{shlex.quote(folder)}/tasks/"${{SLURM_ARRAY_TASK_ID:-0}}".json'
    prefix = shlex.join(compute.container)
    job = f"-m spatial_core.jobs {shlex.quote(stage)} --task {task}"
    lines = [
        "#!/bin/bash",
        "# One task for each file in tasks/.",
        "set -eo pipefail",
        "umask 077",
        "export PYTHONUNBUFFERED=1",
        *compute.setup,
    ]
    if stage == "train" and (resources.nodes > 1 or resources.processes > 1):
        first, count = _PORTS
        lines += [
            "# One torchrun a node; they meet at the first, where SLURM itself reaches it, on a port of the job's own.",
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "address=$(scontrol show node \"$head\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
            f"port=$(({first} + SLURM_JOB_ID % {count}))",
            "# How long torchrun lets processes finish their epoch; 30 s unless told.",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={compute.end_signal_s}",
            "# srun answers SIGTERM by killing the processes: this shell passes it on to them itself and waits.",
            "trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
            _command("srun --kill-on-bad-exit=1", prefix, python)
            + f" -m torch.distributed.run --nnodes={resources.nodes} --nproc-per-node={resources.processes}"
            + ' --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="${address:-$head}:$port" '
            + f"{job} &",
            "step=$!",
            "code=0",
            'wait "$step" || code=$?',
            'while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done',
            'exit "$code"',
        ]
    else:
        # exec: signals for the batch shell are then signals for the stage.
        lines.append(f"{_command('exec', prefix, python)} {job}")
    return "\n".join(lines) + "\n"


def _command(*words: object) -> str:
    texts = [shlex.quote(str(word)) if isinstance(word, Path) else str(word) for word in words]
    return " ".join(text for text in texts if text)
