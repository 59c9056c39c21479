"""Which interpreter jobs are started with, what an environment is named after, and which answers are refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster import beside_scheduler
from spatial_core.cluster.building import Builder, build_script, ready_python
from spatial_core.cluster.environment import STAMP, managed, node_python, verify_python
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ClusterError, ConfigError
from spatial_core.installed import installed, source_files

ROOT = Path(__file__).parents[3]


class ThisMachine:
    """A transport to this machine, in this process; remembers what it ran."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def ask(self, request: Any) -> dict[str, Any]:
        if request["do"] == "run":
            self.ran.append(request["argv"])
        answer: dict[str, Any] = getattr(beside_scheduler, request["do"])(dict(request))
        return answer


def scheduler(transport: ThisMachine | None = None) -> Scheduler:
    return Scheduler(transport or ThisMachine(), print, 1.0)


def settings_with(**compute: Any) -> Settings:
    return Settings(compute={"profile": "slurm_login", **compute}, base_dir=Path("/base"))  # type: ignore[arg-type]


def interpreter(folder: Path, *lines: str) -> Path:
    """An interpreter that says what it is told to."""
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


OURS = f"echo '{installed().to_json()}'"
OTHER = 'echo \'{"version": "0.0.1", "digest": "0123456789abcdef"}\''


def test_the_interpreter_is_the_named_one_or_the_managed_one_or_this() -> None:
    assert node_python(settings_with()) == Path(sys.executable)
    assert node_python(settings_with(python="envs/a/bin/python")) == Path("/base/envs/a/bin/python")
    both = settings_with(python="/a/bin/python", environment_dir="/envs")
    assert node_python(both) == Path("/a/bin/python") and managed(both) is None
    found = node_python(settings_with(environment_dir="/envs"))
    assert found.parts[-2:] == ("bin", "python") and found.is_relative_to("/envs")


def test_an_environment_is_named_after_everything_that_decides_what_is_in_it(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for path in [*source_files(ROOT), *(ROOT / name for name in ("pyproject.toml", "constraints.txt"))]:
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)

    def name(**compute: Any) -> str:
        found = managed(settings_with(environment_dir="/envs", project_dir=str(checkout), **compute))
        assert found is not None
        return found.folder.name

    first = name()
    here = managed(settings_with(environment_dir="/envs"))
    assert here is not None and here.folder.name == first and here.project == ROOT
    assert first.startswith(f"{installed().version}-")
    assert name(max_parallel=3, setup=["module load cuda"]) == first
    others = [name(pip_options=["--pre"]), name(base_python="python3.12")]
    for file in ("constraints.txt", "pyproject.toml"):
        with (checkout / file).open("a") as text:
            text.write("# changed\n")
        others.append(name())
    assert len({first, *others}) == 5


def test_an_environment_is_built_from_a_checkout_of_this_very_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pyproject.toml is not there.*compute.project_dir"):
        managed(settings_with(environment_dir="/envs", project_dir=str(tmp_path)))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    with pytest.raises(ConfigError, match=r"holds version 0\..* but this process runs 0\."):
        managed(settings_with(environment_dir="/envs", project_dir=str(tmp_path)))


def test_this_process_is_not_asked_for_its_own_code() -> None:
    transport = ThisMachine()
    assert ready_python(settings_with(), scheduler(transport), print) == Path(sys.executable)
    assert transport.ran == []


def test_a_named_interpreter_is_asked_every_time(tmp_path: Path) -> None:
    settings = settings_with(python=str(interpreter(tmp_path, OURS)))
    assert ready_python(settings, scheduler(), print) == tmp_path / "bin" / "python"
    interpreter(tmp_path, OTHER)
    with pytest.raises(
        ClusterError, match=r"has version 0\.0\.1 \(0123456789ab\), but this process runs .*install this"
    ):
        ready_python(settings, scheduler(), print)


def test_lines_of_setup_are_tried_only_when_the_plain_question_fails(tmp_path: Path) -> None:
    """They are for nodes: elsewhere they may fail, or wait for something that only a job gets."""
    python = interpreter(tmp_path, f'test -n "$LOADED" && {OURS} || {OTHER}')
    needed = settings_with(python=str(python), setup=["export LOADED=yes"])
    assert verify_python(needed, scheduler(), python) is None
    for lines in (["exit 3"], ["export LOADED=yes", "exit 3"]):
        with pytest.raises(ClusterError, match="has version"):
            verify_python(settings_with(python=str(python), setup=lines), scheduler(), python)
    absent = interpreter(tmp_path / "absent", "echo 'No module named spatial_core' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"has no spatial-embeddings .*; after compute.setup: .*no such module\); "):
        verify_python(settings_with(python=str(absent), setup=["echo no such module >&2; exit 1"]), scheduler(), absent)
    plain = interpreter(tmp_path / "plain", OURS)
    transport = ThisMachine()
    waits = settings_with(python=str(plain), setup=["sleep 3600"])
    assert verify_python(waits, scheduler(transport), plain) is None
    assert len(transport.ran) == 1


def test_an_interpreter_in_a_container_is_asked_through_it(tmp_path: Path) -> None:
    python = interpreter(tmp_path, f'test "$INSIDE" = "a b" && {OURS} || {OTHER}')
    inside = settings_with(python=str(python), container=["env", "INSIDE=a b"])
    assert verify_python(inside, scheduler(), python) is None
    with pytest.raises(ClusterError, match="has version"):
        verify_python(settings_with(python=str(python), container=["env"]), scheduler(), python)
    doubt = verify_python(settings_with(python=str(python), container=["no-such-runtime"]), scheduler(), python)
    assert doubt is not None and "no container beside the scheduler (" in doubt and "no-such-runtime" in doubt


def test_a_stamp_of_other_code_does_not_count(tmp_path: Path) -> None:
    settings = settings_with(environment_dir=str(tmp_path))
    environment = managed(settings)
    assert environment is not None
    builder = Builder(settings, scheduler(), print)
    assert not builder.is_built(environment)
    environment.folder.mkdir()
    for text in ("", "{", '{"version": "0.0.1", "digest": "0"}'):
        (environment.folder / STAMP).write_text(text)
        assert not builder.is_built(environment)
    (environment.folder / STAMP).write_text(environment.code.to_json())
    assert builder.is_built(environment)


def test_hostile_words_reach_the_build_as_arguments(tmp_path: Path) -> None:
    """Nothing of the settings is read by the shell but the lines of `setup`."""
    words = ["$(touch evil)", "a'b", "`id`", "; rm -rf x"]
    settings = load_settings(
        None,
        [f"compute.environment_dir={tmp_path / 'envs $HOME'}", f"compute.pip_options={words!r}"],
        {},
    )
    environment = managed(settings)
    assert environment is not None
    script = build_script(settings, environment, tmp_path / "job $(id)")
    (line,) = [line for line in script.splitlines() if " pip install " in line]
    ran = scheduler().run("bash", "-c", f"printf '%s\\n' {line}")
    assert ran.out.splitlines()[-5:] == [*words, "./source"]
    assert ran.out.splitlines()[0] == str(environment.python)
