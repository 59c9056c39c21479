"""A run follows its jobs while services are away, over ssh, and when a stage is told to stop.

What takes long goes on while the first tests run; the controller, which the others need, is stopped last.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from spatial_core.cluster.ledger import Ledger
from spatial_core.cluster.transport import Ssh, transport_for
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError, ClusterUnreachable, JobCancelled, TarError
from spatial_core.jobs.registry import StageCall
from spatial_core.street_view.embeddings import embed_tar
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_model import make_backbone, model_settings
from tests.data.make_tars import street_view, tar_bytes
from tests.slurm.client import Slurm
from tests.slurm.following import END_S, Case, FollowedLake, python_that_runs
from tests.slurm.test_job_on_node import DRIVER

pytestmark = pytest.mark.slow
SILENT = "WARNING the scheduler does not answer"
BACK = "INFO the scheduler answers again"


@pytest.fixture(scope="module")
def lake(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FollowedLake]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm.conf))
        # Sockets of ssh have short names; this also keeps the connection apart from those of other tests.
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run", numbered=False)))
        made = FollowedLake(tmp_path_factory.mktemp("lake"), slurm)
        yield made
        made.close()
        connection(made).close()


def connection(lake: FollowedLake, **compute: Any) -> Ssh:
    found = transport_for(lake.settings(profile="slurm_ssh", **compute))
    assert isinstance(found, Ssh)
    return found


def established(port: int) -> int:
    """Connections to a port of this host."""
    found = psutil.net_connections("tcp")
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)


def ends_well(case: Case, *, silences: int) -> None:
    """The job was followed through so many silences, and sent once."""
    done = case.done()
    assert done.report is not None, case.watcher.text
    assert len(case.watcher.jobs) == 1
    assert (case.watcher.text.count(SILENT), case.watcher.text.count(BACK)) == (silences, silences), case.watcher.text


@pytest.fixture(scope="module")
def features(lake: FollowedLake) -> tuple[Path, Path, Settings]:
    """A tar, its intermediates, and settings under which its features are several pieces."""
    tar = lake.folder / "0991.tar"
    tar.write_bytes(tar_bytes(street_view(991, seed=3, targets=12, side_px=72)))
    ingest_tar(tar, lake.folder / "intermediates", Settings())
    pieces = ("embedding_model.batch_size=4", "embedding_model.piece_rows=12")
    tiny = make_backbone(lake.folder / "tiny")
    return tar, lake.folder / "intermediates" / "0991.parquet", model_settings(lake.folder, tiny, *pieces)


@pytest.fixture(scope="module", autouse=True)
def told_to_stop(slurm: Slurm, lake: FollowedLake, features: tuple[Path, Path, Settings]) -> dict[bool, Case]:
    """Two jobs that are told to stop after their first piece: one may queue itself again, the other may not."""
    tar, intermediates, model = features
    python = python_that_runs(lake.folder, "unhurried", DRIVER)
    compute = lake.settings(python=python, mem="3G").compute
    cases = {}
    for may in (True, False):
        out = lake.folder / f"features-{may}"
        paths = lake.settings().paths.model_copy(update={"embeddings_dir": out})
        settings = model.model_copy(update={"compute": compute, "paths": paths, "base_dir": lake.folder})
        arguments = {"tar": str(tar), "intermediates": str(intermediates), "output_dir": str(out)}
        cases[may] = lake.follow("backbone_embeddings", "0991", StageCall("embed", arguments, settings))
        lake.deal(partial(tell_to_stop, slurm, cases[may], out, may))
    return cases


def tell_to_stop(slurm: Slurm, case: Case, out: Path, may_requeue: bool) -> None:
    slurm.wait_for(lambda: list(out.glob(".*pieces-*/*.parquet")), timeout_s=120, what="the first piece")
    if not may_requeue:
        slurm.run("scontrol", "update", f"JobId={case.job()}", "Requeue=0")
    slurm.run("scancel", "--signal=TERM", "--batch", case.job())  # as --signal=B:TERM@… does before the limit


def call_of(lake: FollowedLake, case: Case) -> StageCall:
    tar, out = lake.folder / "raw" / f"{case.key}.tar", lake.folder / "intermediates"
    return StageCall("ingest", {"tar": str(tar), "output_dir": str(out)}, lake.settings())


def test_over_ssh_one_connection_and_nothing_stays_behind(slurm: Slurm, lake: FollowedLake) -> None:
    connection(lake).close()
    port, most, over = slurm.ssh.port, 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, established(port))

    counting = threading.Thread(target=count)
    counting.start()
    good, bad = (lake.ingest(damaged=damaged, profile="slurm_ssh", poll_max_s=0.5) for damaged in (False, True))
    held = lake.ingest(profile="slurm_ssh", extra=("--hold",))
    slurm.cancel(held.job())
    assert good.done().report is not None
    assert type(bad.done().error) is TarError
    assert type(held.done().error) is JobCancelled
    over.set()
    counting.join()
    assert 1 <= most <= 2
    ours = [process.name() for process in slurm.cluster.login_processes()]
    assert ours == [], "between two requests nothing runs there"
    connection(lake).close()
    slurm.wait_for(lambda: established(port) == 0, what="the connection to be gone")


def test_an_unknown_host_is_refused_with_what_to_do(slurm: Slurm, lake: FollowedLake, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.touch()
    kind, key = slurm.ssh.known_hosts.read_text().split()[1:3]
    other.write_text(f"[127.0.0.1]:{slurm.ssh.port} {kind} {key[:-8]}AAAAAAAA\n")
    port = slurm.ssh.port
    told = {
        empty: rf"compare the fingerprint .* >> {empty}",
        other: rf"another one than that in {other}; .*: ssh-keygen -f {other} -R '\[127\.0\.0\.1\]:{port}'",
    }
    for known_hosts, what_to_do in told.items():
        with pytest.raises(ClusterError, match=what_to_do) as caught:
            lake.ingest(profile="slurm_ssh", ssh_known_hosts=str(known_hosts)).done()
        assert not isinstance(caught.value, ClusterUnreachable)
    assert [sent for sent in Ledger(lake.folder / "jobs").submissions() if sent.asset == "intermediates"] == []


def test_a_stranger_is_refused_with_what_to_do(lake: FollowedLake, tmp_path: Path) -> None:
    key = tmp_path / "a key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with pytest.raises(ClusterError, match=r"login refused .* check compute\.ssh_user and compute\.ssh_key"):
        connection(lake, ssh_key=str(key)).ask({"do": "run", "argv": ["true"]})


def test_through_a_jump_host(slurm: Slurm, lake: FollowedLake) -> None:
    """The login node plays its own gate; its key is in no other list of known hosts than ours."""
    ssh = slurm.ssh
    way = connection(lake, ssh_jump_host=f"{ssh.user}@{ssh.host}:{ssh.port}")
    try:
        assert way.ask({"do": "run", "argv": ["squeue", "--version"]})["out"].startswith("slurm")
    finally:
        way.close()


def test_the_login_node_is_away(slurm: Slurm, lake: FollowedLake) -> None:
    case = lake.ingest("sleep 4", profile="slurm_ssh")
    slurm.wait_state(case.job(), "RUNNING")
    slurm.stop("sshd", hard=True)
    late = lake.ingest(profile="slurm_ssh", poll_max_s=1.0)
    slurm.wait_state(case.job(), "COMPLETED")
    time.sleep(5)
    assert not case.outcome.done() and not late.outcome.done()
    slurm.start("sshd")
    assert case.done().report is not None
    assert late.done().report is not None
    assert len(case.watcher.jobs) == len(late.watcher.jobs) == 1


@pytest.mark.parametrize("may_requeue", [True, False], ids=["queued again by itself", "sent again"])
def test_a_stage_told_to_stop_saves_and_goes_on(
    may_requeue: bool,
    lake: FollowedLake,
    told_to_stop: dict[bool, Case],
    features: tuple[Path, Path, Settings],
) -> None:
    for blow in lake.blows:
        blow.result(timeout=END_S)
    case = told_to_stop[may_requeue]
    done = case.done()
    assert done.report is not None, case.watcher.text
    assert done.report.details["pieces_resumed"] >= 1
    assert len(case.watcher.jobs) == (1 if may_requeue else 2)
    assert ("saved its pieces and goes on in a new job" in case.watcher.text) is not may_requeue
    tar, intermediates, model = features
    whole = embed_tar(tar, intermediates, lake.folder / "whole", model)
    assert done.report.artifact.read_bytes() == whole.artifact.read_bytes()


def test_accounting_is_away_while_jobs_end(slurm: Slurm, lake: FollowedLake) -> None:
    good = lake.ingest("sleep 3")
    bad = lake.ingest("sleep 3", damaged=True)
    impatient = lake.ingest("sleep 3", accounting_patience_s=3.0)
    for case in (good, bad, impatient):
        slurm.wait_state(case.job(), "RUNNING")
    slurm.stop("slurmdbd")
    with pytest.raises(ClusterUnreachable, match=r"has not answered for 3 s .* materialize again to follow them"):
        impatient.done()
    slurm.wait_for(lambda: SILENT in good.watcher.text and SILENT in bad.watcher.text, what="the silence to be told")
    assert not good.outcome.done() and not bad.outcome.done()
    slurm.start("slurmdbd")
    ends_well(good, silences=1)
    assert type(bad.done().error) is TarError
    again = lake.follow("intermediates", impatient.key, call_of(lake, impatient))
    assert again.done().report is not None
    assert again.watcher.jobs == impatient.watcher.jobs, "the run that had no patience lost nothing"


def test_the_controller_is_away_for_a_minute(slurm: Slurm, lake: FollowedLake) -> None:
    """Over ssh and without; jobs end in that time, and one is asked for that can only be sent afterwards."""
    cases = [lake.ingest("sleep 12", profile=profile) for profile in ("slurm_login", "slurm_ssh")]
    for case in cases:
        slurm.wait_state(case.job(), "RUNNING")
    time.sleep(7)  # the controller writes down what it knows every few seconds
    slurm.stop("slurmctld", hard=True)
    begun = time.monotonic()
    late = lake.ingest()
    time.sleep(60 - (time.monotonic() - begun))
    assert not any(case.outcome.done() for case in [*cases, late])
    slurm.start("slurmctld")
    for case in cases:
        ends_well(case, silences=1)
    assert late.done().report is not None
    assert "the scheduler does not take jobs now" in late.watcher.text
    assert "connect failure" in late.watcher.text
