"""The `compute` section: where stages run when Dagster asks for them, and what each may use on a cluster.

Every field that reaches a job script or a scheduler's command line has a pattern; what does not match is refused when
the settings are read.
"""

from __future__ import annotations

from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from spatial_core.config.sections import Section


def _as_text(value: Any) -> Any:
    """TOML reads 04:00:00 without quotes as a time of day."""
    return value.isoformat() if isinstance(value, time) else value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,@:+-]*$", max_length=200)]
Memory = Annotated[str, StringConstraints(pattern=r"^[1-9]\d*[KMGT]?$")]
TimeLimit = Annotated[str, BeforeValidator(_as_text), StringConstraints(pattern=r"^(\d+-)?\d{1,6}(:\d{2}){0,2}$")]
Gpus = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][A-Za-z0-9_.-]*:)?[1-9]\d*|0)$")]
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:/@%+\[\]-]+)?$", max_length=200)]
# Options that would break what the platform promises: which cluster, user, folder, log, array, environment or end of a
# job it sees, and that sbatch answers with a job id. sbatch takes abbreviations, so those of these are refused too.
_OWN_OPTIONS = (
    "--array", "--chdir", "--clusters", "--comment", "--error", "--export", "--export-file", "--get-user-env", "--gid",
    "--help", "--job-name", "--no-requeue", "--open-mode", "--output", "--parsable", "--quiet", "--requeue", "--signal",
    "--test-only", "--uid", "--usage", "--version", "--wait", "--wrap",
    # These have keys of their own, by which messages and retries go.
    "--account", "--constraint", "--cpus-per-task", "--gres", "--mem", "--nodes", "--ntasks-per-node", "--partition",
    "--qos", "--time",
)  # fmt: skip


class ResourcesSection(Section):
    """What the jobs of one asset may use; a key left unset keeps the asset's default."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    partition: Name | None = Field(None, description="partition, or several separated by commas")
    account: Name | None = Field(None, description="account that is charged")
    qos: Name | None = Field(None, description="quality of service")
    constraint: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:&|()*\[\]-]+$")] | None = Field(
        None, description="features a node must have"
    )
    cpus: PositiveInt | None = Field(None, description="cores a task")
    mem: Memory | None = Field(None, description="memory a node, such as 48G")
    gpus: Gpus | None = Field(None, description="GPUs a node: a number, type:number, or 0 for none")
    time_limit: TimeLimit | None = Field(None, description="minutes, hours:minutes:seconds or days-hours")
    nodes: PositiveInt | None = Field(None, description="nodes a job; more than one only for training")
    max_parallel: PositiveInt | None = Field(None, description="tasks of one array that run at a time")
    processes_per_node: PositiveInt | None = Field(None, description="training processes a node; default its GPUs")
    extra: tuple[Option, ...] | None = Field(None, description="further sbatch options, each --name=value")

    @model_validator(mode="after")
    def _no_own_options(self) -> Self:
        for option in self.extra or ():
            if any(own.startswith(option.partition("=")[0]) for own in _OWN_OPTIONS):
                raise ValueError(f"extra option {option} is set by the platform itself")
        return self


class ComputeSection(Section):
    """Where stages run when Dagster asks for them."""

    profile: Literal["local", "slurm_login", "slurm_ssh"] = Field(
        "local", description="this machine, a SLURM cluster whose commands work here, or one that is reached over ssh"
    )
    isolation: Literal["in_process", "subprocess"] = Field(
        "subprocess", description="a stage runs in the Dagster run's own process or in a child that can be killed alone"
    )
    local_assets: tuple[str, ...] = Field((), description="assets made on this machine whatever the profile")

    partition: Name | None = Field(None, description="partition of assets that name none; default the cluster's")
    account: Name | None = Field(None, description="account of assets that name none")
    qos: Name | None = Field(None, description="quality of service of assets that name none")
    max_parallel: PositiveInt = Field(50, description="tasks of one job array that run at a time")
    resources: dict[str, ResourcesSection] = Field(
        default_factory=dict, description="asset -> what its jobs may use, as [compute.resources.ASSET]"
    )

    work_dir: Path | None = Field(
        None, description="folder of job scripts, logs and messages, the same path here and on the nodes; "
        "default <data_dir>/jobs"
    )  # fmt: skip
    python: Path | None = Field(None, description="interpreter on the nodes; default that of the environment")
    environment_dir: Path | None = Field(
        None, description="folder on the shared file system that holds one virtual environment a version; "
        "default: the environment Dagster runs in, which the nodes must see"
    )  # fmt: skip
    base_python: Path = Field(Path("python3"), description="interpreter a managed environment is built with")
    build_on: Literal["login", "node"] = Field(
        "login", description="where a managed environment is built: on the login node, which is likelier to have the "
        "network pip needs, or in a job"
    )  # fmt: skip
    project_dir: Path | None = Field(None, description="checkout a managed environment is built from; default this one")
    pip_options: tuple[str, ...] = Field((), description="further options of pip when an environment is built")
    setup: tuple[str, ...] = Field((), description="shell lines before the job's command, such as 'module load cuda'")
    container: tuple[str, ...] = Field(
        (), description="words put before the job's command, such as apptainer exec --nv /shared/image.sif"
    )
    scratch: str | None = Field(
        None,
        pattern=r"^[$A-Za-z0-9_./{}-]+$",
        description="node-local folder artifacts are written in before they are published, such as $SLURM_TMPDIR",
    )

    ssh_host: Name | None = Field(None, description="login node, for slurm_ssh")
    ssh_user: Name | None = Field(None, description="user there; default: as ssh decides")
    ssh_port: int = Field(22, ge=1, le=65535, description="port of its ssh server")
    ssh_key: Path | None = Field(None, description="private key file; default: as ssh decides")
    ssh_known_hosts: Path | None = Field(None, description="file of known host keys; default ~/.ssh/known_hosts")
    ssh_jump_host: Name | None = Field(None, description="host on the way, user@host:port")

    poll_s: PositiveFloat = Field(1.0, description="seconds between two looks at a cluster when something happens")
    poll_max_s: PositiveFloat = Field(30.0, description="seconds between two looks when nothing happens")
    end_signal_s: PositiveInt = Field(120, description="seconds before the time limit at which a job saves and resumes")
    retries: int = Field(
        0, ge=0, le=5, description="times a task that ran out of memory or time is sent again, with more of it"
    )
    retry_scale: float = Field(2.0, gt=1, le=8, description="how much more")
    vanished_after_s: PositiveFloat = Field(
        180.0, description="seconds after which a job that neither queue nor accounting knows counts as lost"
    )
    accounting_patience_s: PositiveFloat = Field(
        3600.0, description="seconds to wait for an accounting service that does not answer"
    )
    cost_per_gpu_hour: float = Field(0.0, ge=0, description="price in the reports; 0 = none is shown")
    cost_per_cpu_hour: float = Field(0.0, ge=0, description="price in the reports; 0 = none is shown")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.profile == "slurm_ssh" and self.ssh_host is None:
            raise ValueError("profile slurm_ssh needs compute.ssh_host")
        if self.poll_max_s < self.poll_s:
            raise ValueError(f"poll_max_s {self.poll_max_s:g} is below poll_s {self.poll_s:g}")
        return self
