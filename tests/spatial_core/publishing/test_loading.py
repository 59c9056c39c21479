"""Loading what was published: damage, drift and strangers are refused before an image is embedded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, DigestMismatch, InputError, ModelError
from spatial_core.publishing import golden
from spatial_core.publishing.integrity import MANIFEST, verify_files, write_file_digests
from spatial_core.publishing.loading import load_published, model_digest
from spatial_core.publishing.model_folder import publish_model
from spatial_core.storage.provenance import content_digest
from tests.data.local_hub import TOKEN, LocalHub, Repository, local_hub
from tests.data.make_model import make_backbone, make_checkpoint, model_settings
from tests.spatial_core.publishing.conftest import Backbones


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def settings(tmp_path: Path, backbones: Backbones) -> Settings:
    return model_settings(tmp_path / "lake", backbones("dinov2"))


def test_sound_folder_loads_and_embeds(folder: Path, settings: Settings) -> None:
    model = load_published(str(folder), settings)
    shipped = load_file(folder / "golden.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model.embed(shipped["pixel_values"]), shipped["embeddings"], atol=1e-6, rtol=0)
    # The digest other stages compare is that of the folder's manifest in the lake, here found without reading weights.
    assert model.sha256 == model_digest(str(folder)) == content_digest(folder)
    assert model.embedding_dim == 256


def test_bf16_keeps_directions_and_leaves_the_head_exact(folder: Path, settings: Settings) -> None:
    reduced = settings.model_copy(update={"inference": settings.inference.model_copy(update={"precision": "bf16"})})
    model = load_published(str(folder), reduced)
    assert next(model.model.backbone.parameters()).dtype == torch.bfloat16
    assert next(model.model.projector.parameters()).dtype == torch.float32
    shipped = load_file(folder / "golden.safetensors")
    with torch.inference_mode():
        found = model.embed(shipped["pixel_values"])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, shipped["embeddings"]).min() >= 0.999


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "golden/01.jpg", "modeling_spatial_embeddings.py"]
)
def test_one_flipped_bit_anywhere_is_noticed(name: str, folder: Path, settings: Settings) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(DigestMismatch, match=f"{Path(name).name}.*publish or download the model again"):
        load_published(str(folder), settings)


def test_missing_file_is_noticed(folder: Path, settings: Settings) -> None:
    (folder / "LICENSE").unlink()
    with pytest.raises(DigestMismatch, match="LICENSE: missing"):
        load_published(str(folder), settings)


def test_folders_without_or_with_a_strange_manifest_are_refused(folder: Path, settings: Settings) -> None:
    manifest = folder / MANIFEST
    for text, message in (
        ("{", "not valid JSON"),
        ('{"format": "other"}', "not a manifest"),
        ('{"format": "spatial-model-folder/1", "sha256": {"../../etc/passwd": "00"}}', "outside the folder"),
    ):
        manifest.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            verify_files(folder)
    manifest.unlink()
    with pytest.raises(InputError, match="not a model folder"):
        load_published(str(folder), settings)


def test_weights_changed_together_with_the_manifest_are_caught_by_the_golden_vectors(
    folder: Path, settings: Settings
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["projector.input_layer.weight"][0] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_file_digests(folder)
    with pytest.raises(ModelError, match="golden vectors are not reproduced"):
        load_published(str(folder), settings)


def test_weights_that_are_not_finite_are_caught(folder: Path, settings: Settings) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["projector.output_layer.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_file_digests(folder)
    with pytest.raises(ModelError, match="golden vectors are not reproduced"):
        load_published(str(folder), settings)


def test_missing_and_surplus_weights_are_refused_not_filled_in(folder: Path, settings: Settings) -> None:
    weights = load_file(folder / "model.safetensors")
    bias = weights.pop("projector.output_layer.bias")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_file_digests(folder)
    with pytest.raises(ModelError, match=r"missing_keys.*output_layer\.bias"):
        load_published(str(folder), settings)
    weights |= {"projector.output_layer.bias": bias, "projector.extra": bias}
    save_file(
        {name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_file_digests(folder)
    with pytest.raises(ModelError, match="unexpected_keys"):
        load_published(str(folder), settings)


def test_pictures_that_decode_differently_are_noticed(folder: Path, settings: Settings) -> None:
    names, _ = golden.load(folder)
    (folder / names[0]).write_bytes((folder / names[1]).read_bytes())
    write_file_digests(folder)
    with pytest.raises(ModelError, match="decoded or resized differently"):
        load_published(str(folder), settings)


def test_shipped_code_is_never_executed(folder: Path, settings: Settings, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(trap)!r}, 'w')\n" + path.read_text())
    write_file_digests(folder)
    load_published(str(folder), settings)
    assert not trap.exists()


def test_head_alone_finds_its_backbone_and_refuses_another(backbones: Backbones, tmp_path: Path) -> None:
    backbone = shutil.copytree(backbones("dinov2"), tmp_path / "bb")
    checkpoint = make_checkpoint(tmp_path / "c.safetensors", backbone)
    settings = model_settings(tmp_path / "lake", backbone, "publishing.include_backbone=false")
    publish_model(checkpoint, tmp_path / "m", settings)
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 100_000
    load_published(str(tmp_path / "m"), settings)
    shutil.rmtree(backbone)
    make_backbone(backbone, seed=5)
    with pytest.raises(ModelError, match="which the head was trained on"):
        load_published(str(tmp_path / "m"), settings)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A hub the library's own functions talk to, with a cache of its own."""
    with local_hub() as running:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in (("ENDPOINT", running.url), ("HF_HUB_CACHE", str(tmp_path / "hub-cache"))):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.url)
        yield running


def test_hub_model_is_loaded_at_its_commit_only(hub: LocalHub, folder: Path, settings: Settings) -> None:
    names = [*json.loads((folder / MANIFEST).read_text())["sha256"], MANIFEST]
    repository = hub.repositories.setdefault("tester/facades", Repository(private=True))
    repository.files |= {name: (folder / name).read_bytes() for name in names}
    commit = repository.commit()
    for unpinned in ("tester/facades", "tester/facades@main", f"tester/facades@{commit[:12]}"):
        with pytest.raises(ModelError, match="not pinned"):
            load_published(unpinned, settings)
    assert not hub.requests
    source = f"tester/facades@{commit}"
    assert model_digest(source) == model_digest(str(folder))
    assert load_published(source, settings).sha256 == model_digest(str(folder))
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        load_published(f"tester/facades@{'0' * 40}", settings)
