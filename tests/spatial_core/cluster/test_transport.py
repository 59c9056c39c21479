"""Requests over ssh, with an ssh that is a script: which connections are made, and what is tried again."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster import transport
from spatial_core.cluster.transport import NotConnected, Ssh, ThisHost, transport_for
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError, ClusterUnreachable

# Plays ssh: a master is a file; a request runs its command here. `trouble` holds shell lines for the next request.
SCRIPT = """#!/bin/sh
here={folder}
echo "$*" | tr '\\n' ' ' | cut -c 1-2000 >> "$here/calls"
for word in "$@"; do last=$word; done
case " $* " in
*" -O check "*) [ -e "$here/master" ]; exit ;;
*" -O exit "*) rm "$here/master"; exit ;;
*" ControlMaster=yes "*)
    [ -e "$here/refusal" ] && {{ cat "$here/refusal" >&2; exit 255; }}
    touch "$here/master"; exit ;;
esac
if [ -e "$here/trouble" ]; then mv "$here/trouble" "$here/now"; . "$here/now"; fi
[ -e "$here/master" ] || {{ echo 'no master connection' >&2; exit 255; }}
exec sh -c "$last"
"""
LOOK = {"do": "run", "argv": ["echo", "hello"]}


class FakeSsh:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        program = folder / "bin" / "ssh"
        program.write_text(SCRIPT.format(folder=folder))
        program.chmod(0o755)
        self.pauses: list[float] = []

    def connection(self, **given: Any) -> Ssh:
        return Ssh("login", **({"pause": self.pauses.append} | given))

    def calls(self, what: str = "") -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if what in line]

    def trouble(self, lines: str) -> None:
        (self.folder / "trouble").write_text(lines)

    def refuse(self, text: str) -> None:
        (self.folder / "refusal").write_text(text)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    fake = FakeSsh(tmp_path / "ssh")
    monkeypatch.setenv("PATH", f"{fake.folder}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return fake


def hello(answer: Mapping[str, Any]) -> bool:
    return (answer["code"], answer["out"]) == (0, "hello\n")


def test_one_connection_serves_all_requests(ssh: FakeSsh, tmp_path: Path) -> None:
    for _ in range(3):
        assert hello(ssh.connection().ask(LOOK))
    assert len(ssh.calls("ControlMaster=yes")) == 1
    requests = ssh.calls("python3")
    assert len(requests) == 3
    assert all("ProxyCommand=echo" in call for call in requests), "through the master or not at all"
    (folder,) = tmp_path.glob("spatial-ssh-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_connections_are_strict_and_ask_nothing(ssh: FakeSsh, tmp_path: Path) -> None:
    (tmp_path / "a key").touch()
    ssh.connection(port=2222, user="me", key=tmp_path / "a key", known_hosts=tmp_path / "100% known").ask(LOOK)
    (call,) = ssh.calls("ControlMaster=yes")
    for words in (
        "-p 2222",
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        f'UserKnownHostsFile="{tmp_path}/100%% known"',
        "IdentitiesOnly=yes",
        f'IdentityFile="{tmp_path}/a key"',
        "ServerAliveInterval=15",
        "me@login true",
    ):
        assert words in call


def test_a_jump_host_is_met_as_strictly(ssh: FakeSsh, tmp_path: Path) -> None:
    ssh.connection(jump_host="me@gate:2200", known_hosts=tmp_path / "known").ask(LOOK)
    (call,) = ssh.calls("ControlMaster=yes")
    way = call.partition("ProxyCommand=")[2]
    for words in ("-p 2200", "StrictHostKeyChecking=yes", "BatchMode=yes", "known", "-W %h:%p me@gate"):
        assert words in way


def test_other_places_have_other_connections(ssh: FakeSsh, tmp_path: Path) -> None:
    for given in ({}, {"port": 2}, {"user": "you"}, {"jump_host": "gate"}):
        (ssh.folder / "master").unlink(missing_ok=True)
        ssh.connection(**given).ask(LOOK)
    assert len(list(tmp_path.glob("spatial-ssh-*"))) == 4


def test_a_connection_that_was_lost_is_made_again(ssh: FakeSsh) -> None:
    ssh.trouble("echo 'Timeout, server not responding' >&2; rm $here/master; exit 255")
    assert hello(ssh.connection().ask(LOOK))
    assert len(ssh.calls("ControlMaster=yes")) == 2
    assert len(ssh.pauses) == 1


def test_a_submission_that_may_have_arrived_is_not_repeated(ssh: FakeSsh) -> None:
    ssh.trouble("echo 'Timeout, server not responding' >&2; exit 255")
    with pytest.raises(ClusterUnreachable, match="Timeout, server not responding") as caught:
        ssh.connection().ask({"do": "submit"})
    assert not isinstance(caught.value, NotConnected)
    assert len(ssh.calls("python3")) == 1


def test_a_submission_that_was_not_sent_is(ssh: FakeSsh, tmp_path: Path) -> None:
    ssh.trouble("rm $here/master")
    given = {"do": "submit", "folder": str(tmp_path / "jobs" / "x"), "files": {}, "folders": [], "options": []}
    answer = ssh.connection().ask(given)
    assert "sbatch" in answer["error"]
    assert len(ssh.calls("python3")) == 2


def test_a_host_that_stays_away_is_given_up(ssh: FakeSsh) -> None:
    ssh.refuse("ssh: connect to host login port 22: Connection refused")
    with pytest.raises(NotConnected, match="Connection refused"):
        ssh.connection().ask({"do": "submit"})
    assert len(ssh.pauses) == 4
    assert ssh.pauses == sorted(ssh.pauses), "pauses grow"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Host key verification failed.", r"compare the fingerprint .*, then: ssh-keyscan -p 22 login >> ~/.ssh/known"),
        ("WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!", r"another one than .* -f ~/.ssh/known_hosts -R login"),
        ("me@login: Permission denied (publickey).", r"login refused .* check compute.ssh_user and compute.ssh_key"),
    ],
)  # fmt: skip
def test_what_a_person_has_to_settle_is_not_tried_again(said: str, told: str, ssh: FakeSsh) -> None:
    ssh.refuse(said)
    with pytest.raises(ClusterError, match=told) as caught:
        ssh.connection().ask(LOOK)
    assert not isinstance(caught.value, ClusterUnreachable)
    assert ssh.pauses == []


def test_a_key_that_is_not_there_is_named(ssh: FakeSsh, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"compute.ssh_key: there is no file {tmp_path}/id"):
        ssh.connection(key=tmp_path / "id").ask(LOOK)
    assert ssh.calls("ControlMaster=yes") == []


def test_what_a_login_shell_prints_is_passed_over(ssh: FakeSsh) -> None:
    ssh.trouble("echo Welcome to the cluster!")
    assert hello(ssh.connection().ask(LOOK))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("echo nonsense; exit 0", "answered with b'nonsense'"),
        ("exit 0", "answered with b''"),
        ("echo 'python3: not found' >&2; exit 127", "python3: not found"),
    ],
)
def test_an_answer_that_is_none_is_an_error(lines: str, told: str, ssh: FakeSsh) -> None:
    ssh.trouble(lines)
    with pytest.raises(ClusterError, match=told):
        ssh.connection().ask(LOOK)


def test_no_more_sessions_at_a_time_than_servers_allow(ssh: FakeSsh, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    command = f"mark=$(mktemp -p {marks}); ls {marks} | wc -l; sleep 0.2; rm $mark"
    seen: list[int] = []

    def ask() -> None:
        seen.append(int(Ssh("login").ask({"do": "run", "argv": ["sh", "-c", command]})["out"]))

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(seen) == 8
    assert max(seen) <= 4
    assert len(ssh.calls("ControlMaster=yes")) == 1


def test_a_connection_can_be_closed(ssh: FakeSsh) -> None:
    connection = ssh.connection()
    connection.ask(LOOK)
    connection.close()
    connection.close()
    assert not (ssh.folder / "master").exists()


def test_a_connection_that_hangs_is_none(ssh: FakeSsh, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = ssh.connection(attempts=1)
    connection.ask(LOOK)
    monkeypatch.setattr(transport, "_TIMEOUT_S", 0.2)
    (ssh.folder / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(NotConnected, match=r"does not react in 0\.2 s"):
        connection.ask(LOOK)


def test_this_host_answers_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hello(ThisHost().ask(LOOK))
    with pytest.raises(ClusterError, match=r"'paint' failed beside the scheduler: .*KeyError: 'paint'"):
        ThisHost().ask({"do": "paint"})
    monkeypatch.setattr(transport, "_TIMEOUT_S", 0.3)
    with pytest.raises(ClusterUnreachable, match=r"no answer to 'run' in 0\.3 s"):
        ThisHost().ask({"do": "run", "argv": ["sleep", "60"]})


def test_the_settings_choose_the_way(tmp_path: Path) -> None:
    def chosen(**compute: Any) -> Any:
        return transport_for(Settings(compute=compute, base_dir=tmp_path))  # type: ignore[arg-type]

    assert isinstance(chosen(profile="slurm_login"), ThisHost)
    there = chosen(
        profile="slurm_ssh", ssh_host="login", ssh_port=2222, ssh_user="me", ssh_key="key", ssh_known_hosts="known"
    )
    assert (there.host, there.port, there.user, there.jump_host) == ("login", 2222, "me", None)
    assert (there.key, there.known_hosts) == (tmp_path / "key", tmp_path / "known")
