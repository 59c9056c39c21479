"""The check against clusters that the test cluster cannot be: told by what their commands print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spatial_core.cli import cluster_check
from spatial_core.cli.app import app
from spatial_core.cli.cluster_check import submissions
from spatial_core.cluster import check
from spatial_core.cluster.check import ClusterCheck
from spatial_core.cluster.finding import Finding
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ClusterUnreachable

SINFO = "cpu*|up|2-00:00:00|64|257000|(null)\ngpu|up|2-00:00:00|64|515000|gpu:h100:4\n"
WOULD_START = (0, "", "sbatch: Job 9 to start at 2026-11-25T10:08:27 using 1 processors on nodes n1 in partition cpu")
Answer = tuple[int, str, str]


class Scripted:
    """A cluster's commands by what they print; submissions are refused, so that no test job is on its way."""

    def __init__(self, **commands: Answer | Callable[[list[str]], Answer]) -> None:
        self._commands: dict[str, Any] = {
            "sbatch": lambda argv: (0, "slurm 24.05\n", "") if argv == ["--version"] else WOULD_START,
            "bash": (0, "11\n12\n", ""),
            "sacct": (0, "11\n12\n13\n", ""),
            "sinfo": (0, SINFO, ""),
            "sacctmgr": (0, "lab\nnormal\nhigh\n", ""),
        } | commands
        self.asked: list[list[str]] = []

    def ask(self, request: Any) -> dict[str, Any]:
        if request["do"] == "submit":
            return {"error": "sbatch: error: Batch job submission failed: Unspecified error", "unclear": False}
        if request["do"] != "run":
            return {"tails": {}}
        name, *argv = request["argv"]
        self.asked.append(request["argv"])
        answer = self._commands.get(name, (0, "", ""))
        code, out, err = answer(argv) if callable(answer) else answer
        return {"code": code, "out": out, "err": err}


def settings_in(folder: Path, *overrides: str) -> Settings:
    gpu = [f"compute.resources.{asset}.partition=gpu" for asset in ("backbone_embeddings", "projector_checkpoint")]
    given = [*gpu, "compute.resources.final_embeddings.gpus='0'", "compute.resources.tuning_study.gpus='0'", *overrides]
    return load_settings(None, [f"paths.data_dir={folder / 'lake'}", "compute.profile=slurm_login", *given], {})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    def findings(*overrides: str, **commands: Any) -> dict[str, Finding]:
        settings = settings_in(tmp_path, *overrides)
        checked = ClusterCheck(
            settings,
            Scripted(**commands),
            submissions(settings),
            build=False,
            wait_s=5.0,
            say=print,
            pause=lambda s: None,
        )
        found = {finding.step: finding for finding in checked.run()}
        assert list(tmp_path.iterdir()) == []
        return found

    return findings


def failed(found: dict[str, Finding]) -> list[str]:
    return [
        step for step, finding in found.items() if not finding.ok and not step.startswith(("test job", "environment"))
    ]


def test_what_is_there_is_said(run: Callable[..., dict[str, Finding]]) -> None:
    found = run("compute.account=lab", "compute.qos=high")
    assert failed(found) == []
    assert found["sbatch"].text == "slurm 24.05"
    assert found["squeue"].text == "2 jobs of yours are queued"
    assert found["accounting"].text == "3 jobs of yours in the last 30 days"
    assert found["partition gpu"].text == "up to 48 h; nodes: 64 cores, 503 GiB, 4 GPU h100"
    assert found["account lab"].ok and found["qos high"].ok
    assert found["resources backbone_embeddings"].text == (
        "6 cores, 126G, 1 GPU, 24:00:00 fit gpu; would start at 10:08 on n1"
    )
    assert found["resources intermediates"].text.startswith("1 core, 32G, no GPU, 02:00:00 fit cpu")
    assert "Unspecified error" in found["test job cpu"].text


