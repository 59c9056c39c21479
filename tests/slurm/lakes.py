"""A lake whose stages run on the test cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.cluster.resources import DEFAULTS
from spatial_core.config.settings import Settings, load_settings
from spatial_core.jobs.registry import StageCall, run_stage
from tests.slurm.client import Slurm

REPOSITORY = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "demo": {"tars": 3, "buildings_per_tar": 10, "image_size_px": 64, "drop_images": 6, "max_views": 3},
    "data": {"neighbors": 8, "k0_for_local_scale": 3, "pca_components": 8},
    "training": {"num_epochs": 2, "batch_size": 16, "retrieval_metric_top_k": [1, 5]},
    "training_model": {"hidden_dim": 16, "output_dim": 256},
    "evaluation": {"bootstrap_samples": 20, "gallery_queries": 2, "map_points": 50},
}
MODEST = {"cpus": 2, "mem": "1500M", "gpus": "0", "time_limit": "00:10:00"}
"""What every asset asks for: both nodes are this one machine."""


@dataclass
class ClusterLake:
    """A settings file for the test cluster, and the folders it names.

    Args:
        config: the settings file.
        slurm: the cluster.
    """

    config: Path
    slurm: Slurm

    def write(self, profile: str = "slurm_login", **compute: Any) -> None:
        """Write settings under which the whole chain takes seconds; `compute` is laid over the usual section."""
        usual: dict[str, Any] = {
            "profile": profile,
            "isolation": "in_process",
            "poll_s": 0.5,
            "poll_max_s": 3.0,
            "partition": "cpu",
            # The checkout under test, whatever the environment has installed.
            "setup": [f"export PYTHONPATH={REPOSITORY}"],
            "resources": dict.fromkeys(DEFAULTS, MODEST),
        }
        if profile == "slurm_ssh":
            ssh = self.slurm.ssh
            usual |= {"ssh_host": ssh.host, "ssh_port": ssh.port, "ssh_user": ssh.user}
            usual |= {"ssh_key": str(ssh.key), "ssh_known_hosts": str(ssh.known_hosts)}
        sections = {"paths": {"data_dir": "data"}, **SMALL, "compute": usual | compute}
        lines = []
        for name, values in sections.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def settings(self) -> Settings:
        """As read from the file."""
        return load_settings(self.config, environ={})

    def draw_city(self) -> None:
        """Raw tars and a drop of the procedural city."""
        settings = self.settings
        run_stage(StageCall("demo-data", {"output_dir": str(settings.locations.data_dir)}, settings))

    def digests(self) -> dict[str, str]:
        """Artifact -> SHA-256, of everything that was made."""
        data = self.settings.locations.data_dir
        manifests = sorted(data.rglob("_manifests/*.json"))
        return {str(path.relative_to(data)): json.loads(path.read_text())["sha256"] for path in manifests}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value)
