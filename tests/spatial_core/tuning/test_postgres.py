"""The embedded PostgreSQL: who gets in, where its password lies, and that it ends with its last user."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from spatial_core.config.tuning import TuningSection
from spatial_core.errors import ConfigError
from spatial_core.tuning.postgres import embedded_database
from spatial_core.tuning.secrets import read_secret

USER = """
import sys, time
from pathlib import Path
from spatial_core.config.tuning import TuningSection
from spatial_core.tuning.postgres import embedded_database
with embedded_database(Path(sys.argv[1]), TuningSection()):
    print("up", flush=True)
    sys.stdin.read()
"""


def servers(folder: Path) -> list[psutil.Process]:
    """The folder's server and its keeper, whether or not the one still has the other."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            of_keeper = str(folder / "postgres") in (process.info["cmdline"] or [])
            if of_keeper or (process.name() == "postgres" and process.cwd() == str(folder / "postgres")):
                found.append(process)
    return found


def until(reached: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(url.replace("+psycopg", ""), connect_timeout=5)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "tuning"
    until(lambda: not servers(tmp_path / "tuning"), "a server outlived its users")


@pytest.fixture
def user(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the server until its standard input closes."""
    command = [sys.executable, "-c", USER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def test_it_listens_on_loopback_and_wants_the_password(folder: Path) -> None:
    with embedded_database(folder, TuningSection()) as file:
        url = read_secret(file)
        parts = urlsplit(url)
        assert (parts.hostname, parts.username, parts.path) == ("127.0.0.1", "tuning", "/tuning")
        assert len(parts.password or "") >= 40
        with connect(url) as connection:
            row = connection.execute("select current_setting('server_version'), rolsuper, rolcreatedb from pg_roles "
                                     "where rolname = current_user").fetchone()  # fmt: skip
            assert row is not None
            assert row[0].startswith("18.")
            assert row[1:] == (False, False), "the role that workers use has no privileges"
            assert connection.execute("show listen_addresses").fetchone() == ("127.0.0.1",)
        for wrong in (
            url.replace(str(parts.password), "x"),
            url.replace(f":{parts.password}", ""),
            url.replace("tuning:", "postgres:"),
            url.replace("/tuning", "/postgres"),
        ):
            with pytest.raises(psycopg.OperationalError, match=r"authentication failed|no password|no pg_hba"):
                connect(wrong)
        listening = {c.laddr.ip for server in servers(folder) for c in server.net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        assert not list(folder.rglob("*.s.PGSQL*"))


def test_the_password_lies_in_one_file_that_the_owner_alone_can_read(folder: Path) -> None:
    with embedded_database(folder, TuningSection()) as file:
        password = str(urlsplit(read_secret(file)).password).encode()
        with connect(read_secret(file)) as connection:
            connection.execute("select 1")
        holders = [path for path in folder.rglob("*") if path.is_file() and password in path.read_bytes()]
        assert holders == [file]
        assert file.stat().st_mode & 0o777 == 0o600
        assert (folder / "postgres").stat().st_mode & 0o777 == 0o700
        for process in psutil.process_iter(["pid"]):
            line = Path(f"/proc/{process.pid}/cmdline")
            assert password not in (line.read_bytes() if line.exists() else b"")


def test_it_keeps_data_port_and_password(folder: Path) -> None:
    with embedded_database(folder, TuningSection()) as file:
        first, changed = read_secret(file), file.stat().st_mtime_ns
        with connect(first) as connection:
            connection.execute("create table kept as select 42 as answer")
    with embedded_database(folder, TuningSection()) as file, connect(read_secret(file)) as connection:
        assert (read_secret(file), file.stat().st_mtime_ns) == (first, changed)
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_it_moves_when_its_port_is_taken_and_takes_a_new_password_when_that_was_lost(folder: Path) -> None:
    with embedded_database(folder, TuningSection()) as file:
        first = read_secret(file)
    until(lambda: not servers(folder), "the server outlived its user")
    file.unlink()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", urlsplit(first).port or 0))
        taken.listen()
        with embedded_database(folder, TuningSection()) as file, connect(read_secret(file)):
            assert urlsplit(read_secret(file)).port != urlsplit(first).port
            assert urlsplit(read_secret(file)).password != urlsplit(first).password


def test_several_users_share_it_and_the_last_one_ends_it(folder: Path, user: subprocess.Popen[str]) -> None:
    with embedded_database(folder, TuningSection()) as file:
        pids = {process.pid for process in servers(folder)}
        user.kill()
        user.wait()
        time.sleep(0.5)
        with connect(read_secret(file)) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        assert {process.pid for process in servers(folder)} == pids
    until(lambda: not servers(folder), "the server outlived its last user")


def test_it_ends_with_a_user_that_is_killed(folder: Path, user: subprocess.Popen[str]) -> None:
    assert servers(folder)
    user.send_signal(signal.SIGKILL)
    until(lambda: not servers(folder), "the server outlived its user")
    assert "database system is shut down" in (folder / "postgres.log").read_text()


def test_it_ends_with_its_keeper_and_is_started_again_when_it_dies(folder: Path) -> None:
    with embedded_database(folder, TuningSection()) as file:
        (keeper,) = [process for process in servers(folder) if "spatial_core.tuning.keeper" in process.cmdline()]
        (server,) = [process for process in keeper.children() if process.name() == "postgres"]
        server.send_signal(signal.SIGQUIT)

        def answers() -> bool:
            try:
                connect(read_secret(file)).close()
            except psycopg.OperationalError:
                return False
            return not server.is_running()

        until(answers, "a server that died was not started again")
        keeper.kill()
        until(lambda: not servers(folder), "the server outlived its keeper")


def test_a_server_of_another_machine_is_not_started_twice(folder: Path, user: subprocess.Popen[str]) -> None:
    place = folder / "postgres.json"
    place.write_text(place.read_text().replace(socket.gethostname(), "elsewhere"))
    url = folder / "storage.url"
    url.write_text(url.read_text().replace("127.0.0.1", "127.0.0.2"))  # nobody answers there
    with (
        pytest.raises(ConfigError, match=r"in use on elsewhere.*tuning\.host"),
        embedded_database(folder, TuningSection()),
    ):
        pass


def test_other_networks_get_in_only_where_the_host_is_no_loopback(folder: Path) -> None:
    with embedded_database(folder, TuningSection()):
        rules = (folder / "postgres" / "pg_hba.conf").read_text()
    assert rules.splitlines() == [
        "host tuning tuning 127.0.0.1/32 scram-sha-256",
        "host tuning tuning ::1/128 scram-sha-256",
    ]


def test_a_lake_that_nobody_else_may_enter_is_no_hindrance(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    with embedded_database(hidden / "tuning", TuningSection()) as file, connect(read_secret(file)) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    until(lambda: not servers(hidden / "tuning"), "the server outlived its user")
