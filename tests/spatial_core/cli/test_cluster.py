"""The cluster's commands where there is no cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def spatial(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "spatial_core.cli.main", *arguments]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_local_profile_has_nothing_to_check(tmp_path: Path) -> None:
    shown = spatial("cluster", "check", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "there is nothing to check" in shown.stdout
    record = json.loads(spatial("cluster", "check", "--json", cwd=tmp_path).stdout)
    assert record == {"profile": "local", "ok": True, "findings": []}
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_the_schedulers_commands_is_told_so(tmp_path: Path) -> None:
    """Whether or not SLURM is installed here: no controller is named by this configuration."""
    (tmp_path / "slurm.conf").write_text("")
    argv = [sys.executable, "-m", "spatial_core.cli.main", "cluster", "check", "--set", "compute.profile=slurm_login"]
    environment = {"PATH": str(tmp_path), "SLURM_CONF": str(tmp_path / "slurm.conf"), "PYTHONPATH": str(Path.cwd())}
    shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode == 1, shown.stderr
    assert shown.stdout.startswith("failed sbatch: sbatch: No such file or directory")
    assert "-> put SLURM's commands on the PATH" in shown.stdout
    assert "1 of 1 steps failed" in shown.stdout


def test_what_is_always_made_here_is_never_rendered(tmp_path: Path) -> None:
    refused = spatial("slurm", "render", "cluster_usage", cwd=tmp_path)
    assert refused.returncode == 2
    assert "made on this machine, whatever compute.profile says" in refused.stderr
