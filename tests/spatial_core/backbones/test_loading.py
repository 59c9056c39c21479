"""Loaded backbones against plain transformers; pooling; precision; damaged and incomplete models."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModel, DINOv3ConvNextConfig

from spatial_core.backbones.engine import stream_features
from spatial_core.backbones.family import family_of, known_families, pool_tokens
from spatial_core.backbones.loading import Backbone, choose_device, load_backbone, matrix_products
from spatial_core.backbones.seeded import PREFIX
from spatial_core.errors import ModelError
from tests.data.make_model import jpegs, make_backbone

FAMILIES = ["dinov2", "dinov2_with_registers", "dinov3_vit"]
DEMOS = [PREFIX + name for name in ("dinov2-demo", "dinov2-registers-demo", "dinov3-demo")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_backbone(root / family, family) for family in FAMILIES}


def pixels(side: int = 64, images: int = 3) -> torch.Tensor:
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling_type", ["cls_token", "pooler_output"])
def test_features_are_those_of_transformers(models: dict[str, Path], family: str, pooling_type: str) -> None:
    backbone = load_backbone(str(models[family]), cache_dir=models[family], pooling_type=pooling_type)
    assert backbone.describe() | {"revision": ""} == {
        "id": family,
        "revision": "",
        "family": "dinov3" if family.startswith("dinov3") else "dinov2",
        "pooling_type": pooling_type,
        "precision": "fp32",
        "dim": "32",
    }
    reference = AutoModel.from_pretrained(models[family]).eval()
    batch = pixels(*backbone.preprocessing.output_size[:1])
    with torch.inference_mode():
        outputs = reference(pixel_values=batch)
        expected = outputs.last_hidden_state[:, 0] if pooling_type == "cls_token" else outputs.pooler_output
        torch.testing.assert_close(backbone.features(batch), expected)
    assert not backbone.model.training


def test_convolutional_dinov3_loads_like_the_others(tmp_path: Path) -> None:
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], image_size=64)
    AutoModel.from_config(config).save_pretrained(tmp_path / "convnext")
    record = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 64}}
    (tmp_path / "convnext" / "preprocessor_config.json").write_text(json.dumps(record))
    backbone = load_backbone(str(tmp_path / "convnext"), cache_dir=tmp_path, pooling_type="pooler_output")
    with torch.inference_mode():
        assert backbone.features(pixels()).shape == (3, backbone.dim) == (3, 24)


def test_pooling_falls_back_to_the_cls_token_only_without_a_pooler() -> None:
    tokens = torch.randn(2, 5, 4)
    pooled = torch.randn(2, 4)
    with_pooler = SimpleNamespace(last_hidden_state=tokens, pooler_output=pooled)
    assert torch.equal(pool_tokens(with_pooler, "pooler_output"), pooled)
    assert torch.equal(pool_tokens(with_pooler, "cls_token"), tokens[:, 0])
    for without in (
        SimpleNamespace(last_hidden_state=tokens, pooler_output=None),
        SimpleNamespace(last_hidden_state=tokens),
    ):
        assert torch.equal(pool_tokens(without, "pooler_output"), tokens[:, 0])
    with pytest.raises(ModelError, match="pooling_type 'mean'"):
        pool_tokens(with_pooler, "mean")


def features_of(backbone: Backbone, pictures: list[bytes]) -> torch.Tensor:
    batches = stream_features(backbone.features, backbone.preprocessing, enumerate(pictures), batch_size=8, threads=2)
    return torch.from_numpy(np.concatenate([batch.vectors for batch in batches]))


@pytest.mark.parametrize("name", DEMOS)
def test_bf16_points_the_same_way_as_fp32(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.getbasetemp() / "demos"
    full = load_backbone(name, cache_dir=cache)
    half = load_backbone(name, cache_dir=cache, precision="bf16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    pictures = jpegs(24)
    cosines = torch.nn.functional.cosine_similarity(features_of(full, pictures), features_of(half, pictures))
    assert cosines.min() >= 0.999


def test_tf32_keeps_fp32_weights_and_rounds_products_for_a_while(models: dict[str, Path]) -> None:
    exact = load_backbone(str(models["dinov2"]), cache_dir=models["dinov2"])
    rounded = load_backbone(str(models["dinov2"]), cache_dir=models["dinov2"], precision="tf32")
    assert next(rounded.model.parameters()).dtype == torch.float32
    before = torch.get_float32_matmul_precision()
    batch = pixels(exact.preprocessing.output_size[0])
    with torch.inference_mode(), matrix_products("tf32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        found = rounded.features(batch)
    assert torch.get_float32_matmul_precision() == before
    with torch.inference_mode(), matrix_products("fp32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
        assert torch.nn.functional.cosine_similarity(found, exact.features(batch)).min() >= 0.999


def test_a_model_with_missing_weights_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["dinov2"], tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    dropped = next(name for name in weights if name.startswith("encoder"))
    del weights[dropped]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_backbone(str(folder), cache_dir=tmp_path)


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_only(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def other_width(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "hidden_size": 64}))


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "resnet"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be loaded"),
        (pickle_only, "cannot be loaded"),
        (other_width, "cannot be loaded"),
        (foreign, "model_type 'resnet' is not a known backbone; known are dinov2"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config"),
    ],
)
def test_damaged_models_give_one_line_errors(
    models: dict[str, Path], tmp_path: Path, damage: Any, message: str
) -> None:
    folder = shutil.copytree(models["dinov2"], tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_backbone(str(folder), cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_every_family_is_found_by_its_model_types() -> None:
    for family in known_families():
        for model_type in family.model_types:
            assert family_of(model_type, "test") is family


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda:-1"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=r"infrastructure\.device"):
        choose_device(name)


def test_auto_is_some_device() -> None:
    assert choose_device("auto").type in {"cpu", "cuda"}


def test_vectors_do_not_depend_on_decoding_threads(models: dict[str, Path]) -> None:
    backbone = load_backbone(str(models["dinov2"]), cache_dir=models["dinov2"])
    pictures = list(enumerate(jpegs(13)))

    def vectors(threads: int) -> np.ndarray:
        batches = stream_features(backbone.features, backbone.preprocessing, pictures, batch_size=4, threads=threads)
        return np.concatenate([batch.vectors for batch in batches])

    np.testing.assert_array_equal(vectors(1), vectors(4))


@pytest.mark.real_data
@pytest.mark.parametrize("name", DEMOS)
def test_seeded_features_find_photographs_of_the_same_building(
    name: str, real_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "demos"
    images: list[bytes] = []
    buildings = []
    with (real_data / "buildings" / "labels.csv").open() as handle:
        labels = [row for row in csv.DictReader(handle) if row["tar"] in {"0201.tar", "0202.tar"}]
    for row in labels:
        with tarfile.open(real_data / "buildings" / row["tar"]) as tar:
            data_set = row["tar"].removesuffix(".tar")
            member = tar.extractfile(f"{data_set}/{data_set}/{row['stem']}.jpg")
            assert member is not None
            images.append(member.read())
            buildings.append(row["building_id"])
    exact = features_of(load_backbone(name, cache_dir=cache), images)
    rounded = features_of(load_backbone(name, cache_dir=cache, precision="bf16"), images)
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() >= 0.999
    vectors = exact.numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    same = np.asarray(buildings)[:, None] == np.asarray(buildings)
    np.fill_diagonal(same, False)
    queries = same.any(axis=1)
    nearest = np.argsort(-scores, axis=1)[:, :5]
    found = np.take_along_axis(same, nearest, axis=1).any(axis=1)[queries].mean()
    chance = 1 - (1 - same[queries].mean()) ** 5
    assert found >= 3 * chance


@pytest.mark.parametrize("name", DEMOS)
def test_built_in_features_are_centred_and_equal_on_every_run(name: str, tmp_path: Path) -> None:
    first, second = (load_backbone(name, cache_dir=tmp_path / part) for part in ("a", "b"))
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    side = first.preprocessing.output_size[0]
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(24, 3, 12, 12, generator=generator) + torch.randn(24, 3, 1, 1, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    with torch.inference_mode():
        features = first.features(pictures)
    common = features.mean(dim=0).norm() / features.norm(dim=1).mean()
    assert common < 0.75, "nearly all of a random model's feature vector is common to all pictures"
