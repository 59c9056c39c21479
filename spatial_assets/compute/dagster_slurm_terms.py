"""Our settings, resources and scripts in dagster-slurm's terms, and its sbatch command in ours."""

from __future__ import annotations

import getpass
import shlex
from pathlib import Path
from typing import Any

from dagster_slurm import ComputeLauncher, SlurmQueueConfig, SlurmResource, SSHConnectionResource
from dagster_slurm.config.runtime import RuntimeVariant
from dagster_slurm.launchers import ExecutionPlan
from pydantic import PrivateAttr

from spatial_core.cluster.resources import Resources
from spatial_core.cluster.script import end_signal, job_script
from spatial_core.config.compute import ComputeSection
from spatial_core.config.settings import Settings

_LONG = {
    "-J": "--job-name",
    "-D": "--chdir",
    "-o": "--output",
    "-e": "--error",
    "-p": "--partition",
    "-t": "--time",
    "-c": "--cpus-per-task",
    "-N": "--nodes",
}


class StageLauncher(ComputeLauncher):
    """Renders the script of a job that becomes a stage; the payload is the stage's name, the work its job folder."""

    _compute: ComputeSection = PrivateAttr()
    _resources: Resources = PrivateAttr()

    @classmethod
    def of(cls, compute: ComputeSection, resources: Resources) -> StageLauncher:
        """A launcher for jobs with these settings and resources."""
        launcher = cls()
        launcher._compute, launcher._resources = compute, resources
        return launcher

    def prepare_execution(  # noqa: PLR0917 - dagster-slurm's signature
        self,
        payload_path: str,
        python_executable: str,
        working_dir: str,
        pipes_context: dict[str, str],
        extra_env: dict[str, str] | None = None,
        allocation_context: dict[str, Any] | None = None,
        activation_script: str | None = None,
    ) -> ExecutionPlan:
        """The job's script. Its environment, Pipes variables included, lies in its task file: nothing is exported."""
        script = job_script(payload_path, self._resources, self._compute, working_dir, Path(python_executable))
        return ExecutionPlan(RuntimeVariant.SHELL, script.splitlines(), {}, {"nodes": self._resources.nodes})


def slurm_resource(settings: Settings, resources: Resources) -> SlurmResource:
    """The cluster and a job's defaults as dagster-slurm models them.

    Of the ssh connection only the description is used; where sbatch works on this host, it describes this host.

    Raises:
        ValueError: if a value is refused.
    """
    compute = settings.compute
    ssh = SSHConnectionResource(
        host=compute.ssh_host or "localhost",
        port=compute.ssh_port,
        user=compute.ssh_user or getpass.getuser(),
        key_path=str(settings.absolute(compute.ssh_key)) if compute.ssh_key else None,
        known_hosts_file=str(settings.absolute(compute.ssh_known_hosts)) if compute.ssh_known_hosts else None,
    )
    queue = SlurmQueueConfig(
        partition=resources.partition or "",
        num_nodes=resources.nodes,
        time_limit=resources.time_limit,
        signal_before_timeout=end_signal(compute.end_signal_s, resources),
        cpus=resources.cpus,
        gpus_per_node=resources.gpu_count,
        mem=resources.mem,
        qos=resources.qos,
        account=resources.account,
    )
    return SlurmResource(
        ssh=ssh,
        queue=queue,
        remote_base=str(settings.jobs_dir),
        status_poll_interval_seconds=compute.poll_s,
        status_poll_max_interval_seconds=compute.poll_max_s,
    )


def overrides(resources: Resources, compute: ComputeSection) -> dict[str, Any]:
    """What one attempt asks for, as dagster-slurm's `extra_slurm_opts`.

    Memory is always named: dagster-slurm drops it when there are GPUs, unless it is given here. GPUs are given as text,
    so that they may have a type, and so that the number of nodes is kept with one GPU too.
    """
    return {
        "partition": resources.partition,
        "time_limit": resources.time_limit,
        "signal_before_timeout": end_signal(compute.end_signal_s, resources),
        "cpus_per_task": resources.cpus,
        "mem": resources.mem,
        "nodes": resources.nodes,
        "gpus_per_node": resources.gpus or 0,
        "qos": resources.qos,
        "account": resources.account,
    }


def spelled_out(command: str) -> list[str]:
    """The options of dagster-slurm's sbatch command with long names, as an argument list that no shell reads.

    `--error` is left out: the log takes both streams.
    """
    words = iter(shlex.split(command)[1:-1])
    options = [f"{_LONG[word]}={next(words)}" if word in _LONG else word for word in words]
    return [option for option in options if not option.startswith("--error=")]
