"""Publishing a checkpoint: what the folder holds, when it is refused, and that nothing half-made is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from spatial_core.backbones.loading import load_backbone
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, ConfigError, InputError, ModelError
from spatial_core.images.decode import decode_jpeg
from spatial_core.metric_learning.checkpoint import Backbone, Checkpoint, load_checkpoint, save_checkpoint
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.publishing import assembly, golden
from spatial_core.publishing.model_folder import publish_model
from spatial_core.storage.provenance import manifest_path, verify_artifact
from tests.data.local_hub import TOKEN, local_hub
from tests.data.make_model import WIDTH, make_backbone, make_checkpoint, model_settings
from tests.spatial_core.publishing.conftest import Backbones

FILES = {
    "LICENSE",
    "MANIFEST.json",
    "README.md",
    "config.json",
    "configuration_spatial_embeddings.py",
    "golden.json",
    "golden.safetensors",
    "golden/00.jpg",
    "golden/01.jpg",
    "golden/02.jpg",
    "golden/03.jpg",
    "image_processing_spatial_embeddings.py",
    "model.safetensors",
    "modeling_spatial_embeddings.py",
    "preprocessor_config.json",
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_metrics(folder: Path, weights_sha256: str) -> Path:
    """A report as the evaluation stage writes it, as far as the card reads it."""
    scores: dict[str, Any] = {"recall@1": 0.53125, "recall@5": 0.75, "recall@10": None, "mAP": 0.6, "MRR": 0.61}
    rows = [
        {"split": "test", "method": method, "queries": 64, "buildings": 20, "images": 80, **scores}
        | {"recall@1_ci": [0.5, 0.56]}
        for method in ("projector", "backbone")
    ]
    folder.mkdir()
    (folder / "metrics.json").write_text(
        json.dumps({"headline": rows, "checkpoint": {"weights_sha256": weights_sha256}})
    )
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, backbones: Backbones) -> Path:
    return make_checkpoint(tmp_path / "checkpoint_best.safetensors", backbones("dinov2"))


@pytest.fixture
def settings(tmp_path: Path, backbones: Backbones) -> Settings:
    return model_settings(tmp_path / "lake", backbones("dinov2"))


def test_folder_holds_all_files_and_its_manifest_matches(published: Path) -> None:
    assert set(content(published)) == FILES
    verify_artifact(published)
    modes = {path.stat().st_mode for path in published.rglob("*") if path.is_file()}
    assert len(modes) == 1, "some files are readable by fewer people than others"


def test_nothing_in_the_folder_names_a_path_of_this_machine(published: Path, tmp_path: Path) -> None:
    for name, data in content(published).items():
        assert str(Path.home()).encode() not in data, name
        assert str(published.parent).encode() not in data, name
        assert b"/tmp" not in data, name


def test_same_inputs_give_the_same_bytes(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    publish_model(checkpoint, tmp_path / "a", settings)
    publish_model(checkpoint, tmp_path / "b", settings)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_second_run_does_nothing_and_a_changed_setting_is_published_anew(
    checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    publish_model(checkpoint, tmp_path / "m", settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}
    assert publish_model(checkpoint, tmp_path / "m", settings).up_to_date
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")} == before
    fewer = model_settings(tmp_path / "lake", Path(settings.embedding_model.model_name), "publishing.golden_images=2")
    assert not publish_model(checkpoint, tmp_path / "m", fewer).up_to_date
    assert len(list((tmp_path / "m" / "golden").iterdir())) == 2


@torch.inference_mode()
def test_golden_vectors_are_those_of_backbone_and_head(
    checkpoint: Path, settings: Settings, published: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(settings.embedding_model.model_name, cache_dir=tmp_path)
    shipped = load_file(published / "golden.safetensors")
    for row in range(4):
        pixels = backbone.preprocessing.pixels(decode_jpeg((published / f"golden/0{row}.jpg").read_bytes()))
        batch = backbone.preprocessing.normalise(torch.from_numpy(pixels.copy())[None])
        features = backbone.features(batch)
        vector = load_checkpoint(checkpoint).projector(features)
        torch.testing.assert_close(shipped["pixel_values"][row : row + 1], batch)
        torch.testing.assert_close(shipped["features"][row : row + 1], features, atol=1e-5, rtol=0)
        torch.testing.assert_close(shipped["embeddings"][row : row + 1], vector, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"use_residual": False}, {"use_layer_norm": False}, {"activation": "silu"}])
@pytest.mark.parametrize("widths", [(7,), (48, 16, 5)])
def test_heads_of_every_shape_are_reproduced(
    options: dict[str, Any], widths: tuple[int, ...], backbones: Backbones, settings: Settings, tmp_path: Path
) -> None:
    path = make_checkpoint(
        tmp_path / "c.safetensors", backbones("dinov2"), hidden_widths=widths, output_dim=9, **options
    )
    report = publish_model(path, tmp_path / "m", settings)
    assert report.details["golden"]["max_abs_difference"] <= 1e-5
    assert json.loads((tmp_path / "m" / "config.json").read_text())["hidden_widths"] == list(widths)


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("whole", ["true", "false"])
def test_every_family_in_both_forms(family: str, whole: str, backbones: Backbones, tmp_path: Path) -> None:
    backbone = backbones(family)
    path = make_checkpoint(tmp_path / "c.safetensors", backbone, pooling_type="pooler_output")
    settings = model_settings(tmp_path / "lake", backbone, f"publishing.include_backbone={whole}")
    report = publish_model(path, tmp_path / "m", settings)
    assert report.details["golden"]["max_abs_difference"] <= 1e-5
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert any(name.startswith("backbone.") for name in weights) == (whole == "true")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    described = load_backbone(str(backbone), cache_dir=tmp_path).describe()
    assert config["backbone_model_name"] == described["id"]
    assert config["backbone_revision"] == described["revision"]
    assert config["pooling_type"] == "pooler_output"


def test_a_seeded_backbone_says_so_on_the_card(tmp_path: Path) -> None:
    settings = model_settings(tmp_path / "lake", Path("seeded:dinov2-demo"))
    loaded = load_backbone("seeded:dinov2-demo", cache_dir=tmp_path / "lake" / "backbones")
    head = Projector(ProjectorConfig(loaded.dim, (16,))).eval()
    backbone = Backbone(loaded.describe(), loaded.preprocessing.id)
    save_checkpoint(tmp_path / "c.safetensors", Checkpoint(head, epoch=1, backbone=backbone))
    publish_model(tmp_path / "c.safetensors", tmp_path / "m", settings)
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert "seeded random numbers" in card.text
    assert "base_model" not in card.data.to_dict()


def test_card_of_an_unevaluated_model_invents_nothing(published: Path) -> None:
    card = ModelCard.load(published / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in data
    assert "not been evaluated" in card.text
    assert (published / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_card_quotes_the_report(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    weights = load_checkpoint(checkpoint).weights_sha256
    report_dir = write_metrics(tmp_path / "report", weights)
    report = publish_model(checkpoint, tmp_path / "m", settings, report_dir=report_dir)
    assert report.details["evaluated"]
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.eval_results is not None
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"recall_at_1": 0.53125, "recall_at_5": 0.75, "mAP": 0.6, "MRR": 0.61}
    assert "| test | this model | 64 | 0.531 [0.500, 0.560] | 0.750 |" in card.text
    assert weights in card.text
    assert "not been evaluated" not in card.text


def test_report_of_another_checkpoint_is_refused(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    report_dir = write_metrics(tmp_path / "report", "0" * 64)
    with pytest.raises(ArtifactError, match="measured another checkpoint"):
        publish_model(checkpoint, tmp_path / "m", settings, report_dir=report_dir)
    (report_dir / "metrics.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a report of stage 'evaluate'"):
        publish_model(checkpoint, tmp_path / "m", settings, report_dir=report_dir)


@pytest.mark.parametrize("there", [False, True])
def test_a_report_that_is_named_must_have_figures(
    there: bool, checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    if there:
        (tmp_path / "report").mkdir()
    with pytest.raises(InputError, match=r"report/metrics\.json: no such file"):
        publish_model(checkpoint, tmp_path / "m", settings, report_dir=tmp_path / "report")
    assert not (tmp_path / "m").exists()


def test_only_an_earlier_model_is_replaced(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"code: holds README\.md and would be replaced as a whole"):
        publish_model(checkpoint, code, settings)
    assert (code / "README.md").read_text() == "mine"
    publish_model(checkpoint, tmp_path / "m", settings)
    moved = (tmp_path / "m").rename(tmp_path / "moved")
    assert not publish_model(checkpoint, moved, settings).up_to_date
    (moved / "golden" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds golden/mine\.jpg"):
        publish_model(checkpoint, moved, settings)
    assert (moved / "golden" / "mine.jpg").read_bytes() == b"mine"


def test_dinov3_card_names_its_licence_and_ships_its_text(backbones: Backbones, tmp_path: Path) -> None:
    backbone = shutil.copytree(backbones("dinov3_vit"), tmp_path / "small-dinov3")
    path = make_checkpoint(tmp_path / "c.safetensors", backbone)
    settings = model_settings(tmp_path / "lake", backbone)
    publish_model(path, tmp_path / "notice", settings)
    assert "pass on a copy of those terms" in (tmp_path / "notice" / "LICENSE").read_text()
    (backbone / "LICENSE.md").write_text("The terms in full.\n")
    publish_model(path, tmp_path / "full", settings)
    assert "The terms in full." in (tmp_path / "full" / "LICENSE").read_text()
    data = ModelCard.load(tmp_path / "full" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "dinov3-license")
    assert data["license_link"].startswith("https://")


def test_weights_whose_licence_text_is_missing_are_not_pushed(backbones: Backbones, tmp_path: Path) -> None:
    backbone = backbones("dinov3_vit")
    path = make_checkpoint(tmp_path / "c.safetensors", backbone)
    settings = model_settings(tmp_path / "lake", backbone, "publishing.repo_id=tester/facades")
    with pytest.raises(ConfigError, match=r"LICENSE\.md"):
        publish_model(path, tmp_path / "m", settings)
    assert not (tmp_path / "m").exists()


def test_usage_on_the_card_runs(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    publish_model(checkpoint, tmp_path / "m", settings)
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    done = subprocess.run(
        [sys.executable, "-c", snippet[1]],
        cwd=tmp_path / "m",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "min_cosine" in done.stdout


def test_another_backbone_than_the_recorded_one_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_backbone(tmp_path / "small-dinov2", seed=7)
    with pytest.raises(ModelError, match="which the head was trained on"):
        publish_model(checkpoint, tmp_path / "m", model_settings(tmp_path / "lake", other))
    assert not (tmp_path / "m").exists()


def test_backbone_folder_may_have_moved(checkpoint: Path, backbones: Backbones, tmp_path: Path) -> None:
    moved = shutil.copytree(backbones("dinov2"), tmp_path / "elsewhere" / "renamed")
    publish_model(checkpoint, tmp_path / "m", model_settings(tmp_path / "lake", moved))
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_checkpoint_of_the_earlier_pipeline_is_published_with_the_settings_backbone(
    checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    head = load_checkpoint(checkpoint)
    torch.save(
        {"epoch": 4, "model_state_dict": head.projector.state_dict(), "metrics": {"val_loss": 0.1}},
        tmp_path / "checkpoint_best.pt",
    )
    report = publish_model(tmp_path / "checkpoint_best.pt", tmp_path / "m", settings)
    assert report.details["backbone"]["dim"] == str(WIDTH)


def test_head_that_does_not_fit_the_backbone_is_refused(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    narrow = Projector(ProjectorConfig(WIDTH - 1, (8,))).eval()
    save_checkpoint(tmp_path / "narrow.safetensors", Checkpoint(narrow, epoch=1))
    with pytest.raises(ModelError, match=r"takes 31 features.*gives 32"):
        publish_model(tmp_path / "narrow.safetensors", tmp_path / "m", settings)
    trained = load_checkpoint(checkpoint)
    other_pixels = replace(trained, backbone=replace(trained.backbone, preprocessing="0123456789ab pixels v0"))
    save_checkpoint(tmp_path / "other.safetensors", other_pixels)
    with pytest.raises(ModelError, match="trained on pixels prepared as '0123456789ab pixels v0'"):
        publish_model(tmp_path / "other.safetensors", tmp_path / "m", settings)
    assert not (tmp_path / "m").exists()


def test_folder_that_does_not_reproduce_its_vectors_is_not_published(
    checkpoint: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_model(checkpoint, tmp_path / "m", settings)
    before = content(tmp_path / "m")
    genuine = assembly.make_golden

    def drifted(folder: Path, *args: Any, **options: Any) -> None:
        genuine(folder, *args, **options)
        names, found = golden.load(folder)
        turned = torch.nn.functional.normalize(found.embeddings + 1e-3, dim=-1)
        golden.save(folder, names, golden.Golden(found.pixel_values, found.features, turned))

    monkeypatch.setattr(assembly, "make_golden", drifted)
    changed = model_settings(tmp_path / "lake", Path(settings.embedding_model.model_name), "global.seed=7")
    with pytest.raises(ModelError, match="golden vectors are not reproduced"):
        publish_model(checkpoint, tmp_path / "m", changed)
    assert content(tmp_path / "m") == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert json.loads(manifest_path(tmp_path / "m").read_text())["report"]["details"]["golden"]


def test_publishing_from_the_command_line_pushes_without_showing_the_token(
    checkpoint: Path, backbones: Backbones, tmp_path: Path
) -> None:
    arguments = ["publish", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "m"), "--json"]
    for override in (
        f"paths.data_dir={tmp_path / 'lake'}",
        f"embedding_model.model_name={backbones('dinov2')}",
        "publishing.repo_id=tester/facades",
    ):
        arguments += ["--set", override]
    with local_hub() as hub:
        hub.faults["POST .*/commit/"] = [500]
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from spatial_core.cli.main import main; main()", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = json.loads(done.stdout)["details"]["hub"]
        assert pushed["uploaded"]
        assert pushed["commit"] == hub.repositories["tester/facades"].commits[-1]
        remote = {name: data for name, data in hub.repositories["tester/facades"].files.items() if name[0] != "."}
        assert remote == content(tmp_path / "m")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
