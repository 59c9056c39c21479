"""`spatial cluster check` on a real cluster: what it proves, each way in which it fails, and that it leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cli.cluster_check import submissions
from spatial_core.cluster.check import ClusterCheck
from spatial_core.cluster.finding import Finding
from spatial_core.cluster.transport import Ssh, transport_for
from spatial_core.config.settings import Settings, load_settings
from tests.slurm import recipes
from tests.slurm.client import Slurm

ROOT = Path(__file__).parents[2]
# What the test cluster's nodes have. The code on them is the one under test, wherever pip installed it from.
MODEST = [
    f"compute.setup=['export PYTHONPATH={ROOT}']",
    "compute.max_parallel=2",
    "compute.resources.difficulty_metadata.cpus=8",
    "compute.resources.projector_checkpoint.time_limit='24:00:00'",
]
MEMORY = [f"compute.resources.{asset}.mem=2G" for asset in (
    "intermediates", "backbone_embeddings", "merged_splits", "difficulty_metadata", "projector_checkpoint",
    "final_embeddings", "tuning_study",
)]  # fmt: skip
GPU = [f"compute.resources.{asset}.partition=gpu" for asset in (
    "backbone_embeddings", "projector_checkpoint", "final_embeddings", "tuning_study",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def commands_work_here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))


@pytest.fixture
def lake(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A lake that holds a file; the check may change nothing in it, and no job may be left."""
    folder = tmp_path / "lake"
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "0001.tar").write_text("not read")
    before = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == before, "the check left something behind"
    assert slurm.jobs() == []


Check = Callable[..., dict[str, Finding]]


@pytest.fixture
def check(lake: Path) -> Check:
    """Runs the check on this host and returns its findings by step."""

    def run(
        *overrides: str, profile: str = "slurm_login", wait_s: float = 60.0, build: bool = False
    ) -> dict[str, Finding]:
        return findings(settings_of(lake, f"compute.profile={profile}", *overrides), wait_s=wait_s, build=build)

    return run


def settings_of(lake: Path, *overrides: str) -> Settings:
    return load_settings(None, [f"paths.data_dir={lake}", *MODEST, *MEMORY, *GPU, *overrides], {})


def findings(settings: Settings, *, wait_s: float = 60.0, build: bool = False) -> dict[str, Finding]:
    transport = transport_for(settings)
    said: list[str] = []
    checked = ClusterCheck(settings, transport, submissions(settings), build=build, wait_s=wait_s, say=said.append)
    try:
        found = list(checked.run())
    finally:
        if isinstance(transport, Ssh):
            transport.close()
    names = [finding.step for finding in found]
    assert len(names) == len(set(names)), "a step was reported twice"
    return {finding.step: finding for finding in found}


def failed(found: dict[str, Finding]) -> list[str]:
    return [step for step, finding in found.items() if not finding.ok]


def over_ssh(slurm: Slurm) -> list[str]:
    access = slurm.ssh
    return [
        "compute.profile=slurm_ssh", f"compute.ssh_host={access.host}", f"compute.ssh_port={access.port}",
        f"compute.ssh_user={access.user}", f"compute.ssh_key={access.key}",
        f"compute.ssh_known_hosts={access.known_hosts}",
    ]  # fmt: skip


def test_a_cluster_as_jobs_need_it_passes_every_step(check: Check, slurm: Slurm) -> None:
    found = check("compute.scratch=$SLURM_TMPDIR")
    assert failed(found) == [], [found[step] for step in failed(found)]
    assert "1 GPU, 24:00:00 fit gpu; would start at" in found["resources backbone_embeddings"].text
    assert "8 cores, 64 GiB, 2 GPU h100" in found["partition gpu"].text
    for place, node in (("cpu", "node1"), ("gpu", "node2")):
        assert f"ran on {node}" in found[f"test job {place}"].text
        assert f"what {node} writes is seen on this host" in found[f"folders {place}"].text
        assert "MiB free" in found[f"scratch {place}"].text
        assert f"{sys.executable} on {node} has the code of this process" in found[f"environment {place}"].text
    assert "with GPU 0" in found["test job gpu"].text, "the job of a partition whose assets all ask for one gets one"
    assert "GPU" not in found["test job cpu"].text
    jobs = [step for step in found if step.startswith("resources")]
    assert len(jobs) == len(submissions(settings_of(Path("/lake"))))
    rows = slurm.run("sacct", "-n", "-X", "-P", "-S", "now-1hour", "--format=JobName").split()
    assert sum(name.startswith("spatial-check-") for name in rows) >= 2