def test_sbatch_judges_the_options_of_each_asset_as_they_would_be_submitted(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, "compute.resources.hf_model.extra=['--exclusive']")
    scripted = Scripted()
    planned = submissions(settings)
    list(ClusterCheck(settings, scripted, planned, build=False, wait_s=1.0, say=print, pause=lambda s: None).run())
    judged = [argv[2:] for argv in scripted.asked if argv[:2] == ["sbatch", "--test-only"]]
    assert judged == [list(submission.options) for submission in planned.values()]
    assert any("--exclusive" in options for options in judged)
    assert any(option.startswith("--array=0-1%") for options in judged for option in options)


def test_a_fresh_accounting_is_told_from_one_that_does_not_answer(run: Callable[..., dict[str, Finding]]) -> None:
    fresh = run(sacct=(0, "", ""))["accounting"]
    assert fresh.ok and "no job of yours in the last 30 days" in fresh.text
    off = run(sacct=(1, "", "Slurm accounting storage is disabled"))
    assert not off["accounting"].ok and "disabled" in off["accounting"].text
    assert "resources hf_model" in off, "everything else is still tried"


def test_a_site_that_hides_its_accounts_leaves_them_to_sbatch(run: Callable[..., dict[str, Finding]]) -> None:
    found = run("compute.account=lab", sacctmgr=(1, "", "sacctmgr: error: Access denied"))
    assert found["account"].ok and "left to sbatch" in found["account"].text


def test_partitions_that_take_no_jobs(run: Callable[..., dict[str, Finding]]) -> None:
    down = run(sinfo=(0, SINFO.replace("gpu|up", "gpu|inact"), ""))
    assert failed(down) == ["partition gpu"]
    assert "test job gpu" not in down and "test job cpu" in down
    none = run(sinfo=(0, SINFO.replace("cpu*", "cpu"), ""))
    assert none["partition"].text == "the cluster has no default partition"
    assert str(none["partition"].remedy).startswith("name one of cpu, gpu in compute.partition")


def test_what_sbatch_says_is_passed_on(run: Callable[..., dict[str, Finding]]) -> None:
    def refuse(argv: list[str]) -> Answer:
        if argv == ["--version"]:
            return 0, "slurm 24.05\n", ""
        return (1, "", "allocation failure: Invalid account") if "--mem=100G" in argv else WOULD_START

    found = run(sbatch=refuse)
    assert failed(found) == ["resources merged_splits"]
    assert found["resources merged_splits"].text.endswith("fits cpu: allocation failure: Invalid account")


def test_a_lost_connection_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Scripted):
        def ask(self, request: Any) -> dict[str, Any]:
            if "sinfo" in request.get("argv", ()):
                raise ClusterUnreachable("login: ssh connection lost during 'run' (Broken pipe)")
            return super().ask(request)

    monkeypatch.setattr(cluster_check, "transport_for", lambda settings: Lost())
    monkeypatch.setattr(check, "_PATIENCE_S", 1.0)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["cluster", "check", "--set", "compute.profile=slurm_login"])
    assert shown.exit_code == 1
    assert "failed connection: lost on the way: login: ssh connection lost" in shown.stdout
    assert "run the check again" in shown.stdout


@pytest.mark.parametrize(("code", "told"), [(127, "on the PATH of shells"), (1, "SLURM_CONF must be set")])
def test_a_command_that_is_missing_is_told_from_one_that_does_not_work(
    code: int, told: str, run: Callable[..., dict[str, Finding]]
) -> None:
    found = run(sbatch=(code, "", "sbatch: fatal: Could not establish a configuration source"))
    assert list(found) == ["sbatch"]
    assert told in str(found["sbatch"].remedy)


def test_a_constraint_that_no_node_meets_is_named(run: Callable[..., dict[str, Finding]]) -> None:
    def sbatch(argv: list[str]) -> Answer:
        if "--constraint=avx99" in argv:
            return (1, "", "sbatch: error: Invalid feature specification")
        return (0, "slurm 24.05\n", "") if argv == ["--version"] else WOULD_START

    found = run("compute.resources.hf_model.constraint=avx99", sbatch=sbatch)
    assert str(found["resources hf_model"].remedy).startswith("change compute.resources.hf_model.constraint, or")
