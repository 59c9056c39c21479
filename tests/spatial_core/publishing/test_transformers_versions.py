"""Published folders, used by plain transformers of both majors in environments that know nothing of spatial_core.

Each environment is a virtual environment of its own in the repository's root (`.venv-transformers-*`, ignored by git,
kept between runs). It sees the running interpreter's packages, so torch is not installed twice; its own come first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_core.publishing.model_folder import publish_model
from tests.data.make_model import make_checkpoint, model_settings
from tests.spatial_core.publishing.conftest import Backbones

pytestmark = pytest.mark.isolated
ROOT = Path(__file__).parents[3]
USER = ROOT / "tests" / "data" / "use_published_model.py"
# What an environment adds to the interpreter's packages; "5" uses the installed transformers.
ENVIRONMENTS: dict[str, list[str]] = {
    "4.57": ["transformers==4.57.*", "tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1"],
    "5": [],
}
FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def environment(name: str) -> Path:
    """The interpreter of a virtual environment, built on the first call."""
    root = ROOT / f".venv-transformers-{name}"
    root.mkdir(exist_ok=True)
    folder = root / "environment"
    python = folder / "bin" / "python"
    wanted = json.dumps([sys.version, sysconfig.get_path("purelib"), ENVIRONMENTS[name]])
    stamp = folder / "built-as.json"
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        own.mkdir(parents=True, exist_ok=True)
        (own / "interpreter.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if ENVIRONMENTS[name]:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own)]
            subprocess.run([*install, *ENVIRONMENTS[name]], check=True)
        stamp.write_text(wanted)
    return python


@pytest.fixture(scope="module")
def folders(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A full model of every family, one that pools otherwise, and a head alone."""
    root = tmp_path_factory.mktemp("models")
    made = []
    cases = [(family, family, "cls_token", True) for family in FAMILIES]
    cases += [("pooler", "dinov2", "pooler_output", True), ("head_only", "dinov2", "cls_token", False)]
    shutil.copytree(backbones("dinov2"), root / "backbone")
    for name, family, pooling_type, whole in cases:
        backbone = backbones(family)
        checkpoint = make_checkpoint(root / f"{name}.safetensors", backbone, pooling_type=pooling_type)
        settings = model_settings(root, backbone, f"publishing.include_backbone={str(whole).lower()}")
        publish_model(checkpoint, root / name, settings)
        made.append(root / name)
    return made


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def used(
    request: pytest.FixtureRequest, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """(results folder, report) of one environment using every folder."""
    python = environment(request.param)
    results = tmp_path_factory.mktemp("results")
    hidden = ("PYTHONPATH", "HF_TOKEN", "HF_ENDPOINT")
    clean = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [str(python), str(USER), str(results), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        cwd=results,
        env={**clean, "HF_HOME": str(results / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert re.match(rf"{re.escape(request.param)}\.", report["transformers"])
    assert not report["knows_spatial_core"]
    return results, report


def test_every_way_of_loading_gives_the_golden_vectors(used: tuple[Path, dict[str, Any]], folders: list[Path]) -> None:
    results, report = used
    for folder in folders:
        expected = load_file(folder / "golden.safetensors")["embeddings"]
        vectors = np.load(results / f"{folder.name}.npz")
        assert set(vectors) == ({"direct"} if folder.name == "head_only" else {"direct", "pipeline", "pipeline_pooled"})
        for way in vectors:
            np.testing.assert_allclose(vectors[way], expected, atol=1e-5, rtol=0, err_msg=f"{folder.name} {way}")
        found = report[folder.name]
        assert found["faults"] == []
        assert found["golden"]["max_abs_difference"] <= 1e-5
        assert found["golden_as_loaded"]["max_abs_difference"] <= 1e-5


def test_outputs_begin_with_embeddings_and_pool_to_them(used: tuple[Path, dict[str, Any]]) -> None:
    _, report = used
    assert report["dinov2"]["fields"] == ["embeddings", "pooler_output", "features"]
    assert report["dinov2"]["pooler_is_embeddings"]


def test_saving_again_keeps_the_model_and_the_head_alone(
    used: tuple[Path, dict[str, Any]], folders: list[Path]
) -> None:
    _, report = used
    for folder in folders:
        assert report[folder.name]["saved_again_difference"] <= 1e-6
        published = (folder / "model.safetensors").stat().st_size
        assert abs(report[folder.name]["saved_again_bytes"] - published) < 1000