def test_over_ssh_and_as_json_from_the_command_line(lake: Path, slurm: Slurm, tmp_path: Path) -> None:
    settings = [*MODEST, *MEMORY, *GPU, *over_ssh(slurm), f"paths.data_dir={lake}"]
    argv = [sys.executable, "-m", "spatial_core.cli.main", "cluster", "check", "--json", "--wait", "60"]
    done = subprocess.run(
        [*argv, *(part for one in settings for part in ("--set", one))],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["ok"], [one for one in record["findings"] if not one["ok"]]
    assert done.returncode == 0, done.stderr
    assert record["profile"] == "slurm_ssh"
    steps = [one["step"] for one in record["findings"]]
    assert steps[:5] == ["login", "python3", "sbatch", "squeue", "accounting"]
    assert "test job gpu: job" in done.stderr, "how the jobs stand is shown while waiting"
    Ssh(slurm.ssh.host, slurm.ssh.port, slurm.ssh.user, slurm.ssh.key, slurm.ssh.known_hosts).close()


def test_failures_are_listed_with_what_to_do_and_the_exit_code(lake: Path, slurm: Slurm, tmp_path: Path) -> None:
    settings = [
        *MODEST,
        *MEMORY,
        *GPU,
        f"paths.data_dir={lake}",
        "compute.profile=slurm_login",
        "compute.partition=nope",
    ]
    argv = [sys.executable, "-m", "spatial_core.cli.main", "cluster", "check"]
    done = subprocess.run(
        [*argv, *(part for one in settings for part in ("--set", one))],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed partition nope: there is no such partition" in done.stdout
    assert re.search(r"-> name one of .*\bcpu, gpu, .* in compute\.partition or that of an asset", done.stdout)
    assert "steps failed" in done.stdout


def test_an_unknown_host_key_is_refused_before_anything_else(check: Check, slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    found = check(*over_ssh(slurm), f"compute.ssh_known_hosts={tmp_path / 'known_hosts'}", profile="slurm_ssh")
    assert list(found) == failed(found) == ["login"]
    assert f"ssh-keyscan -p {slurm.ssh.port} 127.0.0.1" in found["login"].text


def test_a_key_the_login_node_does_not_take_is_a_refused_login(check: Check, slurm: Slurm, tmp_path: Path) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    found = check(*over_ssh(slurm), f"compute.ssh_key={key}", profile="slurm_ssh")
    assert list(found) == failed(found) == ["login"]
    assert "login refused" in found["login"].text and "compute.ssh_key" in found["login"].text


def test_a_port_where_nobody_listens_is_no_connection(check: Check, slurm: Slurm) -> None:
    found = check(*over_ssh(slurm), "compute.ssh_port=9", profile="slurm_ssh")
    assert list(found) == failed(found) == ["login"]
    assert "Connection refused" in found["login"].text
    assert found["login"].remedy is not None and "compute.ssh_port" in found["login"].remedy


def test_names_that_the_cluster_does_not_know(check: Check) -> None:
    found = check("compute.account=nobody", "compute.qos=nowhere", "compute.resources.intermediates.partition=cpo")
    assert failed(found)[:3] == ["partition cpo", "account nobody", "qos nowhere"]
    remedy = str(found["partition cpo"].remedy)
    assert re.fullmatch(r"name one of .*\bcpu, gpu, .* in compute\.partition or that of an asset", remedy)
    assert "test job cpo" not in found and "resources intermediates" not in found


def test_jobs_that_no_node_can_run(check: Check) -> None:
    found = check(
        "compute.resources.intermediates.mem=200G",
        "compute.resources.fingerprints.time_limit='2-00'",
        "compute.resources.hf_model.cpus=9",
        "compute.resources.backbone_embeddings.gpus='a100:1'",
        "compute.resources.building_embeddings.constraint=infiniband",
    )
    wrong = {
        "intermediates": "compute.resources.intermediates.mem",
        "fingerprints": "compute.resources.fingerprints.time_limit",
        "hf_model": "compute.resources.hf_model.cpus",
        "backbone_embeddings": "compute.resources.backbone_embeddings.gpus",
        "building_embeddings": "compute.resources.building_embeddings.constraint",
    }
    assert sorted(failed(found)) == sorted(f"resources {asset}" for asset in wrong)
    for asset, key in wrong.items():
        remedy = found[f"resources {asset}"].remedy
        assert remedy is not None and f"{'change' if 'constraint' in key else 'lower'} {key}," in remedy
    assert "Invalid feature" in found["resources building_embeddings"].text
    assert "for at most 24 h" in str(found["resources fingerprints"].remedy)


def test_a_folder_that_cannot_be_made(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = check(f"compute.work_dir={tmp_path / 'file' / 'jobs'}")
    assert failed(found) == ["folders"]
    assert "Not a directory, on this host" in found["folders"].text
    assert found["folders"].remedy is not None and "at the same path" in found["folders"].remedy


def test_a_folder_that_is_another_one_on_the_nodes(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is the same text everywhere and leads below each process's own working folder."""
    monkeypatch.chdir(tmp_path)
    found = check(
        "paths.data_dir=/proc/self/cwd/elsewhere",
        f"compute.work_dir={tmp_path / 'jobs'}",
        *["compute.scratch=/proc/none"],
    )
    assert sorted(failed(found)) == ["folders cpu", "folders gpu", "scratch cpu", "scratch gpu"]
    assert "/proc/self/cwd/elsewhere on node1 is not there" in found["folders cpu"].text
    assert "/proc/none on node1 is no folder" in found["scratch cpu"].text
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "jobs").exists()


def test_a_scratch_expression_that_says_nothing_on_a_node(check: Check) -> None:
    found = check("compute.scratch=$NO_SUCH_FOLDER", "compute.partition=cpu")
    assert sorted(failed(found)) == ["scratch cpu", "scratch gpu"]
    assert "$NO_SUCH_FOLDER on node1 has a variable that is not set" in found["scratch cpu"].text


def test_a_partition_that_is_busy_shows_why_and_is_not_waited_for_for_ever(check: Check, slurm: Slurm) -> None:
    blocker = recipes.occupy(slurm, "node2")
    try:
        found = check(wait_s=12)
    finally:
        slurm.cancel(blocker)
        slurm.wait_for(lambda: not slurm.jobs(), what="an empty queue")
    assert failed(found) == ["test job gpu"]
    assert "is still pending (Resources) after 12 s" in found["test job gpu"].text
    assert found["folders cpu"].ok


def test_accounting_that_does_not_answer(check: Check, slurm: Slurm) -> None:
    slurm.stop("slurmdbd")
    found = check()
    assert sorted(failed(found)) == ["accounting", "test job cpu", "test job gpu"]
    assert "ask the administrators" in str(found["accounting"].remedy)
    assert "accounting does not answer" in found["test job cpu"].text


def test_a_controller_that_is_away_ends_the_check(check: Check, slurm: Slurm) -> None:
    slurm.stop("slurmctld")
    found = check()
    slurm.start("slurmctld")
    assert list(found) == ["sbatch", "squeue"] and failed(found) == ["squeue"]
    assert "Unable to contact slurm controller" in found["squeue"].text
