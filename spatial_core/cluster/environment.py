"""The Python environment that jobs run in, and proof that its code is the code of this process.

Three ways, the first that is set counts: the interpreter named by `compute.python`; a managed environment below
`compute.environment_dir`, one for each state of the project, which `building` makes; the environment Dagster runs in.
The first two are asked for their version and digest beside the scheduler before anything is submitted. That takes a
Python start and a pass over some 200 small files, 0.1 s, so no answer is remembered: one that was right an hour ago
says nothing of what somebody installed since. The third is this process's own interpreter, with the same code as long
as nodes see the same files; the cluster check asks it in a job.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from spatial_core.cluster.scheduler import Ran, Scheduler
from spatial_core.config.compute import ComputeSection
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError, ConfigError
from spatial_core.installed import PROJECT, Installed, installed, root_folder
from spatial_core.storage.digests import digest_json, sha256_file

STAMP = "spatial-environment.json"
PROJECT_FILES = ("pyproject.toml", "constraints.txt")
_SETUP_S = 20
_NOT_STARTED = (126, 127)  # exit codes by which a shell says that a command is not there or not executable


@dataclass(frozen=True)
class ManagedEnvironment:
    """A virtual environment that belongs to one state of the project.

    Args:
        folder: `<environment_dir>/<version>-<digest>`: that of the dependencies, of pip's options and of the code.
        project: checkout it is built from.
        code: version and digest that its interpreter has to name.
    """

    folder: Path
    project: Path
    code: Installed

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """The file that says it is finished; a folder without it is none."""
        return self.folder / STAMP


def managed(settings: Settings) -> ManagedEnvironment | None:
    """The managed environment of this code; None where the settings name none, or an interpreter.

    Raises:
        ConfigError: if there is no checkout to build it from, or its code is not that of this process.
    """
    compute = settings.compute
    if compute.python is not None or compute.environment_dir is None:
        return None
    code = installed()
    project = root_folder() if compute.project_dir is None else settings.absolute(compute.project_dir)
    missing = [name for name in PROJECT_FILES if not (project / name).is_file()]
    if missing:
        raise ConfigError(
            f"{project}: {missing[0]} is not there, so this is no checkout; a managed environment is built from one, "
            "which compute.project_dir names"
        )
    found = installed(project)
    if found != code:
        raise ConfigError(f"compute.project_dir {project} holds version {found}, but this process runs {code}")
    recipe = [sha256_file(project / name) for name in PROJECT_FILES]
    digest = digest_json([code.digest, *recipe, str(compute.base_python), list(compute.pip_options)])
    folder = settings.absolute(compute.environment_dir) / f"{code.version}-{digest[:12]}"
    return ManagedEnvironment(folder, project, code)


def node_python(settings: Settings) -> Path:
    """The interpreter that jobs are started with."""
    if settings.compute.python is not None:
        return settings.absolute(settings.compute.python)
    environment = managed(settings)
    # The name it was started by: resolved, the interpreter of a virtual environment is the one it was made from.
    return Path(sys.executable) if environment is None else environment.python


def asking_script(compute: ComputeSection, python: Path, *, plainly: bool = False) -> str:
    """Shell lines that print which code an interpreter has: as jobs find it, or plainly, without `compute.setup`."""
    prefix = f"{shlex.join(compute.container)} " if compute.container else ""
    # From the root folder, because `python -m` looks into the working folder first.
    asking = f"exec {prefix}{shlex.quote(str(python))} -m spatial_core.installed"
    return "\n".join(["set -eo pipefail", *(() if plainly else compute.setup), "cd /", asking]) + "\n"


def verify_python(settings: Settings, scheduler: Scheduler, python: Path) -> str | None:
    """Ask an interpreter beside the scheduler which code it has.

    Lines of `compute.setup` are meant for nodes and may fail or wait elsewhere, so they are tried only when the
    interpreter does not give the right answer without them.

    Returns:
        None when it is the code of this process. A line when there is no container runtime beside the scheduler, as
        on many login nodes: then only a job can tell, and `spatial cluster check` sends one.

    Raises:
        ClusterError: if it is other code, or no code at all; says what to do.
        ClusterUnreachable: if the cluster could not be asked.
    """
    compute = settings.compute
    ran = scheduler.run("bash", "-c", asking_script(compute, python, plainly=True))
    if ran.code in _NOT_STARTED and compute.container:
        return f"no container beside the scheduler ({ran.said[-200:]}), so what is in it was not checked"
    problem = disagreement(python, ran)
    if problem is not None and compute.setup:
        ran = scheduler.run("timeout", str(_SETUP_S), "bash", "-c", asking_script(compute, python))
        after = disagreement(python, ran)
        if after is None:
            return None
        problem = problem if after == problem else f"{problem}; after compute.setup: {after}"
    if problem is not None:
        raise ClusterError(f"{problem}; {remedy(settings, ran)}")
    return None


def disagreement(python: Path, ran: Ran) -> str | None:
    """What is wrong with an interpreter's answer, or None."""
    if ran.code and "No module named" in ran.said:
        return f"{python} has no {PROJECT} ({ran.said[-300:]})"
    if ran.code:
        return f"{python} could not be asked for its code ({ran.said[-300:]})"
    try:
        found = Installed.from_json(ran.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"{python} did not say which code it has, but {' '.join(ran.out.split())[:200]!r}"
    here = installed()
    return None if found == here else f"{python} has version {found}, but this process runs {here}"


def remedy(settings: Settings, ran: Ran) -> str:
    """What to do about an interpreter with other code or without, or about one that could not be asked."""
    compute = settings.compute
    if ran.code and "No module named" not in ran.said and (compute.setup or compute.container):
        return (
            "a job's command comes behind the lines of compute.setup and the words of compute.container: try them by "
            "hand in a shell there"
        )
    if compute.python is not None:
        return "install this checkout there, or unset compute.python and set compute.environment_dir to have one built"
    if compute.environment_dir is not None:
        return "delete its folder and run: spatial cluster check --build"
    return (
        "the nodes must see the environment Dagster runs in, at the same path; else set compute.environment_dir to a "
        "folder on the shared file system and run: spatial cluster check --build"
    )
